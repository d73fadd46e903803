"""One distillation job by Limbeck, by TRL and by a loop written by hand: tokens a second, memory, the loss they reach.

The same teacher and student, the same rows in the same order, forward KL at temperature 1, AdamW, float32. Limbeck goes
through its real loop (`train_stage`). TRL (pinned, installed into a folder of its own on first use) goes through GKDTrainer with
no on-policy share, and through DistillationTrainer with its writing replaced by the rows, for its chunked loss. The gate:
the first loss of each equals the one by hand, and so does the KL on held-out rows, after three steps and at the end.

Speed is taken in turns: every contender is a process that does a block of steps while the others wait, the order is turned
round every time, and all processes are started anew for every run. Memory is measured in further processes, above
models, data and libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._kept import keep, spread_of, told
from benchmarks._peers.job import Job, prepare
from benchmarks._peers.packages import NotInstalled, environment, last_line, packages_root, private_folder
from benchmarks._peers.worker import CONTENDERS

TRL = "1.16.0"
REFERENCE, OWN = "by hand", "limbeck"
LOSS_TOLERANCE, HELDOUT_TOLERANCE = 1e-4, 1e-3  # relative; the orders of float32 sums differ


class Contender:
    """One contender's process, which waits between blocks."""

    def __init__(
        self, name: str, folder: Path, chosen: argparse.Namespace, packages: Path | None, *, watch: int | None = None
    ):
        self.name = name
        command = [
            sys.executable, "-m", "benchmarks._peers.worker", name, str(folder), "--threads", str(chosen.threads),
            "--block", str(chosen.block), *([] if watch is None else ["--watch", str(watch)]),
        ]  # fmt: skip
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in close())
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment(packages if name.startswith("trl") else None, threads=chosen.threads),
        )  # fmt: skip

    def listen(self) -> dict[str, Any]:
        """What it says next. Raises: RuntimeError with its last line of errors when it is gone."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self._errors.seek(0)
        raise RuntimeError(last_line(self._errors.read()) or f"ended with code {self.process.returncode}")

    def go(self) -> None:
        """Let it do a block."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End it, if it has not ended."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._errors.close()


def watch_first_steps(
    names: list[str], folder: Path, chosen: argparse.Namespace, packages: Path | None
) -> dict[str, Any]:
    """Three steps of each in a process of its own: memory, losses, held-out KL; or why it could not be run."""
    found: dict[str, Any] = {}
    for name in names:
        contender = Contender(name, folder, chosen, packages, watch=3)
        try:
            found[name] = contender.listen()
        except RuntimeError as error:
            if name in (REFERENCE, OWN):
                raise
            found[name] = {"not_run": str(error)}
        finally:
            contender.close()
    return found


def gate(facts: dict[str, Any], *, what: str) -> None:
    """Refuse to time, or to keep, what is not the same job: losses must be those of the loop by hand."""
    reference = facts[REFERENCE]
    for name, own in facts.items():
        if "not_run" in own:
            print(f"{what}: {name}: not run here: {own['not_run']}")
            continue
        for figure, value, expected, tolerance in (
            ("first loss", own["losses"][0], reference["losses"][0], LOSS_TOLERANCE),
            ("held-out KL", own["heldout_kl"], reference["heldout_kl"], HELDOUT_TOLERANCE),
        ):
            if not abs(value - expected) <= tolerance * abs(expected):
                raise SystemExit(f"{what}: {name}: {figure} {value:.6f}, by hand {expected:.6f}: not the same job")
    print(
        f"gate passed, {what}: first loss {reference['losses'][0]:.5f}, held-out KL {reference['heldout_kl']:.5f} nats, for all"
    )


def take_turns(names: list[str], folder: Path, chosen: argparse.Namespace, packages: Path | None) -> dict[str, Any]:
    """One run: all processes started, then block after block in turn. The first block is a warm-up and is left out."""
    contenders: list[Contender] = []
    blocks: dict[str, list[dict[str, list[float]]]] = {name: [] for name in names}
    try:
        contenders += [Contender(name, folder, chosen, packages) for name in names]
        for contender in contenders:
            contender.listen()
        for number in range(chosen.blocks + 1):
            for contender in contenders if number % 2 else reversed(contenders):
                contender.go()
                blocks[contender.name].append(contender.listen())
        ends = {}
        for contender in contenders:
            contender.go()
            ends[contender.name] = contender.listen()
    finally:
        for contender in contenders:
            contender.close()
    return {name: {**ends[name], "blocks": blocks[name][1:]} for name in names}


def figures_of(runs: list[dict[str, Any]], peaks: dict[str, list[int]], job: Job) -> dict[str, Any]:
    """Tokens a second of every block (by the median step in it) and Limbeck's ratios to the others, block by block.

    peaks: bytes of every process that was watched; empty where the device does not tell.
    """
    speeds: dict[str, dict[str, list[float]]] = {}
    for name in runs[0]:
        speeds[name] = {
            clock: [job.step_tokens / statistics.median(block[clock]) for run in runs for block in run[name]["blocks"]]
            for clock in ("wall", "cpu")
        }
    found: dict[str, Any] = {"tokens_per_second": {}, "tokens_per_cpu_second": {}, "peak_bytes": {}, "ratios": {}}
    for name, own in speeds.items():
        found["tokens_per_second"][name] = spread_of(own["wall"])
        found["tokens_per_cpu_second"][name] = spread_of(own["cpu"])
        found["peak_bytes"][name] = spread_of(peaks[name]) if peaks[name] else None
        if name != OWN:
            speed = [mine / other for mine, other in zip(speeds[OWN]["wall"], own["wall"], strict=True)]
            found["ratios"][name] = {"speed": spread_of(speed)}
            if peaks[OWN] and peaks[name]:
                smaller = [mine / other for mine, other in zip(peaks[OWN], peaks[name], strict=True)]
                found["ratios"][name]["memory"] = spread_of(smaller)
    found["heldout_kl"] = {name: [run[name]["heldout_kl"] for run in runs] for name in runs[0]}
    return found


def measure(vocabulary: int, chosen: argparse.Namespace, packages: Path | None, missing: str | None) -> dict[str, Any]:
    """Gate, memory, speed at one size of vocabulary."""
    job = Job(
        vocabulary=vocabulary, width=chosen.width, layers=chosen.layers, rows=chosen.rows, context=chosen.context,
        steps=chosen.block * (chosen.blocks + 1), teacher_steps=chosen.teacher_steps, device=chosen.device,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, job, documents=chosen.documents)
        names = [name for name in chosen.contenders if packages is not None or not name.startswith("trl")]
        watches = [watch_first_steps(names, folder, chosen, packages) for _ in range(chosen.memory_runs)]
        for watched in watches:
            gate(watched, what=f"vocabulary {vocabulary:,}, three steps")
        watched = watches[0]
        running = [name for name in names if not any("not_run" in of[name] for of in watches)]
        peaks = {name: [of[name]["peak_bytes"] for of in watches if of[name]["peak_bytes"]] for name in running}
        runs = []
        for number in range(chosen.runs):
            runs.append(take_turns(running, folder, chosen, packages))
            gate(runs[-1], what=f"vocabulary {vocabulary:,}, run {number + 1}, {job.steps * job.step_tokens:,} tokens")
    found = figures_of(runs, peaks, job)
    found["not_run"] = {name: watched[name]["not_run"] for name in names if name not in running}
    found["not_run"] |= {name: str(missing) for name in chosen.contenders if name not in names}
    found["memory_method"] = watched[OWN]["memory_method"]
    return found


def show(vocabulary: int, found: dict[str, Any]) -> None:
    """A table of one size."""
    print(
        f"\nvocabulary {vocabulary:,}\n{'':<24}{'tokens/s':>10}{'peak MB':>10}{'held-out KL':>13}   Limbeck against it: speed, memory"
    )
    for name, speed in found["tokens_per_second"].items():
        peak = found["peak_bytes"][name]
        line = f"{name:<24}{speed['median']:>10,.0f}{'?' if peak is None else format(peak['median'] / 1e6, ',.0f'):>10}"
        line += f"{found['heldout_kl'][name][-1]:>13.5f}"
        ratios = found["ratios"].get(name, {})
        print(line + "   " + ", ".join(told(ratio) for ratio in ratios.values()))
    for name, reason in found["not_run"].items():
        print(f"{name:<24}not run here: {reason}")


def main(arguments: list[str]) -> None:
    """Install what is missing, measure every size, print ratios, keep the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 49152])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=192, help="of the student; the teacher is twice as wide")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block", type=int, default=3, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=3, help="blocks in a run, besides the first, which warms up")
    parser.add_argument("--runs", type=int, default=2, help="times that all processes are started anew")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes of each whose memory is watched")
    parser.add_argument("--teacher-steps", type=int, default=10, help="updates that make the teacher more than noise")
    parser.add_argument("--documents", type=int, help="use only so many countries of the factbook (default: all)")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--packages", type=Path, default=None, help=f"folder for TRL (default: {packages_root()})")
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    if not {REFERENCE, OWN} <= set(chosen.contenders):
        raise SystemExit(
            f"--contenders {' '.join(chosen.contenders)}: the gate needs '{REFERENCE}' and '{OWN}' among them."
        )
    torch.set_num_threads(chosen.threads)
    packages, missing = None, None
    if any(name.startswith("trl") for name in chosen.contenders):
        try:
            packages = private_folder(f"trl-{TRL}", [f"trl=={TRL}"], root=chosen.packages or packages_root())
        except NotInstalled as error:
            missing = f"trl {TRL} could not be installed: {error}"
    words = (
        "rows",
        "context",
        "width",
        "layers",
        "block",
        "blocks",
        "runs",
        "memory_runs",
        "teacher_steps",
        "device",
        "threads",
    )
    results: dict[str, Any] = {word: getattr(chosen, word) for word in words} | {"trl": TRL, "sizes": {}}
    for vocabulary in chosen.vocabularies:
        results["sizes"][str(vocabulary)] = found = measure(vocabulary, chosen, packages, missing)
        show(vocabulary, found)
    keep(chosen.json, results)


if __name__ == "__main__":
    main(sys.argv[1:])
