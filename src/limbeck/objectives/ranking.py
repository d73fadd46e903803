"""Objectives on the order of the teacher's likeliest tokens, not on their probabilities.

The student's log-probabilities count only through their differences, so a constant added to them changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.objectives.divergences import Comparison


@Comparison
def hinge(student_BTV: Tensor, teacher_BTV: Tensor, *, margin: float | None = None, top_k: int = 32) -> Tensor:
    """Of the teacher's `top_k` tokens, each should lead each less likely one by `margin` nats; averaged over pairs.

    margin: None asks for the teacher's own lead, and then the loss is zero exactly on equals. Ties make no pair, and a
    position without pairs gives 0. Needs top_k^2 numbers a position. Returns [B, T] nats, >= 0.
    Source: Weston and Watkins 1999 for the margin between pairs. DistillKit has the same on probabilities, where the
    leads of unlikely tokens vanish; log-probabilities here.

    Raises: ValueError for a negative margin or a `top_k` below 2.
    """
    if margin is not None and margin < 0:
        raise ValueError(f"hinge: margin must not be negative, got {margin}")
    student_BTKK, teacher_BTKK, is_pair_BTKK = _leads(student_BTV, teacher_BTV, top_k)
    wanted_BTKK = teacher_BTKK if margin is None else torch.full_like(teacher_BTKK, margin)
    return _mean_over_pairs(F.relu(wanted_BTKK - student_BTKK), is_pair_BTKK)


@Comparison
def logistic_ranking(student_BTV: Tensor, teacher_BTV: Tensor, *, top_k: int = 32) -> Tensor:
    """Nats of guessing which of two tokens the teacher prefers, from the student's lead; averaged over pairs.

    Pairs are those of the teacher's `top_k` tokens that do not tie. Not zero on equals: a larger lead always pays.
    Needs top_k^2 numbers a position. Returns [B, T] nats, > 0 where there are pairs, else 0.
    Source: Burges et al. 2005 (RankNet), equation 3, with certain targets.

    Raises: ValueError for a `top_k` below 2.
    """
    student_BTKK, _, is_pair_BTKK = _leads(student_BTV, teacher_BTV, top_k)
    return _mean_over_pairs(F.softplus(-student_BTKK), is_pair_BTKK)


def _leads(student_BTV: Tensor, teacher_BTV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """By how much the student and the teacher prefer token i to token j, and where the teacher does at all."""
    if top_k < 2:
        raise ValueError(f"top_k must be at least 2 to make a pair, got {top_k}")
    teacher_BTK, ids_BTK = teacher_BTV.topk(min(int(top_k), teacher_BTV.shape[-1]), dim=-1)
    student_BTK = student_BTV.gather(-1, ids_BTK)
    is_possible_BTK = torch.isfinite(teacher_BTK) & torch.isfinite(student_BTK)
    student_BTK = torch.where(is_possible_BTK, student_BTK, 0.0)
    teacher_BTK = torch.where(is_possible_BTK, teacher_BTK, 0.0)
    teacher_BTKK = teacher_BTK.unsqueeze(-1) - teacher_BTK.unsqueeze(-2)
    is_pair_BTKK = (teacher_BTKK > 0) & is_possible_BTK.unsqueeze(-1) & is_possible_BTK.unsqueeze(-2)
    return student_BTK.unsqueeze(-1) - student_BTK.unsqueeze(-2), teacher_BTKK, is_pair_BTKK


def _mean_over_pairs(values_BTKK: Tensor, is_pair_BTKK: Tensor) -> Tensor:
    sum_BT = (values_BTKK * is_pair_BTKK).sum((-2, -1))
    return sum_BT / is_pair_BTKK.sum((-2, -1)).clamp_min(1)
