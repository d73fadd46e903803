"""What both of TRL's trainers are given: the same settings, rows in order, nothing saved or reported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from benchmarks._peers.job import Job, rows_in_order
from benchmarks._peers.pace import Pace


class PacingCallback(TrainerCallback):
    """Takes turns at the trainer's own hooks and gathers the losses that it logs."""

    def __init__(self, pace: Pace):
        self.pace = pace
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Everything is loaded."""
        self.pace.ready()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """One update is done."""
        self.pace.step_done()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """A step's loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def common_settings(job: Job) -> dict[str, Any]:
    """Arguments of transformers' trainer that make the job the same as everybody's; all others are the defaults."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-peer-"), "max_steps": job.steps,
        "per_device_train_batch_size": job.rows, "learning_rate": job.learning_rate, "weight_decay": job.weight_decay,
        "adam_beta1": job.beta1, "adam_beta2": job.beta2, "max_grad_norm": job.clip_norm, "lr_scheduler_type": "constant",
        "bf16": False, "gradient_checkpointing": False, "use_cpu": job.device == "cpu", "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def tokenizer_of(folder: Path) -> Any:
    """The job's tokenizer."""
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def rows_as_dataset(folder: Path, job: Job, name: str) -> Any:
    """The rows in order, as a dataset of one column."""
    return Dataset.from_dict({name: rows_in_order(folder, job).tolist()})


def finish(trainer: Any, pacing: PacingCallback) -> list[float]:
    """Train. Returns the losses that the trainer logged."""
    trainer.train()
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    return pacing.losses


def leave_out_broken_trackers() -> None:
    """TRL imports a tracker that is installed, used or not; one that is installed but broken is put aside."""
    if importlib.util.find_spec("trackio") is None:
        return
    try:
        importlib.import_module("trackio")
    except ImportError:
        empty = types.ModuleType("trackio")
        empty.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
        sys.modules["trackio"] = empty


def stacked(examples: list[dict[str, Any]], name: str) -> Tensor:
    """A batch's rows."""
    return torch.tensor([example[name] for example in examples])
