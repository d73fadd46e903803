"""The one place that masks, weighs and sums losses over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.types import DenseTargets, SparseTargets
from limbeck.objectives.divergences import cross_entropy, forward_kl


def scored_rows(values_BTX: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """What a model says at t-1 wherever the token at t is scored: hidden states or targets [B, T, ...] to [N, ...]."""
    return values_BTX[:, :-1][loss_mask_BT[:, 1:]]


def scored_ids(input_ids_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """The scored tokens themselves, [N], in the order of `scored_rows`."""
    return input_ids_BT[:, 1:][loss_mask_BT[:, 1:]]


def scored_targets(
    targets: DenseTargets | SparseTargets | None, loss_mask_BT: Tensor
) -> DenseTargets | SparseTargets | None:
    """A teacher's targets at the scored positions, flattened to rows as `chunked.logit_terms` takes them."""
    if targets is None:
        return None
    if isinstance(targets, DenseTargets):
        return DenseTargets(scored_rows(targets.hidden_BTD, loss_mask_BT), targets.head)
    weights = targets.weights_BTK
    return SparseTargets(
        scored_rows(targets.ids_BTK, loss_mask_BT),
        scored_rows(targets.log_probs_BTK, loss_mask_BT),
        scored_rows(targets.tail_log_prob_BT, loss_mask_BT),
        None if weights is None else scored_rows(weights, loss_mask_BT),
    )


def logit_loss(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor | None,
    input_ids_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over scored tokens of KL(teacher || student) and cross-entropy, in nats.

    Logits at position t-1 are scored against the token at t wherever `loss_mask_BT` is True at t: padding, first
    tokens of documents and position 0 never count. Only scored positions are touched, so their number sets the cost.
    The KL term is multiplied by temperature**2, so that its gradients keep their size (Hinton et al. 2015, section 2).
    Returns the sum (a scalar; divide by the count of scored tokens for nats per token) and each unweighted term's sum.

    Raises: ValueError when a KL is asked for without teacher logits.
    """
    scored_BT = loss_mask_BT[:, 1:]
    student_NV = student_logits_BTV[:, :-1][scored_BT].unsqueeze(0)
    total = student_NV.new_zeros(())
    terms: dict[str, Tensor] = {}
    if ce:
        terms["ce"] = cross_entropy(student_NV, input_ids_BT[:, 1:][scored_BT].unsqueeze(0)).sum()
        total = total + ce * terms["ce"]
    if kl:
        if teacher_logits_BTV is None:
            raise ValueError("a KL term needs the teacher's logits")
        teacher_NV = teacher_logits_BTV[:, :-1][scored_BT].unsqueeze(0)
        terms["kl"] = forward_kl(student_NV, teacher_NV, temperature=temperature).sum()
        total = total + kl * temperature**2 * terms["kl"]
    return total, {name: term.detach() for name, term in terms.items()}


def normalised_squared_error(
    student_BTD: Tensor, teacher_BTD: Tensor, *, power: float | Tensor, mask_BT: Tensor | None
) -> Tensor:
    """Sum over tokens of the squared error averaged over the width, divided by the target's mean square `power`.

    Divided by the number of tokens this is the normalised MSE: 0 is perfect, 1 is as good as an output of zero.
    """
    error_BT = (student_BTD - teacher_BTD.detach()).float().square().mean(-1)
    if mask_BT is not None:
        error_BT = torch.where(mask_BT, error_BT, 0.0)
    return error_BT.sum() / power
