"""The report's figures as small inline SVG, with real text and colours that follow the page's light or dark theme.

Colours are drawn as stand-ins and then replaced by the page's CSS variables (`--ink`, `--rule`, `--series-1` ...), so a
figure needs a page that defines them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from limbeck.evaluate.facts import ReportFacts, SpeedMeasurement, SpeedRow
from limbeck.evaluate.wording import count, duration, memory

INK, RULE = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
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
WIDTH_INCHES = 5.0
MODEL_LABELS = {
    "teacher": "teacher",
    "student": "student",
    "copied": "copied, no align",
    "from_scratch": "from scratch",
    "teacher_more": "teacher, more tokens",
}
MODEL_COLOURS = dict(zip(MODEL_LABELS, SERIES, strict=True))
MAX_CURVE_POINTS = 300


def loss_curves(facts: ReportFacts) -> str | None:
    """Training loss by tokens, one panel per kind of stage: the losses of different kinds do not compare."""
    kinds = list(dict.fromkeys(stage.kind for model in facts.models().values() for stage in model.stages))
    curves = {kind: _curves_of(facts, kind) for kind in kinds}
    curves = {kind: lines for kind, lines in curves.items() if lines}
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        for place, (kind, lines) in enumerate(curves.items()):
            axes = figure.add_subplot(len(curves), 1, place + 1)
            for line, (model, points) in enumerate(lines):
                style = "-" if [name for name, _ in lines[:line]].count(model) == 0 else "--"
                label = MODEL_LABELS[model] if style == "-" else None
                axes.plot(*zip(*points, strict=True), color=MODEL_COLOURS[model], label=label, linestyle=style)
            axes.set_title(f"{kind} loss", loc="left")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
            axes.legend()
        axes.set_xlabel("tokens")

    return _svg(draw, name="loss", height=0.5 + 1.9 * len(curves))


def _curves_of(facts: ReportFacts, kind: str) -> list[tuple[str, list[tuple[float, float]]]]:
    lines = []
    for name, model in facts.models().items():
        for stage in model.stages:
            points = [(tokens, loss) for tokens, loss in stage.loss_curve if loss is not None]
            if stage.kind == kind and points:
                step = -(-len(points) // MAX_CURVE_POINTS)
                lines.append((name, points[::-step][::-1]))
    return lines


def layer_errors(facts: ReportFacts) -> str | None:
    """Bars of the held-out NMSE of every replaced layer: before, after calibration, after the align stage."""
    states = {
        "at the start": "nmse_initial",
        "calibrated": "nmse_calibrated",
        "after align": "nmse_after_align",
    }
    shown = {
        label: [(layer.index, getattr(layer, field)) for layer in facts.layers if getattr(layer, field) is not None]
        for label, field in states.items()
    }
    shown = {label: bars for label, bars in shown.items() if bars}
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.8 / len(shown)
        for place, (label, bars) in enumerate(shown.items()):
            shift = (place - (len(shown) - 1) / 2) * width
            heights = [min(value, 1.5) for _, value in bars]
            at = [index + shift for index, _ in bars]
            axes.bar(at, heights, width=0.9 * width, color=SERIES[(2, 4, 1)[place + 3 - len(shown)]], label=label)
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(0, max(1.1, *(min(value, 1.5) for bars in shown.values() for _, value in bars)))
        indices = [layer.index for layer in facts.layers]
        axes.set_xticks(indices[:: -(-len(indices) // 16)])
        axes.set_xlabel("layer")
        axes.set_ylabel("NMSE (1 = silence; cut at 1.5)")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3)

    return _svg(draw, name="layers", height=2.8)


def quality_against_speed(facts: ReportFacts) -> str | None:
    """Perplexity against decoding speed at the longest context both were measured at.

    A control has the speed of the model whose shape it has.
    """
    row = _longest_compared(facts)
    if row is None or row.teacher is None:
        return None
    seconds = {"teacher": row.teacher.decode_seconds_per_token, "student": row.student.decode_seconds_per_token}
    shape = {"copied": "student", "from_scratch": "student", "teacher_more": "teacher"}
    points = {
        name: (1 / decode, model.perplexity)
        for name, model in facts.models().items()
        if (decode := seconds[shape.get(name, name)]) and model.perplexity is not None
    }
    if len(points) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, (speed, perplexity) in points.items():
            filled = MODEL_COLOURS[name] if name in seconds else "none"
            axes.plot(
                [speed],
                [perplexity],
                "o",
                markersize=7,
                color=MODEL_COLOURS[name],
                markerfacecolor=filled,
                label=MODEL_LABELS[name],
            )
        axes.set_xlim(0, 1.15 * max(speed for speed, _ in points.values()))
        axes.margins(y=0.15)
        axes.set_xlabel(f"tokens decoded a second, at {row.context:,} tokens of context")
        axes.set_ylabel("perplexity (lower is better)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3)

    return _svg(draw, name="tradeoff", height=2.8)


def _longest_compared(facts: ReportFacts) -> SpeedRow | None:
    rows = facts.speed.rows if facts.speed else []
    compared = [row for row in rows if row.decode_speedup is not None]
    return compared[-1] if compared else None


def cost_against_context(facts: ReportFacts) -> str | None:
    """Prefill time, decode time and memory of teacher and student by context length, on logarithmic axes."""
    rows = facts.speed.rows if facts.speed else []
    panels: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("prefill time", "prefill_seconds", duration),
        ("decode time per token", "decode_seconds_per_token", duration),
        ("cache", "cache_bytes", memory),
        ("peak memory above the weights", "peak_memory_bytes", memory),
    ]
    curves = [(title, _cost_lines(rows, field), unit) for title, field, unit in panels]
    curves = [panel for panel in curves if panel[1]]
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        contexts = [row.context for row in rows]
        for place, (title, lines, unit) in enumerate(curves):
            axes = figure.add_subplot((len(curves) + 1) // 2, 2, place + 1)
            for name, points in lines.items():
                axes.plot(*zip(*points, strict=True), "o-", color=MODEL_COLOURS[name], label=MODEL_LABELS[name])
            axes.set_title(title, loc="left")
            _logarithmic(axes, contexts, unit)
            if place == 0:
                axes.legend()
        figure.supxlabel("tokens of context", fontsize=9)

    return _svg(draw, name="cost", height=0.4 + 2.0 * ((len(curves) + 1) // 2))


def _cost_lines(rows: Sequence[SpeedRow], field: str) -> dict[str, list[tuple[int, float]]]:
    def points(measured: Sequence[SpeedMeasurement | None]) -> list[tuple[int, float]]:
        return [(one.context, value) for one in measured if one is not None and (value := getattr(one, field))]

    lines = {"teacher": points([row.teacher for row in rows]), "student": points([row.student for row in rows])}
    return {name: line for name, line in lines.items() if line}


def _logarithmic(axes: Axes, contexts: Sequence[int], unit: Callable[[float | None], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts[:: -(-len(contexts) // 5)])
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high < 4 * low:
        axes.set_ylim(low / 2, high * 2)


def _svg(draw: Callable[[Figure], None], *, name: str, height: float) -> str:
    """Draw, and turn the file into an element that can stand in a page beside others."""
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
    for colour, variable in {INK: "--ink", RULE: "--rule"}.items():
        text = text.replace(colour, f"var({variable})")
    for place, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{place + 1})")
    return text
