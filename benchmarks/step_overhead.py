"""One distillation step: the package's chunked loss beside a minimal loop written by hand, same models, same rows.

The loop is what one would write without a package: logits of both models, `F.kl_div`, backward, AdamW. The gate: losses and
all gradients of both are equal. Times of single steps, taken in turn, so that other work on the machine meets both. Peak
memory is measured in a process of its own for each, above what models and data take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from benchmarks._kept import keep, spread_of, told
from limbeck.core.types import DenseTargets
from limbeck.evaluate.memory import watch_memory
from limbeck.objectives.chunked import logit_terms
from limbeck.objectives.combine import scored_ids, scored_rows, scored_targets
from limbeck.objectives.terms import LogitTerm

Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]
TERMS = [LogitTerm("kl", 1.0, "forward_kl")]


def build_model(*, vocabulary: int, width: int, layers: int, seed: int) -> nn.Module:
    """A random Llama; speed does not depend on the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_by_hand(student: nn.Module, teacher: nn.Module, ids_BT: Tensor) -> Tensor:
    """Whole logits, whole log-softmaxes, one `kl_div`."""
    with torch.no_grad():
        teacher_BTV = F.log_softmax(teacher(input_ids=ids_BT).logits[:, :-1], dim=-1)
    student_BTV = F.log_softmax(student(input_ids=ids_BT).logits[:, :-1], dim=-1)
    kl = F.kl_div(student_BTV, teacher_BTV, reduction="sum", log_target=True)
    return kl / (ids_BT.shape[0] * (ids_BT.shape[1] - 1))


def loss_in_chunks(student: nn.Module, teacher: nn.Module, ids_BT: Tensor) -> Tensor:
    """Hidden states of both, and `logit_terms` from there."""
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    with torch.no_grad():
        targets = DenseTargets(teacher.model(input_ids=ids_BT).last_hidden_state, teacher.lm_head)
    hidden_ND = scored_rows(student.model(input_ids=ids_BT).last_hidden_state, mask_BT)
    total, _ = logit_terms(
        hidden_ND, student.lm_head, scored_ids(ids_BT, mask_BT), scored_targets(targets, mask_BT), TERMS,
        head_parameters=list(student.lm_head.parameters()),
    )  # fmt: skip
    return total / hidden_ND.shape[0]


LOSSES: dict[str, Loss] = {"by hand": loss_by_hand, "limbeck": loss_in_chunks}


class Trainee:
    """A student, its optimiser and one way to work out the loss."""

    def __init__(self, name: str, chosen: argparse.Namespace, *, vocabulary: int):
        shape = {"vocabulary": vocabulary, "layers": chosen.layers}
        self.device = torch.device(chosen.device)
        self.student = build_model(width=chosen.width, seed=0, **shape).to(self.device)
        self.teacher = build_model(width=2 * chosen.width, seed=1, **shape).to(self.device).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.loss = LOSSES[name]

    def step(self, ids_BT: Tensor) -> float:
        """One update. Returns its loss."""
        loss = self.loss(self.student, self.teacher, ids_BT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def seconds(self, ids_BT: Tensor) -> float:
        """How long one update takes: CPU time of this process, or wall time where another device works."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        begun = clock()
        self.step(ids_BT)
        return clock() - begun


def some_ids(chosen: argparse.Namespace, vocabulary: int, *, rows: int | None = None) -> Tensor:
    """Random tokens."""
    torch.manual_seed(2)
    return torch.randint(vocabulary, (rows or chosen.rows, chosen.context)).to(chosen.device)


def gate(chosen: argparse.Namespace, vocabulary: int) -> None:
    """Refuse to time what is not right: both losses and all gradients must be equal."""
    trainee = Trainee("by hand", chosen, vocabulary=vocabulary)
    ids_BT = some_ids(chosen, vocabulary, rows=2)
    results = []
    for loss in LOSSES.values():
        value = loss(trainee.student, trainee.teacher, ids_BT)
        results.append((value.detach(), torch.autograd.grad(value, list(trainee.student.parameters()))))
    assert_close(*results, rtol=1e-3, atol=1e-6)
    print(f"gate passed: vocabulary {vocabulary:,}: loss {float(results[0][0]):.5f} and gradients are equal")


def measure_speed(chosen: argparse.Namespace, vocabulary: int) -> dict[str, list[float]]:
    """Tokens a second of each in every step, steps taken in turn; the first of each warms up and is left out."""
    trainees = {name: Trainee(name, chosen, vocabulary=vocabulary) for name in LOSSES}
    ids_BT = some_ids(chosen, vocabulary)
    speeds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for repeat in range(chosen.repeats + 1):
        for name, trainee in trainees.items():
            seconds = trainee.seconds(ids_BT)
            if repeat:
                speeds[name].append(ids_BT.numel() / seconds)
    return speeds


def measure_memory(chosen: argparse.Namespace, vocabulary: int, name: str) -> int:
    """Peak bytes of two steps above the models, in a fresh process; gradients and AdamW's moments are in it."""
    command = [
        sys.executable, "-m", "benchmarks.step_overhead", "--memory-of", name, "--vocabularies", str(vocabulary),
        *(f"--{word}={getattr(chosen, word)}" for word in ("rows", "context", "width", "layers", "threads", "device")),
    ]  # fmt: skip
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(answer.splitlines()[-1]))


def peak_bytes(chosen: argparse.Namespace) -> int | None:
    """Two steps, watched."""
    (vocabulary,) = chosen.vocabularies
    trainee = Trainee(chosen.memory_of, chosen, vocabulary=vocabulary)
    ids_BT = some_ids(chosen, vocabulary)
    with watch_memory(trainee.device) as watch:
        trainee.step(ids_BT)
        trainee.step(ids_BT)
    return watch.peak_bytes


def main(arguments: list[str]) -> None:
    """Run the gate, measure, print ratios, keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step_overhead", description=__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 49152])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--width", type=int, default=192, help="of the student; the teacher is twice as wide")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="keep the figures in this file")
    parser.add_argument("--memory-of", choices=sorted(LOSSES), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.memory_of:
        print(json.dumps(peak_bytes(chosen)))
        return
    results: dict[str, Any] = {name: getattr(chosen, name) for name in ("rows", "context", "width", "layers", "device")}
    print(f"{'vocabulary':>12}{'':>10}{'tokens/s':>12}{'peak MB':>10}")
    for vocabulary in chosen.vocabularies:
        gate(chosen, vocabulary)
        speeds = measure_speed(chosen, vocabulary)
        peaks = {name: measure_memory(chosen, vocabulary, name) for name in LOSSES}
        for name in LOSSES:
            print(f"{vocabulary:>12,}{name:>10}{statistics.median(speeds[name]):>12,.0f}{peaks[name] / 1e6:>10,.0f}")
        faster = spread_of([own / other for own, other in zip(speeds["limbeck"], speeds["by hand"], strict=True)])
        smaller = spread_of([peaks["limbeck"] / peaks["by hand"]])
        print(f"{'':>22}speed {told(faster)}, memory x{smaller['median']:.2f}")
        results[str(vocabulary)] = {
            "tokens_per_second": {name: spread_of(own) for name, own in speeds.items()}, "peak_bytes": peaks,
            "ratios": {"speed": faster, "memory": smaller},
        }  # fmt: skip
    keep(chosen.json, results)


if __name__ == "__main__":
    main(sys.argv[1:])
