"""TRL's DistillationTrainer with its chunked loss, its writing replaced by the given rows.

The trainer has no off-policy mode. To see its memory-saving loss at the same job, the one method in which the student
writes is overridden here: the first token of a row is handed over as the prompt, the others as what was "written". No user
would do so; everything else is the trainer's own.
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


def train(folder: Path, job: Job, student: nn.Module, teacher: nn.Module, pace: Pace) -> list[float]:
    """Train the student in place. Returns the loss of every step."""
    warnings.simplefilter("ignore")
    trl_common.leave_out_broken_trackers()
    from trl import DistillationConfig, DistillationTrainer

    class GivenRows(DistillationTrainer):
        """Takes rows instead of writing them."""

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            ids_BT = trl_common.stacked(inputs, "prompt").to(job.device)
            mask_BT = torch.ones_like(ids_BT)
            return {
                "prompt_ids": ids_BT[:, :1], "prompt_mask": mask_BT[:, :1], "completion_ids": ids_BT[:, 1:],
                "completion_mask": mask_BT[:, 1:], "num_items_in_batch": mask_BT[:, 1:].sum(),
            }  # fmt: skip

    pacing = trl_common.PacingCallback(pace)
    settings = DistillationConfig(**trl_common.common_settings(job), beta=0.0, temperature=1.0, shuffle_dataset=False)
    trainer = GivenRows(
        model=student, teacher_model=teacher, args=settings, callbacks=[pacing],
        train_dataset=trl_common.rows_as_dataset(folder, job, "prompt"), processing_class=trl_common.tokenizer_of(folder),
    )  # fmt: skip
    return trl_common.finish(trainer, pacing)
