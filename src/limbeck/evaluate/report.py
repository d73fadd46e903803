"""Write a run's report: report.json (the facts), report.html (for people) and report.md (for diffs and reviews).

The page is one file: styles and figures are inside it, it runs no script and loads nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from limbeck.core.files import write_atomic, write_json
from limbeck.evaluate import figures, tables
from limbeck.evaluate.facts import ReportFacts
from limbeck.evaluate.verdict import compared, gap_closed, perplexity_ratio, verdict
from limbeck.evaluate.wording import MISSING, percent, ratio

MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|~])")


@dataclass(frozen=True)
class KeyFigure:
    """One figure at the top of the report and what it says."""

    value: str
    meaning: str


def write_report(run_folder: Path, facts: ReportFacts) -> Path:
    """Write report.json, report.html and report.md into a run folder, each atomically; returns the page's path.

    The verdict is worked out from the facts when they do not carry one.
    """
    if facts.verdict is None:
        facts = facts.model_copy(update={"verdict": verdict(facts)})
    folder = Path(run_folder)
    write_atomic(folder / "report.md", render_markdown(facts))
    write_atomic(folder / "report.html", render_html(facts))
    write_json(folder / "report.json", facts.model_dump(mode="json"))  # last: it says that the run is finished
    return folder / "report.html"


def render_html(facts: ReportFacts) -> str:
    """The page, as one self-contained document."""
    environment = Environment(
        loader=PackageLoader("limbeck.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup(environment.get_template("report.css").render())
    drawings = {
        "loss": figures.loss_curves(facts),
        "layers": figures.layer_errors(facts),
        "cost": figures.cost_against_context(facts),
        "tradeoff": figures.quality_against_speed(facts),
    }
    drawn = {name: [Markup(svg) for svg in panels] for name, panels in drawings.items()}
    return environment.get_template("report.html.j2").render(**_content(facts), style=style, figures=drawn)


def render_markdown(facts: ReportFacts) -> str:
    """The same facts as Markdown, without the figures."""
    environment = Environment(
        loader=PackageLoader("limbeck.evaluate"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escape_markdown,
    )
    environment.filters.update(fence=_fence, table=markdown_table)
    text = environment.get_template("report.md.j2").render(**_content(facts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def key_figures(facts: ReportFacts) -> list[KeyFigure]:
    """The few figures to read first; those that were not measured are left out."""
    candidates = [
        KeyFigure(ratio(perplexity_ratio(facts.student, facts.teacher)), "the teacher's perplexity"),
        KeyFigure(ratio(perplexity_ratio(facts.student, compared(facts))), _compared_words(facts)),
        KeyFigure(percent(gap_closed(facts)), "of what attention is worth here is kept"),
    ]
    measured = [row for row in facts.speed.rows if row.decode_speedup is not None] if facts.speed else []
    if measured:
        row = measured[-1]
        candidates.append(
            KeyFigure(ratio(row.decode_speedup), f"the teacher's decoding speed at {row.context:,} tokens of context")
        )
    return [figure for figure in candidates if figure.value != MISSING]


def _compared_words(facts: ReportFacts) -> str:
    without = facts.controls.without_teacher is not None
    return "the perplexity reached from the same start alone" if without else "the perplexity reached from scratch"


def _content(facts: ReportFacts) -> dict[str, Any]:
    """What both templates show."""
    return {
        "facts": facts,
        "run": facts.run,
        "verdict": facts.verdict or verdict(facts),
        "key_figures": key_figures(facts),
        "quality": tables.quality_table(facts),
        "budget": tables.budget_table(facts),
        "teaching": tables.teaching_table(facts),
        "texts": tables.texts_table(facts),
        "stages": tables.stages_table(facts),
        "layers": tables.layers_table(facts),
        "time": tables.time_table(facts),
        "memory": tables.memory_table(facts),
        "environment": tables.environment_table(facts),
        "wall": tables.wall_table(facts),
        "protocol": tables.protocol_table(facts),
        "samples": _samples_by_prompt(facts),
    }


def _samples_by_prompt(facts: ReportFacts) -> dict[str, list[tuple[str, str]]]:
    """For each prompt what every model wrote, as (model, text)."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for name, model in facts.models().items():
        for sample in model.samples:
            by_prompt.setdefault(sample.prompt, []).append((tables.MODEL_NAMES[name], sample.text))
    return by_prompt


def _escape_markdown(value: Any) -> Any:
    """Make a value plain text in Markdown: one line, nothing of it a mark-up."""
    if isinstance(value, Markup):
        return value
    return MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def markdown_table(table: tables.Table) -> Markup:
    """A pipe table with its notes under it; group headings go into the names of their columns."""
    groups = [heading for heading, span in table.groups for _ in range(span)] or [""] * len(table.columns)
    names = [f"{group}: {column}" if group else column for group, column in zip(groups, table.columns, strict=True)]
    rule = ["---" if place < table.text_columns else "---:" for place in range(len(names))]
    lines = [[_escape_markdown(cell) for cell in row] for row in (names, *table.rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
    notes = "".join(f"\n\n{_escape_markdown(note)}" for note in table.notes)
    return Markup(f"{text}{notes}\n")


def _fence(text: str) -> Markup:
    """A code block around any text, with a fence longer than every run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{text.rstrip()}\n{fence}")
