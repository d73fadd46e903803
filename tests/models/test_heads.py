"""A model in two parts gives what the whole gives, and never logits of more than it is asked for."""

import copy

import pytest
import torch
from tests.models.families import FAMILIES, VOCABULARY, tiny_teacher, token_ids
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.types import Batch
from limbeck.models.heads import SplitModel
from limbeck.models.hybrid import build_student
from limbeck.models.packing import forward_batch
from limbeck.objectives.chunked import logit_terms
from limbeck.objectives.terms import LogitTerm


def batch_of(rows=3, length=11, *, packed=True):
    ids_BT = token_ids(rows, length)
    documents_BT = torch.zeros_like(ids_BT)
    documents_BT[:, 4:] = 1
    documents_BT[1, 7:] = 2
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    mask_BT[:, 0] = False
    return Batch(ids_BT, mask_BT, documents_BT if packed else None)


def hybrid_of(family, *, mixers=("hyena", "attention")):
    return build_student(tiny_teacher(family), mixers=list(mixers), hyena={}).eval()


def next_token_loss(logits_BTV, batch):
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch.input_ids_BT[:, 1:].flatten())


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("hybrid", [False, True], ids=["teacher", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_parts_give_the_logits_of_the_whole(family, hybrid, packed):
    model = hybrid_of(family) if hybrid else tiny_teacher(family)
    split, batch = SplitModel(model), batch_of(packed=packed)
    assert split.is_split
    assert split.vocabulary_size == VOCABULARY
    with torch.no_grad():
        hidden_BTD = split.hidden(batch)
        assert hidden_BTD.shape == (3, 11, 32)
        whole_BTV = forward_batch(model, batch).logits
        torch.testing.assert_close(split.head(hidden_BTD), whole_BTV, atol=0, rtol=0)
        picked_ND = hidden_BTD.flatten(0, 1)[5:9]
        torch.testing.assert_close(split.head(picked_ND), whole_BTV.flatten(0, 1)[5:9], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole(family):
    whole = copy.deepcopy(hybrid_of(family)).double()
    parts = copy.deepcopy(whole)
    batch = batch_of()
    next_token_loss(forward_batch(whole, batch).logits, batch).backward()
    split = SplitModel(parts)
    next_token_loss(split.head(split.hidden(batch)), batch).backward()
    for (name, theirs), ours in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_runs_on_one_position_of_one_row(family):
    model = tiny_teacher(family)
    split, batch = SplitModel(model), batch_of()
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _a, output: seen.append(output.shape))
    split.hidden(batch)
    handle.remove()
    assert seen == [(1, 1, VOCABULARY)]


def test_no_tensor_of_all_logits_exists():
    """Of all tensors that a forward and a backward pass make, none is nearly as large as the logits would be."""
    vocabulary, batch = 50_000, batch_of(2, 64)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)
    )  # fmt: skip
    split = SplitModel(model)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as largest:
        split.hidden(batch).square().sum().backward()
    assert largest.elements <= vocabulary * 8
    assert batch.input_ids_BT.numel() * vocabulary > 10 * largest.elements


def test_the_soft_cap_of_gemma_is_part_of_the_head():
    model = tiny_teacher("gemma2")
    split, cap = SplitModel(model), model.config.final_logit_softcapping
    hidden_ND = torch.randn(5, 32) * 100
    raw_NV = hidden_ND @ model.lm_head.weight.T
    assert raw_NV.abs().max() > 2 * cap
    torch.testing.assert_close(split.head(hidden_ND), cap * torch.tanh(raw_NV / cap))


def scaled_model(family, options):
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "options", "factor"),
    [
        ("granite", {"logits_scaling": 8.0}, 1 / 8),
        ("cohere", {"logit_scale": 0.25}, 0.25),
    ],
)
def test_scaled_logits_are_found_out(family, options, factor):
    model = scaled_model(family, options)
    split, batch = SplitModel(model), batch_of(packed=False)
    assert split.is_split
    hidden_BTD = split.hidden(batch)
    torch.testing.assert_close(split.head(hidden_BTD), model.get_output_embeddings()(hidden_BTD) * factor)
    torch.testing.assert_close(split.head(hidden_BTD), forward_batch(model, batch).logits)


def test_a_head_of_zeros_shows_no_scale_and_is_not_split():
    model = scaled_model("granite", {"logits_scaling": 8.0, "tie_word_embeddings": False})
    torch.nn.init.zeros_(model.lm_head.weight)
    assert not SplitModel(model).is_split


class Odd(torch.nn.Module):
    """A language model whose logits are more than its output embeddings give."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change, self.config, self.dtype = inner, change, inner.config, inner.dtype

    def forward(self, **kwargs):
        output = self.inner(**kwargs)
        output.logits = self.change(output.logits)
        return output

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()


@pytest.mark.parametrize(
    "change",
    [lambda logits: logits + 1.0, lambda logits: logits * 1.001, lambda logits: logits * 0],
    ids=["bias", "scale", "nothing"],
)
def test_a_head_that_is_not_understood_is_not_split(change):
    odd, batch = Odd(tiny_teacher("llama"), change), batch_of()
    split = SplitModel(odd, vocabulary_size=90)
    assert not split.is_split
    assert split.head_parameters() == []
    with torch.no_grad():
        whole_BTV = forward_batch(odd, batch).logits
        torch.testing.assert_close(split.head(split.hidden(batch)), whole_BTV[..., :90], atol=0, rtol=0)


def test_a_model_without_output_embeddings_is_not_split(monkeypatch):
    odd = Odd(tiny_teacher("llama"), lambda logits: logits)
    monkeypatch.setattr(odd, "get_output_embeddings", lambda: None)
    assert not SplitModel(odd).is_split


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_padding_rows_of_the_vocabulary_are_left_out(family):
    model, batch = tiny_teacher(family), batch_of()
    split = SplitModel(model, vocabulary_size=91)
    assert split.vocabulary_size == 91
    with torch.no_grad():
        whole_BTV = forward_batch(model, batch).logits
        torch.testing.assert_close(split.head(split.hidden(batch)), whole_BTV[..., :91], atol=0, rtol=0)
    with pytest.raises(ValueError, match="vocabulary_size is 97, but the model's logits have 96 rows"):
        SplitModel(model, vocabulary_size=97)


def test_head_parameters_are_the_trainable_ones():
    phi = copy.deepcopy(tiny_teacher("phi"))
    assert [tuple(p.shape) for p in SplitModel(phi).head_parameters()] == [(VOCABULARY, 32), (VOCABULARY,)]
    llama = copy.deepcopy(tiny_teacher("llama"))
    assert SplitModel(llama).head_parameters()[0] is llama.get_input_embeddings().weight
    phi.lm_head.weight.requires_grad_(False)
    assert [tuple(p.shape) for p in SplitModel(phi).head_parameters()] == [(VOCABULARY,)]


def test_a_model_that_trains_keeps_its_mode_and_its_random_numbers():
    model = copy.deepcopy(tiny_teacher("phi")).train()
    model.model.layers[0].resid_dropout.p = 0.5
    before = torch.random.get_rng_state()
    assert SplitModel(model).is_split
    assert model.training
    torch.testing.assert_close(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain = copy.deepcopy(hybrid_of("llama")).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    batch = batch_of()
    for model in (plain, checkpointed):
        split = SplitModel(model)
        next_token_loss(split.head(split.hidden(batch)), batch).backward()
    for (name, theirs), ours in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("targets", [["v_proj"], ["v_proj", "lm_head"]], ids=["body", "head too"])
def test_adapted_models(hybrid, targets):
    from peft import LoraConfig, get_peft_model

    base = copy.deepcopy(hybrid_of("mistral") if hybrid else tiny_teacher("mistral"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    split, batch = SplitModel(model), batch_of()
    assert split.is_split
    hidden_BTD = split.hidden(batch)
    torch.testing.assert_close(split.head(hidden_BTD), forward_batch(model, batch).logits, atol=2e-6, rtol=1e-6)
    next_token_loss(split.head(hidden_BTD), batch).backward()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert len(split.head_parameters()) == (2 if "lm_head" in targets else 0)
    assert all("lora" in name for name in trainable)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_sixteen_bits(family, dtype):
    model = copy.deepcopy(tiny_teacher(family)).to(dtype)
    split, batch = SplitModel(model), batch_of()
    assert split.is_split
    with torch.no_grad():
        whole_BTV = forward_batch(model, batch).logits
        torch.testing.assert_close(split.head(split.hidden(batch)), whole_BTV, atol=0, rtol=0)


class Lesson(torch.nn.Module):
    """The student in the way a stage uses it: the body through the model, the head a few positions at a time."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.split = SplitModel(student)

    def forward(self, batch):
        hidden_ND = self.split.hidden(batch)[:, :-1].flatten(0, 1)
        terms = [LogitTerm("cross_entropy", 1.0, "cross_entropy")]
        total, _ = logit_terms(
            hidden_ND, self.split.head, batch.input_ids_BT[:, 1:].flatten(), None, terms,
            head_parameters=self.split.head_parameters(), chunk_tokens=7,
        )  # fmt: skip
        return total / len(hidden_ND)


def _train_wrapped(parts, batch):
    """In a function of its own: a wrapper that outlives its process group can wait for ever."""
    lesson = torch.nn.parallel.DistributedDataParallel(Lesson(parts))
    for _ in range(2):
        parts.zero_grad()
        lesson(batch).backward()


@pytest.mark.parametrize("family", ["llama", "phi"], ids=["tied", "with a bias"])
def test_chunk_by_chunk_inside_a_distributed_wrapper(family, tmp_path):
    whole = copy.deepcopy(hybrid_of(family))
    parts, batch = copy.deepcopy(whole), batch_of()
    next_token_loss(forward_batch(whole, batch).logits, batch).backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        _train_wrapped(parts, batch)
    finally:
        torch.distributed.destroy_process_group()
    for (name, theirs), ours in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")
