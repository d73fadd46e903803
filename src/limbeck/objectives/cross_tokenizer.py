"""Losses between models whose tokens differ. They compare what both have: likelihoods of stretches of text, and how
peaked the next-token distributions are where both have a token border.

A chunk is a stretch of text that begins and ends at a token border of both models (`AlignedText`). Its loss is nats per
chunk, [B, C], 0 where there is no chunk. A batch has at most as many chunks as scored tokens, and the number of chunks
depends on the teacher; so a step sums over chunks and divides by the count of *scored tokens*, which is known before
anything is aligned and adds up over micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_LOGITS_BYTES = 64 * 2**20


def chunk_likelihood(
    student_log_prob_BC: Tensor,
    teacher_log_prob_BC: Tensor,
    mask_BC: Tensor,
    *,
    temperature: float = math.inf,
    divergence: str = "forward_kl",
    floor_nats: float = 1e-6,
) -> Tensor:
    """Approximate likelihood matching: the student should find each chunk as likely as the teacher does.

    Each chunk either occurs or does not, so the models are compared as two coins with the probabilities p of the chunk
    at the power 1/temperature: D(p_teacher, 1 - p_teacher || p_student, 1 - p_student), times the temperature.
    temperature: any positive number; infinity, the limit, is a log(a/b) - a + b for forward KL with a and b the
    teacher's and student's nats of the chunk. divergence: forward_kl, reverse_kl or total_variation. floor_nats: added
    to the nats of both, so that a chunk held certain by the student has a finite gradient.

    Gradients flow to the student only. Returns [B, C] nats, >= 0, zero on equals, 0 outside the mask.
    Raises: ValueError for an unknown divergence or a temperature that is not positive.
    Source: Minixhofer et al. 2025, arXiv:2503.20083, section 3. Deviations: the factor temperature keeps gradients of
    one size whatever the temperature (theirs is left out); chunks are not debiased by the probability of a word's end.
    """
    if divergence not in CHUNK_DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; known: {', '.join(CHUNK_DIVERGENCES)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    teacher_BC = torch.where(mask_BC, _at_least_float32(-teacher_log_prob_BC.detach()), 1.0) + floor_nats
    student_BC = torch.where(mask_BC, _at_least_float32(-student_log_prob_BC), 1.0) + floor_nats
    return torch.where(mask_BC, CHUNK_DIVERGENCES[divergence](teacher_BC, student_BC, temperature), 0.0)


def chunk_log_probs(token_log_prob_BT: Tensor, chunk_BT: Tensor, *, chunks: int) -> Tensor:
    """Log-probability of each chunk: the sum over its tokens. Gradients flow to the tokens.

    token_log_prob_BT: of the token at each position given those before it; anything finite outside chunks. chunk_BT:
    number of the chunk a token belongs to, -1 for none. Returns [B, chunks] nats.
    """
    inside_BT = chunk_BT >= 0
    values_BT = torch.where(inside_BT, token_log_prob_BT, 0.0)
    sums_BC = values_BT.new_zeros(chunk_BT.shape[0], chunks + 1)
    return sums_BC.scatter_add(1, torch.where(inside_BT, chunk_BT, chunks), values_BT)[:, :chunks]


def border_earth_mover(student_logits_NV: Tensor, teacher_sorted_probs_NK: Tensor) -> Tensor:
    """Universal logit distillation: distance between the two next-token distributions, each sorted by probability.

    Which token is which plays no part, so the vocabularies may differ in everything, size included; the shorter list is
    continued with zeros. It is the 1-Wasserstein distance of the paper: the sum of |difference| of the sorted
    probabilities, in [0, 2] (no unit). teacher_sorted_probs_NK: the teacher's K largest probabilities, descending,
    0 in unused places. With all of them given the distance is exact; otherwise what lies after the first K counts as
    one bucket on both sides, which gives a lower bound.

    Gradients flow to the student only. Returns [N], zero on equals.
    Source: Boizard et al. 2024, arXiv:2402.12030, section 3. Deviation: compared where both have a token border, not
    at equal positions of two token sequences that drift apart.
    """
    student_NV = _at_least_float32(student_logits_NV).softmax(-1)
    teacher_NK = teacher_sorted_probs_NK.detach().to(student_NV.dtype)
    kept = min(teacher_NK.shape[-1], student_NV.shape[-1])
    student_NK = student_NV.topk(kept, dim=-1).values
    student_tail_N = (1 - student_NK.sum(-1)).clamp(min=0)
    teacher_tail_N = (1 - teacher_NK.sum(-1)).clamp(min=0)
    inside_N = (student_NK - teacher_NK[..., :kept]).abs().sum(-1)
    beyond_N = teacher_NK[..., kept:].sum(-1)
    return inside_N + beyond_N + (student_tail_N - teacher_tail_N).abs()


def target_log_probs(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], target_ids_N: Tensor, *, chunk_rows: int | None = None
) -> Tensor:
    """Log-probability [N] of one token at every row, without the logits of all rows at once.

    The logits of `chunk_rows` rows at a time (None: about 64 MiB of them) are computed, used and computed again in the
    backward pass. Gradients flow to the hidden states and the head.
    """

    def picked(hidden_nD: Tensor, ids_n: Tensor) -> Tensor:
        return -F.cross_entropy(_at_least_float32(head(hidden_nD)), ids_n, reduction="none")

    return _by_rows(picked, hidden_ND, head, target_ids_N, chunk_rows)


def border_earth_movers(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    teacher_sorted_probs_NK: Tensor,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """`border_earth_mover` [N] of the logits that `head` gives, without the logits of all rows at once."""

    def distance(hidden_nD: Tensor, probs_nK: Tensor) -> Tensor:
        return border_earth_mover(head(hidden_nD), probs_nK)

    return _by_rows(distance, hidden_ND, head, teacher_sorted_probs_NK, chunk_rows)


def _by_rows(
    function: Callable[[Tensor, Tensor], Tensor],
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    other: Tensor,
    chunk_rows: int | None,
) -> Tensor:
    if hidden_ND.shape[0] == 0:
        # Of nothing too, so that a batch without chunks has a gradient of zero and not none at all.
        return function(hidden_ND, other)
    if chunk_rows is None:
        with torch.no_grad():
            chunk_rows = max(1, _LOGITS_BYTES // (4 * head(hidden_ND[:1]).shape[-1]))
    parts = zip(hidden_ND.split(chunk_rows), other.split(chunk_rows), strict=True)
    return torch.cat([checkpoint(function, hidden, rest, use_reentrant=False) for hidden, rest in parts])


def _coin_kl(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """temperature * KL between coins whose heads have exp(-nats / temperature); `one` is averaged over."""
    if math.isinf(temperature):
        return one * (one / other).log() - one + other
    one, other = one / temperature, other / temperature
    occurs = (-one).exp() * (other - one)
    does_not = -torch.expm1(-one) * (_log_complement(one) - _log_complement(other))
    return temperature * (occurs + does_not)


def _coin_difference(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    if math.isinf(temperature):
        return (one - other).abs()
    return temperature * ((-one / temperature).exp() - (-other / temperature).exp()).abs()


def _log_complement(nats: Tensor) -> Tensor:
    """log(1 - exp(-nats)) for nats > 0, exact at both ends."""
    is_small = nats < math.log(2)
    small = torch.where(is_small, nats, 1.0)
    large = torch.where(is_small, 1.0, nats)
    return torch.where(is_small, (-torch.expm1(-small)).log(), torch.log1p(-(-large).exp()))


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


CHUNK_DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": _coin_kl,
    "reverse_kl": lambda teacher, student, temperature: _coin_kl(student, teacher, temperature),
    "total_variation": _coin_difference,
}
