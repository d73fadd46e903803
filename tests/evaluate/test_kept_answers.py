"""An interrupted evaluation goes on: the same figures bit for bit, nothing asked twice, nothing believed blindly."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tests.evaluate.harness_tasks import write_tasks
from tests.evaluate.small_models import build_model, build_tokenizer
from tests.models.test_byte_pool import small_model

from limbeck.core.errors import EnvironmentFault, EvaluationError
from limbeck.evaluate.harness import evaluate_task, wrap_model
from limbeck.evaluate.kept_answers import KeptAnswers
from limbeck.models.byte_tokenizer import ByteTokenizer

TASKS = ["choice", "rolling", "last_word", "write"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


class Interrupted(BaseException):
    """Stands for Ctrl-C: nothing may swallow it."""


def lm_of(kind, *, batch_size=2):
    if kind == "bytes":
        tokenizer = ByteTokenizer("space", patch_bytes=4)
        model = small_model().float()
        return wrap_model(model, tokenizer, device="cpu", batch_size=batch_size, max_length=24)
    tokenizer = build_tokenizer(bos=True)
    tokenizer.eos_token = "<s>"
    model = build_model(dtype=torch.float32)
    return wrap_model(model, tokenizer, device="cpu", batch_size=batch_size, max_length=24)


def counted(lm, *, stop_after=None):
    """Count how often the model is asked for a batch; interrupt it there when that is given."""
    calls = []
    for name in ("_model_call", "_model_generate"):
        method = getattr(lm, name)

        def call(*args, name=name, method=method, **options):
            if stop_after is not None and len(calls) == stop_after:
                raise Interrupted
            calls.append(name)
            return method(*args, **options)

        setattr(lm, name, call)
    return calls


@pytest.mark.parametrize("kind", ["tokens", "bytes"])
@pytest.mark.parametrize("task", TASKS)
def test_going_on_gives_the_figures_of_an_uninterrupted_run(task, kind, tasks, tmp_path):
    lm = lm_of(kind)
    batches = counted(lm)
    whole = evaluate_task(lm, task, folder=tasks)
    assert len(batches) > 1
    path = tmp_path / "answers.jsonl"
    for stop in range(len(batches)):
        stopped = lm_of(kind)
        asked = counted(stopped, stop_after=1 if stop else 0)
        with pytest.raises(Interrupted):
            evaluate_task(stopped, task, folder=tasks, kept=KeptAnswers(path))
        assert len(asked) == (1 if stop else 0)
    last = lm_of(kind)
    asked = counted(last)
    found = evaluate_task(last, task, folder=tasks, kept=KeptAnswers(path))
    assert len(asked) == 1, "one batch was left"
    assert (found.metrics, found.items, found.standard_errors) == (whole.metrics, whole.items, whole.standard_errors)
    again = lm_of(kind)
    asked = counted(again)
    assert evaluate_task(again, task, folder=tasks, kept=KeptAnswers(path)).items == whole.items
    assert asked == []


@pytest.mark.parametrize("kind", ["tokens", "bytes"])
def test_keeping_changes_nothing_and_leaves_the_model_as_it_was(kind, tasks, tmp_path):
    lm = lm_of(kind)
    plain = {task: evaluate_task(lm, task, folder=tasks).items for task in TASKS}
    before, hook = set(vars(lm)), lm.cache_hook
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    assert {task: evaluate_task(lm, task, folder=tasks, kept=kept).items for task in TASKS} == plain
    assert set(vars(lm)) == before
    assert lm.cache_hook is hook
    assert len(KeptAnswers(kept.path)) == len(kept) > 20


@pytest.mark.parametrize("change", ["limit", "batch"])
def test_other_runs_share_the_file_and_not_the_answers(change, tasks, tmp_path):
    """Their batches are made up otherwise, so the last digits may differ."""
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    evaluate_task(lm_of("tokens"), "choice", folder=tasks, limit=2 if change == "limit" else None, kept=kept)
    lm = lm_of("tokens", batch_size=3 if change == "batch" else 2)
    asked = counted(lm)
    found = evaluate_task(lm, "choice", folder=tasks, kept=KeptAnswers(kept.path))
    fresh = lm_of("tokens", batch_size=3 if change == "batch" else 2)
    batches = counted(fresh)
    assert found.items == evaluate_task(fresh, "choice", folder=tasks).items
    assert len(asked) == len(batches)


def test_equal_requests_in_different_batches_are_kept_apart(tmp_path):
    """Three equal prompts, two to a batch: after the first batch one of them is still to be asked."""
    requests = [SimpleNamespace(args=("the cat", {"until": ["."], "max_gen_toks": 2}), task_name="t") for _ in range(3)]
    path = tmp_path / "answers.jsonl"
    stopped = lm_of("bytes")
    counted(stopped, stop_after=1)
    with pytest.raises(Interrupted), KeptAnswers(path).serving(stopped):
        stopped.generate_until(requests)
    assert len(KeptAnswers(path)) == 2
    lm = lm_of("bytes")
    asked = counted(lm)
    with KeptAnswers(path).serving(lm):
        assert len(set(lm.generate_until(requests))) == 1
    assert len(asked) == 1


def test_samples_are_drawn_anew(tmp_path):
    lm = lm_of("bytes")
    drawn = [SimpleNamespace(args=("a", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 1}))]
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    with kept.serving(lm):
        assert len(lm.generate_until(drawn)) == 1
    assert len(kept) == 0
    assert not kept.path.exists()


def test_lines_are_plain_json_of_key_and_answer(tasks, tmp_path):
    kept = KeptAnswers(tmp_path / "deep" / "answers.jsonl")
    evaluate_task(lm_of("tokens"), "choice", folder=tasks, kept=kept)
    rows = [json.loads(line) for line in kept.path.read_text().splitlines()]
    assert len(rows) == 15
    for row in rows:
        assert set(row) == {"key", "answer"}
        assert len(row["key"]) == 64
        nats, greedy = row["answer"]
        assert nats < 0
        assert isinstance(greedy, bool)


@pytest.mark.parametrize("cut", [1, 40, 100])
def test_a_torn_last_line_is_asked_again(cut, tasks, tmp_path):
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    whole = evaluate_task(lm_of("tokens"), "choice", folder=tasks, kept=kept)
    data = kept.path.read_bytes()
    kept.path.write_bytes(data[:-cut])
    torn = KeptAnswers(kept.path)
    found = evaluate_task(lm_of("tokens"), "choice", folder=tasks, kept=torn)
    assert found.items == whole.items
    assert len(KeptAnswers(kept.path)) == 15


HOSTILE = [
    b"\x80\x05K\x01.\n", b"[" * 100_000 + b"\n", b"null\n", b"[]\n", b'{"key": 3, "answer": 1}\n', b'{"key": "a"}\n',
    b"\xff\xfe\n", b'{"key": {}, "answer": []}\n', b"\n", b'{"key": "a", "answer": ' + b"9" * 5000 + b"}\n",
]  # fmt: skip


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_lines_are_as_if_they_were_not_there(line, tasks, tmp_path):
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    whole = evaluate_task(lm_of("tokens"), "choice", folder=tasks, kept=kept)
    kept.path.write_bytes(line + kept.path.read_bytes() + line)
    lm = lm_of("tokens")
    asked = counted(lm)
    assert evaluate_task(lm, "choice", folder=tasks, kept=KeptAnswers(kept.path)).items == whole.items
    assert asked == []


@pytest.mark.parametrize(
    "answer",
    ["NaN", "[NaN, true]", "[-1.0]", '["-1", true]', "[-1.0, 1]", "{}", '"text"', "-1.5", "[[-1.0, true]]", "null"],
)
def test_answers_of_the_wrong_kind_are_asked_again(answer, tasks, tmp_path):
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    whole = evaluate_task(lm_of("tokens"), "choice", folder=tasks, kept=kept)
    rows = [json.loads(line) for line in kept.path.read_text().splitlines()]
    kept.path.write_text("".join(f'{{"key": "{row["key"]}", "answer": {answer}}}\n' for row in rows))
    lm = lm_of("tokens")
    asked = counted(lm)
    found = evaluate_task(lm, "choice", folder=tasks, kept=KeptAnswers(kept.path))
    assert found.items == whole.items
    assert asked


def test_answers_that_are_no_numbers_are_not_kept(tmp_path):
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    lm = SimpleNamespace(
        cache_hook=None,
        batch_size=1,
        set_cache_hook=lambda hook: None,
        loglikelihood=lambda requests: [(math.nan, False)],
    )
    with kept.serving(lm):
        lm.loglikelihood([SimpleNamespace(args=("a", "b"))])
    assert not kept.path.exists()


def test_a_folder_and_a_full_disk_are_said_in_words(tasks, tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match=r"is no file: expected one to keep answers in"):
        KeptAnswers(tmp_path)
    import builtins
    import errno

    plain = builtins.open

    def full(path, *args, **options):
        if str(path).endswith("answers.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, *args, **options)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        evaluate_task(lm_of("tokens"), "choice", folder=tasks, kept=KeptAnswers(tmp_path / "answers.jsonl"))


def test_answers_of_half_a_batch_are_not_kept(tmp_path):
    """Interrupted between two answers of the second batch of three."""
    requests = [
        SimpleNamespace(args=("the cat sat", word)) for word in (" a", " bc", " def", " on it", " there", " yet")
    ]
    kept = KeptAnswers(tmp_path / "answers.jsonl")
    note, told = kept.add_partial, []

    def add_partial(*answer):
        note(*answer)
        told.append(answer)
        if len(told) == 4:
            raise Interrupted

    kept.add_partial = add_partial
    lm = lm_of("bytes", batch_size=3)
    with pytest.raises(Interrupted), kept.serving(lm):
        lm.loglikelihood(requests)
    assert len(KeptAnswers(kept.path)) == 3
