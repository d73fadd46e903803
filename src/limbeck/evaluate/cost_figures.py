"""Quality against cost as SVG files that stand alone, in the report's style and its light or dark theme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from limbeck.evaluate.figures import INK, SERIES, svg, ticks
from limbeck.evaluate.trade_offs import Axis, TradeOff
from limbeck.evaluate.wording import count, memory, number

_MARKERS = "osD^vP"
_LEGEND_COLUMNS = 2
_LEGEND_LETTERS = 60


def draw_trade_off(found: TradeOff, names: Mapping[str, str]) -> str:
    """One SVG file: a point for each model, hollow where another beats it in both, and the front as a step line.

    names: what each model is called in the legend, in the order that gives models their colours.
    """
    name = f"{found.quality.name}-vs-{found.cost.name}"
    rows = -(-len(found.points) // _columns(names))
    return _stand_alone(svg(partial(_draw, found=found, names=names), name=name, height=2.5 + 0.19 * rows))


def _draw(figure: Figure, *, found: TradeOff, names: Mapping[str, str]) -> None:
    axes = figure.add_subplot()
    front = sorted(found.points[name] for name in found.front)
    steps = "steps-pre" if found.cost.maximise else "steps-post"
    axes.plot(*zip(*front, strict=True), color=INK, linewidth=0.8, linestyle=":", drawstyle=steps)
    for place, (name, label) in enumerate(names.items()):
        if name not in found.points:
            continue
        colour, marker = SERIES[place % len(SERIES)], _MARKERS[place // len(SERIES) % len(_MARKERS)]
        filled = colour if name in found.front else "none"
        cost, quality = found.points[name]
        if name in found.spreads:
            axes.plot(found.spreads[name], [quality, quality], color=colour, linewidth=1.2)
        axes.plot(
            [cost], [quality], marker, markersize=7, color=colour, markerfacecolor=filled, linestyle="", label=label
        )
    costs = [cost for cost, _ in found.points.values()]
    axes.margins(0.12)
    if min(costs) > 0:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        if high < 4 * low:
            axes.set_xlim(low / 1.6, high * 1.6)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 60 * low else (1.0,), numticks=7))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(ticks(_unit(found.cost)))
    axes.set_title(_where(found), loc="left")
    axes.set_xlabel(f"{found.cost.words} ({'more' if found.cost.maximise else 'less'} is better)")
    axes.set_ylabel(f"{found.quality.words}\n({'more' if found.quality.maximise else 'less'} is better)")
    figure.legend(loc="outside lower center", ncols=_columns(names))


def _where(found: TradeOff) -> str:
    words = {"context": found.context, "batch": found.batch}
    return ", ".join(f"{name} {value:,}" for name, value in words.items() if value is not None)


def _unit(cost: Axis) -> Callable[[float | None], str]:
    if cost.key.endswith("bytes"):
        return memory
    return number if cost.maximise else count


def _columns(names: Mapping[str, str]) -> int:
    return _LEGEND_COLUMNS if _LEGEND_COLUMNS * max(map(len, names.values())) < _LEGEND_LETTERS else 1


def _stand_alone(text: str) -> str:
    """Give a figure the colours that a report's page would."""
    style = (files("limbeck.evaluate") / "templates" / "report.css").read_text(encoding="utf-8")
    theme = style[: style.index("* {")]  # the variables, light and dark, stand first
    theme += (
        "svg { background: var(--paper); }\ntext { font-family: system-ui, 'Liberation Sans', sans-serif !important; }"
    )
    end = text.index(">") + 1
    return f"{text[:end]}\n<style>\n{theme}\n</style>{text[end:]}"
