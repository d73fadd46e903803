"""A smaller copy is the original with what was left out doing nothing, and what is left out is what mattered least."""

import copy
import json

import pytest
import torch
from tests.models.families import FAMILIES, VOCABULARY, tiny_teacher, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import DataError, RecipeError, TeacherError
from limbeck.core.types import Batch
from limbeck.models.anatomy import find_layers
from limbeck.models.features import record_features
from limbeck.models.hybrid import build_student
from limbeck.models.packing import forward_batch
from limbeck.models.shrink import ShrinkPlan, plan_shrinking, shrink_model, shrunk_config

LAYERS = 4
NEURONS = {"gpt2": 128}
DOWN = {"gpt_neox": "mlp.dense_4h_to_h", "gpt2": "mlp.c_proj", "opt": "fc2", "phi": "mlp.fc2"}
INTO = {
    "gpt_neox": ["mlp.dense_h_to_4h"], "gpt2": ["mlp.c_fc"], "opt": ["fc1"], "phi": ["mlp.fc1"],
    "phi3": ["mlp.gate_up_proj"],
}  # fmt: skip

every_family = pytest.mark.parametrize("family", FAMILIES)


def teacher_of(family, *, dtype=torch.float64, layers=LAYERS):
    return copy.deepcopy(tiny_teacher(family, layers=layers)).to(dtype)


def batch_of(rows=3, length=12, *, seed=0):
    """Packed rows of which about half of the tokens are scored."""
    ids_BT = token_ids(rows, length, seed=seed)
    documents_BT = torch.zeros_like(ids_BT)
    documents_BT[1, 5:] = 1
    mask_BT = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask_BT[:, 0] = False
    return Batch(ids_BT, mask_BT, documents_BT)


def down_of(model, family, layer):
    return find_layers(model)[layer].block.get_submodule(DOWN.get(family, "mlp.down_proj"))


def logits_of(model, ids_BT=None):
    with torch.no_grad():
        return model(token_ids(2, 12, seed=5) if ids_BT is None else ids_BT).logits


def some_neurons(family, layer, count):
    order = torch.randperm(NEURONS.get(family, 48), generator=torch.Generator().manual_seed(layer))
    return tuple(sorted(order[:count].tolist()))


def without_neurons(model, family, kept):
    """The model with columns of its down projections set to zero, so that what those neurons say is not heard."""
    silent = copy.deepcopy(model)
    for layer, neurons in kept.items():
        down = down_of(silent, family, layer)
        weight_DI = down.weight.T if isinstance(down, Conv1D) else down.weight
        with torch.no_grad():
            for neuron in set(range(weight_DI.shape[1])) - set(neurons):
                weight_DI[:, neuron] = 0
    return silent


def without_layers(model, dropped):
    """The model with some blocks handing on what they were given."""
    bypassed = copy.deepcopy(model)

    def hand_on(_module, args, kwargs, output):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    for layer in dropped:
        find_layers(bypassed)[layer].block.register_forward_hook(hand_on, with_kwargs=True)
    return bypassed


@every_family
def test_a_copy_of_everything_gives_the_same_logits(family):
    model = tiny_teacher(family)
    plan = plan_shrinking(model, [], layers=1.0, intermediate=1.0)
    assert plan == ShrinkPlan((0, 1))
    torch.testing.assert_close(logits_of(shrink_model(model, plan)), logits_of(model), atol=0, rtol=0)
    every_neuron = tuple(range(NEURONS.get(family, 48)))
    copied = shrink_model(model, ShrinkPlan((0, 1), (every_neuron, every_neuron)))
    torch.testing.assert_close(logits_of(copied), logits_of(model), atol=0, rtol=0)


@every_family
@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 2), (3,)])
def test_a_layer_left_out_is_a_layer_bypassed(family, kept):
    model = teacher_of(family)
    student = shrink_model(model, ShrinkPlan(kept))
    assert type(student) is type(model)
    assert student.config.num_hidden_layers == len(find_layers(student)) == len(kept)
    expected = logits_of(without_layers(model, set(range(LAYERS)) - set(kept)))
    torch.testing.assert_close(logits_of(student), expected, atol=0, rtol=0)


@every_family
def test_neurons_left_out_are_neurons_silenced(family):
    model = teacher_of(family)
    kept = {layer: some_neurons(family, layer, 17) for layer in range(LAYERS)}
    student = shrink_model(model, ShrinkPlan(tuple(range(LAYERS)), tuple(kept.values())))
    expected = logits_of(without_neurons(model, family, kept))
    torch.testing.assert_close(logits_of(student), expected, atol=1e-6, rtol=1e-6)
    assert (expected - logits_of(model)).abs().max() > 0.01


@every_family
def test_layers_and_neurons_together_saved_and_read_again(family, tmp_path):
    model = teacher_of(family, dtype=torch.float32)
    kept = {0: some_neurons(family, 0, 20), 1: some_neurons(family, 1, 20), 3: some_neurons(family, 3, 20)}
    student = shrink_model(model, ShrinkPlan((0, 1, 3), tuple(kept.values())))
    expected = logits_of(without_layers(without_neurons(model, family, kept), [2]))
    torch.testing.assert_close(logits_of(student), expected, atol=2e-4, rtol=1e-4)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(logits_of(again), logits_of(student), atol=0, rtol=0)
    words = AutoConfig.from_pretrained(tmp_path)
    assert words.num_hidden_layers == 3
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        assert words.layer_types == [types[0], types[1], types[3]]


@every_family
def test_it_decodes_step_by_step_with_a_cache(family):
    student = shrink_model(teacher_of(family), ShrinkPlan((1, 3)))
    ids_BT = token_ids(1, 10)
    whole_BTV = logits_of(student, ids_BT)
    cache = None
    with torch.no_grad():
        for position in range(10):
            out = student(ids_BT[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            torch.testing.assert_close(out.logits[:, 0], whole_BTV[:, position], atol=1e-5, rtol=1e-5)


@every_family
def test_sizes_can_be_told_from_the_configuration_alone(family):
    model = tiny_teacher(family, layers=LAYERS)
    before = copy.deepcopy(model.config.to_dict())
    config = shrunk_config(model.config, layers=0.5, intermediate=20)
    student = shrink_model(model, plan_shrinking(model, [batch_of()], layers=2, intermediate=20, layer_rule="first"))
    assert {**config.to_dict(), "dtype": "float32"} == student.config.to_dict()
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    assert sum(part.numel() for part in bare.parameters()) == sum(part.numel() for part in student.parameters())
    assert model.config.to_dict() == before


@every_family
def test_neurons_that_never_fire_are_left_out(family):
    """Zero rows into some neurons of each layer: they say nothing, are left out, and nothing else changes."""
    model, width = teacher_of(family), NEURONS.get(family, 48)
    alive = [some_neurons(family, layer, 30) for layer in range(LAYERS)]
    for layer, neurons in enumerate(alive):
        block = find_layers(model)[layer].block
        silent = sorted(set(range(width)) - set(neurons))
        for name in INTO.get(family, ["mlp.gate_proj", "mlp.up_proj"]):
            linear = block.get_submodule(name)
            places = silent + [width + place for place in silent] if name == "mlp.gate_up_proj" else silent
            with torch.no_grad():
                (linear.weight.T if isinstance(linear, Conv1D) else linear.weight)[places] = 0
                if linear.__dict__["_parameters"].get("bias") is not None:
                    linear.bias[places] = 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_shrinking(model, [batch_of(8, 30)], layers=None, intermediate=30)
    assert plan.neurons == tuple(alive)
    torch.testing.assert_close(logits_of(shrink_model(model, plan)), logits_of(model), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma3_text", "phi"])
def test_block_influence_is_one_minus_the_cosine_at_scored_positions(family):
    model, batches = teacher_of(family), [batch_of(), batch_of(2, 9, seed=1)]
    plan = plan_shrinking(model, batches, layers=2, intermediate=None)
    expected = []
    for layer in range(LAYERS):
        cosines = []
        for batch in batches:
            with torch.no_grad():
                hidden = record_features(model, batch, hidden=[layer, layer + 1]).hidden
            for row, position in (batch.loss_mask_BT[:, 1:]).nonzero().tolist():
                before, after = hidden[layer][row, position], hidden[layer + 1][row, position]
                cosines.append(before @ after / (before.norm() * after.norm()))
        expected.append(1 - float(sum(cosines)) / len(cosines))
    torch.testing.assert_close(plan.block_influence, tuple(expected), atol=1e-9, rtol=1e-9)
    assert plan.layers == tuple(sorted(sorted(range(LAYERS), key=lambda layer: -expected[layer])[:2]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "phi3"])
def test_neurons_are_ranked_by_their_mean_size_at_scored_positions(family):
    model, batches = teacher_of(family), [batch_of(), batch_of(2, 9, seed=1)]
    plan = plan_shrinking(model, batches, layers=None, intermediate=0.25)
    fed = []
    for layer in range(LAYERS):
        down_of(model, family, layer).register_forward_pre_hook(
            lambda _m, args, into=layer: fed.append((into, args[0]))
        )
    sizes = [[0.0] * NEURONS.get(family, 48) for _ in range(LAYERS)]
    for batch in batches:
        fed.clear()
        for row in range(len(batch.input_ids_BT)):
            forward_batch(model, row_of(batch, row))
        for number, (layer, seen) in enumerate(fed):
            seen_TI = seen.detach().reshape(-1, seen.shape[-1])
            for position in batch.loss_mask_BT[number // LAYERS, 1:].nonzero()[:, 0].tolist():
                sizes[layer] = [
                    old + abs(new) for old, new in zip(sizes[layer], seen_TI[position].tolist(), strict=True)
                ]
    for layer, kept in enumerate(plan.neurons):
        ranked = sorted(range(len(sizes[layer])), key=lambda neuron: -sizes[layer][neuron])
        assert kept == tuple(sorted(ranked[: len(ranked) // 4]))


def row_of(batch, row):
    parts = (batch.input_ids_BT, batch.loss_mask_BT, batch.document_ids_BT)
    return Batch(*(part[row : row + 1] for part in parts))


def test_a_layer_that_does_nothing_goes_first():
    model = teacher_of("llama")
    idle = find_layers(model)[2].block
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    plan = plan_shrinking(model, [batch_of()], layers=3, intermediate=None)
    assert plan.layers == (0, 1, 3)
    assert plan.block_influence[2] == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(logits_of(shrink_model(model, plan)), logits_of(model), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("rule", "count", "layers"),
    [
        ("even", 1, (0,)), ("even", 2, (0, 6)), ("even", 3, (0, 3, 6)), ("even", 4, (0, 2, 4, 6)),
        ("even", 5, (0, 2, 3, 5, 6)), ("even", 7, tuple(range(7))), ("first", 3, (0, 1, 2)),
    ],
)  # fmt: skip
def test_layers_by_rule_need_no_text(rule, count, layers):
    model = tiny_teacher("llama", layers=7)
    assert plan_shrinking(model, [], layers=count, intermediate=None, layer_rule=rule) == ShrinkPlan(layers)


@pytest.mark.parametrize(("share", "kept"), [(0.5, 2), (0.7, 3), (0.01, 1), (1.0, 4), (1, 1), (4, 4)])
def test_a_share_is_of_the_teachers_number(share, kept):
    config = tiny_teacher("llama", layers=4).config
    assert shrunk_config(config, layers=share, intermediate=None).num_hidden_layers == kept


def test_the_same_text_gives_the_same_plan_and_the_same_copy():
    model, batches = teacher_of("gemma2", dtype=torch.float32), [batch_of()]
    model.train()
    state = torch.get_rng_state()
    plans = [plan_shrinking(model, batches, layers=2, intermediate=0.5) for _ in range(2)]
    assert plans[0] == plans[1]
    students = [shrink_model(model, plan) for plan in plans]
    torch.testing.assert_close(students[0].state_dict(), students[1].state_dict(), atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert students[0].training


def test_importance_is_measured_without_dropout():
    config = copy.deepcopy(tiny_teacher("gpt2").config)
    config.resid_pdrop = config.embd_pdrop = 0.5
    model = AutoModelForCausalLM.from_config(config)
    plans = [plan_shrinking(model.train(mode), [batch_of()], layers=1, intermediate=64) for mode in (True, False)]
    assert plans[0] == plans[1]


def test_a_plan_survives_json():
    plan = plan_shrinking(tiny_teacher("phi3"), [batch_of()], layers=1, intermediate=5)
    assert len(plan.neurons) == 1
    assert len(plan.neurons[0]) == 5
    assert ShrinkPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    whole = ShrinkPlan((0, 1))
    assert ShrinkPlan.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_nothing_is_shared_and_all_is_trained(family):
    model = copy.deepcopy(tiny_teacher(family)).requires_grad_(False)
    student = shrink_model(model, plan_shrinking(model, [], layers=2, intermediate=None))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    logits = student(token_ids(2, 9)).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), token_ids(2, 9, seed=1).flatten()).backward()
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter -= 0.1 * parameter.grad
    student.config.num_hidden_layers = 99
    student.generation_config.max_new_tokens = 99
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert model.config.num_hidden_layers == 2
    assert model.generation_config.max_new_tokens != 99


def test_dtype_and_attention_are_kept():
    model = teacher_of("llama", dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    student = shrink_model(model, plan_shrinking(model, [batch_of()], layers=2, intermediate=0.5))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config._attn_implementation == "eager"


def test_a_feed_forward_as_wide_as_the_model_is_told():
    """After shrinking to the model's own width the shapes of up and down projection are the same."""
    model = teacher_of("opt")
    narrow = shrink_model(model, plan_shrinking(model, [batch_of()], layers=None, intermediate=32))
    plan = plan_shrinking(narrow, [batch_of()], layers=None, intermediate=10)
    expected = logits_of(without_neurons(narrow, "opt", dict(enumerate(plan.neurons))))
    torch.testing.assert_close(logits_of(shrink_model(narrow, plan)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layers", [0, 5, 1.5, 0.0, -1, True, float("nan")])
def test_sizes_that_cannot_be_are_refused(layers):
    with pytest.raises(RecipeError, match="student.shrink.layers: .* 4 layers"):
        shrunk_config(tiny_teacher("llama", layers=4).config, layers=layers, intermediate=None)
    with pytest.raises(RecipeError, match="student.shrink.layers"):
        plan_shrinking(tiny_teacher("llama", layers=4), [batch_of()], layers=layers, intermediate=None)


def test_more_neurons_than_there_are_and_unknown_rules_are_refused():
    model = tiny_teacher("gpt2")
    with pytest.raises(RecipeError, match="student.shrink.intermediate: 129 .* 128 feed-forward neurons"):
        plan_shrinking(model, [batch_of()], layers=None, intermediate=129)
    with pytest.raises(RecipeError, match='unknown rule "evn". Did you mean "even"'):
        plan_shrinking(model, [batch_of()], layers=1, intermediate=None, layer_rule="evn")


def test_text_without_scored_tokens_is_refused():
    ids_BT = token_ids(2, 8)
    unscored = Batch(ids_BT, torch.zeros_like(ids_BT, dtype=torch.bool))
    for batches in ([], [unscored]):
        with pytest.raises(DataError, match="no token of the calibration text is scored"):
            plan_shrinking(tiny_teacher("llama"), batches, layers=1, intermediate=None)


def tiny_experts():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_experts_are_not_narrowed_but_their_layers_can_be_left_out():
    model = tiny_experts()
    with pytest.raises(TeacherError, match="mixtral is a mixture of experts.*shrink layers alone"):
        shrunk_config(model.config, layers=None, intermediate=0.5)
    with pytest.raises(TeacherError, match="mixture of experts"):
        plan_shrinking(model, [batch_of()], layers=None, intermediate=0.5)
    student = shrink_model(model, plan_shrinking(model, [batch_of()], layers=2, intermediate=None, layer_rule="even"))
    torch.testing.assert_close(logits_of(student), logits_of(without_layers(model, [1])), atol=0, rtol=0)


def test_an_unknown_feed_forward_is_refused_by_what_it_has():
    model = teacher_of("llama")
    find_layers(model)[1].block.mlp.extra_proj = nn.Linear(32, 7, dtype=torch.float64)
    with pytest.raises(TeacherError, match=r"model.layers.1 cannot be told.*extra_proj \(7, 32\)"):
        plan_shrinking(model, [batch_of()], layers=None, intermediate=0.5)
    model = teacher_of("llama")
    find_layers(model)[1].block.mlp.mixing = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(TeacherError, match=r"mlp.mixing \(3, 4\)"):
        plan_shrinking(model, [batch_of()], layers=None, intermediate=0.5)
    with pytest.raises(TeacherError, match=r"bloom: its configuration has none of intermediate_size, ffn_dim"):
        shrunk_config(AutoConfig.for_model("bloom"), layers=None, intermediate=0.5)


def test_layers_that_depend_on_their_depth_are_refused():
    """GPT-2 can divide attention scores by the layer's number, which a copy with fewer layers would count anew."""
    config = copy.deepcopy(tiny_teacher("gpt2").config)
    config.scale_attn_by_inverse_layer_idx = True
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    shrink_model(model, ShrinkPlan((0,)))
    with pytest.raises(TeacherError, match="layers depend on their depth"):
        shrink_model(model, ShrinkPlan((1,)))


def test_a_feed_forward_with_its_own_order_of_neurons_is_refused():
    """A fused gate and up whose rows alternate has the shapes of Phi-3's, but not its order."""
    model = teacher_of("phi3")
    for layer in find_layers(model):
        mlp = layer.block.mlp

        def alternate(_module, _args, out_BTC):
            return torch.cat([out_BTC[..., 0::2], out_BTC[..., 1::2]], dim=-1)

        mlp.gate_up_proj.register_forward_hook(alternate)
    with pytest.raises(TeacherError, match="laid out in an unknown way"):
        shrink_model(model, plan_shrinking(model, [batch_of()], layers=None, intermediate=0.5))


def test_a_model_not_built_as_its_configuration_says_is_refused():
    model = teacher_of("llama")
    find_layers(model)[0].block.mlp.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(TeacherError, match=r"layers.0.mlp.extra would be left out"):
        shrink_model(model, ShrinkPlan((0, 1)))
    model = teacher_of("qwen3")
    model.lm_head = nn.Linear(32, VOCABULARY + 1, bias=False)
    with pytest.raises(TeacherError, match=r"lm_head.weight .*\(97, 32\)"):
        shrink_model(model, ShrinkPlan((0, 1)))


def test_hybrids_and_quantised_models_are_refused():
    hybrid = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    with pytest.raises(TeacherError, match="hybrid"):
        plan_shrinking(hybrid, [batch_of()], layers=1, intermediate=None)
    with pytest.raises(TeacherError, match="hybrid"):
        shrunk_config(hybrid.config, layers=1, intermediate=None)
    quantised = teacher_of("llama")
    quantised.config.quantization_config = {"bits": 4}
    with pytest.raises(TeacherError, match="quantised"):
        shrink_model(quantised, ShrinkPlan((0,)))


@pytest.mark.parametrize(
    "plan",
    [
        ShrinkPlan((0, 4)), ShrinkPlan(()), ShrinkPlan((1, 0)), ShrinkPlan((0, 0)), ShrinkPlan((-1, 0)),
        ShrinkPlan((0, 1), ((0, 1),)), ShrinkPlan((0, 1), ((0, 1), (0,))), ShrinkPlan((0,), ((0, 48),)),
        ShrinkPlan((0,), ((),)),
    ],
)  # fmt: skip
def test_a_plan_of_another_model_is_refused(plan):
    with pytest.raises(TeacherError, match="not one for this LlamaForCausalLM of 4 layers"):
        shrink_model(tiny_teacher("llama", layers=4), plan)
