"""Floating-point operations of a model, counted from its modules. Works on the meta device: shapes are enough.

A multiplication and an addition are two operations. Counted are matrix products, attention, long and short
convolutions and gates; norms, activations, embeddings (look-ups) and the evaluation of filters (done once for all
rows of a batch, and kept between calls in evaluation) are not: together a few per cent.
"""

from __future__ import annotations

import math

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import TeacherError
from limbeck.models.surgery import AttentionSite, find_attention, head_shape
from limbeck.nn.hyena import HyenaOperator

_MATRICES = (nn.Linear, Conv1D)


def forward_flops_per_token(model: nn.Module, context_tokens: int) -> float:
    """Operations of one forward pass over `context_tokens` tokens, divided by their number.

    Sums 2 for every weight of a matrix (a tied head counts, its embedding does not), and the mixing of tokens by each
    attention module and Hyena operator. A family whose attention cannot be found counts without its mixing.
    Training costs three times as much: the backward pass has two products for each one of the forward pass
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    """
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


def attention_flops_per_token(query_width: int, *, context_tokens: int, window: int | None = None) -> float:
    """Scores and weighted sum of causal attention: 4 operations per query channel and token attended to.

    A token attends to (T + 1) / 2 tokens on average; with a sliding window to no more than the window.
    """
    span = min(window or context_tokens, context_tokens)
    attended = span * (context_tokens - span) + span * (span + 1) / 2
    return 4 * query_width * attended / context_tokens


def hyena_flops_per_token(channels: int, *, order: int, short_conv: int, context_tokens: int) -> float:
    """Token mixing of a Hyena operator without its two projections.

    Each of the order - 1 long convolutions is a real FFT of 2T points, its inverse, and a product of spectra:
    2.5 n log2 n operations for a transform of n = 2T real points (the usual count, half of a complex one's
    5 n log2 n), so 10 log2(2T) + 6 for each token and channel. The skip term takes 2, each gate 1, and a tap of the
    short convolution 2 on each of the order + 1 projections. The filter's own transform is shared by a batch's rows.
    """
    long_convolution = 10 * math.log2(2 * context_tokens) + 6 + 2
    return channels * ((order - 1) * long_convolution + order + 2 * short_conv * (order + 1))


def _attention_sites(model: nn.Module) -> list[AttentionSite]:
    if not isinstance(model, PreTrainedModel):
        return []
    try:
        return find_attention(model)
    except TeacherError:
        return []
