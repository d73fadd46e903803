"""Results of tasks that are kept on the disk. What is damaged, or does not agree with itself, is as if it were not there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.core.errors import EvaluationError
from limbeck.core.files import write_atomic
from limbeck.evaluate.task_results import value_of

_RELATIVE_DIFFERENCE = 1e-6


def write_result(file: Path, score: Mapping[str, Any], *, key: str) -> None:
    """Write a task's score under what it is the score of; items as columns.

    Raises: EvaluationError when a figure is no number; EnvironmentFault when it cannot be written.
    """
    items = score["items"]
    columns = {name: [item[name] for item in items] for name in items[0]} if items else {}
    try:
        text = json.dumps({**score, "items": columns, "key": key}, allow_nan=False)
    except ValueError:
        raise EvaluationError("the model gives likelihoods that are no numbers.") from None
    write_atomic(file, text + "\n")


def read_result(file: Path, key: str) -> dict[str, Any] | None:
    """A task's score as it was kept under that key; None when there is none that can be believed.

    Every figure must be what its items give.
    """
    if not file.is_file():
        return None
    try:
        score = json.loads(file.read_text(encoding="utf-8"))
        if score["key"] != key:
            return None
        columns = score["items"]
        items = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return score | {"items": items} if _is_sound(score, items) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError):
        return None


def version_of(file: Path) -> str | None:
    """The version of lm-eval that a kept result is of; None when that cannot be read."""
    try:
        score = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    said = score.get("harness_version") if isinstance(score, dict) else None
    return said if isinstance(said, str) else None


def _is_sound(score: Mapping[str, Any], items: list[dict[str, float]]) -> bool:
    numbers = [value for item in items for value in item.values()]
    numbers += [score["seconds"], *score["metrics"].values()]
    numbers += [error for error in score["standard_errors"].values() if error is not None]
    return (
        bool(items and score["metrics"])
        and all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
        and isinstance(score["version"], str)
        and isinstance(score["higher_is_better"], Mapping)
        and all(
            math.isclose(value, value_of(items, metric)[0], rel_tol=_RELATIVE_DIFFERENCE, abs_tol=1e-12)
            for metric, value in score["metrics"].items()
        )
    )
