"""The report's figures as small inline SVG, with real text and colours that follow the page's light or dark theme.

Colours are drawn as stand-ins and then replaced by the page's CSS variables (`--ink`, `--rule`, `--series-1` ...), so a
figure needs a page that defines them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from limbeck.evaluate.facts import ReportFacts, SpeedMeasurement, SpeedRow
from limbeck.evaluate.wording import count, duration, memory

INK, QUIET, RULE = "#010203", "#010204", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06", "#0a0b07")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
WIDTH_INCHES = 4.6
MODEL_LABELS = {
    "teacher": "teacher",
    "student": "student",
    "copied": "copied, no align",
    "from_scratch": "from scratch",
    "without_teacher": "without teacher",
    "equal_flops": "without teacher, equal FLOPs",
    "teacher_more": "teacher, more tokens",
}
MODEL_COLOURS = dict(zip(MODEL_LABELS, SERIES, strict=True))
MAX_CURVE_POINTS = 300
NMSE_CUT = 1.5


def loss_curves(facts: ReportFacts) -> list[str]:
    """Training loss by tokens, one panel per kind of stage: the losses of different kinds do not compare."""
    kinds = list(dict.fromkeys(stage.kind for model in facts.models().values() for stage in model.stages))
    curves = {kind: _curves_of(facts, kind) for kind in kinds}
    return [
        svg(partial(_draw_losses, kind=kind, lines=lines), name=f"loss-{place}", height=2.3)
        for place, (kind, lines) in enumerate(curves.items())
        if lines
    ]


def _draw_losses(figure: Figure, *, kind: str, lines: list[tuple[str, list[tuple[float, float]]]]) -> None:
    axes = figure.add_subplot()
    drawn: set[str] = set()
    for model, points in lines:
        label, style = (None, "--") if model in drawn else (MODEL_LABELS[model], "-")
        axes.plot(*zip(*points, strict=True), color=MODEL_COLOURS[model], label=label, linestyle=style)
        drawn.add(model)
    axes.set_title(f"{kind} loss", loc="left")
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(ticks(count))
    axes.legend()


def _curves_of(facts: ReportFacts, kind: str) -> list[tuple[str, list[tuple[float, float]]]]:
    lines = []
    for name, model in facts.models().items():
        for stage in model.stages:
            points = [(tokens, loss) for tokens, loss in stage.loss_curve if loss is not None]
            if stage.kind == kind and points:
                step = -(-len(points) // MAX_CURVE_POINTS)
                lines.append((name, points[::-step][::-1]))
    return lines


def layer_errors(facts: ReportFacts) -> list[str]:
    """Bars of the held-out NMSE of every replaced layer: at the start, after calibration, after the align stage."""
    states = [
        ("at the start", "nmse_initial", RULE),
        ("calibrated", "nmse_calibrated", QUIET),
        ("after align", "nmse_after_align", MODEL_COLOURS["student"]),
    ]
    bars = [
        (label, colour, {layer.index: min(value, NMSE_CUT) for layer in facts.layers if (value := getattr(layer, key))})
        for label, key, colour in states
    ]
    bars = [state for state in bars if state[2]]
    if not bars:
        return []
    indices = [layer.index for layer in facts.layers]
    return [svg(partial(_draw_layers, bars=bars, indices=indices), name="layers", height=2.6)]


def _draw_layers(figure: Figure, *, bars: list[tuple[str, str, dict[int, float]]], indices: list[int]) -> None:
    axes = figure.add_subplot()
    width = 0.8 / len(bars)
    for place, (label, colour, heights) in enumerate(bars):
        shift = (place - (len(bars) - 1) / 2) * width
        at = [index + shift for index in heights]
        axes.bar(at, list(heights.values()), width=0.9 * width, color=colour, label=label)
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, max(1.1, *(height for _, _, heights in bars for height in heights.values())))
    axes.set_xticks(indices[:: -(-len(indices) // 16)])
    axes.set_xlabel("layer")
    axes.set_ylabel(f"NMSE (1 = silence; cut at {NMSE_CUT})")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3)


def quality_against_speed(facts: ReportFacts) -> list[str]:
    """Perplexity against decoding speed at the longest context both were measured at.

    A control has the speed of the model whose shape it has.
    """
    row = _longest_compared(facts)
    if row is None or row.teacher is None:
        return []
    seconds = {"teacher": row.teacher.decode_seconds_per_token, "student": row.student.decode_seconds_per_token}
    teachers = ("teacher", "teacher_more")
    points = {
        name: (1 / decode, model.perplexity)
        for name, model in facts.models().items()
        if (decode := seconds["teacher" if name in teachers else "student"]) and model.perplexity is not None
    }
    return [svg(partial(_draw_tradeoff, points=points, context=row.context), name="tradeoff", height=2.6)]


def _draw_tradeoff(figure: Figure, *, points: dict[str, tuple[float, float]], context: int) -> None:
    axes = figure.add_subplot()
    for name, (speed, perplexity) in points.items():
        colour = MODEL_COLOURS[name]
        filled = colour if name in ("teacher", "student") else "none"
        label = MODEL_LABELS[name]
        axes.plot([speed], [perplexity], "o", markersize=7, color=colour, markerfacecolor=filled, label=label)
    axes.set_xlim(0, 1.15 * max(speed for speed, _ in points.values()))
    axes.margins(y=0.15)
    axes.set_xlabel(f"tokens decoded a second, at {context:,} tokens of context")
    axes.set_ylabel("perplexity (lower is better)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.26), ncols=3)


def _longest_compared(facts: ReportFacts) -> SpeedRow | None:
    rows = facts.speed.rows if facts.speed else []
    compared = [row for row in rows if row.decode_speedup is not None]
    return compared[-1] if compared else None


def cost_against_context(facts: ReportFacts) -> list[str]:
    """Prefill time, decode time and memory of teacher and student by context length, on logarithmic axes."""
    rows = facts.speed.rows if facts.speed else []
    panels: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("prefill time", "prefill_seconds", duration),
        ("decode time per token", "decode_seconds_per_token", duration),
        ("cache", "cache_bytes", memory),
        ("peak memory above the start", "peak_memory_bytes", memory),
    ]
    return [
        svg(partial(_draw_cost, title=title, lines=lines, unit=unit), name=f"cost-{key}", height=2.2)
        for title, key, unit in panels
        if (lines := _cost_lines(rows, key))
    ]


def _draw_cost(
    figure: Figure,
    *,
    title: str,
    lines: dict[str, list[tuple[int, float]]],
    unit: Callable[[float | None], str],
) -> None:
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", color=MODEL_COLOURS[name], label=MODEL_LABELS[name])
    axes.set_title(title, loc="left")
    axes.set_xlabel("tokens of context")
    contexts = sorted({context for points in lines.values() for context, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts[:: -(-len(contexts) // 8)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 4 * low:
        axes.set_ylim(low / 2, high * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 40 * low else (1.0,), numticks=6))
    axes.yaxis.set_major_formatter(ticks(unit))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend()


def _cost_lines(rows: Sequence[SpeedRow], field: str) -> dict[str, list[tuple[int, float]]]:
    def points(measured: Sequence[SpeedMeasurement | None]) -> list[tuple[int, float]]:
        return [(one.context, value) for one in measured if one is not None and (value := getattr(one, field))]

    lines = {"teacher": points([row.teacher for row in rows]), "student": points([row.student for row in rows])}
    return {name: line for name, line in lines.items() if line}


def ticks(unit: Callable[[float | None], str]) -> FuncFormatter:
    """Tick labels in a unit, without the noughts that only a table needs."""

    def label(value: float, _position: int | None) -> str:
        text = unit(value)
        return re.sub(r"\.?0+(?=\s|$)", "", text) if "." in text else text

    return FuncFormatter(label)


def svg(draw: Callable[[Figure], None], *, name: str, height: float) -> str:
    """Draw, and turn the file into an element that can stand in a page beside others. `name` begins every id in it."""
    style: Any = {**STYLE, "svg.hashsalt": name}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        draw(figure)
        stream = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for colour, variable in {INK: "--ink", QUIET: "--quiet", RULE: "--rule"}.items():
        text = text.replace(colour, f"var({variable})")
    for place, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{place + 1})")
    return text
