"""Students that read bytes, from recipe to report: trained alone, taught through the trie, from stores, and by stretches."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck import pipeline
from limbeck.capturing import capture_recipe
from limbeck.core.errors import CheckpointError, DataError, LimbeckError, VocabularyError
from limbeck.core.symbols import BOS, EOD, EOP
from limbeck.evaluation import evaluate_place
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.recipe import Recipe
from limbeck.recipe_io import load_recipe
from limbeck.writing import generate_from

SMALL_TRUNK = {"width": 16, "layers": 2, "heads": 1, "kv_heads": 1, "feed_forward": 32}
SMALL = {"local_width": 16, "local_heads": 1, "local_feed_forward": 32, "trunk": SMALL_TRUNK}
STUDENT = {"size": "bytepool-10m", "architecture": SMALL, "initialisation": "random"}
OFF = {"from_scratch": False, "copied": False, "teacher_more": False, "floor": False}
TUNE = {"kind": "tune", "tokens": 2560, "batch_tokens": 256, "learning_rate": 3e-3, "optimizer": "muon"}
DISTIL = TUNE | {"kind": "distil", "kl": 0.7, "ce": 0.3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    return tiny.make_teacher(tmp_path_factory.mktemp("teacher") / "model", text, train_steps=30)


def recipe(place, text, *, store=None, **changes):
    data = {
        "train": [{"source": str(text), "split": "train"}], "heldout": [{"source": str(text), "split": "heldout"}],
        "context_tokens": 64,
    }  # fmt: skip
    words = {"student": STUDENT, "data": data, "controls": OFF, "tokenizer": {"segmenter": "space"}, "stages": [TUNE]}
    found = tiny.recipe(place, text, **words | changes)
    if store is None:
        return found
    return Recipe.model_validate(found.model_dump() | {"teacher": {"store": str(store)}})


def run(words, folder):
    return pipeline.run(words, run_folder=folder, progress=False)


def losses(facts):
    return [loss for _, loss in facts["student"]["stages"][0]["loss_curve"]]


def test_bytes_alone_from_recipe_to_text(text, tmp_path):
    facts = run(recipe(None, text), tmp_path / "run")
    assert losses(facts)[-1] < losses(facts)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.patch_bytes) == (BOS, EOD, 16)
    assert 2 < model.config.mean_patch_bytes < 10
    scored = evaluate_place(str(tmp_path / "run"))["texts"][0]
    assert scored["bits_per_byte"] == pytest.approx(facts["student"]["bits_per_byte"])
    assert scored["tokens"] > scored["bytes"]
    assert isinstance("".join(generate_from(str(tmp_path / "run"), "Ada met", max_new_tokens=12)), str)


def test_a_stopped_run_of_bytes_ends_with_the_same_weights(text, tmp_path, monkeypatch):
    words = recipe(None, text, stages=[TUNE | {"patch_curriculum": [{"share": 0.5, "symbols": 3}], "ema_decay": 0.9}])
    whole = run(words, tmp_path / "whole")
    original, calls = pipeline.train_stage, []

    def stopping(lesson, *args, **options):
        options["stop"].exit_code = 130 if not calls else None
        calls.append(1)
        return original(lesson, *args, **options)

    monkeypatch.setattr(pipeline, "train_stage", stopping)
    with pytest.raises(SystemExit):
        run(words, tmp_path / "cut")
    monkeypatch.setattr(pipeline, "train_stage", original)
    run(words, tmp_path / "cut")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole["student"]["parameters"] == sum(tensor.numel() for tensor in one.values())


def test_the_trie_teaches_and_the_control_has_the_same_budget(teacher, text, tmp_path):
    words = recipe(
        teacher, text, tokenizer={"segmenter": "teacher"}, stages=[DISTIL], controls=OFF | {"from_scratch": True}
    )
    facts = run(words, tmp_path / "run")
    assert facts["teaching"]["other_tokenizer"]
    assert facts["worth"]["control"] == "from_scratch"
    assert facts["controls"]["from_scratch"]["tokens_spent"] == facts["student"]["tokens_spent"]
    assert losses(facts)[-1] < losses(facts)[0]


def test_whole_tokens_are_followed_through_the_trie(teacher, text, tmp_path):
    objectives = [
        {"objective": "byte_trie", "weight": 0.5, "options": {"paths": 4}}, {"objective": "cross_entropy", "weight": 0.5},
    ]  # fmt: skip
    stage = {key: value for key, value in DISTIL.items() if key not in ("kl", "ce")} | {"objectives": objectives}
    words = recipe(teacher, text, tokenizer={"segmenter": "teacher"}, stages=[stage])
    facts = run(words, tmp_path / "run")
    assert losses(facts)[-1] < losses(facts)[0]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["byte_trie"] > 0 for line in logged if "byte_trie" in line)
    assert any("byte_trie" in line for line in logged)


def test_a_store_of_symbols_teaches_as_the_live_teacher_does(teacher, text, tmp_path):
    bytes_ = {"segmenter": "teacher"}
    stages = [DISTIL | {"tokens": 1280}]
    capture = {"k": 260, "values": "float32", "check_rows": 1}
    live = recipe(teacher, text, tokenizer=bytes_, stages=stages, capture=capture)
    facts = capture_recipe(live, folder=tmp_path / "store", progress=False)
    assert facts["finished"]
    stored = recipe(
        teacher,
        text,
        store=tmp_path / "store",
        tokenizer=bytes_,
        stages=stages,
    )
    one, other = run(live, tmp_path / "live"), run(stored, tmp_path / "stored")
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)
    assert not other["teaching"]["other_tokenizer"]


def test_a_store_of_tokens_teaches_whole_tokens(teacher, text, tmp_path):
    tokens = tiny.recipe(teacher, text, capture={"k": 16, "tokens": 2048, "check_rows": 1})
    capture_recipe(tokens, folder=tmp_path / "store", progress=False)
    objectives = [
        {"objective": "byte_trie", "weight": 0.5, "options": {"paths": 4}}, {"objective": "cross_entropy", "weight": 0.5},
    ]  # fmt: skip
    stage = {key: value for key, value in DISTIL.items() if key not in ("kl", "ce")} | {"objectives": objectives}
    data = {
        "train": [{"source": str(tmp_path / "store"), "split": "all"}], "context_tokens": 64,
        "heldout": [{"source": str(text), "split": "heldout"}],
    }  # fmt: skip
    words = recipe(
        teacher,
        text,
        store=tmp_path / "store",
        tokenizer={"segmenter": "teacher"},
        stages=[stage],
        data=data,
    )
    facts = run(words, tmp_path / "run")
    assert losses(facts)[-1] < losses(facts)[0]


def test_bytes_cut_elsewhere_learn_from_stretches(teacher, text, tmp_path):
    objectives = [{"objective": "chunk_likelihood"}, {"objective": "cross_entropy", "weight": 0.5}]
    stage = {key: value for key, value in DISTIL.items() if key not in ("kl", "ce")} | {"objectives": objectives}
    facts = run(recipe(teacher, text, stages=[stage]), tmp_path / "run")
    assert losses(facts)[-1] < losses(facts)[0]


@pytest.mark.parametrize("segmenter", ["fixed:4", "ngram_entropy", "trained"])
def test_other_rules_of_cutting(segmenter, text, tmp_path):
    words = {"segmenter": segmenter} | ({"train_vocab_size": 300} if segmenter == "trained" else {})
    facts = run(recipe(None, text, tokenizer=words, stages=[TUNE | {"tokens": 512}]), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = tokenizer("Ada met Bo. é🙂", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode_bytes(ids) == "Ada met Bo. é🙂".encode()
    assert ids[-1] == EOP
    assert facts["student"]["bits_per_byte"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytepool-10m", "bpe-10m", "byte-trie"])
def test_presets_train_resume_and_write(name, teacher, text, tmp_path):
    sizes = [f"student.architecture={json.dumps({'trunk': SMALL_TRUNK})}"]
    if name != "bpe-10m":
        sizes = [f"student.architecture={json.dumps(SMALL)}"]
    sources = [f"data.{part}=[{{source: {text}, split: {part}}}]" for part in ("train", "heldout")]
    overrides = [
        *sizes, *sources, "data.context_tokens=64", "stages.0.batch_tokens=256", "stages.0.tokens=2560",
        "stages.0.micro_batch_sequences=2", "evaluation.max_tokens=512", "evaluation.speed={context_lengths: [32], decode_tokens: 2}",
        "evaluation.prompts=[Ada met]", "evaluation.sample_tokens=4", "runtime.device=cpu", "runtime.threads=1",
        *([f"teacher.source={teacher}"] if name == "byte-trie" else []),
        *(["tokenizer.train_vocab_size=300"] if name == "bpe-10m" else []),
    ]  # fmt: skip
    words = load_recipe(name, overrides)
    facts = run(words, tmp_path / "run")
    assert losses(facts)[-1] < losses(facts)[0]
    assert facts["speed"]["rows"][0]["student"]["decode_seconds_per_token"] > 0
    assert run(words, tmp_path / "run") == facts


def test_a_text_to_be_judged_on_that_cannot_be_read_is_told_of_before_training(text, tmp_path):
    words = recipe(None, text, evaluation={"texts": [{"source": str(tmp_path / "nowhere.txt")}], "max_tokens": 256})
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        run(words, tmp_path / "run")
    assert not (tmp_path / "run" / "arms").exists()


def test_a_folder_where_nothing_was_trained_may_be_taken_by_a_corrected_recipe(text, tmp_path):
    folder = tmp_path / "run"
    wrong = recipe(None, text, tokenizer={"segmenter": "fixed:4"}, data={
        "train": [{"source": str(text), "split": "train"}], "heldout": [{"source": str(tmp_path / "none.txt")}], "context_tokens": 64,
    })  # fmt: skip
    with pytest.raises(LimbeckError):
        run(wrong, folder)
    run(recipe(None, text, stages=[TUNE | {"tokens": 512}]), folder)
    assert AutoTokenizer.from_pretrained(folder / "model").segmenter.name == "space"
    with pytest.raises(CheckpointError, match="another recipe"):
        run(recipe(None, text, tokenizer={"segmenter": "fixed:4"}), folder)


@pytest.fixture(scope="module")
def byte_teacher(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "run"
    run(recipe(None, text, stages=[TUNE | {"tokens": 512}]), folder)
    return folder / "model"


def test_a_teacher_of_bytes_is_captured_and_teaches_symbol_by_symbol(byte_teacher, text, tmp_path):
    """Both at the teacher's borders: they share their symbols, live and stored."""
    stages = [DISTIL | {"tokens": 1280}]
    capture = {"k": 260, "values": "float32", "check_rows": 1}
    live = recipe(byte_teacher, text, tokenizer={"segmenter": "teacher"}, stages=stages, capture=capture)
    assert capture_recipe(live, folder=tmp_path / "store", progress=False)["finished"]
    stored = recipe(byte_teacher, text, store=tmp_path / "store", tokenizer={"segmenter": "teacher"}, stages=stages)
    one, other = run(live, tmp_path / "live"), run(stored, tmp_path / "stored")
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)
    assert not one["teaching"]["other_tokenizer"]


def test_what_a_teacher_of_bytes_does_not_know_is_refused_with_the_way_out(byte_teacher, text, tmp_path):
    stage = {key: value for key, value in DISTIL.items() if key not in ("kl", "ce")}
    trie = [{"objective": "byte_trie"}, {"objective": "cross_entropy"}]
    words = {"tokenizer": {"segmenter": "teacher"}, "stages": [stage | {"objectives": trie}]}
    with pytest.raises(VocabularyError, match="predicts symbols as this student does.*forward_kl"):
        run(recipe(byte_teacher, text, **words), tmp_path / "trie")
    shorter = STUDENT | {"architecture": SMALL | {"patch_bytes": 8}}
    words = {"tokenizer": {"segmenter": "teacher"}, "student": shorter, "stages": [DISTIL]}
    with pytest.raises(VocabularyError, match="in patches of 16 symbols.*the student's have 8"):
        run(recipe(byte_teacher, text, **words), tmp_path / "short")
