"""Every preset that takes a teacher and a student of its own, carried out with tiny models of the same families."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.teachers.fake_server import FakeServer
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import pipeline
from limbeck.core.errors import VocabularyError
from limbeck.data.text import TextSource, read_documents
from limbeck.models.tokenizers import train_tokenizer
from limbeck.recipe_io import load_recipe

SMALL = (
    "data.context_tokens=32", "stages.0.batch_tokens=128", "stages.0.micro_batch_sequences=2", "stages.0.tokens=2560",
    "stages.0.learning_rate=3e-3", "student.calibration_tokens=256", "runtime.device=cpu", "runtime.threads=1",
    "evaluation.context_tokens=32", "evaluation.stride_tokens=16", "evaluation.max_tokens=256", "evaluation.speed=null",
    "evaluation.prompts=[Ada met]", "evaluation.sample_tokens=4",
)  # fmt: skip
ON_POLICY = ("stages.0.on_policy.prompt_tokens=8", "stages.0.on_policy.max_new_tokens=8", "stages.0.tokens=1280")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def models(text, tmp_path_factory):
    """A function that makes a folder with a tiny random model; models of one `tokens` have one tokenizer."""
    folder, tokenizers = tmp_path_factory.mktemp("models"), {}

    def make(family, *, width=16, layers=2, rows=None, tokens=300):
        place = folder / f"{family}-{width}-{layers}-{rows}-{tokens}"
        if place.exists():
            return place
        if tokens not in tokenizers:
            documents = read_documents(TextSource(str(text), split="train"))
            tokenizers[tokens] = train_tokenizer(documents, vocab_size=tokens)
        tokenizer = tokenizers[tokens]
        torch.manual_seed(width + layers)
        config = AutoConfig.for_model(
            family, vocab_size=rows or len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
            pad_token_id=0,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
        return place

    return make


@pytest.fixture
def carry_out(text, tmp_path):
    def run(name, *overrides):
        sources = [f"data.{part}=[{{source: {text}, split: {part}}}]" for part in ("train", "heldout")]
        recipe = load_recipe(name, [*SMALL, *sources, *overrides])
        return pipeline.run(recipe, run_folder=tmp_path / "run", progress=False)

    return run


def pair(teacher, student):
    return f"teacher.source={teacher}", "teacher.dtype=float32", f"student.source={student}"


def check_report(facts, *, kind="source"):
    """What is true of each: it trained, its control has its tokens, and the report says whether it was worth it."""
    assert facts["teaching"]["kind"] == kind
    control = facts["controls"]["without_teacher"]
    assert control["tokens_spent"] == facts["student"]["tokens_spent"] > 0
    assert facts["worth"] is not None
    losses = [loss for _, loss in facts["student"]["stages"][-1]["loss_curve"]]
    assert losses
    assert all(loss == loss for loss in losses)
    return losses


def falls(losses):
    return sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.slow
def test_distillkit(models, carry_out):
    facts = carry_out("distillkit", *pair(models("qwen2", width=24), models("qwen2")))
    assert falls(check_report(facts))
    assert not facts["teaching"]["other_tokenizer"]
    assert facts["student"]["kl_to_teacher"] >= 0


@pytest.mark.slow
def test_hidden_states_of_other_depth_and_width(models, carry_out, tmp_path):
    facts = carry_out("hidden-states", *pair(models("qwen2", width=24, layers=3), models("qwen2")))
    assert falls(check_report(facts))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line) for line in lines if "share.hidden_cosine" in line]
    assert shares
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert set(saved) <= set(plain.state_dict())
    assert not any("projection" in name for name in saved)


@pytest.mark.slow
def test_gkd_with_vocabularies_padded_differently(models, carry_out, capsys):
    places = models("qwen2", width=24, rows=320), models("qwen2", rows=304)
    facts = carry_out("gkd", *pair(*places), *ON_POLICY)
    check_report(facts)
    assert not facts["teaching"]["other_tokenizer"]
    assert "the first 304 are used" in capsys.readouterr().out


@pytest.mark.slow
def test_minillm(models, carry_out):
    places = models("gpt2", width=24), models("gpt2")
    check_report(carry_out("minillm", *pair(*places), *ON_POLICY))


@pytest.mark.slow
def test_distillm(models, carry_out):
    places = models("gpt2", width=24), models("gpt2")
    check_report(carry_out("distillm", *pair(*places), *ON_POLICY))


@pytest.mark.slow
def test_minitron(models, carry_out):
    facts = carry_out(
        "minitron", f"teacher.source={models('qwen2', width=24, layers=4)}", "student.shrink.layers=3",
        "student.shrink.intermediate=32",
    )  # fmt: skip
    assert falls(check_report(facts))
    assert facts["student"]["parameters"] < facts["teacher"]["parameters"]
    assert facts["controls"]["from_scratch"]["tokens_spent"] == facts["student"]["tokens_spent"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_llama_70b_served_to_stablelm(mode, models, carry_out, tmp_path):
    teacher, student = models("llama", width=24), models("stablelm", tokens=280)
    with served(teacher) as server:
        facts = carry_out(
            "llama-70b-stablelm", *served_by(server, teacher), f"student.source={student}", "stages.0.tokens=1280",
            f"teacher.served.mode={mode}", "teacher.served.prompt_characters=40", "teacher.served.max_new_tokens=16",
        )  # fmt: skip
    check_report(facts, kind="served")
    assert facts["teaching"]["other_tokenizer"]
    assert facts["teaching"]["store_tokens"] >= 1280
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    chunks = [line["chunk_likelihood"] for line in lines if line.get("chunk_likelihood") is not None]
    assert chunks[0] > chunks[-1] > 0
    assert facts["student"]["bits_per_byte"] > 0


def test_a_served_teacher_with_other_tokens_is_not_compared_token_by_token(models, carry_out):
    teacher, student = models("llama", width=24), models("stablelm", tokens=280)
    overrides = ["stages.0.objectives=[{objective: forward_kl}]", "stages.0.tokens=256"]
    with served(teacher) as server, pytest.raises(VocabularyError, match=r"forward_kl.*chunk_likelihood"):
        carry_out("llama-70b-stablelm", *served_by(server, teacher), f"student.source={student}", *overrides)


def served(folder):
    """A stand-in for vLLM, which speaks of the tokens of this model."""
    from transformers import AutoTokenizer

    server = FakeServer(AutoTokenizer.from_pretrained(folder))
    server.shape, server.names, server.prompt_logprobs = "classic", ("token_id",), True
    return server.running()


def served_by(server, folder):
    words = {"url": server.url, "tokenizer": folder, "top_logprobs": 8, "concurrency": 2}
    return [f"teacher.served.{name}={value}" for name, value in words.items()]
