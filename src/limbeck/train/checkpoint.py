"""Checkpoints that survive a kill at any instant.

A checkpoint is a folder `step-NNNNNNNN` of safetensors and JSON with a manifest of SHA-256 sums. It is written under a
temporary name, synced, and renamed once; a folder under its final name is therefore whole unless somebody damaged it,
and then the manifest tells. Loading takes the newest intact one.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.errors import CheckpointError
from limbeck.core.files import explain_full_disk, read_json, sha256_file, sync_folder, write_json
from limbeck.core.runtime import agreed, rank

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """What a stage needs to go on: update count, named groups of tensors, and plain facts."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint whole, then remove all but the newest `keep`. Returns its folder."""
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".step-{checkpoint.step:08d}.tmp"
    with explain_full_disk(folder):
        try:
            for stale in (temporary, final):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            _fill(temporary, checkpoint)
            os.rename(temporary, final)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in _candidates(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    for name, tensors in checkpoint.tensors.items():
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors"
        )
        _sync_file(folder / f"{name}.safetensors")
    write_json(folder / "state.json", {"step": checkpoint.step, "facts": checkpoint.facts})
    sums = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"format": 1, "sha256": sums})


def _sync_file(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _candidates(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [
        path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, reverse=True)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint, or None when there is none.

    A damaged one is passed over with a warning that names it. Raises: CheckpointError when all are damaged.
    """
    candidates = _candidates(folder)
    for path in candidates:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"{error} Trying the one before it.", stacklevel=2)
    if candidates:
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged. Remove that folder to train the stage anew (other stages are kept)."
        )
    return None


def newest_for_all(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint that the run's first process sees, on every process. All must call it.

    Raises: CheckpointError as `newest_checkpoint` does, and on a process that does not see what the first one sees.
    """
    found = newest_checkpoint(folder)
    step = agreed(-1 if found is None else found.step)
    if step < 0:
        return None
    if found is None or found.step != step:
        raise CheckpointError(
            f"process {rank()} does not see step {step} in {folder}, from where process 0 goes on. "
            "All processes of a run need the same run folder: put it on storage that their machines share."
        )
    return found


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder after checking every file against the manifest.

    Raises: CheckpointError naming the first file that is missing, changed or unreadable.
    """
    manifest = path / "manifest.json"
    if not manifest.is_file():
        raise CheckpointError(f"checkpoint {path} has no manifest: it is not whole.")
    sums = read_json(manifest).get("sha256")
    if not isinstance(sums, dict) or "state.json" not in sums:
        raise CheckpointError(f"checkpoint {path}: the manifest lists no files.")
    for name, expected in sums.items():
        file = path / name
        if Path(name).name != name or not file.is_file() or file.is_symlink():
            raise CheckpointError(f"checkpoint {path}: {name} is missing.")
        if sha256_file(file) != expected:
            raise CheckpointError(f"checkpoint {path}: {name} was changed or truncated (its checksum differs).")
    try:
        tensors = {
            name.removesuffix(".safetensors"): load_file(path / name) for name in sums if name.endswith(".safetensors")
        }
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path}: unreadable tensors ({error}).") from error
    state = read_json(path / "state.json")
    return Checkpoint(step=state["step"], tensors=tensors, facts=state["facts"])
