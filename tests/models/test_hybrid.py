"""The student as a model: equal to the teacher where nothing is replaced, saved and loaded exactly, trainable."""

import copy

import pytest
import torch
from tests.models.families import FAMILIES, tiny_teacher, token_ids
from transformers import AutoModelForCausalLM, DynamicCache

from limbeck.core.errors import TeacherError
from limbeck.models.hybrid import HybridForCausalLM, HyenaMixer, build_student
from limbeck.models.surgery import find_attention

LAYOUTS = [["hyena", "hyena"], ["attention", "hyena"], ["hyena", "attention"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_replaced_gives_the_teacher_exactly(family):
    teacher = tiny_teacher(family)
    student = build_student(teacher, mixers=["attention", "attention"], hyena={})
    ids_BT = token_ids(2, 11)
    assert student.mixers() == {}
    with torch.no_grad():
        torch.testing.assert_close(student(ids_BT).logits, teacher(ids_BT).logits, atol=0, rtol=0)
    assert torch.equal(
        student.generate(ids_BT, max_new_tokens=6, do_sample=False),
        teacher.generate(ids_BT, max_new_tokens=6, do_sample=False),
    )


@pytest.mark.parametrize("mixers", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_but_the_mixers_is_the_teachers(family, mixers):
    teacher = tiny_teacher(family)
    student = build_student(teacher, mixers=mixers, hyena={})
    assert sorted(student.mixers()) == [layer for layer, mixer in enumerate(mixers) if mixer == "hyena"]
    replaced = [site.name for site in find_attention(teacher) if mixers[site.layer_index] == "hyena"]
    theirs, ours = teacher.state_dict(), student.backbone.state_dict()
    kept = {name for name in theirs if not name.startswith(tuple(f"{name}." for name in replaced))}
    assert kept == {name for name in ours if ".operator." not in name}
    for name in kept:
        torch.testing.assert_close(ours[name], theirs[name], atol=0, rtol=0)
        assert ours[name].data_ptr() != theirs[name].data_ptr()
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert [site.layer_index for site in find_attention(student)] == [
        i for i, mixer in enumerate(mixers) if mixer == "attention"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_operator_is_as_wide_as_the_attention_it_replaces(family):
    student = build_student(tiny_teacher(family), mixers=["hyena", "hyena"], hyena={"order": 3, "short_conv": 2})
    width = student.mixers()[0].operator.inner_width
    assert width == (48 if "head_dim" in FAMILIES[family] else 32)
    assert student.mixers()[1].operator.order == 3


@pytest.mark.parametrize("mixers", LAYOUTS[:2], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(family, mixers, tmp_path):
    """Weights to the bit; logits to rounding, since a CPU kernel sums in an order that depends on memory alignment."""
    student = build_student(tiny_teacher(family), mixers=mixers, hyena={"filter": "modal"})
    student.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, HybridForCausalLM)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)
    ids_BT = token_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_BT).logits, student(ids_BT).logits, atol=1e-5, rtol=1e-5)
    assert loaded.config.mixers == mixers
    assert loaded.generation_config.pad_token_id == student.generation_config.pad_token_id


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma2", True), ("gpt2", True), ("qwen3", False)])
def test_tied_weights_are_one_and_are_saved_once(family, tied, tmp_path):
    from safetensors import safe_open

    student = build_student(tiny_teacher(family), mixers=["hyena", "attention"], hyena={})
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("backbone.lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_mixer_and_checkpointing_changes_nothing(family):
    student = build_student(tiny_teacher(family), mixers=["hyena", "attention"], hyena={}).train()
    ids_BT = token_ids(2, 10)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    found = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        student(ids_BT, attention_mask=mask_BT, labels=ids_BT).loss.backward()
        found.append({name: parameter.grad for name, parameter in student.named_parameters()})
    for name, gradient in found[0].items():
        if ".operator." in name:
            assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_student_of_another_precision_keeps_it(tmp_path):
    teacher = copy.deepcopy(tiny_teacher("llama")).to(torch.bfloat16)
    student = build_student(teacher, mixers=["hyena", "attention"], hyena={})
    assert student.dtype == torch.bfloat16
    ids_BT = token_ids(1, 6)
    assert student(ids_BT).logits.dtype == torch.bfloat16
    student.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids_BT).logits.dtype == torch.float32


def test_filters_stay_in_float32_when_the_rest_is_loaded_in_half(tmp_path):
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    student.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = dict(student.named_parameters())
    for name, parameter in half.named_parameters():
        if ".filters." in name:
            torch.testing.assert_close(parameter, exact[name], atol=0, rtol=0)
        else:
            assert parameter.dtype == torch.bfloat16


def test_without_copying_the_weights_are_new():
    teacher = tiny_teacher("llama")
    student = build_student(teacher, mixers=["hyena", "attention"], hyena={}, copy_weights=False)
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


def test_the_operators_own_start_survives_construction():
    """transformers draws the weights of unknown linear maps anew; the operator's own start must stand."""
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    operator = student.mixers()[0].operator
    torch.manual_seed(0)
    operator.reset_parameters()
    bound = operator.in_proj.weight.abs().max()
    fresh = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={}).mixers()[0].operator
    assert 0.9 < fresh.in_proj.weight.abs().max() / bound < 1.1


def test_the_vocabulary_can_grow(tmp_path):
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    student.resize_token_embeddings(100)
    assert student.config.vocab_size == student.config.backbone.vocab_size == 100
    assert student(token_ids(1, 3)).logits.shape[-1] == 100
    student.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(token_ids(1, 3)).logits.shape[-1] == 100


def test_the_attention_implementation_can_be_chosen(tmp_path):
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    student.save_pretrained(tmp_path)
    ids_BT = token_ids(1, 7)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.backbone.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(eager(ids_BT).logits, student(ids_BT).logits, atol=1e-4, rtol=1e-4)
        student.set_attn_implementation("eager")
        assert student.backbone.config._attn_implementation == "eager"
        assert len(student(ids_BT, output_attentions=True).attentions) == 1


def test_logits_to_keep_hidden_states_and_embeddings():
    student = build_student(tiny_teacher("gemma2"), mixers=["hyena", "attention"], hyena={})
    ids_BT = token_ids(2, 6)
    with torch.no_grad():
        whole = student(ids_BT, output_hidden_states=True)
        assert len(whole.hidden_states) == 3
        torch.testing.assert_close(student(ids_BT, logits_to_keep=2).logits, whole.logits[:, -2:], atol=1e-5, rtol=1e-5)
        embedded = student(inputs_embeds=student.get_input_embeddings()(ids_BT)).logits
        torch.testing.assert_close(embedded, whole.logits, atol=1e-5, rtol=1e-5)
        assert isinstance(student(ids_BT, return_dict=False), tuple)


def test_training_keeps_no_cache_and_evaluation_does():
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    ids_BT = token_ids(1, 4)
    assert isinstance(student(ids_BT).past_key_values, DynamicCache)
    assert student(ids_BT, use_cache=False).past_key_values is None
    assert student.train()(ids_BT).past_key_values is None


def test_a_mask_over_pairs_of_tokens_is_refused():
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    with pytest.raises(ValueError, match="2-D mask"):
        student(token_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_a_hybrid_cannot_be_the_teacher_of_a_hybrid():
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    with pytest.raises(TeacherError, match="hybrid already"):
        build_student(student, mixers=["hyena", "hyena"], hyena={})


def test_mixers_must_fit_the_layers():
    with pytest.raises(TeacherError, match="1 are given but the model has 2"):
        build_student(tiny_teacher("llama"), mixers=["hyena"], hyena={})
    with pytest.raises(TeacherError, match="unknown kind hyaena"):
        build_student(tiny_teacher("llama"), mixers=["hyaena", "attention"], hyena={})


def test_a_teacher_that_is_not_what_its_config_says_is_refused():
    teacher = copy.deepcopy(tiny_teacher("llama"))
    teacher.model.norm.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(TeacherError, match=r"norm\.extra"):
        build_student(teacher, mixers=["hyena", "attention"], hyena={})
    teacher = copy.deepcopy(tiny_teacher("llama"))
    teacher.model.norm.weight = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(TeacherError, match=r"norm\.weight has shape \(7,\)"):
        build_student(teacher, mixers=["hyena", "attention"], hyena={})


def test_a_family_that_drops_arguments_is_refused(monkeypatch):
    forward = HyenaMixer.forward

    def deaf(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states)

    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward",
        lambda self, hidden_states, **kwargs: hidden_states + deaf(self.self_attn, hidden_states)[0],
    )
    with pytest.raises(TeacherError, match="does not hand extra arguments down"):
        build_student(tiny_teacher("llama"), mixers=["hyena", "hyena"], hyena={})


def test_a_quantised_teacher_is_refused():
    teacher = copy.deepcopy(tiny_teacher("llama"))
    teacher.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(TeacherError, match="quantised"):
        build_student(teacher, mixers=["hyena", "attention"], hyena={})
