"""Files written whole or not at all.

A reader never sees half a file: the bytes go to a temporary name in the same folder, reach the disk, and take the
final name in one rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.core.errors import CheckpointError, EnvironmentFault


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" (or a quota) into a message that names the folder and the bytes that are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES) and not _is_full(path):
            raise
        free = shutil.disk_usage(_existing_parent(path)).free
        raise EnvironmentFault(
            f"cannot write {path}: {error.strerror or error} ({free / 1e6:.1f} MB free there). What was saved before is intact: "
            "free some space (or choose another run folder) and give the same command again."
        ) from error


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _is_full(path: Path) -> bool:
    return shutil.disk_usage(_existing_parent(path)).free == 0


def sync_folder(folder: Path) -> None:
    """Ask the system to put the folder's own entries on the disk (a rename is only durable after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file whole: temporary name, fsync, rename."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN and infinity are refused: JSON has no word for them."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a `CheckpointError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}). Restore it or remove the folder it is in."
        ) from error


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
