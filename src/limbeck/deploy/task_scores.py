"""Task scores found beside a run, read with patience: files may be of another version, damaged, or somebody else's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

_MOST_FILES, _MOST_BYTES, _MOST_DEPTH, _MOST_ROWS = 500, 20_000_000, 4, 200
_MOST_LISTED = 8  # of a group of more tasks only the mean stands on the card


@dataclass(frozen=True)
class TaskRow:
    """One figure of one task: the metric, its standard error, over how many items, and what guessing gives.

    is_whole: whether all items of the task were asked, not only the first (`--limit`).
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    items: int | None
    chance: float | None
    is_whole: bool = True


def read_task_rows(folder: Path) -> list[TaskRow]:
    """Every task's headline figure of a run's student in the JSON files of a folder; what cannot be read is passed over.

    Results of other models that lie there, such as controls, are no figures of the student's. Of several results of a task
    the one over all items is taken, then the one over the most, then the newest.
    """
    found: dict[tuple[str, str], TaskRow] = {}
    paths = sorted(folder.glob("*.json"))[:_MOST_FILES] if folder.is_dir() else []
    for path in sorted(paths, key=_age):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        for row in _suite_rows(content) if _is_of_the_suite(content) else _rows(content, path.stem, 0):
            other = found.get((row.task, row.metric))
            if other is None or (row.is_whole, row.items or 0) > (other.is_whole, other.items or 0):
                found[row.task, row.metric] = row
    return sorted(found.values(), key=lambda row: (row.task, row.metric))[:_MOST_ROWS]


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _is_of_the_suite(content: Any) -> bool:
    return isinstance(content, Mapping) and ("places" in content or {"fingerprint", "tasks"} <= content.keys())


def _suite_rows(content: Mapping[str, Any]) -> Iterator[TaskRow]:
    """What the task suite wrote of one model, when it is the student; a comparison's places have files of their own."""
    if "places" in content or not _is_student(content):
        return
    groups = dict(_entries(content, "groups"))
    sizes = {name: _count(of.get("tasks")) or 0 for name, of in groups.items()}
    is_whole = content.get("limit") is None
    for name, of in [*groups.items(), *_entries(content, "tasks")]:
        if name not in groups and sizes.get(str(of.get("group")), 0) > _MOST_LISTED:
            continue
        title = name
        if name in groups and sizes[name] != of.get("tasks_of_the_group"):
            title = f"{name} (mean of {sizes[name]} of {of.get('tasks_of_the_group')})"
        for row in _rows({**of, "task": title}, title, 0):
            yield replace(row, is_whole=is_whole)


def _entries(content: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = content.get(key)
    return (
        [(str(name), of) for name, of in found.items() if isinstance(of, Mapping)] if isinstance(found, Mapping) else []
    )


def _is_student(content: Mapping[str, Any]) -> bool:
    """Results written before the arm was noted are told apart by their place: `RUN/arms/...` is none of the student's."""
    if "arm" in content:
        return content["arm"] == "student"
    return "arms" not in PurePath(str(content.get("place"))).parts[-3:-1]


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
