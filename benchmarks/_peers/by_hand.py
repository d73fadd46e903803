"""The loop that one writes without a package: whole logits of both models, `kl_div`, clipping, AdamW."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._peers.job import Job, rows_in_order
from benchmarks._peers.pace import Pace


def train(folder: Path, job: Job, student: nn.Module, teacher: nn.Module, pace: Pace) -> list[float]:
    """Train the student in place. Returns the loss of every step."""
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": job.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, betas=(job.beta1, job.beta2))
    batches = rows_in_order(folder, job).split(job.rows)
    student.train()
    losses = []
    pace.ready()
    for ids_BT in batches:
        loss = loss_of(student, teacher, ids_BT.to(job.device))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), job.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        pace.step_done()
    return losses


def loss_of(student: nn.Module, teacher: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean KL(teacher || student) over every position that has a next token."""
    with torch.no_grad():
        teacher_BTV = F.log_softmax(teacher(input_ids=ids_BT).logits[:, :-1], dim=-1)
    student_BTV = F.log_softmax(student(input_ids=ids_BT).logits[:, :-1], dim=-1)
    kl = F.kl_div(student_BTV, teacher_BTV, reduction="sum", log_target=True)
    return kl / (ids_BT.shape[0] * (ids_BT.shape[1] - 1))
