"""Floating-point operations of a model, counted from its modules. Works on the meta device: shapes are enough.

A multiplication and an addition are two operations. Counted are matrix products, attention, long and short
convolutions and gates; norms, activations, embeddings (look-ups) and the evaluation of filters (done once for all
rows of a batch, and kept between calls in evaluation) are not: together a few per cent.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import TeacherError
from limbeck.models.surgery import AttentionSite, find_attention, head_shape
from limbeck.nn.flops import attention_flops_per_token, hyena_flops_per_token
from limbeck.nn.hyena import HyenaOperator

__all__ = ["attention_flops_per_token", "forward_flops_per_token", "hyena_flops_per_token"]

_MATRICES = (nn.Linear, Conv1D)


def forward_flops_per_token(model: nn.Module, context_tokens: int) -> float:
    """Operations of one forward pass over `context_tokens` tokens, divided by their number.

    Sums 2 for every weight of a matrix (a tied head counts, its embedding does not), and the mixing of tokens by each
    attention module and Hyena operator. A family whose attention cannot be found counts without its mixing. A model
    that counts its own operations (it runs parts several times, or on shorter rows) is asked for them.
    Training costs three times as much: the backward pass has two products for each one of the forward pass
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    """
    own_count = getattr(model, "forward_flops_per_token", None)
    if callable(own_count):
        return float(own_count(context_tokens))
    total = 0.0
    for module in model.modules():
        if isinstance(module, _MATRICES):
            total += 2 * module.weight.numel()
        elif isinstance(module, HyenaOperator):
            total += hyena_flops_per_token(
                module.inner_width, order=module.order, short_conv=module.short_conv, context_tokens=context_tokens
            )
    for site in _attention_sites(model):
        heads, head_width = head_shape(site)
        window = getattr(site.module, "sliding_window", None)
        total += attention_flops_per_token(heads * head_width, context_tokens=context_tokens, window=window)
    return total


def _attention_sites(model: nn.Module) -> list[AttentionSite]:
    if not isinstance(model, PreTrainedModel):
        return []
    try:
        return find_attention(model)
    except TeacherError:
        return []
