"""What is recorded inside a model is what the model computed, in every family, and can be learned from."""

import copy

import pytest
import torch
from tests.models.families import FAMILIES, LAYERS, tiny_teacher, token_ids
from torch import nn
from torch.testing import assert_close

from limbeck.core.errors import RecipeError, TeacherError
from limbeck.core.types import Batch, Targets
from limbeck.models.anatomy import find_layers, hidden_width, projection_reader
from limbeck.models.documents import forward_packed
from limbeck.models.features import (
    FEATURE_KINDS,
    FeatureRecorder,
    eager_attention,
    features_of,
    record_features,
    wanted_features,
)
from limbeck.models.hybrid import build_student
from limbeck.models.surgery import find_attention, projections
from limbeck.objectives.features import FEATURE_OBJECTIVES, feature_loss, feature_positions

FINAL_NORMS = ("final_layer_norm", "ln_f", "norm", "final_layernorm")
EVERYTHING = [f"{kind}.{layer}" for kind in FEATURE_KINDS for layer in range(1, LAYERS + 1)]


def batch_of(ids_BT, document_ids_BT=None):
    return Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), document_ids_BT)


def fresh(family, **options):
    return copy.deepcopy(tiny_teacher(family, **options))


def final_norm(model):
    inner = model.base_model.decoder if hasattr(model.base_model, "decoder") else model.base_model
    return next(module for name, module in inner.named_children() if name in FINAL_NORMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_residual_stream(family):
    model, ids_BT = fresh(family), token_ids(2, 9)
    with torch.no_grad():
        recorded = record_features(model, batch_of(ids_BT), hidden=range(LAYERS + 1))
        right = model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
        last = final_norm(model)(recorded.hidden[LAYERS])
    assert sorted(recorded.hidden) == list(range(LAYERS + 1))
    for layer in range(LAYERS):
        assert_close(recorded.hidden[layer], right[layer], atol=0, rtol=0)
    assert_close(last, right[LAYERS], atol=0, rtol=0)
    assert hidden_width(model) == recorded.hidden[1].shape[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_carry_gradients(family):
    model, ids_BT = fresh(family), token_ids(2, 7)
    recorded = record_features(model, batch_of(ids_BT), hidden=[1])
    recorded.hidden[1].square().mean().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states[1].square().mean().backward()
    assert sum(gradient is not None for gradient in ours.values()) > 3
    for name, parameter in model.named_parameters():
        # The head's gradient is zeros or None, as the library's forward has it.
        if parameter.grad is None or ours[name] is None:
            assert ours[name] is None or not ours[name].any()
        else:
            assert_close(ours[name], parameter.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_are_the_familys_own(family):
    model, ids_BT = fresh(family), token_ids(2, 9)
    names = [f"attention.{layer}" for layer in range(1, LAYERS + 1)]
    before = model.config._attn_implementation
    recorder = FeatureRecorder(model, features=[*names, "mixer.1"])
    with torch.no_grad():
        plain = model(ids_BT, use_cache=False).logits
        with recorder.recording() as recorded:
            logits = model(ids_BT, use_cache=False).logits
        assert model.config._attn_implementation == before
        with eager_attention(model):
            right = model(ids_BT, output_attentions=True, use_cache=False).attentions
    if (
        family != "gemma2" or before == "eager"
    ):  # before transformers 5.23 Gemma 2 ran without its soft-cap unless eager
        assert_close(logits, plain, atol=1e-4, rtol=1e-4)
    for layer, name in enumerate(names):
        assert_close(recorded.features[name], right[layer], atol=0, rtol=0)
        assert_close(recorded.features[name].sum(-1), torch.ones(2, 4, 9))
    assert_close(recorded.features["mixer.1"], right[0], atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_those_of_the_projections(family):
    model, ids_BT = fresh(family), token_ids(2, 9)
    kinds = ("queries", "keys", "values")
    recorder = FeatureRecorder(model, features=[f"{kind}.{layer}" for kind in kinds for layer in range(1, LAYERS + 1)])
    given = {}
    sites = find_attention(model)
    for site in sites:
        site.module.register_forward_pre_hook(
            lambda _module, args, kwargs, layer=site.layer_index: given.update(
                {layer: kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]}
            ),
            with_kwargs=True,
        )
    with torch.no_grad(), recorder.recording() as recorded:
        model(ids_BT, use_cache=False)
    for site in sites:
        parts = projections(site)
        for kind, weight, bias in zip(
            kinds, (parts.q, parts.k, parts.v), (parts.q_bias, parts.k_bias, parts.v_bias), strict=True
        ):
            right = nn.functional.linear(given[site.layer_index], weight, bias)
            own = recorded.features[f"{kind}.{site.layer_index + 1}"].unflatten(-1, (-1, parts.head_dim))
            repeated = own.repeat_interleave(parts.num_heads // own.shape[-2], dim=-2).flatten(-2)
            assert_close(repeated, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_recorded_apart(family):
    teacher = fresh(family)
    student = build_student(teacher, mixers=["hyena", "attention"], hyena={}).eval()
    first, second = token_ids(2, 5, seed=1), token_ids(2, 4, seed=2)
    packed = batch_of(torch.cat([first, second], dim=1), torch.tensor([[0] * 5 + [1] * 4] * 2))
    wanted = {"hidden": [0, 1, 2], "features": ["attention.2", "mixer.1", "values.1", "values.2"]}
    with torch.no_grad():
        whole = record_features(student, packed, **wanted)
        for ids_BT, place in ((first, slice(0, 5)), (second, slice(5, 9))):
            alone = record_features(student, batch_of(ids_BT), **wanted)
            for layer, hidden in alone.hidden.items():
                assert_close(whole.hidden[layer][:, place], hidden, atol=1e-4, rtol=1e-4)
            for name, feature in alone.features.items():
                found = whole.features[name]
                found = found[..., place, place] if found.dim() == 4 else found[:, place]
                assert_close(found, feature, atol=1e-4, rtol=1e-4)
    for name in ("attention.2", "mixer.1"):
        assert not whole.features[name][..., 5:, :5].any()


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma3_text", "phi3"])
def test_a_hybrid_hands_over_what_its_hyena_layers_do(family):
    student = build_student(fresh(family), mixers=["hyena", "attention"], hyena={}).eval()
    recorder = FeatureRecorder(student, hidden=[0, 1, 2], features=[n for n in EVERYTHING if n != "attention.1"])
    mixer, seen = student.mixers()[0], {}
    mixer.register_forward_hook(lambda _m, args, kwargs, out: seen.update(kwargs, output=out[0]), with_kwargs=True)
    mixer.operator.in_proj.register_forward_hook(lambda _m, _args, out: seen.update(projected=out))
    ids_BT = token_ids(2, 6)
    with torch.no_grad(), recorder.recording() as recorded:
        student(ids_BT, use_cache=False)
    width = mixer.operator.inner_width
    queries, keys, values = seen["projected"].split(width, dim=-1)
    assert_close(recorded.features["queries.1"], queries, atol=0, rtol=0)
    assert_close(recorded.features["keys.1"], keys, atol=0, rtol=0)
    assert_close(recorded.features["values.1"], values, atol=0, rtol=0)
    assert recorded.features["mixer.1"].shape == (2, width, 6, 6)
    documents = torch.zeros_like(ids_BT)
    stream = mixer.operator._convolve_short_within(seen["projected"].transpose(1, 2), documents)[:, -width:]
    mixed = (recorded.features["mixer.1"] @ stream.unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    assert_close(mixer.operator.out_proj(mixed), seen["output"], atol=1e-5, rtol=1e-4)
    assert recorded.features["attention.2"].shape == (2, 4, 6, 6)


def test_padding_on_the_left_is_not_in_the_mixing_matrix():
    student = build_student(fresh("llama"), mixers=["hyena", "attention"], hyena={}).eval()
    recorder = FeatureRecorder(student, features=["mixer.1"])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad(), recorder.recording() as recorded:
        student(token_ids(1, 5), attention_mask=mask, use_cache=False)
    assert not recorded.features["mixer.1"][..., :2].any()
    assert recorded.features["mixer.1"][0, :, 2:, 2].all()


@pytest.mark.parametrize("name", FEATURE_OBJECTIVES)
@pytest.mark.parametrize("student_family", ["hybrid", "gpt_neox"])
def test_every_objective_trains_a_student(name, student_family):
    """Twelve steps on one batch of features must bring the student nearer; GQA against none, five layers against two."""
    objective = FEATURE_OBJECTIVES[name]
    teacher = fresh("llama", layers=5)
    student = fresh("gpt_neox") if student_family == "gpt_neox" else None
    if student is None:
        kept = "attention" if "attention" in objective.needs else "hyena"
        student = build_student(fresh("qwen2"), mixers=["hyena", kept], hyena={})
    batch = batch_of(token_ids(3, 12))
    hidden, features = wanted_features(objective.needs, [2])
    teaches, learns = wanted_features(objective.needs, [5]), FeatureRecorder(student, hidden=hidden, features=features)
    with torch.no_grad():
        said = record_features(teacher, batch, hidden=teaches[0], features=teaches[1])
    targets = features_of(Targets(hidden=said.hidden, features=said.features), objective.needs, 5)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        with learns.recording() as recorded:
            forward_packed(student, batch.input_ids_BT, None)
        value = feature_loss(
            name, features_of(recorded, objective.needs, 2), targets, mask_BT=feature_positions(batch.loss_mask_BT),
            options={"relation_heads": 2} if "relation_heads" in objective.options else {},
        ).sum()  # fmt: skip
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.95 * values[0]


def test_hooks_do_not_stay_and_runs_do_not_mix():
    model = fresh("llama")
    recorder = FeatureRecorder(model, hidden=[0, 2], features=["values.1", "mixer.2"])
    with torch.no_grad():
        with recorder.recording() as first:
            model(token_ids(1, 4), use_cache=False)
        model(token_ids(2, 5), use_cache=False)
        with recorder.recording() as second:
            model(token_ids(1, 6), use_cache=False)
    assert first.hidden[0].shape[1] == 4
    assert second.features["values.1"].shape[1] == 6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(KeyboardInterrupt), recorder.recording():
        raise KeyboardInterrupt
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_hybrid_gets_each_of_its_attentions_back(family):
    """Gemma 2 is eager by nature (since transformers 5.23), and a hybrid of it is not."""
    own = fresh(family).config._attn_implementation
    student = build_student(fresh(family), mixers=["hyena", "attention"], hyena={}).eval()
    before = student.config._attn_implementation, student.backbone.config._attn_implementation
    assert before == ("sdpa", own)
    recorder = FeatureRecorder(student, features=["attention.2"])
    with torch.no_grad(), recorder.recording() as recorded:
        student(token_ids(1, 4), use_cache=False)
    assert (student.config._attn_implementation, student.backbone.config._attn_implementation) == before
    assert_close(recorded.features["attention.2"].sum(-1), torch.ones(1, 4, 4))


def test_a_block_in_which_nothing_ran_is_an_error():
    recorder = FeatureRecorder(tiny_teacher("llama"), hidden=[1])
    with pytest.raises(RuntimeError, match="run the model once"), recorder.recording():
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    wanted = {"hidden": [0, 1, 2], "features": ["values.2", "queries.1", "attention.1"]}
    gradients = []
    for checkpointing in (False, True):
        model = fresh(family).train()
        model.set_attn_implementation("eager")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        recorded = record_features(model, batch_of(token_ids(2, 6)), **wanted)
        sum(part.square().mean() for part in (*recorded.hidden.values(), *recorded.features.values())).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None and p.grad.any()])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


def test_checkpointing_of_a_hybrid_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = build_student(fresh("llama"), mixers=["hyena", "attention"], hyena={}).train()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        recorded = record_features(student, batch_of(token_ids(2, 6)), hidden=[2], features=["mixer.1", "values.1"])
        sum(part.square().mean() for part in (*recorded.hidden.values(), *recorded.features.values())).backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None and p.grad.any()])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


def test_checkpointing_that_would_mislead_is_refused():
    model = fresh("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(RecipeError, match='attn_implementation="eager"'):
        record_features(model, batch_of(token_ids(1, 4)), features=["attention.1"])
    with torch.no_grad():
        record_features(model, batch_of(token_ids(1, 4)), features=["attention.1"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RecipeError, match="use_reentrant"):
        record_features(model, batch_of(token_ids(1, 4)), features=["values.1"])


def test_adapted_projections_are_read_with_their_adapters():
    from peft import LoraConfig, get_peft_model

    ids_BT = token_ids(1, 5)
    model = get_peft_model(fresh("llama"), LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False))
    recorder = FeatureRecorder(model, hidden=[0, 2], features=["values.1"])
    with recorder.recording() as recorded:
        model(input_ids=ids_BT, use_cache=False)
    layer = find_layers(model)[0]
    assert not torch.equal(layer.mixer.v_proj.base_layer.weight @ torch.ones(32), recorded.features["values.1"][0, 0])
    recorded.features["values.1"].sum().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("v_proj.lora_B" in name for name in trained)


@pytest.mark.parametrize(
    ("hidden", "features", "message"),
    [
        ([3], [], "no hidden states of layer 3; its layers are 0 to 2"),
        ([-1], [], "no hidden states of layer -1"),
        ([], ["attention.0"], "no attention of layer 0; its layers are 1 to 2"),
        ([], ["value.1"], 'unknown feature "value". Did you mean "values"'),
        ([], ["values"], 'such as "values.1"'),
        ([], ["attention.1"], "layer 1 is a Hyena layer and has no attention weights.*mixing_matrix_distance"),
        ([], ["queries.1"], "order 3.*value_relation"),
    ],
)
def test_what_a_model_does_not_have_is_refused_beforehand(hidden, features, message):
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={"order": 3})
    with pytest.raises(RecipeError, match=message):
        FeatureRecorder(student, hidden=hidden, features=features)


def test_a_wider_hyena_layer_has_no_matrix_for_each_head():
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "hyena"], hyena={"inner_width": 64})
    with pytest.raises(RecipeError, match="64 channels where the attention had 32"):
        FeatureRecorder(student, features=["mixer.1"])
    FeatureRecorder(student, features=["values.1"])


def test_an_unknown_layout_is_refused():
    model = fresh("llama")
    attention = find_attention(model)[0].module
    attention.all_in_one = attention.v_proj
    del attention.v_proj
    with pytest.raises(TeacherError, match="values of layer 1 .*all_in_one"):
        FeatureRecorder(model, features=["values.1"])


def test_a_fused_projection_of_the_wrong_size_is_refused():
    model = fresh("gpt_neox")
    _module, take = projection_reader(find_attention(model)[0], "values")
    with pytest.raises(TeacherError, match="40 channels where 96"):
        take(torch.zeros(1, 2, 40))


def test_hidden_states_of_a_small_model_over_tokens_are_those_of_its_blocks():
    from transformers import AutoConfig, AutoModelForCausalLM

    trunk = {"width": 8, "layers": 2, "heads": 1, "feed_forward": 16}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("limbeck_compact", vocab_size=11, trunk=trunk)
    ).double()
    ids_BT = torch.randint(11, (2, 5))
    seen = []
    handle = model.network.trunk.layers[-1].register_forward_hook(lambda _module, _args, output: seen.append(output))
    batch = Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    found = record_features(model, batch, hidden=(0, 1, 2))
    handle.remove()
    torch.testing.assert_close(found.hidden[2], seen[0], rtol=0, atol=0)
    assert found.hidden[0].shape == (2, 5, 8)
    with pytest.raises(RecipeError, match="cannot be read"):
        record_features(model, batch, features=("attention.1",))
    looped = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("limbeck_compact", vocab_size=11, trunk=trunk | {"repeat": 2})
    )
    with pytest.raises(TeacherError, match="more than once"):
        record_features(looped, batch, hidden=(1,))
