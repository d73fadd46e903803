"""Numbers as a reader wants them: the same figure looks the same in the verdict, the tables and the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A number to `digits` significant places, thousands separated; a dash when there is none.

    Whole numbers of more places than that keep all of them, and nothing is written with an exponent below 1e9.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 10 ** (-digits):
        return f"{value:.{digits - 1}g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    decimals = max(0, digits - 1 - exponent)
    return f"{value:,.{decimals}f}"


def ratio(value: float | None) -> str:
    """A ratio with the multiplication sign, such as ×1.23."""
    return MISSING if value is None else f"×{number(value, 3)}"


def percent(value: float | None) -> str:
    """A share as a percentage with three significant places."""
    return MISSING if value is None else f"{number(100 * value, 3)} %"


def count(value: float | None) -> str:
    """A count with a thousand, million, ... suffix: 1.25 M."""
    return _scaled(value, 1000, ["", " k", " M", " G", " T", " P", " E", " Z"])


def memory(value: float | None) -> str:
    """Bytes in decimal units: 1.25 MB."""
    return _scaled(value, 1000, [" B", " kB", " MB", " GB", " TB", " PB"])


def duration(value: float | None) -> str:
    """Seconds from microseconds to hours: 1.25 ms, 3 min 20 s."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60)} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{number(value / size, 3)} {unit}"
    return "0 s" if value == 0 else f"{number(value / 1e-6, 3)} µs"


def energy(joules: float | None) -> str:
    """Joules as J, Wh or kWh: 1.25 kWh."""
    if joules is None or not math.isfinite(joules):
        return MISSING
    if joules < 360:
        return f"{number(joules, 3)} J"
    return f"{number(joules / 3600, 3)} Wh" if joules < 3.6e6 else f"{number(joules / 3.6e6, 3)} kWh"


def listing(values: Sequence[int | str]) -> str:
    """Words or whole numbers in a sentence: 512, 2,048 and 8,192."""
    words = [f"{value:,}" if isinstance(value, int) else value for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _scaled(value: float | None, base: int, units: Sequence[str]) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    for unit in units[:-1]:
        if abs(value) < 0.9995 * base:
            return f"{int(value)}{unit}" if unit == units[0] else f"{number(value, 3)}{unit}"
        value /= base
    return f"{number(value, 3)}{units[-1]}"
