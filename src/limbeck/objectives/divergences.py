"""Losses on logits. Each returns [B, T] nats per token; masking and averaging happen in `combine`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(student_logits_BTV: Tensor, target_ids_BT: Tensor) -> Tensor:
    """Negative log-likelihood of the given tokens under the student.

    Gradients flow to the student. Returns [B, T] nats, >= 0.
    """
    nats = F.cross_entropy(
        _at_least_float32(student_logits_BTV).flatten(0, -2), target_ids_BT.flatten(), reduction="none"
    )
    return nats.view(target_ids_BT.shape)


def forward_kl(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student): the student pays where the teacher puts mass and it does not.

    Gradients flow to the student only. Returns [B, T] nats, >= 0, zero exactly on equals. The customary
    temperature**2 factor is not applied; it belongs to the stage's weight.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    student_BTV = F.log_softmax(_softened(student_logits_BTV, temperature), dim=-1)
    teacher_BTV = F.log_softmax(_softened(teacher_logits_BTV.detach(), temperature), dim=-1)
    return F.kl_div(student_BTV, teacher_BTV, reduction="none", log_target=True).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _softened(logits: Tensor, temperature: float) -> Tensor:
    logits = _at_least_float32(logits)
    return logits if temperature == 1 else logits / temperature
