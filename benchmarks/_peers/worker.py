"""`python -m benchmarks._peers.worker CONTENDER FOLDER`: one contender's process, steered through standard input."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks._peers.job import heldout_kl, open_models, read_job, rows_of
from benchmarks._peers.pace import Channel, Pace

CONTENDERS = {
    "by hand": "by_hand", "limbeck": "limbeck", "trl GKDTrainer": "trl_gkd", "trl DistillationTrainer": "trl_chunked"
}  # fmt: skip


def main() -> None:
    """Do the job, or its first steps with `--watch`, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=sorted(CONTENDERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--watch", type=int, metavar="STEPS", help="do so many steps only and measure memory")
    chosen = parser.parse_args()
    channel = Channel.take_standard_streams()
    torch.set_num_threads(chosen.threads)
    job = read_job(chosen.folder)
    if chosen.watch:
        job = replace(job, steps=chosen.watch)
    train = importlib.import_module(f"benchmarks._peers.{CONTENDERS[chosen.contender]}").train
    student, teacher = open_models(chosen.folder, job)
    pace = Pace(channel, steps=job.steps, block=chosen.block, device=job.device, watches=bool(chosen.watch))
    losses = train(chosen.folder, job, student, teacher, pace)
    memory = {} if pace.memory is None else {"peak_bytes": pace.memory.peak_bytes, "memory_method": pace.memory.method}
    channel.say(losses=losses, heldout_kl=heldout_kl(student, teacher, rows_of(chosen.folder)["heldout"]), **memory)


if __name__ == "__main__":
    main()
