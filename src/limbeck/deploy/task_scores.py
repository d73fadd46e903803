"""Task scores found beside a run, read with patience: files may be of another version, damaged, or somebody else's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_FILES, _MOST_BYTES, _MOST_DEPTH, _MOST_ROWS = 500, 20_000_000, 4, 200


@dataclass(frozen=True)
class TaskRow:
    """One figure of one task: the metric, its standard error, over how many items, and what guessing gives."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    items: int | None
    chance: float | None


def read_task_rows(folder: Path) -> list[TaskRow]:
    """Every task's headline figure in the JSON files of a folder, by task and metric; what cannot be read is passed over."""
    found: dict[tuple[str, str], TaskRow] = {}
    for path in sorted(folder.glob("*.json"))[:_MOST_FILES] if folder.is_dir() else []:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        for row in _rows(content, path.stem, 0):
            found.setdefault((row.task, row.metric), row)
    return sorted(found.values(), key=lambda row: (row.task, row.metric))[:_MOST_ROWS]


def _rows(node: Any, name: str, depth: int) -> Iterator[TaskRow]:
    if not isinstance(node, Mapping) or depth > _MOST_DEPTH:
        return
    task = node["task"] if isinstance(node.get("task"), str) else name
    metrics = node.get("metrics")
    if isinstance(metrics, Mapping):
        headline = node.get("headline")
        chosen = [headline] if isinstance(headline, str) and headline in metrics else list(metrics)
        for metric in chosen:
            yield from _row(task, str(metric), metrics[metric], node)
    elif _number(node.get("value")) is not None:
        metric = node["metric"] if isinstance(node.get("metric"), str) else "value"
        yield from _row(task, metric, node, node)
    else:
        for key, inner in node.items():
            yield from _rows(inner, task if key in ("facts", "score", "result") else str(key), depth + 1)


def _row(task: str, metric: str, figures: Any, about: Mapping[str, Any]) -> Iterator[TaskRow]:
    words: Mapping[str, Any] = figures if isinstance(figures, Mapping) else {"value": figures}
    value = _number(words.get("value"))
    if value is None:
        return
    counts = [words.get("n"), about.get("n"), about.get("items")]
    items = next((_count(count) for count in counts if _count(count) is not None), None)
    yield TaskRow(task, metric, value, _number(words.get("standard_error")), items, _number(words.get("chance")))


def _count(value: Any) -> int | None:
    if isinstance(value, list):
        return len(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
