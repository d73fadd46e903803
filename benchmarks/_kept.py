"""Results with the facts that make them comparable: machine, date, commit, versions, threads, the command."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from limbeck.core.files import write_atomic
from limbeck.judging import processor_name

PLACES = ("--json", "--packages", "--folder")


def circumstances() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit, "processor": processor_name(), "device": device,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": str(torch.__version__),
        "transformers": transformers.__version__, "command": command_of(sys.argv[1:]),
    }  # fmt: skip


def command_of(words: Sequence[str]) -> str:
    """The command that a person types to measure this again, without the places of one machine.

    Options that only say where something lies are left out, and of an absolute path its last part is kept.
    """
    kept: list[str] = []
    skip = False
    for word in words:
        option = word.partition("=")[0]
        if not skip and option not in PLACES:
            kept.append(Path(word).name if Path(word).is_absolute() else word)
        skip = word in PLACES
    return shlex.join(["python", "-m", "benchmarks", *kept])


def keep(path: str | None, results: dict[str, Any]) -> None:
    """Write results with their circumstances, when a path is given."""
    if path is not None:
        text = json.dumps({"circumstances": circumstances(), "results": results}, indent=2) + "\n"
        write_atomic(Path(path), text)
        print(f"kept in {path}")


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and the values themselves: what a figure measured in several blocks is kept as."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "blocks": list(values)}


def told(spread: dict[str, Any]) -> str:
    """A ratio with its range, for the screen."""
    return f"x{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"
