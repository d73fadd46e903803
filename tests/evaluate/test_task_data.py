"""Items from files: what is read, and what is said of files that are not as they should be."""

import json

import pytest
from tests.evaluate.task_files import ROWS, write_task_files

from limbeck.core.errors import EvaluationError
from limbeck.evaluate import task_files
from limbeck.evaluate.task_data import items_of_rows, read_items, split_articles
from limbeck.evaluate.task_files import search_folder

TASKS = ("arc_easy", "piqa", "sciq", "hellaswag", "boolq", "winogrande", "lambada_openai", "blimp_adjunct_island")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return search_folder(write_task_files(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize("task", TASKS)
def test_known_names_are_found_anywhere_below_the_folder(task, files):
    items = read_items(task, files)
    assert len(items.rows) == 8
    assert len(items.texts) == len(items.choices) == 8
    assert all(isinstance(piece, str) for pieces in items.texts for piece in pieces)


def test_what_guessing_gives(files):
    expected = {
        "arc_easy": 1 / 3,
        "piqa": 0.5,
        "sciq": 0.25,
        "hellaswag": 0.25,
        "winogrande": 0.5,
        "lambada_openai": 0.0,
    }
    for task, chance in expected.items():
        assert read_items(task, files).chance() == pytest.approx(chance)
    assert read_items("wikitext", files).chance() is None
    assert read_items("lambada_openai", files).likelihoods(2) == (1, 1)


def test_texts_hold_the_right_answer(files):
    assert read_items("arc_easy", files).texts[0] == ("What is thing 0?", "a mat")
    assert read_items("piqa", files).texts[1] == ("Sit on the mat.", "Bo met.")
    assert read_items("hellaswag", files).texts[1] == ("Ada met Bo. she saw Bo.",)
    assert read_items("winogrande", files).texts[0] == ("Ada saw Bo so Ada ran.",)
    assert read_items("sciq", files).texts[0] == ("Ada met Bo.", "Who met Bo?", "Ada")


def test_both_forms_of_lambada_and_of_boolq_become_one(files):
    assert {row["text"] for row in read_items("lambada_openai", files).rows} == {
        "Ada met Bo and Bo saw Ada",
        "Bo saw Ada and Ada met Bo",
    }
    assert [row["label"] for row in read_items("boolq", files).rows[:2]] == [0, 1]
    stock = {"passage": "p", "question": "q", "label": 1, "idx": 3}
    assert items_of_rows("boolq", [stock], source="x").rows[0] == {"passage": "p", "question": "q", "label": 1}


def test_articles_begin_at_headings_of_level_one(files):
    pages = [row["page"] for row in read_items("wikitext", files).rows]
    assert len(pages) == 2
    assert pages[0].startswith(" = Ada =")
    assert "= = Life = =" in pages[0]
    assert pages[1] == " = Cy = \n \n Cy met Di . \n"
    assert "".join(split_articles(" = A = \nx\n = B = \ny")) == " = A = \nx = B = \ny"


def test_a_task_without_a_file_is_none(tmp_path):
    assert read_items("piqa", search_folder(tmp_path)) is None


def test_the_split_that_the_task_is_scored_on_is_chosen(tmp_path):
    row = json.dumps(ROWS["piqa.validation.jsonl"][0])
    for split, count in {"train": 3, "validation": 2, "test": 1}.items():
        (tmp_path / f"piqa.{split}.jsonl").write_text(f"{row}\n" * count)
    assert len(read_items("piqa", search_folder(tmp_path)).rows) == 2
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "piqa.validation.jsonl").write_text(row)
    with pytest.raises(EvaluationError, match="2 files could be its data"):
        read_items("piqa", search_folder(tmp_path))


BAD_ROWS = {
    "piqa": [
        ("not json", "not JSON"),
        ("[1]", "list, not an object"),
        ('{"goal": "g", "sol1": "a", "label": 0}', 'no column "sol2"'),
        ('{"goal": 3, "sol1": "a", "sol2": "b", "label": 0}', "holds int, expected text"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}', "a number from 0 to 1"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0.5}', "a number from 0 to 1"),
        ('{"goal": "\\ud800", "sol1": "a", "sol2": "b", "label": 0}', "half a character"),
        ('{"goal": " ", "sol1": "a", "sol2": "b", "label": 0}', "is empty"),
        ("[" * 100_000, "not JSON"),
    ],
    "arc_easy": [
        ('{"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}', "choices.label"),
        ('{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}', "answerKey"),
        ('{"question": "q", "choices": ["a", "b"], "answerKey": "A"}', 'the lists "text" and "label"'),
    ],
    "winogrande": [
        ('{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}', 'has no "_"'),
        ('{"sentence": "a _", "option1": "a", "option2": "b", "answer": "3"}', "a number from 1 to 2"),
    ],
    "lambada_openai": [('{"text": "word"}', "the word that is asked for"), ('{"text": "ends in a "}', "the word")],
    "hellaswag": [
        ('{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["a", "b", "c"], "label": "0"}', "endings")
    ],
}


@pytest.mark.parametrize(
    ("task", "line", "words"), [(task, *case) for task, cases in BAD_ROWS.items() for case in cases]
)
def test_bad_rows_are_refused_with_file_and_line(task, line, words, tmp_path):
    name = next(name for name in ROWS if task.split("_")[0] in name)
    good = json.dumps(ROWS[name][0])
    path = tmp_path / name.split("/")[-1]
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(EvaluationError) as caught:
        read_items(task, search_folder(tmp_path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_have_limits(tmp_path, monkeypatch):
    row = json.dumps(ROWS["piqa.validation.jsonl"][0])
    path = tmp_path / "piqa.jsonl"
    path.write_text(f"{row}\n" * 3)
    files = search_folder(tmp_path)
    monkeypatch.setattr(task_files, "MOST_ROWS", 2)
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl:3: more than 2 rows"):
        read_items("piqa", files)
    monkeypatch.setattr(task_files, "MOST_LINE_BYTES", 20)
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl:1: a row of more than 20 bytes"):
        read_items("piqa", files)
    monkeypatch.setattr(task_files, "MOST_FILE_BYTES", 50)
    with pytest.raises(EvaluationError, match="files of up to 50"):
        read_items("piqa", files)
    monkeypatch.setattr(task_files, "MOST_FILES_SEARCHED", 0)
    with pytest.raises(EvaluationError, match="more than 0 files"):
        search_folder(tmp_path)


def test_files_that_are_none_or_no_text(tmp_path):
    with pytest.raises(EvaluationError, match="no such folder"):
        search_folder(tmp_path / "nowhere")
    (tmp_path / "piqa.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl:1: not UTF-8"):
        read_items("piqa", search_folder(tmp_path))
    (tmp_path / "sciq.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="is empty"):
        read_items("sciq", search_folder(tmp_path))
    (tmp_path / "wiki.test.raw").write_text(" \n")
    with pytest.raises(EvaluationError, match="the text is empty"):
        read_items("wikitext", search_folder(tmp_path))


def test_the_sum_is_of_the_rows_alone(tmp_path):
    row = ROWS["piqa.validation.jsonl"][0]
    one = items_of_rows("piqa", [row], source="here")
    assert one.sha256 == items_of_rows("piqa", [row | {"more": 1}], source="there").sha256
    assert one.sha256 != items_of_rows("piqa", [row | {"label": 1}], source="here").sha256


BEYOND = {
    "arc_challenge": ROWS["arc_easy.test.jsonl"][0],
    "logiqa": {"context": "Ada met Bo.", "question": "Who met Bo?", "options": ["Ada", "Cy", "Di", "Eli"], "label": "a"},
    "wsc": {
        "text": "Ada met Bo because she ran .", "span1_index": 0, "span1_text": "Ada", "span2_index": 4, "span2_text": "she",
        "label": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("task", BEYOND)
def test_tasks_beyond_the_suite_are_had_by_name_alone(tmp_path, task):
    from limbeck.evaluate.harness import evaluate_task, wrap_model
    from limbeck.evaluate.suite import choose_tasks
    from limbeck.evaluate.task_folder import prepare_tasks
    from limbeck.models.teacher import load_teacher

    assert task not in choose_tasks("tiny", [])
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(BEYOND[task]) + "\n")
    ready, missing = prepare_tasks(choose_tasks("tiny", [task]).values(), data=tmp_path, folder=tmp_path / "tasks")
    assert not missing
    loaded = load_teacher("embedded")
    score = evaluate_task(
        wrap_model(loaded.model, loaded.tokenizer, device="cpu"), task, folder=ready[task].folder
    )  # fmt: skip
    assert score.metrics["acc"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("logiqa", {"label": "e"}, "expected a, b, c or d"),
        ("logiqa", {"options": ["one"]}, "list of 4 to 4 texts"),
        ("wsc", {"span2_index": 99}, "expected a number from 0 to 6"),
        ("wsc", {"label": 2}, "expected a number from 0 to 1"),
    ],
)
def test_bad_rows_of_those(task, change, message):
    with pytest.raises(EvaluationError, match=message):
        items_of_rows(task, [BEYOND[task] | change], source="here")


def test_a_mark_of_byte_order_is_no_part_of_a_text(tmp_path):
    row = json.dumps({"goal": "Sit.", "sol1": "a", "sol2": "b", "label": 0})
    (tmp_path / "piqa.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    (tmp_path / "wiki.test.raw").write_bytes(b"\xef\xbb\xbf = A = \n x\n")
    files = search_folder(tmp_path)
    assert read_items("piqa", files).rows[0]["goal"] == "Sit."
    assert read_items("wikitext", files).rows == ({"page": " = A = \n x\n"},)
