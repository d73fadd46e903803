"""A model as a teacher: what it hands over is what the model itself says."""

import copy
from importlib.util import find_spec

import pytest
import torch
from tests.models.families import FAMILIES, VOCABULARY, tiny_teacher, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.errors import EnvironmentFault, RecipeError, TeacherError, TrainingError
from limbeck.core.types import Batch, DenseTargets, SparseTargets
from limbeck.models import large
from limbeck.models.hybrid import build_student
from limbeck.models.large import offload_blocks
from limbeck.models.packing import forward_batch
from limbeck.models.tokenizers import train_tokenizer
from limbeck.teachers.base import TargetSource, Wanted
from limbeck.teachers.entries import Dense, Sampled, TopK
from limbeck.teachers.live import LiveTeacher, load_live_model


def batch_of(rows=3, length=11, *, packed=True):
    ids_BT = token_ids(rows, length)
    documents_BT = torch.zeros_like(ids_BT)
    documents_BT[:, 4:] = 1
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    return Batch(ids_BT, mask_BT, documents_BT if packed else None)


def dense_logits(targets):
    assert isinstance(targets.logits, DenseTargets)
    return targets.logits.head(targets.logits.hidden_BTD.flatten(0, 1)).unflatten(
        0, targets.logits.hidden_BTD.shape[:2]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_targets_are_the_models_logits(family):
    model, batch = tiny_teacher(family), batch_of()
    source = LiveTeacher(model, name=family)
    assert isinstance(source, TargetSource)
    assert (source.name, source.vocabulary_size, source.entries) == (family, VOCABULARY, Dense())
    targets = source.targets(batch)
    with torch.no_grad():
        expected_BTV = forward_batch(model, batch).logits
    torch.testing.assert_close(dense_logits(targets), expected_BTV, atol=2e-6, rtol=1e-6)
    assert (dict(targets.hidden), dict(targets.features), targets.aligned) == ({}, {}, None)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_top_k_targets_are_the_models_likeliest(chunk_tokens):
    model, batch = tiny_teacher("qwen3"), batch_of()
    sparse = LiveTeacher(model, entries=TopK(7), chunk_tokens=chunk_tokens).targets(batch).logits
    assert isinstance(sparse, SparseTargets)
    with torch.no_grad():
        logp_BTV = forward_batch(model, batch).logits.log_softmax(-1)
    values, ids = logp_BTV.topk(7)
    torch.testing.assert_close(sparse.ids_BTK, ids)
    torch.testing.assert_close(sparse.log_probs_BTK, values)
    rest_BT = logp_BTV.scatter(-1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(sparse.tail_log_prob_BT, rest_BT)


def test_no_head_sees_more_positions_than_a_chunk():
    model = tiny_teacher("llama")
    source = LiveTeacher(model, entries=TopK(4), chunk_tokens=6)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(output.numel() // VOCABULARY))
    source.targets(batch_of())
    handle.remove()
    assert max(seen) == 6
    assert sum(seen) == 1 + 33


def test_sampled_targets_do_not_depend_on_the_rows_beside():
    source = LiveTeacher(tiny_teacher("llama"), entries=Sampled(12, seed=3))
    batch = batch_of()
    whole = source.targets(batch).logits
    assert isinstance(whole, SparseTargets)
    assert whole.weights_BTK is not None
    torch.testing.assert_close(whole.weights_BTK.sum(-1), torch.ones(3, 11))
    assert batch.document_ids_BT is not None
    alone = source.targets(Batch(batch.input_ids_BT[1:2], batch.loss_mask_BT[1:2], batch.document_ids_BT[1:2])).logits
    assert isinstance(alone, SparseTargets)
    torch.testing.assert_close(alone.ids_BTK, whole.ids_BTK[1:2], atol=0, rtol=0)
    torch.testing.assert_close(alone.weights_BTK, whole.weights_BTK[1:2])
    again = LiveTeacher(tiny_teacher("llama"), entries=Sampled(12, seed=4)).targets(batch).logits
    assert (again.ids_BTK != whole.ids_BTK).any()


@pytest.mark.parametrize("entries", [Dense(), TopK(5), Sampled(5)])
def test_nothing_has_a_gradient(entries):
    model = copy.deepcopy(tiny_teacher("llama")).train()
    source = LiveTeacher(model, entries=entries)
    assert not model.training
    targets = source.targets(batch_of())
    with torch.enable_grad():
        tensors = (
            [dense_logits(targets)]
            if isinstance(entries, Dense)
            else [targets.logits.log_probs_BTK, targets.logits.tail_log_prob_BT]
        )
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_padded_vocabularies_are_cut_before_normalising():
    model, batch = tiny_teacher("llama"), batch_of()
    kept = LiveTeacher(model, entries=TopK(90), vocabulary_size=90).targets(batch).logits
    assert isinstance(kept, SparseTargets)
    assert int(kept.ids_BTK.max()) < 90
    assert (kept.tail_log_prob_BT == -torch.inf).all()
    torch.testing.assert_close(kept.log_probs_BTK.exp().sum(-1), torch.ones(3, 11))
    with pytest.raises(ValueError, match="k is 91, but the vocabulary has 90 tokens"):
        LiveTeacher(model, entries=TopK(91), vocabulary_size=90)


@pytest.mark.parametrize("logits", [True, False])
def test_hidden_states_and_features_come_along(logits):
    model, batch = tiny_teacher("llama"), batch_of(packed=False)
    source = LiveTeacher(model)
    source.prepare(Wanted(logits=logits, hidden=(0, 1), features=("values.2",)))
    targets = source.targets(batch)
    with torch.no_grad():
        output = model(input_ids=batch.input_ids_BT, output_hidden_states=True)
    assert sorted(targets.hidden) == [0, 1]
    for layer, states_BTD in targets.hidden.items():
        torch.testing.assert_close(states_BTD, output.hidden_states[layer])
    assert targets.features["values.2"].shape == (3, 11, 16)
    if logits:
        torch.testing.assert_close(dense_logits(targets), output.logits, atol=2e-6, rtol=1e-6)
    else:
        assert targets.logits is None
    source.prepare(Wanted())
    assert not source.targets(batch).hidden


def test_what_a_model_cannot_give_is_refused():
    source = LiveTeacher(tiny_teacher("llama"), name="tiny")
    with pytest.raises(TeacherError, match="the teacher tiny gives features, hidden, logits, but .* aligned"):
        source.prepare(Wanted(aligned=True))
    with pytest.raises(RecipeError, match="no hidden states of layer 9"):
        source.prepare(Wanted(hidden=(9,)))


def test_a_hybrid_teaches_too():
    student = build_student(tiny_teacher("gemma2"), mixers=["hyena", "attention"], hyena={}).eval()
    batch = batch_of()
    with torch.no_grad():
        expected_BTV = forward_batch(student, batch).logits
    torch.testing.assert_close(dense_logits(LiveTeacher(student).targets(batch)), expected_BTV, atol=2e-6, rtol=1e-6)


def test_a_teacher_that_gives_no_numbers():
    model = copy.deepcopy(tiny_teacher("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not numbers"):
        LiveTeacher(model, entries=TopK(2)).targets(batch_of())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_offloaded_blocks_give_the_same(family):
    plain, batch = tiny_teacher(family), batch_of()
    model = copy.deepcopy(plain)
    offload_blocks(model, torch.device("cpu"))
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert len(away) > 5
    assert not model.get_output_embeddings().weight.is_meta
    for entries in (Dense(), TopK(5)):
        here, there = (LiveTeacher(each, entries=entries) for each in (plain, model))
        there.prepare(Wanted(hidden=(1,)))
        here.prepare(Wanted(hidden=(1,)))
        one, other = here.targets(batch), there.targets(batch)
        torch.testing.assert_close(other.hidden[1], one.hidden[1], atol=0, rtol=0)
        if isinstance(entries, Dense):
            torch.testing.assert_close(dense_logits(other), dense_logits(one), atol=0, rtol=0)
        else:
            torch.testing.assert_close(other.logits.log_probs_BTK, one.logits.log_probs_BTK, atol=0, rtol=0)


def test_what_is_outside_the_blocks_moves_to_the_device():
    model = copy.deepcopy(tiny_teacher("llama"))
    offload_blocks(model, torch.device("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.model.rotary_emb.buffers())


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer(["one two three", "four five"], vocab_size=262)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_model_is_loaded_offloaded(folder):
    plain, offloaded = load_live_model(folder), load_live_model(folder, offload=True)
    assert plain.fingerprint == offloaded.fingerprint
    assert next(offloaded.model.model.layers[0].parameters()).is_meta
    batch = batch_of()
    one, other = (dense_logits(LiveTeacher(loaded.model).targets(batch)) for loaded in (plain, offloaded))
    torch.testing.assert_close(other, one, atol=0, rtol=0)


@pytest.mark.parametrize(("word", "package"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_quantising_without_its_packages_says_what_to_install(folder, word, package, monkeypatch):
    monkeypatch.setattr(large, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=rf"{word} needs .*{package}.*pip install {package}.*offload"):
        load_live_model(folder, quantise=word)


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_a_quantised_teacher_is_near_the_whole_one(folder, word):
    if find_spec("bitsandbytes") is None and (word == "int4" or find_spec("torchao") is None):
        pytest.skip("needs bitsandbytes, or torchao for int8")
    batch = batch_of()
    whole, few = load_live_model(folder), load_live_model(folder, quantise=word)
    assert whole.fingerprint != few.fingerprint
    one, other = (dense_logits(LiveTeacher(loaded.model).targets(batch)).log_softmax(-1) for loaded in (whole, few))
    kl_nats = (one.exp() * (one - other)).sum(-1).mean()
    assert 0 < kl_nats < {"int8": 0.01, "int4": 0.5}[word]


def test_words_that_do_not_go_together(folder, tmp_path):
    with pytest.raises(RecipeError, match='unknown quantisation "int9"'):
        load_live_model(folder, quantise="int9")
    with pytest.raises(TeacherError, match="quantise and offload exclude each other"):
        load_live_model(folder, quantise="int8", offload=True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(TeacherError, match="a GGUF file is dequantised on loading"):
        load_live_model(str(tmp_path / "model.gguf"), quantise="int8")
