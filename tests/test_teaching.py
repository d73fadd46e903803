"""Every kind of teacher from recipe to report, on tiny models: what each promises, and what bad input gets."""

import json

import pytest
import torch
from tests import tiny

from limbeck import capturing, pipeline
from limbeck.core.errors import RecipeError, StoreError, VocabularyError
from limbeck.recipe import Recipe

ARCHITECTURE = {
    "model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
NO_CONTROLS = {"from_scratch": False, "copied": False, "teacher_more": False, "floor": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teaching")
    text = tiny.write_text(folder / "text.jsonl")
    teacher = tiny.make_teacher(folder / "teacher", text, train_steps=100)
    return folder, teacher, text


def recipe(place, *, stage=None, **changes):
    _, teacher, text = place
    words = tiny.recipe(teacher, text).model_dump(mode="json", exclude_unset=True)
    words["student"] = {"architecture": ARCHITECTURE}
    words["stages"] = [
        {"kind": "distil", "tokens": 1280, "batch_tokens": 128, "learning_rate": 3e-3, "clip_norm": 1.0} | (stage or {})
    ]
    words["controls"] = NO_CONTROLS
    words["evaluation"] |= {"max_tokens": 128, "sample_tokens": 1}
    return Recipe.model_validate(words | changes)


def run(place, tmp_path, *, name="run", **words):
    return pipeline.run(recipe(place, **words), run_folder=tmp_path / name, progress=False)


def curve(facts):
    return [loss for _tokens, loss in facts["student"]["stages"][0]["loss_curve"]]


@pytest.fixture(scope="module")
def stores(place):
    """A lossless store of all entries, and a small one as users make them."""
    folder, _, _ = place
    for name, capture in {"whole": {"k": 300, "values": "float32"}, "small": {"k": 8, "hidden_layers": [1]}}.items():
        words = recipe(place, capture=capture | {"rows_per_shard": 16})
        capturing.capture_recipe(words, folder=folder / name, progress=False)
    return folder / "whole", folder / "small"


def test_a_store_of_all_entries_teaches_exactly_as_the_live_teacher(place, stores, tmp_path):
    whole, _ = stores
    teacher = str(place[1])
    dense = run(place, tmp_path, name="dense")
    live = run(place, tmp_path, name="live", teacher={"source": teacher, "targets": "top_k", "top_k": 300})
    stored = run(place, tmp_path, name="stored", teacher={"store": str(whole), "source": teacher})
    assert curve(live) == curve(stored)
    torch.testing.assert_close(torch.tensor(curve(dense)), torch.tensor(curve(stored)), rtol=1e-5, atol=1e-6)
    assert curve(stored)[-1] < curve(stored)[0]
    assert stored["teaching"]["fidelity"]["mean_kl_nats"] < 1e-7


def test_a_store_alone_brings_its_tokenizer(place, stores, tmp_path):
    facts = run(place, tmp_path, teacher={"store": str(stores[1])})
    assert facts["teacher"] is None
    assert facts["teaching"]["kind"] == "store"
    assert curve(facts)[-1] < curve(facts)[0]


@pytest.mark.parametrize(
    "teacher",
    [
        {"targets": "sampled", "draws": 20},
        {"targets": "top_k", "top_k": 5},
        {"several": 2},
        {"several": 2, "texts": True},
        {"itself": {"rule": "average", "decay": 0.9}},
        {"itself": {"rule": "generation", "every": 4}},
    ],
    ids=lambda words: "-".join(words),
)
def test_live_teachers_of_every_kind(place, tmp_path, teacher):
    _, folder, text = place
    words = {}
    if "several" in teacher:
        members = [{"source": str(folder)}, {"source": str(folder), "weight": 2.0}]
        if "texts" in teacher:
            members[1]["texts"] = [1]
            words["data"] = recipe(place).model_dump(mode="json")["data"]
            words["data"]["train"] = [{"source": str(text), "weight": 1.0}, {"source": str(text), "weight": 2.0}]
        words["teacher"] = {"several": members}
    elif "itself" in teacher:
        words |= {"teacher": teacher, "tokenizer": {"source": str(folder)}, "stage": {"kl": 0.5, "ce": 0.5}}
    else:
        words["teacher"] = {"source": str(folder)} | teacher
    facts = run(place, tmp_path, **words)
    assert curve(facts)[-1] < curve(facts)[0]
    assert facts["teaching"]["kind"] in ("source", "several", "itself")


OBJECTIVES = [
    [{"objective": "jensen_shannon", "options": {"beta": 0.1}}, {"objective": "hidden_mse", "weight": 0.5}],
    [{"objective": "reverse_kl", "temperature": 2.0}, {"objective": "hidden_cosine", "layers": "last"}],
    [{"objective": "cross_entropy", "weight": {"start": 1.0, "end": 0.1}}, {"objective": "value_relation"}],
    [{"objective": "skewed_forward_kl"}, {"objective": "attention_kl", "layers": [[2, 2]]}],
]


@pytest.mark.parametrize("objectives", OBJECTIVES, ids=lambda terms: "+".join(term["objective"] for term in terms))
def test_objectives_together(place, tmp_path, objectives):
    facts = run(place, tmp_path, stage={"objectives": objectives})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for term in objectives:
        assert all(term["objective"] in line for line in lines)
    shares = [
        {k: v for k, v in line.items() if k.startswith("share.")} for line in lines if "share.cross_entropy" in line
    ]
    assert all(sum(share.values()) == pytest.approx(1) for share in shares)
    assert facts["student"]["perplexity"] > 1
    saved = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert b"projection" not in saved.replace(b"dense_projection", b"")


def test_hidden_states_from_the_store(place, stores, tmp_path):
    terms = [{"objective": "forward_kl"}, {"objective": "hidden_mse", "layers": [[1, 1]]}]
    facts = run(place, tmp_path, teacher={"store": str(stores[1])}, stage={"objectives": terms})
    assert curve(facts)[-1] < curve(facts)[0]


@pytest.mark.parametrize("objective", ["chunk_likelihood", "sorted_earth_mover"])
@pytest.mark.parametrize("origin", ["live", "stored"])
def test_a_student_with_other_tokens(place, stores, tmp_path, objective, origin):
    _, teacher, _ = place
    words = {
        "tokenizer": {"train_vocab_size": 280},
        "stage": {"objectives": [{"objective": objective}, {"objective": "cross_entropy", "weight": 0.5}]},
    }
    if origin == "stored":
        data = recipe(place).model_dump(mode="json")["data"] | {"train": [{"source": str(stores[1])}]}
        words |= {"teacher": {"store": str(stores[1])}, "data": data}
    else:
        words["teacher"] = {"source": str(teacher)}
    facts = run(place, tmp_path, **words)
    assert facts["teaching"]["other_tokenizer"]
    # The number of common borders differs from batch to batch, so the whole loss is noisy; the text's own is not.
    text = [json.loads(line)["cross_entropy"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert text[-1] < text[0]
    assert facts["student"]["kl_to_teacher"] is None


def test_losses_on_logits_between_other_tokens_are_refused_with_a_table(place, tmp_path):
    with pytest.raises(VocabularyError, match="chunk_likelihood") as caught:
        run(place, tmp_path, tokenizer={"train_vocab_size": 280})
    assert "merges or scores" in str(caught.value)


def test_a_padded_vocabulary_is_used_as_far_as_it_goes(place, tmp_path):
    """As in Qwen2.5: the same tokenizer, but rows of the embedding padded to different sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _, teacher, _ = place
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    config = AutoConfig.for_model(**ARCHITECTURE | {"vocab_size": len(tokenizer) + 20})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    words = {"student": {"source": str(tmp_path / "padded")}, "stage": {"kl": 1.0}}
    facts = run(place, tmp_path, **words)
    assert curve(facts)[-1] < curve(facts)[0]


def test_the_control_without_a_teacher_with_seeds_and_equal_flops(place, tmp_path):
    controls = NO_CONTROLS | {"from_scratch": True, "seeds": 2, "equal_flops": True}
    facts = run(place, tmp_path, controls=controls)
    assert facts["worth"]["seeds"] == 2
    assert facts["worth"]["low"] < facts["worth"]["nats"] < facts["worth"]["high"]
    assert len(facts["run"]["seeds"]) == 2
    student, equal = facts["student"], facts["controls"]["equal_flops"]
    assert equal["flops_spent"] == pytest.approx(student["flops_spent"], rel=0.15)
    assert equal["tokens_spent"] > student["tokens_spent"]
    assert any("95 %" in text for text in facts["verdict"]["teacher_needed"]["statements"])


def test_the_own_start_is_the_control_of_a_trained_student(place, tmp_path):
    _, teacher, _ = place
    facts = run(place, tmp_path, student={"source": str(teacher)})
    control = facts["controls"]["without_teacher"]
    assert control["tokens_spent"] == facts["student"]["tokens_spent"]
    assert facts["worth"]["control"] == "without_teacher"


def test_a_store_with_holes_is_found_before_training(place, tmp_path):
    small = recipe(place, capture={"tokens": 256})
    capturing.capture_recipe(small, folder=tmp_path / "holes", progress=False)
    with pytest.raises(StoreError, match="no targets for"):
        run(place, tmp_path, teacher={"store": str(tmp_path / "holes")})
    assert not list((tmp_path / "run" / "arms").glob("*/done.json")) if (tmp_path / "run" / "arms").exists() else True


def test_a_flipped_bit_and_another_teacher_are_found_before_training(place, stores, tmp_path):
    import shutil

    _, _, text = place
    other = tiny.make_teacher(tmp_path / "other", text, layers=1)
    with pytest.raises(StoreError, match="another teacher"):
        run(place, tmp_path, name="a", teacher={"store": str(stores[1]), "source": str(other)})
    shutil.copytree(stores[1], tmp_path / "flipped")
    shard = next((tmp_path / "flipped").rglob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="checksum"):
        run(place, tmp_path, name="b", teacher={"store": str(tmp_path / "flipped")})


def test_what_a_teacher_cannot_give_is_refused(place, stores, tmp_path):
    terms = [{"objective": "hidden_mse", "layers": [[1, 2]]}]
    with pytest.raises(RecipeError, match="no layer 2"):
        run(place, tmp_path, teacher={"store": str(stores[1])}, stage={"objectives": terms})


def test_a_self_taught_run_goes_on_bit_for_bit(place, tmp_path):
    """The moving average is part of the checkpoint."""
    from limbeck.core.runtime import StopRequest
    from limbeck.train import trainer

    words = {
        "teacher": {"itself": {"decay": 0.9}},
        "tokenizer": {"source": str(place[1])},
        "stage": {"kl": 0.5, "ce": 0.5},
    }
    whole = run(place, tmp_path, name="whole", **words)
    real = trainer._Stage.update

    def interrupted(self, first_sample):
        loss = real(self, first_sample)
        if self.step == 4:
            stops[0].exit_code = 130
        return loss

    stops = [StopRequest()]
    original = pipeline.stop_on_signals
    from contextlib import contextmanager

    @contextmanager
    def with_ours():
        yield stops[0]

    pipeline.stop_on_signals, trainer._Stage.update = with_ours, interrupted
    try:
        with pytest.raises(SystemExit):
            run(place, tmp_path, name="stopped", **words)
    finally:
        pipeline.stop_on_signals, trainer._Stage.update = original, real
    again = run(place, tmp_path, name="stopped", **words)
    assert curve(again) == curve(whole)
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == two


def test_a_smaller_copy_of_the_teacher(place, tmp_path):
    from transformers import AutoModelForCausalLM

    facts = run(place, tmp_path, student={"shrink": {"layers": 1, "intermediate": 0.5}, "calibration_tokens": 256})
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config
    assert (config.num_hidden_layers, config.intermediate_size) == (1, 32)
    assert facts["student"]["parameters"] < facts["teacher"]["parameters"]
    assert facts["controls"]["without_teacher"]["perplexity"] > 1
    assert curve(facts)[-1] < curve(facts)[0]


@pytest.mark.parametrize(
    ("on_policy", "objectives"),
    [
        ({"method": "mixed", "share": 0.5}, [{"objective": "jensen_shannon"}]),
        ({"method": "adaptive", "buffer": 8}, [{"objective": "skewed_forward_kl"}]),
        ({"method": "minillm"}, [{"objective": "reverse_kl"}, {"objective": "cross_entropy"}]),
    ],
    ids=["mixed", "adaptive", "minillm"],
)
def test_learning_on_the_own_writing(place, tmp_path, on_policy, objectives):
    words = {"prompt_tokens": 8, "max_new_tokens": 8} | on_policy
    facts = run(place, tmp_path, stage={"objectives": objectives, "on_policy": words, "tokens": 512})
    assert all(loss == loss for loss in curve(facts))
    assert facts["student"]["tokens_spent"] == 512


def test_exact_predictions_in_the_first_merges_of_the_teacher(place, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _, teacher, _ = place
    pipeline_words = json.loads(AutoTokenizer.from_pretrained(teacher).backend_tokenizer.to_str())
    merges = pipeline_words["model"]["merges"][:10]
    kept = 257 + len(merges)  # the end token, all bytes, the first merges
    pipeline_words["model"] |= {"merges": merges}
    vocabulary = pipeline_words["model"]["vocab"]
    pipeline_words["model"]["vocab"] = {name: place for name, place in vocabulary.items() if place < kept}
    from tokenizers import Tokenizer

    student = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(pipeline_words)), eos_token="<|endoftext|>",
        bos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    student.save_pretrained(tmp_path / "tokens")
    facts = run(
        place, tmp_path, teacher={"source": str(teacher), "exact": True}, tokenizer={"source": str(tmp_path / "tokens")},
        stage={"tokens": 256, "batch_tokens": 64},
    )  # fmt: skip
    assert facts["teaching"]["other_tokenizer"]
    assert curve(facts)[-1] < curve(facts)[0]


def test_a_closed_teacher_beside_a_control_that_reads_the_text_itself(place, tmp_path):
    from tests.teachers.fake_server import TEMPLATE, FakeServer
    from transformers import AutoTokenizer

    _, teacher, _ = place
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = TEMPLATE
    server = FakeServer(tokenizer)
    with server.running():
        closed = {
            "url": server.url,
            "model": "m",
            "max_new_tokens": 8,
            "answers": 24,
            "input_price": 1.0,
            "output_price": 2.0,
        }
        facts = run(
            place, tmp_path, teacher={"closed": closed}, tokenizer={"source": str(teacher)},
            controls=NO_CONTROLS | {"from_scratch": True}, stage={"kind": "tune"},
        )  # fmt: skip
    assert facts["teaching"]["store_teacher"]["usage"]["cost"] > 0
    assert facts["student"]["perplexity"] != facts["controls"]["from_scratch"]["perplexity"]


@pytest.mark.parametrize("weight", [0.0, {"start": 0.0, "end": 0.0}])
def test_weights_of_nothing_are_refused(place, weight):
    with pytest.raises(ValueError, match="nothing to learn from"):
        recipe(place, stage={"objectives": [{"objective": "forward_kl", "weight": weight}]})
