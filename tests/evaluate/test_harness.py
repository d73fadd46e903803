"""Benchmark tasks through lm-evaluation-harness: the same figures as by hand, and what is said when that cannot be."""

import importlib.metadata
import logging
import math
import random

import numpy as np
import pytest
import torch
from tests.evaluate.harness_tasks import SENTENCES, write_tasks
from tests.evaluate.small_models import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.core.errors import EnvironmentFault, EvaluationError
from limbeck.evaluate import harness
from limbeck.evaluate.harness import evaluate_task, harness_version, wrap_model

TASKS = ["choice", "rolling", "last_word", "write"]
COMMON = {"device": "cpu", "batch_size": 2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny random GPT-NeoX in float32, saved as a folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(bos=True)
    tokenizer.eos_token = "<s>"
    model = build_model(dtype=torch.float32)
    model.config.max_position_embeddings = 32
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_by_hand(tasks, folder, names, *, more="", **options):
    """What the harness's own command does, without its look at the machine, which takes seconds."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda _results: None)
        return evaluator.simple_evaluate(
            model="hf", model_args=f"pretrained={folder},dtype=float32{more}", tasks=names, batch_size=2, device="cpu",
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False), **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def by_hand(place, tasks):
    """All tasks; without the random samples that the harness takes for the error of a perplexity."""
    whole = run_by_hand(tasks, place, ["choice", "rolling", "write"])
    return whole, run_by_hand(tasks, place, ["last_word"], bootstrap_iters=0)


@pytest.fixture(scope="module")
def lm(place):
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return wrap_model(model, AutoTokenizer.from_pretrained(place), **COMMON)


@pytest.mark.parametrize("task", TASKS)
def test_figures_are_those_of_the_harness_to_the_last_digit(task, lm, tasks, by_hand):
    theirs = by_hand[task == "last_word"]
    ours = evaluate_task(lm, task, folder=tasks)
    words = theirs["results"][task]
    figures = {key: value for key, value in words.items() if "," in key and "_stderr" not in key}
    assert {key.removesuffix(",none"): value for key, value in figures.items()} == ours.metrics
    for key, value in words.items():
        if "_stderr" in key and value != "N/A":
            name = key.replace("_stderr", "").removesuffix(",none")
            assert ours.standard_errors[name] == value
    assert ours.version == str(theirs["versions"][task])
    assert ours.harness_version == importlib.metadata.version("lm_eval")
    assert ours.seconds > 0
    assert ours.notes == ()
    assert len(ours.items) == theirs["n-samples"][task]["original"]


def test_a_task_says_which_way_is_better_and_what_each_item_scored(lm, tasks):
    found = evaluate_task(lm, "choice", folder=tasks)
    assert found.higher_is_better == {"acc": True, "acc_norm": True}
    for name in ("acc", "acc_norm"):
        assert sum(item[name] for item in found.items) / 5 == found.metrics[name]
    assert evaluate_task(lm, "choice", folder=tasks, limit=2).items == found.items[:2]
    written = evaluate_task(lm, "write", folder=tasks)
    assert set(written.metrics) == {"exact_match,raw", "exact_match,letters"} == set(written.items[0])
    assert evaluate_task(lm, "last_word", folder=tasks).higher_is_better == {"perplexity": False, "acc": True}


def test_items_of_rolling_likelihood_count_nats_bytes_and_words(lm, tasks):
    found = evaluate_task(lm, "rolling", folder=tasks)
    assert [(item["bytes"], item["words"]) for item in found.items] == [
        (len(text), len(text.split(" " if text.endswith(" ") else None))) for text in SENTENCES
    ]
    nats, size = (sum(item[name] for item in found.items) for name in ("nats", "bytes"))
    assert found.metrics["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-12)


def test_errors_by_the_delta_method_are_near_those_of_resampling(monkeypatch):
    """Drawn items; 3,000 samples with replacement of the whole set."""
    chance = np.random.default_rng(0)
    nats, sizes = chance.gamma(9, 1.0, 200), chance.integers(20, 60, 200)
    values = [(-float(n * s / 40), int(s)) for n, s in zip(nats, sizes, strict=True)]
    table = np.asarray(values)
    rows = chance.integers(0, 200, (3000, 200))
    ratio = -table[rows, 0].sum(1) / table[rows, 1].sum(1)
    for name, draws, figure in (
        ("bits_per_byte", ratio / math.log(2), None),
        ("weighted_perplexity", np.exp(ratio), math.exp(-table[:, 0].sum() / table[:, 1].sum())),
    ):
        assert harness._standard_error(name, values, figure or 0.0) == pytest.approx(draws.std(), rel=0.06)
    single = [-float(n) / 9 for n in nats]
    draws = np.exp(-np.asarray(single)[rows].mean(1))
    error = harness._standard_error("perplexity", single, math.exp(-sum(single) / 200))
    assert error == pytest.approx(draws.std(), rel=0.06)
    assert harness._standard_error("mean", [1.0], 1.0) is None
    assert harness._standard_error("f1", [1.0, 2.0], 1.0) is None


@pytest.mark.parametrize(("task", "word"), [("choice", " dog"), ("write", " sat")])
def test_logits_that_are_no_numbers_stop_the_run_and_say_where(task, word, place, tasks, tmp_path):
    """Broken after one word alone, so that other batches are sound."""
    from limbeck.evaluate.kept_answers import KeptAnswers

    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    (spoiling,) = tokenizer(word).input_ids
    plain = model.forward

    def forward(input_ids=None, **options):
        output = plain(input_ids=input_ids, **options)
        output.logits[input_ids[:, -output.logits.shape[1] :] == spoiling] = math.nan
        return output

    model.forward = forward
    spoiled = wrap_model(model, tokenizer, **COMMON)
    kept = KeptAnswers(tmp_path / "kept.jsonl")
    with pytest.raises(EvaluationError, match=rf'(?s)^task "{task}": .*not finite.*{word}.*float32'):
        evaluate_task(spoiled, task, folder=tasks, kept=kept)
    model.forward = plain
    whole = evaluate_task(wrap_model(model, tokenizer, **COMMON), task, folder=tasks)
    mended = evaluate_task(wrap_model(model, tokenizer, **COMMON), task, folder=tasks, kept=kept)
    assert (mended.metrics, mended.items) == (whole.metrics, whole.items)


def test_a_prediction_that_is_not_scored_may_be_spoiled(place, tasks):
    """What follows the last token of a row, or padding, does not count: only scored positions are looked at."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    sound = evaluate_task(wrap_model(model, tokenizer, **COMMON), "choice", folder=tasks)
    plain = model.forward

    def forward(input_ids, **options):
        output = plain(input_ids, **options)
        output.logits[input_ids == 0] = math.inf
        return output

    model.forward = forward
    assert evaluate_task(wrap_model(model, tokenizer, **COMMON), "choice", folder=tasks).metrics == sound.metrics


def test_likelihoods_that_are_no_numbers_are_refused_from_any_model(tasks):
    from lm_eval.api.model import LM

    class Broken(LM):
        batch_size = 1
        max_length = 8

        def loglikelihood(self, requests):
            return [(math.nan, False)] * len(requests)

        loglikelihood_rolling = generate_until = None

    with pytest.raises(EvaluationError, match=r'task "choice": the model gives a likelihood that is nan for item 0'):
        evaluate_task(Broken(), "choice", folder=tasks)


def test_unknown_tasks_lost_data_and_impossible_numbers(lm, tasks):
    with pytest.raises(
        EvaluationError, match=r'unknown task "choise". Did you mean "choice"\? Known: choice, last_word'
    ):
        evaluate_task(lm, "choise", folder=tasks)
    with pytest.raises(EvaluationError, match=r'task "lost" of .* cannot be loaded: .*nowhere.jsonl'):
        evaluate_task(lm, "lost", folder=tasks)
    with pytest.raises(EvaluationError, match="limit is 0"):
        evaluate_task(lm, "choice", folder=tasks, limit=0)
    with pytest.raises(EvaluationError, match="batch_size is 0"):
        wrap_model(build_model(), build_tokenizer(bos=True), device="cpu", batch_size=0)


def test_a_request_longer_than_the_context_is_said_in_words(place, tasks):
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    short = wrap_model(model, AutoTokenizer.from_pretrained(place), max_length=3, **COMMON)
    with pytest.raises(EvaluationError, match=r'task "choice" cannot be asked of this model.*holds 3 tokens'):
        evaluate_task(short, "choice", folder=tasks)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.4.10", r"0\.4\.10 is installed; expected 0\.4\.11 or newer, and older than 0\.6"),
        ("0.6.0", 'pip install "lm-eval>=0.4.11,<0.6"'),
        (None, r'not installed. Install it: pip install "limbeck\[eval\]"'),
    ],
)
def test_other_versions_are_refused_in_words(version, message, monkeypatch):
    def answer(_name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError("lm_eval")
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)
    with pytest.raises(EnvironmentFault, match=message):
        wrap_model(build_model(), build_tokenizer(bos=True), device="cpu")


def test_a_newer_minor_version_is_used_and_noted(lm, tasks, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.5.2.dev1")
    assert harness_version() == "0.5.2.dev1"
    found = evaluate_task(lm, "choice", folder=tasks, limit=1)
    assert "0.5.2.dev1" in found.notes[0]
    assert found.standard_errors == {"acc": None, "acc_norm": None}


def test_nothing_is_printed_and_nothing_is_left_behind(lm, tasks, capfd):
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    level = logging.getLogger("lm_eval").level
    methods = set(vars(lm))
    evaluate_task(lm, "write", folder=tasks)
    evaluate_task(lm, "rolling", folder=tasks)
    assert capfd.readouterr() == ("", "")
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]
    assert logging.getLogger("lm_eval").level == level
    assert set(vars(lm)) - methods <= {"_read_BT", "_row"}


def test_the_callers_tokenizer_is_left_as_it_was(place):
    tokenizer = build_tokenizer(bos=True)
    wrap_model(build_model(), tokenizer, device="cpu")
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("kind", ["hybrid", "compact"])
def test_students_are_asked_as_any_model_of_transformers(kind, tasks, place, tmp_path):
    """By hand after `import limbeck`, from a saved folder."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    torch.manual_seed(0)
    if kind == "hybrid":
        from limbeck.models.hybrid import build_student

        student = build_student(
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), mixers=["hyena", "attention"], hyena={}
        )
    else:
        from limbeck.models.compact import CompactConfig, CompactForCausalLM

        trunk = {
            "width": 16,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "feed_forward": 24,
            "mixers": ["hyena", "attention"],
        }
        student = CompactForCausalLM(CompactConfig(vocab_size=len(tokenizer), trunk=trunk))
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = wrap_model(student, tokenizer, device="cpu", batch_size=2, max_length=32)
    theirs = run_by_hand(tasks, tmp_path, ["rolling", "choice"], more=",backend=causal,max_length=32")["results"]
    for task in ("rolling", "choice"):
        found = evaluate_task(ours, task, folder=tasks).metrics
        assert found == {key.removesuffix(",none"): theirs[task][key] for key in (f"{name},none" for name in found)}


def test_long_windows_are_read_fewer_at_a_time(lm, tasks, monkeypatch):
    rows = []
    inner = type(lm)._model_call

    def counted(self, inputs, *args, **options):
        rows.append(len(inputs))
        return inner(self, inputs, *args, **options)

    monkeypatch.setattr(type(lm), "_model_call", counted)
    whole = evaluate_task(lm, "rolling", folder=tasks)
    assert max(rows) == 2
    rows.clear()
    monkeypatch.setattr(harness, "MOST_LOGIT_BYTES", 1)
    again = evaluate_task(lm, "rolling", folder=tasks)
    assert set(rows) == {1}
    assert lm.batch_size == 2
    assert again.metrics == pytest.approx(whole.metrics, rel=1e-5)
