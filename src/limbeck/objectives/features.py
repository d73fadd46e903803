"""Objectives on what lies inside a model: hidden states, attention maps, mixing matrices, relations between tokens.

Each gives one number per position, [B, T], and averages over heads and widths, so that weights mean the same for models
of all sizes. Position t is the student's and the teacher's state after reading token t. Nothing is reduced over
positions: rows are independent of each other, so any split of a batch adds up to the whole. Half precision is computed
in float32. Gradients flow to the student only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import RecipeError, unknown_name

# Below this a probability, or a squared norm to divide by, counts as this: no infinities, no NaN.
_LEAST = 1e-30


class CannotCompare(RecipeError, ValueError):
    """An objective was chosen that cannot compare this student with this teacher."""


def hidden_mse(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Squared difference of two hidden states, averaged over the width.

    Returns [B, T] in squared units of the hidden states, >= 0, zero exactly on equals. Its size is the teacher's:
    choose the weight accordingly, or take `hidden_cosine`.
    Source: Romero et al. 2015, arXiv:1412.6550 (half of the sum there; the mean here).
    """
    _require_same_shape("hidden_mse", student_BTD, teacher_BTD, "a projection of the student's hidden states")
    return (_wide(student_BTD) - _wide(teacher_BTD).detach()).square().mean(-1)


def hidden_cosine(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """One minus the cosine of the angle between two hidden states: their direction counts, their length does not.

    Returns [B, T] in 0..2, zero on equals up to rounding.
    Source: Sanh et al. 2019, arXiv:1910.01108.
    """
    _require_same_shape("hidden_cosine", student_BTD, teacher_BTD, "a projection of the student's hidden states")
    return 1 - (F.normalize(_wide(student_BTD), dim=-1) * F.normalize(_wide(teacher_BTD).detach(), dim=-1)).sum(-1)


def linear_cka(student_BTD: Tensor, teacher_BTE: Tensor, *, mask_BT: Tensor | None = None) -> Tensor:
    """One minus the centred kernel alignment of each row: whether the same positions are alike in both models.

    Widths may differ, and rotating or scaling either side changes nothing. mask_BT: positions that take part. Needs
    [T, T] numbers for each row. Returns [B, T] in 0..2, the row's value at each of its positions: 0 for equal geometry, about
    1 for unrelated ones, and 0 in rows with fewer than four positions, of which nothing can be said.
    Source: Kornblith et al. 2019, arXiv:1905.00414, with the unbiased HSIC of Song et al. 2012 as in Nguyen et al. 2021,
    arXiv:2010.15327. The usual biased form is near 1 for any two models wider than the row is long, and so teaches
    nothing. Per row rather than over the batch (our deviation), so that micro-batches add up.
    """
    _require_same_positions("linear_cka", student_BTD, teacher_BTE)
    mask_BT = _all_true(student_BTD) if mask_BT is None else mask_BT
    student_BTT = _unbiased_centred_gram(_wide(student_BTD), mask_BT)
    teacher_BTT = _unbiased_centred_gram(_wide(teacher_BTE).detach(), mask_BT)
    alignment_B = (_to_unit_length(student_BTT) * _to_unit_length(teacher_BTT)).sum((1, 2))
    is_known_B1 = mask_BT.sum(1, keepdim=True) > 3
    return torch.where(mask_BT & is_known_B1, 1 - alignment_B.unsqueeze(1), 0.0)


def _unbiased_centred_gram(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Inner products of positions, U-centred: the diagonal left out, rows and columns summing to zero. [B, T, T].

    Its inner product with another one is n (n - 3) times the unbiased HSIC (Szekely and Rizzo 2014).
    """
    count_B11 = mask_BT.sum(1).view(-1, 1, 1)
    mask_BT1 = mask_BT.unsqueeze(-1)
    # Neither scale nor mean changes the alignment, but fourth powers overflow and large means cost digits.
    largest_B11 = x_BTD.detach().abs().masked_fill(~mask_BT1, 0.0).amax((1, 2), keepdim=True)
    x_BTD = x_BTD / torch.where(largest_B11 > 0, largest_B11, 1.0)
    mean_B1D = torch.where(mask_BT1, x_BTD, 0.0).sum(1, keepdim=True) / count_B11.clamp_min(1)
    x_BTD = torch.where(mask_BT1, x_BTD - mean_B1D, 0.0)
    is_pair_BTT = mask_BT1 & mask_BT1.mT & ~torch.eye(x_BTD.shape[1], dtype=torch.bool, device=x_BTD.device)
    gram_BTT = torch.where(is_pair_BTT, x_BTD @ x_BTD.mT, 0.0)
    rows_BT1 = gram_BTT.sum(-1, keepdim=True) / (count_B11 - 2).clamp_min(1)
    total_B11 = rows_BT1.sum(1, keepdim=True) / (count_B11 - 1).clamp_min(1)
    return torch.where(is_pair_BTT, gram_BTT - rows_BT1 - rows_BT1.mT + total_B11, 0.0)


def _to_unit_length(matrix_BTT: Tensor) -> Tensor:
    """Each matrix over its Frobenius norm; zero stays zero."""
    return matrix_BTT / matrix_BTT.square().sum((1, 2), keepdim=True).clamp_min(_LEAST).sqrt()


def contrastive(
    student_BTD: Tensor, teacher_BTD: Tensor, *, mask_BT: Tensor | None = None, temperature: float = 0.1
) -> Tensor:
    """InfoNCE: which of the row's teacher states belongs to this student state? Nats of the right answer.

    Similarity is the cosine over `temperature`; the other positions of the same row are the wrong answers. mask_BT:
    positions that ask and may be answers. Returns [B, T] nats, >= 0; no divergence: the teacher's own states give more
    than zero when neighbours are alike.
    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4; for distillation Tian et al. 2020, arXiv:1910.10699. Negatives
    from the row itself, no memory bank (our deviation).

    Raises: ValueError for a temperature that is not positive.
    """
    _require_same_shape("contrastive", student_BTD, teacher_BTD, "a projection of the student's hidden states")
    if temperature <= 0:
        raise CannotCompare(f"contrastive: temperature must be positive, got {temperature}")
    student_BTD = F.normalize(_wide(student_BTD), dim=-1)
    teacher_BTD = F.normalize(_wide(teacher_BTD).detach(), dim=-1)
    scores_BTT = student_BTD @ teacher_BTD.mT / temperature
    if mask_BT is not None:
        scores_BTT = scores_BTT.masked_fill(~mask_BT.unsqueeze(1), _never(scores_BTT))
    nats_BT = torch.logsumexp(scores_BTT, dim=-1) - torch.diagonal(scores_BTT, dim1=1, dim2=2)
    return nats_BT if mask_BT is None else torch.where(mask_BT, nats_BT, 0.0)


def attention_kl(student_BHTT: Tensor, teacher_BHTT: Tensor) -> Tensor:
    """KL(teacher || student) of where each position looks, averaged over heads.

    The maps are attention weights [B, H, T, T] (row t: over the past of t), zero where nothing may be looked at. Returns
    [B, T] nats, >= 0, zero exactly on equals. Where the student's weight is below 1e-30 it counts as that.
    Source: Wang et al. 2020, arXiv:2002.10957 (MiniLM: the last layer alone; here any pair).

    Raises: ValueError when the numbers of heads differ.
    """
    _require_same_shape(
        "attention_kl", student_BHTT, teacher_BHTT, "the same heads; value_relation and qkv_relation do not"
    )
    student_log_BHTT = _wide(student_BHTT).clamp_min(_LEAST).log()
    return F.kl_div(student_log_BHTT, _wide(teacher_BHTT).detach(), reduction="none").sum(-1).mean(1)


def mixing_matrix_distance(student_BHTT: Tensor, teacher_BHTT: Tensor) -> Tensor:
    """Squared difference between the rows of two mixing matrices, averaged over heads.

    A mixing matrix says how much token s's value counts in token t's output: an attention map, or what a Hyena layer's
    gates and filters amount to. Its heads need not sum to one. When the student has r times the teacher's heads (Hyena
    has one matrix per channel), the teacher's head h is the target of the student's h r .. h r + r - 1. Returns [B, T],
    >= 0, zero exactly on equals; summed over positions it is the squared Frobenius norm.
    Source: MOHAWK, arXiv:2408.10189, stage 1 (there the norm, and one matrix per head).

    Raises: ValueError when the student's number of heads is no multiple of the teacher's.
    """
    repeats, rest = divmod(student_BHTT.shape[1], teacher_BHTT.shape[1])
    if rest or not repeats or student_BHTT.shape[2:] != teacher_BHTT.shape[2:]:
        raise CannotCompare(
            f"mixing_matrix_distance: the student has matrices {tuple(student_BHTT.shape)}, the teacher "
            f"{tuple(teacher_BHTT.shape)}; the first's heads must be a multiple of the second's, the rest equal"
        )
    student_BGRTT = _wide(student_BHTT).unflatten(1, (-1, repeats))
    return (student_BGRTT - _wide(teacher_BHTT).detach().unsqueeze(2)).square().sum(-1).mean((1, 2))


def value_relation(
    student_BTC: Tensor, teacher_BTE: Tensor, *, document_ids_BT: Tensor | None = None, relation_heads: int = 16
) -> Tensor:
    """KL(teacher || student) of which earlier tokens have similar vectors, averaged over relation heads.

    Each side's vectors (all heads of a layer side by side: [B, T, C]) are cut into `relation_heads` pieces, whatever its
    own heads are, so widths, numbers of heads and grouping may differ. A piece's relation at t is the softmax over s <= t
    of its scaled inner products. document_ids_BT: relations stay within runs of equal ids. Returns [B, T] nats, >= 0, zero
    exactly on equals. Needs [relation_heads, T, T] numbers for each row.
    Source: MiniLM, arXiv:2002.10957, with the relation heads of MiniLMv2, arXiv:2012.15828. Over the past only, as in a
    decoder, and on projections before rotary embeddings and norms (our deviations).

    Raises: ValueError when `relation_heads` does not divide both widths.
    """
    _require_same_positions("value_relation", student_BTC, teacher_BTE)
    widths = student_BTC.shape[-1], teacher_BTE.shape[-1]
    if relation_heads < 1 or any(width % relation_heads for width in widths):
        common = math.gcd(*widths)
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise CannotCompare(
            f"relation_heads {relation_heads} does not divide the widths of both models, {widths[0]} and {widths[1]}; "
            f"choose one of {', '.join(fitting)}"
        )
    visible_BTT = _visible_past(student_BTC, document_ids_BT)
    student_BATT = _relation_log_probs(_wide(student_BTC), relation_heads, visible_BTT)
    teacher_BATT = _relation_log_probs(_wide(teacher_BTE).detach(), relation_heads, visible_BTT)
    return F.kl_div(student_BATT, teacher_BATT, reduction="none", log_target=True).sum(-1).mean(1)


def qkv_relation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, document_ids_BT: Tensor | None = None,
    relation_heads: int = 16,
) -> Tensor:  # fmt: skip
    """The sum of `value_relation` over queries, keys and values, each a tensor [B, T, C] of its own width.

    Returns [B, T] nats, >= 0, zero exactly on equals.
    Source: MiniLMv2, arXiv:2012.15828, with equal weights; deviations as in `value_relation`.

    Raises: ValueError when `relation_heads` does not divide a width. With grouped keys and values theirs is narrower.
    """
    options: dict[str, Any] = {"document_ids_BT": document_ids_BT, "relation_heads": relation_heads}
    relations = [value_relation(s, t, **options) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(relations).sum(0)


def _visible_past(like_BTC: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """True where position t (second last) may see s (last): [1 or B, T, T]."""
    length = like_BTC.shape[1]
    past_BTT = torch.ones(1, length, length, dtype=torch.bool, device=like_BTC.device).tril()
    if document_ids_BT is None:
        return past_BTT
    # Runs of equal ids, not equal ids: the same id may come back later in a row.
    begins_BT = F.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0))
    run_BT = begins_BT.cumsum(1)
    return past_BTT & (run_BT.unsqueeze(-1) == run_BT.unsqueeze(1))


def _relation_log_probs(x_BTC: Tensor, relation_heads: int, visible_BTT: Tensor) -> Tensor:
    x_BATE = x_BTC.unflatten(-1, (relation_heads, -1)).transpose(1, 2)
    scores_BATT = x_BATE @ x_BATE.mT / math.sqrt(x_BATE.shape[-1])
    return scores_BATT.masked_fill(~visible_BTT.unsqueeze(1), _never(scores_BATT)).log_softmax(-1)


def _never(like: Tensor) -> float:
    """A score that no softmax notices, yet finite: differences of two of them are not NaN."""
    return torch.finfo(like.dtype).min / 4


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _all_true(like_BTD: Tensor) -> Tensor:
    return torch.ones(like_BTD.shape[:2], dtype=torch.bool, device=like_BTD.device)


def _require_same_shape(name: str, student: Tensor, teacher: Tensor, needed: str) -> None:
    if student.shape != teacher.shape:
        raise CannotCompare(
            f"{name}: the student's tensor has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            f"this objective needs {needed}"
        )


def _require_same_positions(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"{name}: the student speaks of {tuple(student.shape[:2])} rows and positions, the teacher of "
            f"{tuple(teacher.shape[:2])}; both must have read the same tokens"
        )


@dataclass(frozen=True)
class FeatureObjective:
    """One objective, and what has to be known to use it.

    needs: kinds of features it compares: "hidden", "attention", "mixer", "queries", "keys", "values"; the function gets
    one tensor from each model, or a sequence of them when there are several kinds. is_divergence: zero on equals.
    needs_projection: whether the student's tensor must be projected when the models' widths differ. context: which of
    mask_BT and document_ids_BT the function takes. options: its options and their defaults.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    is_divergence: bool
    needs_projection: bool
    description: str
    source: str
    context: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def feature_positions(loss_mask_BT: Tensor) -> Tensor:
    """True at positions t whose next token is scored: [B, T]. The states that features are compared at."""
    return F.pad(loss_mask_BT[:, 1:], (0, 1))


def feature_loss(
    name: str, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *, mask_BT: Tensor,
    document_ids_BT: Tensor | None = None, options: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Any objective of `FEATURE_OBJECTIVES` by name: [B, T], zero where `mask_BT` is False. Sum it, divide by the count.

    mask_BT: positions that count (see `feature_positions`). document_ids_BT: runs of equal ids are packed documents.

    Raises: ValueError for an unknown name or option, or tensors that the objective cannot compare.
    """
    if name not in FEATURE_OBJECTIVES:
        raise ValueError(unknown_name("feature objective", name, FEATURE_OBJECTIVES))
    objective = FEATURE_OBJECTIVES[name]
    options = dict(options or {})
    for option in options:
        if option not in objective.options:
            raise ValueError(f"{name}: " + unknown_name("option", option, objective.options))
    context = {"mask_BT": mask_BT, "document_ids_BT": document_ids_BT}
    values_BT = objective.function(student, teacher, **{key: context[key] for key in objective.context}, **options)
    return torch.where(mask_BT, values_BT, 0.0)


FEATURE_OBJECTIVES = {
    "hidden_mse": FeatureObjective(
        hidden_mse, ("hidden",), True, True, "squared difference of hidden states", "arXiv:1412.6550"
    ),
    "hidden_cosine": FeatureObjective(
        hidden_cosine, ("hidden",), True, True, "angle between hidden states", "arXiv:1910.01108"
    ),
    "linear_cka": FeatureObjective(
        linear_cka, ("hidden",), True, False, "whether the same positions have similar hidden states",
        "arXiv:1905.00414, arXiv:2010.15327", context=("mask_BT",),
    ),
    "contrastive": FeatureObjective(
        contrastive, ("hidden",), False, True, "tell the teacher's state of this position from those of others",
        "arXiv:1807.03748, arXiv:1910.10699", context=("mask_BT",), options={"temperature": 0.1},
    ),
    "attention_kl": FeatureObjective(
        attention_kl, ("attention",), True, False, "where each attention head looks", "arXiv:2002.10957"
    ),
    "mixing_matrix_distance": FeatureObjective(
        mixing_matrix_distance, ("mixer",), True, False, "how much each token counts in each other, Hyena layers included",
        "arXiv:2408.10189",
    ),
    "value_relation": FeatureObjective(
        value_relation, ("values",), True, False, "which tokens have similar values; any heads and widths",
        "arXiv:2002.10957, arXiv:2012.15828", context=("document_ids_BT",), options={"relation_heads": 16},
    ),
    "qkv_relation": FeatureObjective(
        qkv_relation, ("queries", "keys", "values"), True, False,
        "which tokens have similar queries, keys and values; any heads and widths", "arXiv:2012.15828",
        context=("document_ids_BT",), options={"relation_heads": 16},
    ),
}  # fmt: skip
