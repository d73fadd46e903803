"""The model card: what a student is, how it was made, what it is worth, and what it may be used for.

Everything in it was made harmless first (`deploy/plain.py`): reports, recipes and others' cards are not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from limbeck.deploy.inheritance import Decision
from limbeck.deploy.licences import Licence
from limbeck.deploy.parents import Parent
from limbeck.deploy.plain import fenced, markdown, printable

MARK = re.compile(r"<!-- limbeck push: ([0-9a-f]{16}) -->")
_MOST_ROWS, _MOST_SENTENCES = 60, 40


@dataclass(frozen=True)
class Grid:
    """A table of words and figures; the first `text_columns` columns are words, the others are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Measured:
    """One figure for the card's metadata: metric with arguments (standard error, protocol), on a text or task."""

    text: str
    metric: str
    value: float
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What the report says in sentences. answer: was the teacher needed: yes, no, unclear or not measured."""

    headline: str
    answer: str
    statements: Sequence[str] = ()
    gained: Sequence[str] = ()
    lost: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class CardContent:
    """All that a card says. Texts are as they were found; rendering makes them harmless.

    repo_id: owner/name on the hub. mark: 16 hexadecimal digits that tell one run from another. own_class: whether the
    model's class comes with this package. tables: heading -> table, in order, by the section they stand in.
    """

    repo_id: str
    mark: str
    summary: str
    own_class: bool
    parents: Sequence[Parent]
    decision: Decision
    what: Grid
    made: Sequence[str] = ()
    recipe: str = ""
    stages: Grid | None = None
    verdict: Verdict | None = None
    evaluation: dict[str, Grid] = field(default_factory=dict)
    tasks: Grid | None = None
    protocol: Grid | None = None
    limits: Sequence[str] = ()
    compute: Grid | None = None
    versions: Grid | None = None
    papers: Sequence[tuple[str, str]] = ()
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    languages: Sequence[str] = ()
    measured: Sequence[Measured] = ()
    carbon_grams: float | None = None

    @property
    def name(self) -> str:
        """The model's name without its owner."""
        return self.repo_id.rpartition("/")[2]


def write_card(content: CardContent) -> str:
    """The whole card: metadata and text. It is read back by the hub's own reader before it is returned."""
    from huggingface_hub import ModelCard

    head = card_data(content).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{head}\n---\n\n{render_text(content)}")
    return str(card.content)


def card_data(content: CardContent) -> Any:
    """The metadata, as the hub's `ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type=slug(row.text), dataset_name=printable(row.text, most=120),
            metric_type=slug(row.metric), metric_name=printable(row.metric, most=120), metric_value=row.value,
            metric_args=row.about or None,
        )
        for row in content.measured
    ]  # fmt: skip
    starts = [parent.hub_id for parent in content.parents if parent.starts and parent.hub_id]
    further: dict[str, Any] = {"base_model_relation": "finetune"} if starts else {}
    if content.carbon_grams is not None:
        source = "energy measured while training, times the grid's intensity as given"
        further["co2_eq_emissions"] = {
            "emissions": content.carbon_grams,
            "source": source,
            "training_type": "distillation",
        }
    return ModelCardData(
        model_name=content.name, eval_results=results or None, **_licence_keys(content.decision.licence),
        base_model=starts or None, **further, language=list(content.languages) or None, datasets=list(content.datasets) or None,
        library_name="limbeck" if content.own_class else "transformers", pipeline_tag="text-generation", tags=list(content.tags) or None,
    )  # fmt: skip


def render_text(content: CardContent) -> str:
    """The card below its metadata."""
    environment = Environment(
        loader=PackageLoader("limbeck.deploy"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.filters.update(table=_table, fence=lambda text, language="": Markup(fenced(text, language=language)))
    environment.filters["few"] = lambda sentences: list(sentences)[:_MOST_SENTENCES]
    text = environment.get_template("card.md.j2").render(card=content, plain=Markup(content.repo_id))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def slug(text: str) -> str:
    """A text as an identifier: letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9._/]+", "-", printable(text, most=80).lower()).strip("-./") or "text"


def _licence_keys(licence: Licence | None) -> dict[str, Any]:
    if licence is None:
        return {}
    if licence.on_hub:
        return {"license": licence.key}
    link = licence.link or "LICENSE"
    return {"license": "other", "license_name": slug(licence.key), "license_link": link}


def _harmless(value: Any) -> Any:
    return value if isinstance(value, Markup) else markdown(value)


def _table(grid: Grid) -> Markup:
    rule = ["---" if place < grid.text_columns else "---:" for place in range(len(grid.columns))]
    lines = [[markdown(cell, most=300) for cell in row] for row in [grid.columns, *list(grid.rows)[:_MOST_ROWS]]]
    left = len(grid.rows) - _MOST_ROWS
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
    notes = [*grid.notes, *([f"{left} further rows are left out."] if left > 0 else [])]
    return Markup(text + "".join(f"\n\n{markdown(note)}" for note in notes) + "\n")
