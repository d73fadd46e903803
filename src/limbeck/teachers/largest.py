"""The k largest of very many logits, fast enough to be taken beside a teacher's forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64
# Rows that fit in a processor's cache while several passes are made over them.
_ROWS_AT_ONCE_CPU = 32


def keep_largest(logits_NV: Tensor, next_ids_N: Tensor, *, k: int) -> dict[str, Tensor]:
    """The k largest log-probabilities (nats) of each row and what is left.

    Returns ids [N, k], log_probs [N, k] descending, tail [N] (log of the mass of all others; -inf when there are none, or
    when it is below 1e-37), next_log_prob [N] of the tokens given, is_finite [N]: False where logits are NaN or +infinity.
    """
    rows = max(1, len(logits_NV)) if logits_NV.is_cuda else _ROWS_AT_ONCE_CPU
    pieces = [
        _keep(logits_NV[low : low + rows], next_ids_N[low : low + rows], k)
        for low in range(0, max(len(logits_NV), 1), rows)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _keep(logits_NV: Tensor, next_ids_N: Tensor, k: int) -> dict[str, Tensor]:
    values_NK, ids_NK = largest(logits_NV, k=k)
    top_N1 = values_NK[:, :1]
    # Others are summed, not taken from one: what a sure teacher leaves them would drown in rounding.
    rest_N = (logits_NV - top_N1).exp_().scatter_(-1, ids_NK, 0).sum(dim=-1)
    total_N = rest_N + (values_NK - top_N1).exp().sum(dim=-1)
    scale_N1 = top_N1 + total_N.log()[:, None]
    return {
        "ids": ids_NK,
        "log_probs": (values_NK - scale_N1).clamp(max=0),
        "tail": rest_N.log() - total_N.log(),
        "next_log_prob": (logits_NV.gather(-1, next_ids_N[:, None]) - scale_N1)[:, 0].clamp(max=0),
        "is_finite": scale_N1[:, 0].isfinite(),
    }


def largest(logits_NV: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [N, k] of the k largest of each row, descending; the values are those of `torch.topk`.

    They lie in the k blocks with the largest maxima, so that only those are searched. Of equal values any may be taken.
    """
    rows, vocabulary = logits_NV.shape
    blocks = vocabulary // _BLOCK
    if blocks <= 2 * k:
        top = logits_NV.topk(k, dim=-1)
        return top.values, top.indices
    # Block b holds the columns b, b + blocks, b + 2 * blocks ...: neighbours stay neighbours for the maximum.
    best_NK = logits_NV[:, : blocks * _BLOCK].unflatten(-1, (_BLOCK, blocks)).amax(dim=1).topk(k, dim=-1).indices
    steps = torch.arange(_BLOCK, device=logits_NV.device) * blocks
    rest = torch.arange(blocks * _BLOCK, vocabulary, device=logits_NV.device)
    candidates = torch.cat([(best_NK[:, :, None] + steps).flatten(1), rest.expand(rows, -1)], dim=-1)
    top = logits_NV.gather(-1, candidates).topk(k, dim=-1)
    return top.values, candidates.gather(-1, top.indices)
