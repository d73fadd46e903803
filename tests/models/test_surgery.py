import copy

import pytest
import torch
from tests.models.families import FAMILIES, LAYERS, tiny_teacher, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from limbeck.core.errors import TeacherError
from limbeck.models.surgery import AttentionSite, find_attention, head_shape, projections


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_attention(family):
    model = tiny_teacher(family)
    sites = find_attention(model)
    assert [site.layer_index for site in sites] == list(range(LAYERS))
    for site in sites:
        assert getattr(site.parent, site.attribute) is site.module
        assert model.get_submodule(site.name) is site.module
        assert "Attention" in type(site.module).__name__


def record(module: nn.Module, model: nn.Module, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module was given and what it gave, [B, T, D] each."""
    seen = []

    def hook(_module, args, kwargs, output):
        seen.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(ids_BT, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_attends_to_itself(family):
    """With a single token the attention weight is one, so the output is o(v(x))."""
    model = tiny_teacher(family)
    for site in find_attention(model):
        parts = projections(site)
        given_BTD, output_BTD = record(site.module, model, token_ids(3, 1))
        values = nn.functional.linear(given_BTD, parts.v, parts.v_bias)
        torch.testing.assert_close(
            nn.functional.linear(values, parts.o, parts.o_bias), output_BTD, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "phi3", "gpt_neox"])
def test_queries_and_keys_give_the_attention_map(family):
    """At position zero rotary embeddings turn nothing, so with all positions zero the map is softmax(q k / sqrt d)."""
    model = copy.deepcopy(tiny_teacher(family))
    model.set_attn_implementation("eager")
    site = find_attention(model)[0]
    parts = projections(site)
    ids_BT = token_ids(2, 5)
    given_BTD, _ = record(site.module, model, ids_BT)
    keep = torch.ones(5, 5).tril().bool()
    if family not in ("gpt2", "opt"):
        positions = {
            "position_ids": torch.zeros_like(ids_BT),
            "attention_mask": torch.where(keep, 0.0, -1e9)[None, None],
        }
        found = []
        handle = site.module.register_forward_hook(lambda _m, _a, output: found.append(output[1]))
        with torch.no_grad():
            model(ids_BT, use_cache=False, **positions)
        handle.remove()
        weights_BHTT = found[0]
    else:
        with torch.no_grad():
            weights_BHTT = model(ids_BT, use_cache=False, output_attentions=True).attentions[0]
    queries, keys = (
        nn.functional.linear(given_BTD, weight, bias).unflatten(-1, (parts.num_heads, parts.head_dim)).transpose(1, 2)
        for weight, bias in ((parts.q, parts.q_bias), (parts.k, parts.k_bias))
    )
    scores_BHTT = (queries @ keys.transpose(-1, -2) * parts.head_dim**-0.5).masked_fill(~keep, -1e9)
    torch.testing.assert_close(scores_BHTT.softmax(-1), weights_BHTT, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_float32_copies_of_full_head_width(family):
    model = copy.deepcopy(tiny_teacher(family)).to(torch.bfloat16)
    site = find_attention(model)[0]
    before = {name: tensor.clone() for name, tensor in site.module.state_dict().items()}
    parts = projections(site)
    width = parts.num_heads * parts.head_dim
    assert (parts.num_heads, parts.head_dim) == head_shape(site)
    for weight in (parts.q, parts.k, parts.v):
        assert (weight.shape, weight.dtype) == ((width, 32), torch.float32)
        weight.zero_()
    assert parts.o.zero_().shape == (32, width)
    for name, tensor in site.module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def build(family: str, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **options))


def test_a_model_without_attention_is_refused():
    for family in ("rwkv", "mamba"):
        model = build(family, hidden_size=16, num_hidden_layers=2)
        with pytest.raises(TeacherError, match="no attention modules"):
            find_attention(model)


def test_an_encoder_decoder_is_refused():
    options = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **options))
    with pytest.raises(TeacherError, match="encoder-decoder"):
        find_attention(model)


def test_cross_attention_is_refused():
    model = build("gpt2", n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    with pytest.raises(TeacherError, match="cross-attention"):
        find_attention(model)


def test_attention_in_some_layers_only_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    every_other = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
    model = build("jamba", use_mamba_kernels=False, **sizes, **every_other)
    with pytest.raises(TeacherError, match="layers without it: 0, 2"):
        find_attention(model)


def test_a_module_without_config_is_refused():
    with pytest.raises(TeacherError, match="not a transformers model"):
        find_attention(nn.Linear(2, 2))


class Unusual(nn.Module):
    """An attention whose projections have names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.all_in_one = nn.Linear(8, 24)
        self.o_proj = nn.Linear(8, 8)


def test_an_unknown_layout_names_its_parts():
    module = Unusual()
    with pytest.raises(TeacherError, match="all_in_one, o_proj"):
        projections(AttentionSite(0, "attn", module, module, "attn"))


def test_a_fused_projection_of_the_wrong_size_is_refused():
    module = copy.deepcopy(find_attention(tiny_teacher("gpt_neox"))[0].module)
    module.query_key_value = nn.Linear(32, 40)
    with pytest.raises(TeacherError, match="40 rows where 96"):
        projections(AttentionSite(0, "attn", module, module, "attn"))
