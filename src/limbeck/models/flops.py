"""Floating-point operations of a model, counted from its modules. Works on the meta device: shapes are enough.

A multiplication and an addition are two operations. Counted are matrix products, attention, long and short
convolutions and gates; norms, activations, embeddings (look-ups) and the evaluation of filters (done once for all
rows of a batch, and kept between calls in evaluation) are not: together a few per cent. What a run did is counted while
it does it, by `models.metering`, from the same counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import TeacherError
from limbeck.models.surgery import AttentionSite, find_attention, head_shape
from limbeck.nn.flops import attention_flops_per_token, hyena_flops_per_token
from limbeck.nn.hyena import HyenaOperator

__all__ = ["attention_flops_per_token", "forward_flops_per_token", "hyena_flops_per_token"]

MATRICES = (nn.Linear, Conv1D)


# How the configurations of mixtures of experts call the number of experts that a token goes through.
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


def expert_flops(module: nn.Module) -> float | None:
    """Operations of a token in one expert of a mixture that holds each matrix of all its experts in one tensor; None for others."""
    down = module._parameters.get("down_proj")
    if down is None or down.dim() != 3:
        return None
    return 2 * sum(matrix.numel() for matrix in module.parameters(recurse=False) if matrix.dim() == 3) / down.shape[0]


def _chosen_experts(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    counts = [getattr(config, name, None) for name in _CHOSEN]
    return next((count for count in counts if isinstance(count, int) and count > 0), 1)


def forward_flops_per_token(model: nn.Module, context_tokens: int) -> float:
    """Operations of one forward pass over `context_tokens` tokens, divided by their number.

    Sums 2 for every weight of a matrix (a tied head counts, its embedding does not), and the mixing of tokens by each
    attention module and Hyena operator; of a mixture of experts, those that a token goes through. A family whose attention
    cannot be found counts without its mixing. A model that counts its own operations (it runs parts several times, or on shorter
    rows) is asked for them.
    Training all of it costs three times as much: the backward pass has two products for each one of the forward pass
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); see `PassCosts` for training a part.
    """
    own_count = getattr(model, "forward_flops_per_token", None)
    if callable(own_count):
        return float(own_count(context_tokens))
    return sum(part.flops for part in _parts(model, context_tokens))


@dataclass(frozen=True)
class _Part:
    """A module and what it costs a token. is_trained: None for what has no weights of its own."""

    module: nn.Module
    flops: float
    is_trained: bool | None = None


def _parts(model: nn.Module, context_tokens: int) -> Iterator[_Part]:
    for module in model.modules():
        if isinstance(module, MATRICES):
            yield _Part(module, 2 * module.weight.numel(), module.weight.requires_grad)
        elif isinstance(module, HyenaOperator):
            yield _Part(
                module,
                hyena_flops_per_token(
                    module.inner_width, order=module.order, short_conv=module.short_conv, context_tokens=context_tokens
                ),
            )
        elif (one := expert_flops(module)) is not None:
            learns = any(matrix.requires_grad for matrix in module.parameters(recurse=False))
            yield _Part(module, _chosen_experts(model) * one, learns)
    for site in attention_sites(model):
        heads, head_width = head_shape(site)
        window = getattr(site.module, "sliding_window", None)
        yield _Part(
            site.module, attention_flops_per_token(heads * head_width, context_tokens=context_tokens, window=window)
        )


@dataclass(frozen=True)
class PassCosts:
    """Operations of a model's parts for a token: its head, and its body in a context of so many tokens.

    learning_head: the head forth and back. body: forth. learning: forth and back, as its parameters have gradients now: two
    products more for each matrix that is trained and lies above another trained one, one for a frozen one there, none below;
    and what gradient checkpointing works out again.
    """

    head: float
    learning_head: float
    body: Callable[[int], float]
    learning: Callable[[int], float]


def pass_costs(model: nn.Module, *, again: bool = False, mean_patch_bytes: float | None = None) -> PassCosts:
    """What passes through a model cost.

    again: its blocks are worked out again in the backward pass. mean_patch_bytes: of a model of bytes, if another than its
    configuration's.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    own = 2.0 * head.weight.numel() if head is not None else 0.0
    network = getattr(model, "network", None)
    if mean_patch_bytes is not None:

        def body(context: int) -> float:
            return network.flops_per_symbol(context, mean_patch_bytes=mean_patch_bytes) - own  # type: ignore[union-attr, operator, no-any-return]
    else:

        def body(context: int) -> float:
            return forward_flops_per_token(model, context) - own

    def learning(context: int) -> float:
        if callable(getattr(model, "forward_flops_per_token", None)):
            return 3 * body(context)
        return _learning(model, context, head, again=again)

    trains_head = head is not None and head.weight.requires_grad
    return PassCosts(own, (2 + trains_head) * own, body, learning)


def _learning(model: nn.Module, context: int, head: nn.Module | None, *, again: bool) -> float:
    """Forth and back through all but the head."""
    blocks = _blocks(model)
    trains = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    below = embedding is None or any(parameter.requires_grad for parameter in embedding.parameters())
    lowest = -1 if below or not blocks else trains.index(True) if True in trains else len(blocks)
    number = {id(part): place for place, block in enumerate(blocks) for part in block.modules()}
    total = 0.0
    for part in _parts(model, context):
        if part.module is head:
            continue
        place = number.get(id(part.module), 0)
        back = 2 if part.is_trained is None else 1 + part.is_trained
        total += part.flops * (1 if place < lowest else 1 + back + (again and id(part.module) in number))
    return total


def _blocks(model: nn.Module) -> list[nn.Module]:
    from limbeck.models.anatomy import find_layers

    try:
        return [layer.block for layer in find_layers(model)]
    except (TeacherError, AttributeError):
        return []


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention modules of a model of transformers; none of one whose attention cannot be found."""
    if not isinstance(model, PreTrainedModel):
        return []
    try:
        return find_attention(model)
    except TeacherError:
        return []
