"""Quality against cost: for each cost, which models no other beats in both.

A model is a dict of its own figures, a row a dict of its figures at one context and batch (see `costing.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.evaluate.pareto import pareto_front


@dataclass(frozen=True)
class Axis:
    """One figure: how it is called, where it stands, whether more of it is better.

    is_counted: from the model's shape, so that the batch does not matter.
    """

    name: str
    words: str
    key: str
    maximise: bool = False
    is_counted: bool = False


QUALITIES = (
    Axis("bits-per-byte", "bits per byte", "bits_per_byte"),
    Axis("accuracy", "mean accuracy over the tasks", "accuracy", maximise=True),
)
MODEL_COSTS = (
    Axis("parameters", "parameters", "parameters"),
    Axis("bytes-shipped", "bytes shipped", "folder_bytes"),
)
MEMORY = Axis("memory", "weights and peak memory", "running_bytes")


@dataclass(frozen=True)
class TradeOff:
    """Models by quality and one cost. points: (cost, quality) by model; front: models that nothing beats in both.

    context and batch: where the cost was measured; None for what does not depend on it. spreads: the lowest and highest
    cost of the repeats, where there were several; the front goes by the points alone.
    """

    quality: Axis
    cost: Axis
    context: int | None
    batch: int | None
    points: dict[str, tuple[float, float]]
    front: list[str]
    spreads: dict[str, tuple[float, float]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "quality": self.quality.key, "cost": self.cost.key, "context": self.context, "batch": self.batch,
            "points": {name: list(point) for name, point in self.points.items()}, "front": self.front,
        }  # fmt: skip


def row_costs(*, by_byte: bool) -> tuple[Axis, ...]:
    """The costs that depend on context and batch, by the token or, for models with other tokens, by the byte of text."""
    unit = "byte" if by_byte else "token"
    return (
        Axis("flops", f"FLOPs a {unit}", f"forward_flops_per_{unit}", is_counted=True),
        Axis("prefill", f"prefill, {unit}s a second", f"prefill_{unit}s_per_second", maximise=True),
        Axis("decode", f"decode, {unit}s a second", f"decode_{unit}s_per_second", maximise=True),
        MEMORY,
    )


def trade_offs(
    models: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, by_byte: bool
) -> list[TradeOff]:
    """Every quality against every cost, at every context and batch. Models without one of the two figures are left out;
    fewer than two make no trade-off."""
    found: list[TradeOff] = []
    settings = sorted({(row["context"], row["batch"]) for row in rows})
    for quality in QUALITIES:
        good = {model["place"]: model[quality.key] for model in models if model.get(quality.key) is not None}
        for cost in MODEL_COSTS:
            found += _trade_off(quality, good, cost, models, None, None)
        for cost in row_costs(by_byte=by_byte):
            for context, batch in settings:
                if cost.is_counted and batch != settings[0][1]:
                    continue
                here = [row for row in rows if (row["context"], row["batch"]) == (context, batch)]
                found += _trade_off(quality, good, cost, here, context, None if cost.is_counted else batch)
    return found


def _trade_off(
    quality: Axis,
    good: Mapping[str, float],
    cost: Axis,
    rows: Sequence[Mapping[str, Any]],
    context: int | None,
    batch: int | None,
) -> list[TradeOff]:
    points = {
        row["place"]: (float(row[cost.key]), good[row["place"]])
        for row in rows
        if row["place"] in good and row.get(cost.key) is not None
    }
    if len(points) < 2:
        return []
    ends = {row["place"]: row.get(f"{cost.key}_range") for row in rows}
    spreads = {name: (float(own[0]), float(own[1])) for name, own in ends.items() if own and name in points}
    names = list(points)
    front = pareto_front(list(points.values()), maximise=(cost.maximise, quality.maximise))
    return [TradeOff(quality, cost, context, batch, points, [names[place] for place in front], spreads)]


def to_draw(found: Sequence[TradeOff]) -> list[TradeOff]:
    """One for each pair of quality and cost: where most models were measured, the longest context, the smallest batch."""
    chosen: dict[tuple[str, str], TradeOff] = {}
    for one in found:
        key = one.quality.name, one.cost.name
        if key not in chosen or _weight(one) > _weight(chosen[key]):
            chosen[key] = one
    return list(chosen.values())


def _weight(one: TradeOff) -> tuple[int, int, int]:
    return len(one.points), one.context or 0, -(one.batch or 0)
