"""Other people's packages, installed by the benchmark itself into a folder of their own: nothing else sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DONE = "installed.txt"


class NotInstalled(Exception):
    """A package could not be had; the message is the installer's own last word."""


def packages_root() -> Path:
    """Where private folders lie unless an option says otherwise: in the user's cache, outside any source tree."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "limbeck" / "benchmarks"


def private_folder(name: str, requirements: Sequence[str], *, root: Path) -> Path:
    """A folder that holds these pinned packages and nothing else, installed on first use.

    They are installed without their dependencies, so that torch and transformers are the ones of this environment for
    every contender; put the folder on PYTHONPATH of the one process that needs it.

    Raises: NotInstalled with pip's reason.
    """
    folder = root / name
    wanted = "\n".join(requirements)
    if (folder / _DONE).exists() and (folder / _DONE).read_text(encoding="utf-8") == wanted:
        return folder
    fresh = root / f".{name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    print(f"installing {', '.join(requirements)} into {folder} (once)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(fresh), *requirements], capture_output=True, text=True, check=False
    )
    if done.returncode:
        shutil.rmtree(fresh, ignore_errors=True)
        raise NotInstalled(last_line(done.stderr) or f"pip ended with code {done.returncode}")
    (fresh / _DONE).write_text(wanted, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder


def environment(folder: Path | None, *, threads: int) -> dict[str, str]:
    """The environment of one contender's process: this one's, the private folder, and the same thread settings for all."""
    found = dict(os.environ)
    places = [*([] if folder is None else [str(folder)]), *sys.path[:1], str(Path.cwd()), found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    found |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found.setdefault("GOMP_SPINCOUNT", "10000")
    return found


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
