"""Accuracies that the task suite has left in run folders, for models that are recognised by their fingerprint."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from limbeck.core.errors import CheckpointError
from limbeck.core.files import read_json

_ACCURACIES = ("acc", "acc_norm", "exact_match")

Accuracies = dict[tuple[str, int, str], float]


def read_accuracies(files: Iterable[Path]) -> dict[str, Accuracies]:
    """By a model's fingerprint the accuracy of each task or group, named with its number of items and what was asked.

    What was asked: the sums of the items and lm-eval's version. Equal numbers of other items are other figures.

    files: results of one place or of a comparison, as the task suite writes them; other JSON beside them is passed over. A
    group of tasks counts once, by its own average.

    Raises: CheckpointError for a file that is damaged.
    """
    found: dict[str, Accuracies] = {}
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict):
            continue
        try:
            version = content.get("lm_eval") or content.get("protocol", {}).get("lm_eval")
            for place in content["places"].values() if "places" in content else [content]:
                if "fingerprint" in place and "tasks" in place:
                    found.setdefault(place["fingerprint"], {}).update(_accuracies_of(place, version))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is no result of the task suite that this version can read ({error!r}). Remove it, or evaluate the run "
                "on the suite again."
            ) from error
    return found


def _accuracies_of(place: Mapping[str, Any], version: Any) -> Accuracies:
    groups, tasks = place.get("groups", {}), place["tasks"]
    alone = {name: task for name, task in tasks.items() if task["group"] not in groups}
    members: dict[str, list[str]] = {}
    for name, task in tasks.items():
        members.setdefault(task["group"] if task["group"] in groups else name, []).append(
            f"{name} {task.get('data_sha256')} {task.get('version')} {version}"
        )
    return {
        (name, int(facts["items"]), " ".join(sorted(members.get(name, ())))): float(
            facts["metrics"][facts["headline"]]["value"]
        )
        for name, facts in {**alone, **groups}.items()
        if facts["headline"] in _ACCURACIES
    }


def mean_accuracies(each: Mapping[str, Accuracies]) -> tuple[dict[str, float], list[str]]:
    """Each model's mean over the tasks that all were scored on, on the same items, and the names of these.

    Of a task that all were scored on more than once the largest counts. Nothing when no task is common to all.
    """
    shared = sorted(set.intersection(*map(set, each.values()))) if each else []
    common = sorted({task[0]: task for task in shared}.values())
    if not common:
        return {}, []
    means = {place: statistics.fmean(own[task] for task in common) for place, own in each.items()}
    return means, [f"{name} ({items:,} items)" for name, items, _ in common]
