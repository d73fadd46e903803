"""What came out of a task, and of two models on the same items.

Two models are compared item by item: what makes some items hard for both cancels, so the difference is sharper than two
separate errors would say. A win is a difference of more than two standard errors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.core.errors import EvaluationError
from limbeck.evaluate.scoring import ratio_standard_error

WIN_STANDARD_ERRORS = 2.0
LEAST_ITEMS = 8

Item = Mapping[str, float]


@dataclass(frozen=True)
class _Reading:
    """How a metric is made of items: the sum of `amount` over the sum of `share`, then `shown`. `better` is the sign of
    a better model in the unit of `amount`."""

    amount: Callable[[Item], float]
    share: Callable[[Item], float]
    better: int
    shown: Callable[[float], float] = float


def _reading(metric: str) -> _Reading:
    if metric == "perplexity":
        return _Reading(lambda item: item["nats"], lambda _item: 1.0, -1, _exponential)
    if metric == "bits_per_byte":
        return _Reading(lambda item: item["nats"] / math.log(2), lambda item: item["bytes"], -1)
    if metric == "byte_perplexity":
        return _Reading(lambda item: item["nats"], lambda item: item["bytes"], -1, _exponential)
    if metric == "word_perplexity":
        return _Reading(lambda item: item["nats"], lambda item: item["words"], -1, _exponential)
    return _Reading(lambda item: item[metric], lambda _item: 1.0, 1)


def _exponential(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def value_of(items: Sequence[Item], metric: str) -> tuple[float, float | None]:
    """A metric over some items, and its standard error (None for a single item; by the delta method for perplexities)."""
    reading = _reading(metric)
    mean, error = _ratio([reading.amount(item) for item in items], [reading.share(item) for item in items])
    shown = reading.shown(mean)
    if error is not None and reading.shown is _exponential:
        error *= shown
    return shown, error


def _ratio(amounts: Sequence[float], shares: Sequence[float]) -> tuple[float, float | None]:
    sums, counts = torch.tensor([amounts, shares], dtype=torch.float64)
    return float(sums.sum() / counts.sum()), ratio_standard_error(sums, counts)


def chance_corrected(value: float, chance: float | None) -> float | None:
    """0 at blind guessing, 1 when all is right; below 0 is worse than guessing. None where there is nothing to guess."""
    return None if chance is None else (value - chance) / (1 - chance)


@dataclass(frozen=True)
class Difference:
    """One model less another on the same items.

    value: in the metric's unit (nats per item for a perplexity), so its sign is that of the metric, or of the
    log-perplexity. verdict: win, tie or lose, of the first; with fewer than 8 items always a tie, for their spread says
    little of the error.
    """

    value: float
    standard_error: float | None
    verdict: str
    items: int


def paired(first: Sequence[Item], other: Sequence[Item], metric: str) -> Difference:
    """Compare two models on the same items.

    Raises: EvaluationError when the items are not the same ones.
    """
    reading = _reading(metric)
    shares = [reading.share(item) for item in first]
    if len(first) != len(other) or shares != [reading.share(item) for item in other]:
        raise EvaluationError(
            f"two models can only be compared on the same items: one has {len(first)}, the other {len(other)}, or other texts. "
            "Score both on the same data with the same --limit."
        )
    amounts = [reading.amount(mine) - reading.amount(others) for mine, others in zip(first, other, strict=True)]
    value, error = _ratio(amounts, shares)
    gain = value * reading.better
    return Difference(value, error, _verdict(gain, error, len(amounts)), len(amounts))


def compare_items(first: Sequence[Item], other: Sequence[Item], metrics: Iterable[str]) -> dict[str, Difference]:
    """`paired` for several metrics."""
    return {metric: paired(first, other, metric) for metric in metrics}


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The difference of two macro averages over tasks with items of their own; for accuracies, where more is better.

    Its verdict is a tie where any of the tasks has too few items: the average is no surer than what it is made of.
    """
    value = statistics.fmean(one.value for one in differences)
    error = _mean_error([one.standard_error for one in differences])
    return Difference(
        value, error, _verdict(value, error, min(one.items for one in differences)), sum(one.items for one in differences)
    )  # fmt: skip


def _verdict(gain: float, error: float | None, items: int) -> str:
    if error is None or items < LEAST_ITEMS or abs(gain) <= WIN_STANDARD_ERRORS * error:
        return "tie"
    return "win" if gain > 0 else "lose"


def _mean_error(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None


def task_facts(
    *,
    metrics: Sequence[str],
    items: Sequence[Item],
    said: Mapping[str, float],
    said_errors: Mapping[str, float | None],
    higher_is_better: Mapping[str, bool],
    chance: float | None,
) -> dict[str, Any]:
    """The facts of one task: each metric with standard error, chance and the score corrected for it.

    metrics: those to show, the headline first; others that the harness gave come after. said, said_errors: the harness's
    own figures, which are kept as they are; an error that it does not give comes from the items.

    Raises: EvaluationError when a figure is not finite, or a metric is missing.
    """
    facts = {}
    for metric in [*metrics, *(name for name in said if name not in metrics)]:
        value = said.get(metric)
        if value is None or not math.isfinite(value):
            raise EvaluationError(
                f"{metric} is {'missing' if value is None else value}: the model gives likelihoods that are no numbers, or "
                "this version of lm-eval gives other metrics."
            )
        error = said_errors.get(metric)
        if error is None or not math.isfinite(error):
            error = value_of(items, metric)[1]
        guess = chance if metric in ("acc", "acc_norm") else 0.0 if metric == "exact_match" else None
        facts[metric] = {
            "value": value, "standard_error": error, "higher_is_better": higher_is_better.get(metric, True),
            "chance": guess, "chance_corrected": chance_corrected(value, guess),
        }  # fmt: skip
    return {"items": len(items), "headline": metrics[0], "metrics": facts}


def group_facts(tasks: Mapping[str, Mapping[str, Any]], *, whole: int) -> dict[str, Any]:
    """The macro average of the accuracies of a group's tasks: every task counts the same, whatever its size.

    whole: how many tasks the group has; an average over fewer is another figure and says so.
    """
    each = [facts["metrics"]["acc"] for facts in tasks.values()]
    value = statistics.fmean(one["value"] for one in each)
    chance = statistics.fmean(one["chance"] for one in each)
    return {
        "tasks": len(tasks), "tasks_of_the_group": whole, "items": sum(facts["items"] for facts in tasks.values()),
        "headline": "acc",
        "metrics": {
            "acc": {
                "value": value, "standard_error": _mean_error([one["standard_error"] for one in each]),
                "higher_is_better": True, "chance": chance, "chance_corrected": chance_corrected(value, chance),
            }
        },
    }  # fmt: skip


def by_place(rows: Sequence[Mapping[str, Any]], items: Sequence[Item], key: str) -> dict[str, float]:
    """Accuracy by a property of the items, such as the depth at which a number was hidden."""
    found: dict[str, list[float]] = {}
    for row, item in zip(rows, items, strict=False):
        found.setdefault(str(row[key]), []).append(item["acc"])
    return {name: statistics.fmean(values) for name, values in sorted(found.items())}
