"""Recipes shipped with the package. A preset's name works wherever the path of a recipe does."""

from __future__ import annotations

import itertools
from pathlib import Path

_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """Where a shipped recipe lies. The name must be one of `preset_names`."""
    return _FOLDER / f"{name}.yaml"


def preset_summary(name: str) -> str:
    """What a shipped recipe does: the first sentence of its opening comment."""
    lines = preset_path(name).read_text(encoding="utf-8").splitlines()[1:]
    comment = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    return comment.partition(". ")[0] + "."
