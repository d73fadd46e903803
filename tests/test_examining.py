"""A suite of tasks from end to end: figures as lm-eval gives them, kept answers, comparison, and what cannot be run."""

import json
import shutil

import pytest
import torch
from tests.evaluate.task_files import write_task_files
from tests.tiny import make_teacher, recipe, write_text
from typer.testing import CliRunner

from limbeck import examining
from limbeck.cli import app
from limbeck.core.errors import EvaluationError, LimbeckError
from limbeck.evaluate import harness
from limbeck.evaluate.suite import choose_tasks, suite_tasks
from limbeck.evaluate.task_tables import as_shown, markdown, table_rows
from limbeck.examining import examine

SOME = ("sciq", "lambada_openai", "wikitext", "blimp")
LIMIT = 2


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_task_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory, text):
    return make_teacher(tmp_path_factory.mktemp("model"), text)


@pytest.fixture(scope="module")
def other(tmp_path_factory, text):
    return make_teacher(tmp_path_factory.mktemp("other"), text, train_steps=20)


@pytest.fixture
def run(tmp_path, model, text):
    """As a finished run: a recipe and the student's model."""
    folder = tmp_path / "a-run"
    folder.mkdir()
    words = recipe(model, text).model_dump(mode="json")
    (folder / "recipe.json").write_text(json.dumps(words))
    shutil.copytree(model, folder / "model")
    return folder


@pytest.fixture
def broken(tmp_path, model):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.get_output_embeddings().weight.data[5] = torch.nan
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The tasks that the harness is really asked to run."""
    names, real = [], harness.evaluate_task

    def evaluate_task(lm, task, **options):
        names.append(task)
        return real(lm, task, **options)

    monkeypatch.setattr(harness, "evaluate_task", evaluate_task)
    return names


def test_the_suite_has_its_tasks():
    tasks = suite_tasks("tiny")
    assert sum(task.group == "blimp" for task in tasks.values()) == 67
    assert list(choose_tasks("tiny", ["mqar", "piqa"])) == ["piqa", "mqar_4", "mqar_8", "mqar_16"]
    with pytest.raises(EvaluationError, match='Did you mean "hellaswag"'):
        choose_tasks("tiny", ["helaswag"])
    with pytest.raises(EvaluationError, match='Did you mean "blimp_adjunct_island"'):
        choose_tasks("tiny", ["blimp_adjunct_islands"])
    with pytest.raises(EvaluationError, match='unknown suite "large"'):
        suite_tasks("large")


def test_every_stock_description_is_there():
    from limbeck.evaluate.task_folder import stock_folder

    for task in suite_tasks("tiny").values():
        assert task.stock is None or (stock_folder() / task.stock).is_file(), task


def test_figures_are_those_of_lm_eval_by_hand(model, data, tmp_path, monkeypatch):
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda _results: None)  # takes seconds

    folder = tmp_path / "tasks"
    facts = examine([str(model)], data=data, limit=LIMIT, batch_size=2, cache=tmp_path, keep_tasks=folder, device="cpu")
    found = next(iter(facts["places"].values()))
    names = [*found["tasks"]]
    assert len(names) == 8 + 7 + 2
    assert not found["failed"]
    theirs = simple_evaluate(
        model="hf", model_args=f"pretrained={model},dtype=float32", tasks=names, batch_size=2, device="cpu", limit=LIMIT,
        bootstrap_iters=0, task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )["results"]  # fmt: skip
    for name in names:
        for metric, of in found["tasks"][name]["metrics"].items():
            assert of["value"] == theirs[name][f"{metric},none"], (name, metric)
            error = theirs[name].get(f"{metric}_stderr,none", "N/A")
            assert error == "N/A" or of["standard_error"] == pytest.approx(error), (name, metric)
    assert found["tasks"]["arc_easy"]["metrics"]["acc"]["chance"] == pytest.approx(1 / 3)
    assert found["groups"]["blimp"]["tasks"] == 2
    assert found["groups"]["blimp"]["tasks_of_the_group"] == 67
    assert len(facts["not_run"]) == 65
    assert facts["failed"] == []
    assert json.loads(json.dumps(facts)) == facts
    group = TaskManager(include_path=str(folder), include_defaults=False).all_groups
    assert group == ["blimp", "mqar", "passkey"]


def test_what_was_answered_is_kept(model, other, data, tmp_path, asked):
    options = {"tasks": SOME, "data": data, "limit": LIMIT, "cache": tmp_path, "device": "cpu"}
    first = examine([str(model)], **options)
    count = len(asked)
    assert count == 5
    assert examine([str(model)], **options)["places"] == first["places"]
    assert len(asked) == count
    assert not list(tmp_path.rglob("*.answers.jsonl"))
    examine([str(other)], **options)
    assert len(asked) == 2 * count, "another model is asked itself"
    examine([str(model)], **options | {"limit": 1})
    assert len(asked) == 3 * count, "so is another limit"
    for damage in ("", "{", "[]", "{}", '{"key": 1, "items": 3}', "null"):
        for path in tmp_path.rglob("sciq-*.json"):
            path.write_text(damage)
        assert examine([str(model)], **options | {"tasks": ["sciq"]})["places"].keys()
        assert asked[-1] == "sciq"
    assert len(asked) == 3 * count + 6


def test_an_interrupted_evaluation_goes_on(model, data, tmp_path, monkeypatch):
    options = {"tasks": SOME, "data": data, "limit": LIMIT, "batch_size": 2, "device": "cpu"}
    whole = examine([str(model)], **options, cache=tmp_path / "one")
    real, names = harness.evaluate_task, []

    def stopped(lm, task, **others):
        names.append(task)
        if task == "wikitext":
            raise KeyboardInterrupt
        return real(lm, task, **others)

    monkeypatch.setattr(harness, "evaluate_task", stopped)
    with pytest.raises(KeyboardInterrupt):
        examine([str(model)], **options, cache=tmp_path / "two")
    monkeypatch.setattr(harness, "evaluate_task", real)
    again = examine([str(model)], **options, cache=tmp_path / "two")
    timeless = [
        {name: of | {"seconds": 0} for name, of in next(iter(facts["places"].values()))["tasks"].items()}
        for facts in (whole, again)
    ]
    assert timeless[0] == timeless[1]


def test_a_run_folder_gets_its_results_and_its_training_text_is_searched(run, model, data, tmp_path, text):
    document = json.loads(text.read_text().splitlines()[0])["text"]
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    rows = [
        {"context": document.rsplit(" ", 2)[0], "continuation": "saw"},
        {"text": "Nobody ever said so many words in a row as here"},
    ]
    (mine / "lambada_openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = examine([str(run), str(model)], tasks=SOME, data=mine, device="cpu")
    found = facts["places"]["a-run"]["contamination"]
    assert found["is_whole"]
    assert found["tasks"]["lambada_openai"]["touched"] == 1
    assert found["tasks"]["lambada_openai"]["first_touched"] == [0]
    assert found["tasks"]["wikitext"]["touched"] == 0
    assert "contamination" not in facts["places"][model.name]
    folder = run / "evaluation" / "tasks"
    assert json.loads((folder / "a-run.json").read_text())["tasks"] == facts["places"]["a-run"]["tasks"]
    assert json.loads((folder / "comparison.json").read_text())["comparison"] == facts["comparison"]
    page = (run / "evaluation" / "tasks.md").read_text()
    assert "| lambada_openai |" in page
    assert "touched" in page
    assert "blimp_adjunct_island" in page
    assert facts["comparison"]["others"][model.name]["wins"] == 0
    assert facts["comparison"]["others"][model.name]["ties"] == 4


def test_a_run_without_its_training_text_says_so(run, data):
    words = json.loads((run / "recipe.json").read_text())
    words["data"]["train"][0]["source"] = "/nowhere/at/all.txt"
    (run / "recipe.json").write_text(json.dumps(words))
    facts = examine([str(run)], tasks=["sciq"], data=data, limit=1, device="cpu")
    assert "cannot be read" in facts["places"]["a-run"]["contamination"]["not_checked"]
    assert any("contamination was not checked" in line for line in as_shown(facts)["notes"])


def test_models_are_compared_on_the_same_items(model, other, data, tmp_path):
    facts = examine([str(other), str(model)], tasks=SOME, data=data, cache=tmp_path, device="cpu")
    against = facts["comparison"]["others"][model.name]
    assert facts["comparison"]["first"] == other.name
    assert against["tasks"]["wikitext"]["bits_per_byte"]["value"] < 0
    assert against["tasks"]["lambada_openai"]["perplexity"]["verdict"] == "win"
    assert against["wins"] + against["ties"] + against["losses"] == 4
    rows = table_rows(facts)
    assert [row["task"] for row in rows] == [
        "sciq", "sciq normed", "lambada_openai", "lambada_openai perplexity", "wikitext bits/byte", "blimp (mean of 2 of 67)"
    ]  # fmt: skip
    assert rows[3][model.name].endswith(" win")
    assert "| blimp_wh_island |" in markdown(facts)


def test_a_model_that_gives_no_numbers_fails_and_says_so(broken, model, data, tmp_path):
    facts = examine([str(model), str(broken)], tasks=SOME, data=data, limit=2, cache=tmp_path, device="cpu")
    assert facts["places"]["broken"]["tasks"] == {}
    assert len(facts["places"]["broken"]["failed"]) == 5
    assert facts["failed"][0].startswith("broken: no task could be run.")
    assert len(facts["places"][model.name]["tasks"]) == 5
    assert any(line.startswith("failed: broken: ") for line in as_shown(facts)["notes"])


def test_a_task_that_fails_does_not_stop_the_others(model, data, tmp_path):
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    (mine / "sub" / "sciq.test.jsonl").write_text('{"question": "q"}\n')
    facts = examine([str(model)], tasks=["sciq", "piqa"], data=mine, limit=2, cache=tmp_path, device="cpu")
    assert "sciq.test.jsonl:1" in facts["not_run"]["sciq"]
    assert "piqa" in facts["places"][model.name]["tasks"]
    assert len(facts["failed"]) == 1
    assert "sciq was not run" in facts["failed"][0]


def test_what_is_nowhere_is_not_run(model, data, tmp_path):
    """Without a network the hub gives nothing; the reason is said once for a group."""
    lines = []
    facts = examine([str(model)], tasks=["blimp"], data=data, limit=1, cache=tmp_path, device="cpu", say=lines.append)
    assert len(facts["not_run"]) == 65
    assert len({*facts["not_run"].values()}) == 1
    assert sum(line.startswith("not run: ") for line in lines) == 1
    assert facts["failed"] == [], "a part of the group could be run"


def test_places_are_told_apart(model, run, data, tmp_path):
    with pytest.raises(EvaluationError, match="given twice"):
        examine([str(model), str(model)], tasks=["mqar_4"], device="cpu")
    with pytest.raises(LimbeckError):
        examine([str(model), str(tmp_path / "nowhere")], tasks=["mqar_4"], limit=1, device="cpu")
    twin = tmp_path / "else" / model.name
    shutil.copytree(model, twin)
    facts = examine([str(model), str(twin)], tasks=["mqar_4"], limit=2, cache=tmp_path, device="cpu")
    assert list(facts["places"]) == [str(model), str(twin)]


def test_the_key_is_of_every_weight_and_of_the_tokenizer(model):
    from limbeck.models.teacher import load_teacher

    loaded = load_teacher(str(model))
    before = examining.model_fingerprint(loaded)
    assert before == examining.model_fingerprint(load_teacher(str(model)))
    weight = loaded.model.get_output_embeddings().weight.data
    weight.view(-1)[weight.numel() // 2 + 1] += 1e-3
    assert before != examining.model_fingerprint(loaded)


def test_on_the_command_line(model, run, data, tmp_path):
    def limbeck(*words):
        return CliRunner().invoke(app, [*map(str, words)])

    options = (
        "--suite",
        "tiny",
        "--task",
        "mqar_4",
        "--task",
        "piqa",
        "--task-data",
        data,
        "--limit",
        2,
        "--cache",
        tmp_path / "c",
    )
    told = limbeck("eval", model, *options)
    assert told.exit_code == 0, told.output
    assert "mqar_4" in told.stdout
    assert "1/2 piqa: acc" in told.stderr
    facts = json.loads(limbeck("compare", run, model, *options, "--json").stdout)
    assert set(facts["comparison"]["others"]) == {model.name}
    missing = limbeck("eval", model, "--suite", "tiny", "--task", "boolq", "--cache", tmp_path / "c")
    assert missing.exit_code == 2
    assert "boolq*.jsonl, .jsonl.gz, .parquet or .arrow, or such files in a folder boolq" in " ".join(
        missing.stderr.split()
    )
    for wrong in (("--suite", "tiny", "--text", "x"), ("--task", "piqa"), ("--limit", "3")):
        assert limbeck("eval", model, *wrong).exit_code == 2
    assert "--suite tiny" in limbeck("eval", model, "--limit", "3").stderr


def test_a_folder_that_another_process_writes_into_never_mixes_items(model, data, tmp_path, monkeypatch):
    """Two evaluations share a folder of descriptions: another one puts its items there just before these are loaded."""
    alone = examine([str(model)], tasks=["sciq"], data=data, cache=tmp_path / "alone", device="cpu")
    real, times = harness._load_task, []

    def load(task, folder, *, others=1):
        times.append(task)
        if len(times) <= others:
            rows = (folder / f"{task}.jsonl").read_text().replace("Ada met Bo.", "Bo met Ada.").replace("Cy", "Dan")
            (folder / f"{task}.jsonl").write_text(rows)
        return real(task, folder)

    monkeypatch.setattr(harness, "_load_task", load)
    monkeypatch.setattr(examining, "_LONGEST_WAIT_SECONDS", 0.0)
    found = examine([str(model)], tasks=["sciq"], data=data, cache=tmp_path / "shared", device="cpu")
    assert len(times) == 2, "the items were put back and loaded again"
    name = model.name
    assert found["places"][name]["tasks"]["sciq"]["metrics"] == alone["places"][name]["tasks"]["sciq"]["metrics"]

    times.clear()
    monkeypatch.setattr(harness, "_load_task", lambda task, folder: load(task, folder, others=1000))
    found = examine([str(model)], tasks=["sciq"], data=data, cache=tmp_path / "fought", device="cpu")
    assert "another evaluation writes there" in found["places"][name]["failed"]["sciq"]
    assert found["failed"]
    assert not list((tmp_path / "fought" / "kept").rglob("*.json")), "nothing is kept under another's name"


def test_a_kept_result_that_was_tampered_with_is_asked_again(model, data, tmp_path, asked):
    options = {"tasks": ["sciq"], "data": data, "limit": LIMIT, "cache": tmp_path / "cache", "device": "cpu"}
    metrics = examine([str(model)], **options)["places"][model.name]["tasks"]["sciq"]["metrics"]
    (file,) = (tmp_path / "cache" / "kept").rglob("sciq-*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"standard_errors": None}))
    found = examine([str(model)], **options)["places"][model.name]
    assert (found["failed"], found["tasks"]["sciq"]["metrics"], asked) == ({}, metrics, ["sciq", "sciq"])


def test_a_disk_that_is_full_in_the_midst_costs_no_figures(model, data, tmp_path, monkeypatch):
    import errno

    options = {"tasks": ["sciq", "piqa"], "data": data, "limit": LIMIT, "device": "cpu"}
    whole = examine([str(model)], **options, cache=tmp_path / "a")
    real = harness.evaluate_task

    def full(*_words, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def then_full(*words, **more):
        score = real(*words, **more)
        monkeypatch.setattr("os.replace", full)
        return score

    monkeypatch.setattr(harness, "evaluate_task", then_full)
    found = examine([str(model)], **options, cache=tmp_path / "b")
    for name, of in whole["places"][model.name]["tasks"].items():
        assert found["places"][model.name]["tasks"][name]["metrics"] == of["metrics"]
    assert "No space left" in found["failed"][0]
    assert "not kept" in found["failed"][0]


def test_an_account_without_a_home_folder(model, data, tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    options = {"tasks": ["sciq"], "data": data, "limit": LIMIT, "device": "cpu"}
    with pytest.raises(LimbeckError, match="--cache DIR"):
        examine([str(model)], **options)
    assert examine([str(model)], **options, cache=tmp_path)["failed"] == []


def test_a_folder_that_cannot_be_written_names_the_option(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LimbeckError, match="--cache DIR"):
        examine([str(model)], tasks=["sciq"], data=data, limit=LIMIT, cache=tmp_path / "file" / "below", device="cpu")


def test_a_model_that_breaks_in_a_way_nobody_knew_fails_alone(model, other, data, tmp_path, monkeypatch):
    real = harness.evaluate_task

    def evaluate_task(lm, task, **options):
        if not lm.broke:
            return real(lm, task, **options)
        raise IndexError("index out of range in self")

    wrap = harness.wrap_model
    order = iter([True, False])

    def wrap_model(*words, **options):
        lm = wrap(*words, **options)
        lm.broke = next(order)
        return lm

    monkeypatch.setattr(harness, "wrap_model", wrap_model)
    monkeypatch.setattr(harness, "evaluate_task", evaluate_task)
    facts = examine([str(model), str(other)], tasks=["sciq"], data=data, limit=LIMIT, cache=tmp_path, device="cpu")
    first, second = facts["places"].values()
    assert "IndexError: index out of range" in first["failed"]["sciq"]
    assert second["tasks"]["sciq"]["items"] == LIMIT
    assert len(facts["failed"]) == 1


def test_a_tokenizer_without_special_tokens_is_refused_in_words(model, data, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(model, folder)
    words = json.loads((folder / "tokenizer_config.json").read_text())
    for token in ("bos_token", "eos_token", "pad_token", "unk_token"):
        words.pop(token, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    facts = examine([str(folder)], tasks=["sciq"], data=data, limit=LIMIT, cache=tmp_path, device="cpu")
    assert "neither a BOS nor an EOS token" in facts["failed"][0]


def test_a_model_that_cannot_be_scored_on_text_does_not_take_the_others_with_it(model, broken, text, tmp_path):
    options = ["--text", str(text), "--context", "16", "--max-tokens", "200"]
    result = CliRunner().invoke(app, ["compare", str(model), str(broken), str(tmp_path / "none"), *options, "--json"])
    assert result.exit_code == 2
    scored, *others = json.loads(result.stdout)["places"]
    assert scored["texts"][0]["perplexity"] > 1
    assert [of["place"] for of in others if of["failed"]] == [str(broken), str(tmp_path / "none")]
    assert f"{broken} was not scored" in result.stderr
    shown = CliRunner().invoke(app, ["compare", str(broken), str(model), *options])
    assert (shown.exit_code, "perplexity" in shown.stdout) == (2, True)
    nothing = CliRunner().invoke(app, ["compare", str(broken), str(tmp_path / "none"), *options])
    assert (nothing.exit_code, nothing.stdout) == (2, "")


def test_results_of_another_lm_eval_are_said_and_not_mixed(model, data, tmp_path, asked, monkeypatch):
    said: list[str] = []
    options = {"tasks": ["sciq"], "data": data, "limit": LIMIT, "cache": tmp_path, "device": "cpu", "say": said.append}
    monkeypatch.setattr(harness, "harness_version", lambda: "0.4.11")
    examine([str(model)], **options)
    assert not [line for line in said if "0.4.11" in line]
    monkeypatch.setattr(harness, "harness_version", lambda: "0.4.13")
    facts = examine([str(model)], **options)
    assert asked == ["sciq", "sciq"]
    assert [line for line in said if "results of lm-eval 0.4.11 are kept as well; they are not mixed" in line]
    assert facts["protocol"]["lm_eval"] == "0.4.13"


def test_an_evaluation_that_is_stopped_says_what_it_has(model, data, tmp_path, monkeypatch):
    said: list[str] = []
    options = {"tasks": ["sciq", "piqa"], "data": data, "limit": LIMIT, "cache": tmp_path, "device": "cpu"}
    real = harness.evaluate_task

    def evaluate_task(lm, task, **more):
        if task == "piqa":
            raise KeyboardInterrupt
        return real(lm, task, **more)

    with monkeypatch.context() as patch:
        patch.setattr(harness, "evaluate_task", evaluate_task)
        with pytest.raises(KeyboardInterrupt):
            examine([str(model)], **options, say=said.append)
    assert f"{model.name}: 1 of 2 tasks are done and kept: sciq " in said[-1]
    facts = examine([str(model)], **options, say=said.append)
    assert any("1 of 2 tasks are kept from before" in line for line in said)
    assert not facts["failed"]


def test_a_place_may_be_the_folder_one_is_in(run, data, monkeypatch):
    monkeypatch.chdir(run)
    options = {"tasks": ["sciq"], "data": data, "limit": LIMIT, "device": "cpu"}
    assert list(examine(["."], **options)["places"]) == [run.name]
    assert (run / "evaluation" / "tasks" / f"{run.name}.json").is_file()
    assert json.loads((run / "evaluation" / "tasks" / f"{run.name}.json").read_text())["arm"] == "student"


def test_a_run_called_comparison_keeps_its_results(run, model, data):
    named = run.rename(run.with_name("comparison"))
    examine([str(named), str(model)], tasks=["sciq"], data=data, limit=LIMIT, device="cpu")
    folder = named / "evaluation" / "tasks"
    assert "places" in json.loads((folder / "comparison.json").read_text())
    assert json.loads((folder / "comparison-1.json").read_text())["tasks"]["sciq"]["items"] == LIMIT
