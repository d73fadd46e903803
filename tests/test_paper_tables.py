"""A paper's tables: what is published, what is measured, and what a gap says."""

import json

import pytest
from tests import tiny
from typer.testing import CliRunner

from limbeck import paper_tables, pipeline
from limbeck.cli import app
from limbeck.core.errors import EvaluationError
from limbeck.evaluate.published import PAPERS, SCAVENGING_HYENA, UNREAD

SCIQ = {
    "question": "Who met Bo?", "distractor1": "Cy", "distractor2": "Di", "distractor3": "Eli", "correct_answer": "Ada",
    "support": "Ada met Bo.",
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    text = tiny.write_text(folder / "text.jsonl")
    teacher = tiny.make_teacher(folder / "teacher", text)
    words = tiny.recipe(teacher, text).model_dump(mode="json")
    words["runtime"]["keep_stages"] = True
    pipeline.run(type(tiny.recipe(teacher, text))(**words), run_folder=folder / "run", progress=False)
    data = folder / "data"
    data.mkdir()
    (data / "sciq.validation.jsonl").write_text("".join(json.dumps(SCIQ) + "\n" for _ in range(3)))
    return folder, text, data


@pytest.fixture(scope="module")
def facts(job):
    folder, text, data = job
    return paper_tables.reproduce(
        "scavenging-hyena", models=paper_tables.places_of_run(folder / "run"), texts={"wikitext": f"{text}"}, data=data,
        max_tokens=256, context_tokens=32, device="cpu", say=lambda _line: None,
    )  # fmt: skip


def cell(facts, key, role, column):
    return next(row for row in facts[key] if (row["role"], row["column"]) == (role, column))


def test_a_run_fills_every_row(job):
    places = paper_tables.places_of_run(job[0] / "run")
    assert set(places) == set(SCAVENGING_HYENA.models)
    assert places["matched"].endswith("arms/student/align")


def test_perplexity_is_that_of_the_command_eval(job, facts):
    from limbeck import evaluation

    folder, text, _ = job
    for role, place in paper_tables.places_of_run(folder / "run").items():
        alone = evaluation.evaluate_place(
            place, texts=[str(text)], max_tokens=256, context_tokens=32, device="cpu"
        )["texts"][0]  # fmt: skip
        assert cell(facts, "perplexity", role, "wikitext")["ours"] == alone["perplexity"]


def test_gaps_say_what_they_need(facts):
    gap = cell(facts, "perplexity", "tuned", "openwebtext")
    assert gap["ours"] is None
    assert gap["needs"] == "--text openwebtext=FILE"
    assert cell(facts, "tasks", "tuned", "piqa")["ours"] is None
    assert "piqa" in cell(facts, "tasks", "tuned", "piqa")["needs"]
    assert 0 <= cell(facts, "tasks", "tuned", "sciq")["ours"] <= 1


def test_another_teacher_is_said(facts):
    assert "EleutherAI/pythia-70m" in facts["notes"][0]


def test_only_confirmed_figures_are_published(facts):
    assert cell(facts, "tasks", "teacher", "sciq")["published"] == 0.601
    assert cell(facts, "perplexity", "tuned", "wikitext")["published"] is None
    assert cell(facts, "perplexity", "tuned", "wikitext")["published_source"] == UNREAD
    for paper in PAPERS.values():
        for (role, column), figure in paper.figures.items():
            assert role in paper.models
            assert column in paper.texts | paper.tasks
            assert figure.value is not None
            assert figure.source


def test_the_page_has_every_figure_once(facts, tmp_path):
    files = paper_tables.write_tables(facts, tmp_path)
    page = files[1].read_text()
    assert json.loads(files[0].read_text())["paper"]["name"] == "scavenging-hyena"
    for row in facts["perplexity"]:
        if row["ours"] is not None:
            assert f"{row['ours']:.4g}" in page
    assert page.count("not run here") == sum(
        row["ours"] is None for key in ("perplexity", "tasks") for row in facts[key]
    )
    width = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(width) == 2


def test_without_models_everything_is_a_gap():
    facts = paper_tables.reproduce("scavenging-hyena", models={}, texts={}, say=lambda _line: None)
    assert all(row["ours"] is None and row["needs"] for key in ("perplexity", "tasks") for row in facts[key])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scavenging-hyna"], 'Did you mean "scavenging-hyena"'),
        (["scavenging-hyena", "--model", "techer=embedded"], 'Did you mean "teacher"'),
        (["scavenging-hyena", "--text", "wikitxt=x"], 'Did you mean "wikitext"'),
        (["scavenging-hyena", "--model", "teacher"], "expected NAME=VALUE"),
        (["scavenging-hyena", "--run", "nowhere"], "is not a run folder"),
    ],
)
def test_bad_words_are_refused(words, message):
    result = CliRunner().invoke(app, ["paper", *words], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert message in result.output + result.stderr


def test_an_unknown_paper_is_an_error():
    with pytest.raises(EvaluationError, match="unknown paper"):
        paper_tables.find_paper("nothing")
