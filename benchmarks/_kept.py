"""Results with the facts that make them comparable: machine, date, commit, versions, threads."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from limbeck.judging import processor_name


def circumstances() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit, "processor": processor_name(), "device": device,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }  # fmt: skip


def keep(path: str | None, results: dict[str, Any]) -> None:
    """Write results with their circumstances, when a path is given."""
    if path is not None:
        Path(path).write_text(
            json.dumps({"circumstances": circumstances(), "results": results}, indent=2) + "\n", encoding="utf-8"
        )
        print(f"kept in {path}")
