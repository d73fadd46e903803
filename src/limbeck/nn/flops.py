"""Floating-point operations of token mixing. A multiplication and an addition are two operations."""

from __future__ import annotations

import math


def attention_flops_per_token(query_width: int, *, context_tokens: float, window: int | None = None) -> float:
    """Scores and weighted sum of causal attention: 4 operations per query channel and token attended to.

    A token attends to (T + 1) / 2 tokens on average; with a sliding window to no more than the window.
    """
    return 4 * query_width * attended_tokens(0, context_tokens, window=window) / context_tokens


def attended_tokens(past: float, new: float, *, window: int | None = None) -> float:
    """How many tokens `new` tokens look at together, themselves included, when `past` stand before them."""

    def from_start(tokens: float) -> float:
        span = min(window or tokens, tokens)
        return span * (tokens - span) + span * (span + 1) / 2

    return from_start(past + new) - from_start(past)


def hyena_flops_per_token(channels: int, *, order: int, short_conv: int, context_tokens: float) -> float:
    """Token mixing of a Hyena operator without its two projections.

    Each of the order - 1 long convolutions is a real FFT of 2T points, its inverse, and a product of spectra:
    2.5 n log2 n operations for a transform of n = 2T real points (the usual count, half of a complex one's
    5 n log2 n), so 10 log2(2T) + 6 for each token and channel. The skip term takes 2, each gate 1, and a tap of the
    short convolution 2 on each of the order + 1 projections. The filter's own transform is shared by a batch's rows.
    """
    long_convolution = 10 * math.log2(2 * context_tokens) + 6 + 2
    return channels * ((order - 1) * long_convolution + order + 2 * short_conv * (order + 1))


def hyena_flops(channels: int, *, order: int, short_conv: int, past: float, new: float) -> float:
    """Token mixing of `new` tokens after `past`: what reading all costs less what reading the past costs."""

    def from_start(tokens: float) -> float:
        if not tokens:
            return 0.0
        return tokens * hyena_flops_per_token(channels, order=order, short_conv=short_conv, context_tokens=tokens)

    return from_start(past + new) - from_start(past)
