"""The same objectives when only some of the teacher's entries are known.

What becomes of the mass of all other tokens is said by `missing`:
tail: they are one bucket more, in both models; their total is right, how it is spread is not taught. A divergence is
    then never larger than the dense one, and equal to it when every token is kept.
renormalise: the kept entries are scaled up to sum to one and all others count as never said. The teacher taught is not
    the true one: its entropy is too low by what the tail holds (DistillKit's "zero").
uniform: the missing mass is spread evenly over the other tokens.

A temperature is applied to the stored log-probabilities as p^(1/T), rescaled: exact for the kept entries among
themselves. With "tail" the k+1 buckets of *both* models are softened as they are, so that equals stay at zero; with the
other two the filled distribution is softened, as the student's own is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import unknown_name
from limbeck.core.types import SparseTargets
from limbeck.objectives import divergences, ranking
from limbeck.objectives.divergences import Comparison, at_least_float32, log_probs

MISSING = ("tail", "renormalise", "uniform")
_NEARLY_NEVER = -1e30
# These put the student's own mass over what the teacher never says, which renormalised targets say of most tokens.
_INFINITE_WHEN_RENORMALISED = ("reverse_kl", "symmetric_kl", "adaptive_kl")


def sparse_divergence(
    name: str,
    student_logits_NV: Tensor,
    targets: SparseTargets,
    *,
    temperature: float = 1.0,
    missing: str = "tail",
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """An objective of `COMPARISONS` against sparse targets, of which each tensor has the logits' leading shape.

    `hinge` and `logistic_ranking` look at the kept entries alone; `missing` does not matter to them. With sampled
    targets (`weights_BTK`) `forward_kl` gives an unbiased estimate of the dense value and gradient, which may be
    negative; the others have none and are refused. Gradients flow to the student. Returns [N] nats.
    Source: for sampled targets Anshumann et al. 2025, arXiv:2503.16870.

    Raises: ValueError for an unknown name or mode, for sampled targets with anything but forward KL at temperature 1,
    and for renormalised targets with an objective that they make infinite.
    """
    if name not in COMPARISONS:
        raise ValueError(unknown_name("objective on a teacher's distribution", name, COMPARISONS))
    if missing not in MISSING:
        raise ValueError(unknown_name("way to treat missing mass", missing, MISSING))
    options = dict(options or {})
    student_NV = at_least_float32(student_logits_NV)
    if targets.weights_BTK is not None:
        _require_forward_kl(name, temperature)
        return _sampled_forward_kl(student_NV, targets, targets.weights_BTK)
    if name in ("hinge", "logistic_ranking"):
        teacher_NK = targets.log_probs_BTK / temperature
        return COMPARISONS[name].of_log_probs(_kept(student_NV, targets.ids_BTK) / temperature, teacher_NK, **options)
    if missing != "tail":
        return _filled(name, student_NV, targets, temperature=temperature, missing=missing, options=options)
    teacher_NK1 = log_probs(_join(targets.log_probs_BTK, targets.tail_log_prob_BT), temperature)
    if name == "sorted_earth_mover":
        return _sorted_buckets_distance(student_NV, teacher_NK1, temperature)
    student_NK1 = log_probs(_buckets(student_NV, targets.ids_BTK), temperature)
    return COMPARISONS[name].of_log_probs(student_NK1, teacher_NK1, **options)


COMPARISONS: dict[str, Comparison] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "symmetric_kl": divergences.symmetric_kl,
    "jensen_shannon": divergences.jensen_shannon,
    "skewed_forward_kl": divergences.skewed_forward_kl,
    "skewed_reverse_kl": divergences.skewed_reverse_kl,
    "adaptive_kl": divergences.adaptive_kl,
    "alpha_beta": divergences.alpha_beta,
    "total_variation": divergences.total_variation,
    "sorted_earth_mover": divergences.sorted_earth_mover,
    "logit_mse": divergences.logit_mse,
    "hinge": ranking.hinge,
    "logistic_ranking": ranking.logistic_ranking,
}


def _kept(student_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The student's logits of the kept tokens, -inf in unused places."""
    return student_NV.gather(-1, ids_NK.clamp_min(0)).masked_fill(ids_NK < 0, -math.inf)


def _buckets(student_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Unnormalised log-masses [N, K+1]: of each kept token, and of all others together.

    The others are summed by themselves rather than as one minus the kept ones, which would lose a small tail to
    rounding and would not give an exact zero when every token is kept. Kept tokens become a very small finite number
    there, since the logsumexp of nothing but -inf has no gradient; a column more takes the unused places.
    """
    others_NW = F.pad(student_NV, (0, 1), value=_NEARLY_NEVER)
    others_NW = others_NW.scatter_(-1, _beyond_when_unused(ids_NK, student_NV), _NEARLY_NEVER)
    rest_N1 = others_NW.logsumexp(-1, keepdim=True)
    rest_N1 = rest_N1.masked_fill(rest_N1 < _NEARLY_NEVER / 2, -math.inf)
    return torch.cat((_kept(student_NV, ids_NK), rest_N1), dim=-1)


def _beyond_when_unused(ids_NK: Tensor, like_NV: Tensor) -> Tensor:
    return torch.where(ids_NK < 0, like_NV.shape[-1], ids_NK)


def _filled(
    name: str, student_NV: Tensor, targets: SparseTargets, *, temperature: float, missing: str, options: dict[str, Any]
) -> Tensor:
    """The dense objective, against a teacher whose other tokens are never said or share the missing mass evenly."""
    is_infinite = name in _INFINITE_WHEN_RENORMALISED or (name == "alpha_beta" and options.get("alpha") == 0)
    if missing == "renormalise" and is_infinite:
        raise ValueError(
            f"{name} against a renormalised top-k is infinite: the teacher never says what was not kept, and the "
            "student pays for all that it puts there. Use missing: tail (or uniform), or forward_kl"
        )
    ids_NK = targets.ids_BTK
    if missing == "uniform":
        others_N1 = student_NV.shape[-1] - (ids_NK >= 0).sum(-1, keepdim=True)
        tail_N1 = targets.tail_log_prob_BT.unsqueeze(-1)
        fill_N1 = tail_N1 - others_N1.clamp_min(1).to(tail_N1.dtype).log()
    else:
        fill_N1 = torch.full_like(targets.tail_log_prob_BT, -math.inf).unsqueeze(-1)
    padded_NW = fill_N1.expand(*fill_N1.shape[:-1], student_NV.shape[-1] + 1)
    teacher_NV = padded_NW.scatter(-1, _beyond_when_unused(ids_NK, student_NV), targets.log_probs_BTK)[..., :-1]
    return COMPARISONS[name](student_NV, teacher_NV, temperature=temperature, **options)


def _sorted_buckets_distance(student_NV: Tensor, teacher_NK1: Tensor, temperature: float) -> Tensor:
    """Ranks are compared as far as the teacher's entries reach, and the rest of both models as one bucket."""
    kept_NK = teacher_NK1[..., :-1].sort(dim=-1, descending=True).values[..., : student_NV.shape[-1]]
    top_ids_NK = student_NV.detach().topk(kept_NK.shape[-1], dim=-1).indices.masked_fill(kept_NK == -math.inf, -1)
    student_NK1 = log_probs(_buckets(student_NV, top_ids_NK), temperature)
    return (_join(kept_NK, teacher_NK1[..., -1]).exp() - student_NK1.exp()).abs().sum(-1)


def _require_forward_kl(name: str, temperature: float) -> None:
    if name != "forward_kl":
        raise ValueError(
            f"{name} has no unbiased estimate from sampled targets; they teach forward_kl. Capture top-k targets for it"
        )
    if temperature != 1:
        raise ValueError(
            f"sampled targets speak of the distribution at temperature 1; {temperature} needs the mass of tokens that "
            "were not drawn. Use temperature 1, or capture top-k targets"
        )


def _sampled_forward_kl(student_NV: Tensor, targets: SparseTargets, weights_NK: Tensor) -> Tensor:
    """Sum of weight * (log p - log q) over the drawn tokens: on average the sum of p (log p - log q) over all."""
    is_drawn_NK = targets.ids_BTK >= 0
    student_NK = _kept(student_NV, targets.ids_BTK) - student_NV.logsumexp(-1, keepdim=True)
    surplus_NK = torch.where(is_drawn_NK, targets.log_probs_BTK - student_NK, 0.0)
    return (torch.where(is_drawn_NK, weights_NK, 0.0) * surplus_NK).sum(-1)


def _join(kept_NK: Tensor, tail_N: Tensor) -> Tensor:
    return torch.cat((kept_NK, tail_N.unsqueeze(-1)), dim=-1)
