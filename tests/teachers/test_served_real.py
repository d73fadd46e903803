"""A real served teacher: llama.cpp's server with a GGUF model, beside the same file run by transformers.

    pip install xllamacpp
    LIMBECK_SERVED_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf pytest -m served

The server runs in a process of its own: LIMBECK_SERVED_PYTHON names the interpreter that has xllamacpp, if it is another.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from limbeck.core.errors import TeacherError
from limbeck.store.records import batch_rows, make_batch
from limbeck.teachers.answers import AnswerFile
from limbeck.teachers.closed import ClosedTeacher
from limbeck.teachers.endpoint import Endpoint, EndpointSettings
from limbeck.teachers.prompts import Prompt
from limbeck.teachers.served import ServedTeacher

MODEL = os.environ.get("LIMBECK_SERVED_GGUF", "")
PYTHON = os.environ.get("LIMBECK_SERVED_PYTHON", sys.executable)
SERVE = """
import sys, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = sys.argv[1], 1024, 2, False
settings.cpuparams.n_threads = 1
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
TEXTS = [Prompt(text="The capital of France is"), Prompt(text="Water boils at")]
CHATS = [
    Prompt(messages=({"role": "user", "content": text},)) for text in ("Name three colours.", "Say hello in Spanish.")
]
TOP = 20


def can_serve():
    return bool(MODEL) and subprocess.run([PYTHON, "-c", "import xllamacpp"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.served,
    pytest.mark.skipif(not can_serve(), reason="set LIMBECK_SERVED_GGUF to a GGUF file, and install xllamacpp"),
]


@contextmanager
def serving():
    """The server's process and its address."""
    with subprocess.Popen(
        [PYTHON, "-c", SERVE, MODEL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process, process.stdout.readline().strip() + "/v1"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url():
    with serving() as (_, address):
        yield address


@pytest.fixture(scope="module")
def teacher():
    from limbeck.models.teacher import load_teacher

    return load_teacher(MODEL)


def connect(url, **changes):
    return Endpoint(EndpointSettings(url, "smollm2", concurrency=2, retries=2, backoff_seconds=0.1), **changes)


def capture(url, tokenizer, prompts, *, kept=None, **options):
    rows = []
    with connect(url, kept=kept) as endpoint:
        served = ServedTeacher(endpoint, tokenizer, **({"top_logprobs": TOP, "max_new_tokens": 32} | options))
        total = served.generate(prompts, context_tokens=128, sink=rows.append)
        return rows, total, endpoint


def true_log_probs(model, row):
    with torch.no_grad():
        logits = model(torch.from_numpy(np.asarray(row.input_ids, dtype=np.int64))[None]).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def difference_nats(row, truth_TV, *, shift=0):
    """Mean difference at each scored position, weighted by probability, from what the model says `shift` places on."""
    said = np.flatnonzero(row.scored) - 1
    truth = np.take_along_axis(truth_TV[np.clip(said + shift, 0, len(truth_TV) - 1)], row.ids[said], axis=1)
    weights = np.exp(row.log_probs[said])
    return (weights * np.abs(truth - row.log_probs[said])).sum(axis=1) / weights.sum(axis=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_are_what_the_same_model_says_here(url, teacher, temperature):
    """llama.cpp rounds activations to 8 bits, which moves each distribution by some hundredths of a nat; another place of
    the text is several nats away."""
    rows, total, endpoint = capture(url, teacher.tokenizer, TEXTS + CHATS, temperature=temperature)
    assert total.rows == 4
    assert endpoint.usage.completion_tokens >= total.scored_tokens
    likeliest = []
    for prompt, row in zip(TEXTS + CHATS, rows, strict=True):
        assert row.text.decode() == teacher.tokenizer.decode(row.input_ids, skip_special_tokens=True)
        truth_TV = true_log_probs(teacher.model, row)
        said = np.flatnonzero(row.scored) - 1
        assert difference_nats(row, truth_TV).mean() < 0.1
        assert difference_nats(row, truth_TV).max() < 0.5
        assert min(difference_nats(row, truth_TV, shift=shift).mean() for shift in (-1, 1)) > 2
        np.testing.assert_allclose(row.next_log_prob[said], truth_TV[said, row.input_ids[said + 1]], atol=0.5)
        mass = np.exp(np.take_along_axis(truth_TV[said], row.ids[said], axis=1)).sum(axis=1)
        np.testing.assert_allclose(np.exp(row.tail[said]), 1 - mass, atol=0.05)
        likeliest.append(truth_TV[said].argmax(axis=1) == row.ids[said, 0])
        if temperature == 0:
            assert (row.ids[said, 0] == row.input_ids[said + 1]).all()
        if prompt.messages:
            before = teacher.tokenizer.apply_chat_template(prompt.chat(), add_generation_prompt=True, return_dict=False)
            assert row.input_ids[: len(before)].tolist() == before
            assert not row.scored[: len(before)].any()
    assert np.concatenate(likeliest).mean() > 0.85


def test_letters_of_several_tokens_end_a_row(url, teacher):
    """llama.cpp puts the tokens of an emoji into one entry: what comes before it is right, and nothing after it is used."""
    prompt = Prompt(messages=({"role": "user", "content": "Say hello in Spanish 😀."},))
    rows, total, _ = capture(url, teacher.tokenizer, [prompt] * 6)
    assert total.cut_answers > 0
    for row in rows:
        assert difference_nats(row, true_log_probs(teacher.model, row)).max() < 0.6


def test_it_does_not_score_given_text(url, teacher):
    rows, _, _ = capture(url, teacher.tokenizer, TEXTS[:1])
    windows = batch_rows(make_batch(rows, width=40))
    with connect(url) as endpoint, pytest.raises(TeacherError, match="does not score given text.*mode: generate"):
        ServedTeacher(endpoint, teacher.tokenizer).score(windows, sink=print)


def test_a_server_that_dies_and_comes_back_elsewhere(teacher, tmp_path):
    with serving() as (process, url):
        kept = AnswerFile(tmp_path / "answers.jsonl")
        first, _, _ = capture(url, teacher.tokenizer, TEXTS, kept=kept, temperature=0.0)
        process.kill()
        process.wait()
        with pytest.raises(TeacherError, match="3 attempts; the last failed: cannot connect.*2 answers are kept"):
            capture(url, teacher.tokenizer, TEXTS + CHATS, kept=kept, temperature=0.0)
        kept.close()
    with serving() as (_, url):
        kept = AnswerFile(tmp_path / "answers.jsonl")
        rows, total, endpoint = capture(url, teacher.tokenizer, TEXTS + CHATS, kept=kept, temperature=0.0)
    assert (total.rows, endpoint.usage_before.answers) == (4, 2)
    assert [row.key for row in rows[:2]] == [row.key for row in first]


def test_its_text_alone(url):
    rows = []
    with connect(url) as endpoint:
        told = ClosedTeacher(endpoint, max_new_tokens=24, temperature=0.0, input_price=1.0, output_price=2.0).write(
            [Prompt(text="Say hello in Spanish.")], sink=rows.append
        )
    assert rows[0].completion.startswith("Hola")
    assert told.cost == pytest.approx((told.usage.prompt_tokens + 2 * told.usage.completion_tokens) / 1e6)
    assert set(told.finish_reasons) <= {"stop", "length"}


def test_a_recipe_distils_from_it_end_to_end(url, tmp_path):
    """Prompts, answers with log-probabilities, a store in the run folder, a student trained from it, a report."""
    from tests import tiny

    from limbeck import pipeline
    from limbeck.recipe import Recipe

    text = tiny.write_text(tmp_path / "text.jsonl")
    architecture = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 64,
    }  # fmt: skip
    served = {
        "url": url,
        "model": "smollm2",
        "max_new_tokens": 16,
        "prompt_characters": 40,
        "answers": 16,
        "concurrency": 2,
    }
    words = {
        "name": "served", "teacher": {"served": served}, "tokenizer": {"source": MODEL}, "student": {"architecture": architecture},
        "data": {"train": [str(text)], "heldout": [{"source": str(text), "split": "heldout"}], "context_tokens": 32},
        "stages": [{"kind": "distil", "tokens": 1280, "batch_tokens": 128, "learning_rate": 1e-2}],
        "controls": {"from_scratch": False, "copied": False, "teacher_more": False, "floor": False},
        "evaluation": {"speed": None, "prompts": ["Ada met"], "sample_tokens": 2, "max_tokens": 128},
        "runtime": {"device": "cpu", "threads": 1},
    }  # fmt: skip
    facts = pipeline.run(Recipe.model_validate(words), run_folder=tmp_path / "run", progress=False)
    curve = [loss for _, loss in facts["student"]["stages"][0]["loss_curve"]]
    assert curve[-1] < curve[0]
    assert facts["teaching"]["kind"] == "served"
    assert facts["teaching"]["store_teacher"]["usage"]["now"]["answers"] >= 16
