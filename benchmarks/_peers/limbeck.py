"""The package: its real training loop, `train_stage` with a `DistilLesson`, checkpointing only at the end.

The loop always writes one checkpoint when a stage ends; no other is asked for, and that one comes after the last step that is
timed or watched.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks._peers.job import Job, mixture, rows_of
from benchmarks._peers.pace import Pace
from limbeck.teachers.live import LiveTeacher
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.metrics import MetricsLog, SilentProgress
from limbeck.train.trainer import StageSettings, train_stage


class _Pacing(SilentProgress):
    """The loop's own progress hook, which is called before the first step and after each one."""

    def __init__(self, pace: Pace):
        self.pace = pace

    def start(self, title: str, total: int, done: int) -> None:
        self.pace.ready()

    def advance(self, tokens: int, note: str) -> None:
        self.pace.step_done()


def train(folder: Path, job: Job, student: nn.Module, teacher: nn.Module, pace: Pace) -> list[float]:
    """Train the student in place. Returns the loss of every step."""
    settings = StageSettings(
        name="distil", tokens=job.steps * job.step_tokens, batch_tokens=job.step_tokens, learning_rate=job.learning_rate,
        weight_decay=job.weight_decay, betas=(job.beta1, job.beta2), schedule="constant", warmup_share=0.0,
        clip_norm=job.clip_norm, checkpoint_every_tokens=job.steps * job.step_tokens,
    )  # fmt: skip
    lesson = DistilLesson(student, LiveTeacher(teacher), [Term("forward_kl")])
    with tempfile.TemporaryDirectory() as scratch:
        log = MetricsLog(Path(scratch) / "metrics.jsonl")
        train_stage(
            lesson, mixture(rows_of(folder)["train"]), settings, folder=Path(scratch) / "checkpoints", log=log, arm="student",
            seed=0, device=torch.device(job.device), progress=_Pacing(pace),
        )  # fmt: skip
        return [line["loss"] for line in log.lines()]
