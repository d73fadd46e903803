"""TRL's GKDTrainer, which distils on given text: on-policy share 0, forward KL, temperature 1, nothing else changed.

(TRL 1.16's DistillationTrainer has no such mode: it always lets the student write. See `trl_chunked`.)
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._peers import trl_common
from benchmarks._peers.job import Job
from benchmarks._peers.pace import Pace


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Whole rows: every token but the first is a target, no prompt."""
    ids_BT = trl_common.stacked(examples, "input_ids")
    labels_BT = ids_BT.clone()
    labels_BT[:, 0] = -100
    mask_BT = torch.ones_like(ids_BT)
    return {
        "input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, "prompts": ids_BT[:, :1],
        "prompt_attention_mask": mask_BT[:, :1],
    }  # fmt: skip


def train(folder: Path, job: Job, student: nn.Module, teacher: nn.Module, pace: Pace) -> list[float]:
    """Train the student in place. Returns the loss of every step."""
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    pacing = trl_common.PacingCallback(pace)
    settings = GKDConfig(
        **trl_common.common_settings(job), lmbda=0.0, beta=0.0, temperature=1.0, seq_kd=False,
        train_sampling_strategy="sequential", max_length=job.context,
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=settings, data_collator=collate, callbacks=[pacing],
        train_dataset=trl_common.rows_as_dataset(folder, job, "input_ids"), processing_class=trl_common.tokenizer_of(folder),
    )  # fmt: skip
    return trl_common.finish(trainer, pacing)
