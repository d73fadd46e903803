"""The model over tokens inside transformers: Auto classes, save and load, generation in all its modes, training."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from limbeck.core.errors import CheckpointError, RecipeError
from limbeck.core.types import Batch
from limbeck.models.compact import CompactConfig, CompactForCausalLM
from limbeck.models.flops import forward_flops_per_token
from limbeck.models.heads import SplitModel
from limbeck.models.packing import forward_batch
from limbeck.nn.compact import CompactNetwork

TRUNK = {"width": 16, "layers": 4, "heads": 4, "kv_heads": 2, "feed_forward": 24}
KINDS = {
    "attention": {},
    "hyena": {"mixers": ["attention", "hyena", "hyena", "attention"]},
    "loop": {"loop": [1, 2, 2], "share_feed_forward": "interior", "share_mixers": "output"},
}
every_kind = pytest.mark.parametrize("trunk", KINDS.values(), ids=KINDS)


def config_of(trunk=None, **options):
    values = {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | options
    return CompactConfig(trunk=TRUNK | (trunk or {}), **values)


def model_of(trunk=None, *, dtype=torch.float64, **options):
    """A model in which every parameter was moved, so that it says something."""
    torch.manual_seed(0)
    model = CompactForCausalLM(config_of(trunk, **options)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def padded_prompts():
    """Three prompts of lengths 3, 5, 8, padded on the left."""
    ids_BT = torch.randint(3, 41, (3, 8), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.arange(8) >= torch.tensor([[5], [3], [0]])
    return ids_BT.masked_fill(~mask_BT, 0), mask_BT.long()


@every_kind
def test_auto_classes_save_and_load(trunk, tmp_path):
    model = model_of(trunk, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is CompactForCausalLM
    ids_BT, mask_BT = padded_prompts()
    ours, theirs = (m(ids_BT, attention_mask=mask_BT, use_cache=False).logits for m in (model, again))
    # The same weights elsewhere in memory: products of other alignment round differently.
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=0, rtol=0)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.trunk_settings == model.config.trunk_settings
    assert (config.hidden_size, config.num_hidden_layers, config.final_logit_softcapping) == (16, 4, 15.0)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size) == (
        4,
        2,
        4,
        24,
    )
    assert config.takes_document_ids


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    weights, name = load_file(tmp_path / "model.safetensors"), "network.trunk.layers.2.feed_forward.down.weight"
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"weights are missing: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(kept | {name: weights[name][1:]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, RuntimeError), match=r"shape|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="of another shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_random_start_is_the_network_s_own():
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_of(KINDS["hyena"]))
    torch.manual_seed(7)
    network = CompactNetwork(vocab_size=41, trunk=TRUNK | KINDS["hyena"])
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], tensor, atol=0, rtol=0)


@every_kind
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3, "top_k": 7},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "sample", "beams", "several beams", "several samples"],
)
def test_generation_with_a_cache_is_generation_without(trunk, options):
    model = model_of(trunk)
    ids_BT, mask_BT = padded_prompts()
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        answers.append(model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=9, use_cache=use_cache, **options))
    torch.testing.assert_close(answers[0], answers[1])
    assert answers[0].shape[1] > 8


@every_kind
def test_padding_on_the_left_changes_no_answer(trunk):
    model = model_of(trunk)
    ids_BT, mask_BT = padded_prompts()
    together = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for row, length in enumerate((3, 5, 8)):
        prompt = ids_BT[row : row + 1, 8 - length :]
        alone = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        torch.testing.assert_close(together[row, -6:], alone[0, -6:])


@every_kind
@torch.no_grad()
def test_forward_in_parts_is_one_pass(trunk):
    model = model_of(trunk)
    ids_BT, mask_BT = padded_prompts()
    whole = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
    cache = DynamicCache()
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        out = model(ids_BT[:, start:stop], attention_mask=mask_BT[:, :stop], past_key_values=cache)
        parts.append(out.logits)
        assert cache.get_seq_length() == stop
    real = mask_BT.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], atol=1e-10, rtol=1e-10)
    kept = model(ids_BT, attention_mask=mask_BT, logits_to_keep=2).logits
    torch.testing.assert_close(kept, whole[:, -2:], atol=1e-12, rtol=1e-12)


def test_assisted_decoding_goes_back():
    model, ids_BT = model_of(), padded_prompts()[0][2:]
    options = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids_BT, **options)
    torch.testing.assert_close(model.generate(ids_BT, prompt_lookup_num_tokens=3, **options), plain)
    torch.testing.assert_close(model.generate(ids_BT, assistant_model=model_of(), **options), plain)


@torch.no_grad()
def test_cropping_counts_real_tokens():
    model = model_of()
    ids_BT, mask_BT = padded_prompts()
    cache = model(ids_BT, attention_mask=mask_BT).past_key_values
    order = torch.tensor([2, 0, 1])
    cache.batch_select_indices(order)
    ids_BT, mask_BT = ids_BT[order], mask_BT[order]
    cache.crop(-4)
    assert cache.get_seq_length() == 4
    assert cache.layers[0].rows.lengths == [4, 0, 1]
    again = model(ids_BT[:, 4:], attention_mask=mask_BT, past_key_values=cache).logits
    whole = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, 4:]
    real = mask_BT[:, 4:].bool()
    torch.testing.assert_close(again[real], whole[real], atol=1e-10, rtol=1e-10)


@every_kind
@torch.no_grad()
def test_packed_documents_by_ids_or_by_positions(trunk):
    model = model_of(trunk)
    ids_BT = padded_prompts()[0][2:]
    documents_BT = torch.tensor([[4, 4, 4, 9, 9, 9, 9, 9]])
    alone = torch.cat([model(part, use_cache=False).logits for part in ids_BT.split([3, 5], dim=1)], dim=1)
    by_ids = model(ids_BT, document_ids=documents_BT).logits
    by_positions = model(ids_BT, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])).logits
    for packed in (by_ids, by_positions, forward_batch(model, Batch(ids_BT, ids_BT > 0, documents_BT)).logits):
        torch.testing.assert_close(packed, alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("softcap", [15.0, None], ids=["capped", "uncapped"])
def test_body_and_head_run_apart(tied, softcap):
    model = model_of(tie_embeddings=tied, logit_softcap=softcap)
    ids_BT = padded_prompts()[0]
    documents_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 3)
    batch = Batch(ids_BT, ids_BT >= 0, documents_BT)
    split = SplitModel(model)
    assert split.is_split
    assert [id(p) for p in split.head_parameters()] == [id(model.get_output_embeddings().weight)]
    whole_BTV = forward_batch(model, batch).logits
    torch.testing.assert_close(split.head(split.hidden(batch)), whole_BTV, atol=1e-12, rtol=1e-12)
    parts = copy.deepcopy(model)
    F.cross_entropy(whole_BTV.flatten(0, 1), ids_BT.flatten()).backward()
    split = SplitModel(parts)
    F.cross_entropy(split.head(split.hidden(batch)).flatten(0, 1), ids_BT.flatten()).backward()
    for ours, theirs in zip(parts.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-9)


def test_labels_are_shifted_and_training_keeps_no_cache():
    model = model_of(dtype=torch.float32).train()
    ids_BT = padded_prompts()[0][2:].repeat(2, 1)
    out = model(ids_BT, labels=ids_BT)
    logits_BTV = model(ids_BT, use_cache=False).logits
    expected = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert out.past_key_values is None
    assert model.eval()(ids_BT).past_key_values is None
    with torch.no_grad():
        assert model(ids_BT).past_key_values.get_seq_length() == 8
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_embeddings_can_be_given_and_resized():
    model = model_of()
    ids_BT = padded_prompts()[0][2:]
    embedded = model.get_input_embeddings()(ids_BT)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids_BT).logits)
    before = model(ids_BT).logits
    model.resize_token_embeddings(50, mean_resizing=False)
    assert model.config.vocab_size == 50
    torch.testing.assert_close(model(ids_BT).logits[..., :41], before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_operations_are_the_model_s_own_count():
    model = model_of(KINDS["loop"])
    assert forward_flops_per_token(model, 16) == model.network.flops_per_token(16)
    assert forward_flops_per_token(model, 16) > forward_flops_per_token(model_of(), 16)


def test_misuse_is_refused():
    model, ids_BT = model_of(), padded_prompts()[0]
    with pytest.raises(RecipeError, match='Did you mean "width"'):
        config_of({"widht": 3})
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids_BT, document_ids=torch.zeros_like(ids_BT), use_cache=True)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(ids_BT, attention_mask=torch.ones(3, 1, 8, 8))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="was not made for this model"):
        model(ids_BT, past_key_values=DynamicCache(config=AutoConfig.for_model("llama", num_hidden_layers=2)))
    with torch.no_grad(), pytest.raises(ValueError, match="holds 3 rows, but 1"):
        model(ids_BT[:1], past_key_values=model(ids_BT).past_key_values)
    with pytest.raises(ValueError, match="static cache is not possible"):
        model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=2, cache_implementation="static")
    hyena = model_of(KINDS["hyena"])
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be taken back"):
        hyena(ids_BT).past_key_values.crop(-1)
