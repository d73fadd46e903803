"""The one place that masks: from tensors over positions to rows that are scored. `chunked` weighs and sums them."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.types import DenseTargets, SparseTargets


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
