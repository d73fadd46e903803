"""What a card says of a run, in words and tables: from the report's facts, the recipe and the model's configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.deploy.card import CardContent, Grid, Measured, Verdict
from limbeck.deploy.citations import papers_of
from limbeck.deploy.inheritance import Decision
from limbeck.deploy.parents import Parent
from limbeck.deploy.plain import is_local
from limbeck.deploy.task_scores import TaskRow, read_task_rows
from limbeck.evaluate import tables
from limbeck.evaluate.facts import ReportFacts
from limbeck.evaluate.verdict import verdict
from limbeck.evaluate.wording import MISSING, count, duration, memory, number

if TYPE_CHECKING:
    from limbeck.publishing import Subject

_OWN_TYPES = re.compile(r"limbeck_\w+")
_JOULES_A_KILOWATT_HOUR = 3.6e6
_TEACHING = {
    "source": "asked live, for its whole predictions or the likeliest",
    "store": "its predictions were written down once",
    "served": "asked over a network for its likeliest tokens",
    "closed": "asked over a network for text alone",
    "several": "several models together",
    "itself": "the student itself",
}
_HUB_DATA = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def card_content(
    subject: Subject,
    repo_id: str,
    *,
    parents: Sequence[Parent],
    decision: Decision,
    mark: str,
    grid_intensity: float | None = None,
) -> CardContent:
    """Everything a card says of a subject whose recipe and facts were cleaned."""
    config, facts, recipe = _config(subject.model), subject.facts, subject.recipe
    tasks = [] if subject.run is None else read_task_rows(subject.run / "evaluation" / "tasks")
    mixers = [str(word) for word in config.get("mixers", [])] if isinstance(config.get("mixers"), list) else []
    own_class = _OWN_TYPES.fullmatch(str(config.get("model_type"))) is not None
    shared: dict[str, Any] = {
        "repo_id": repo_id, "mark": mark, "own_class": own_class, "parents": parents, "decision": decision,
        "what": _what(subject, config, mixers), "tasks": _tasks(tasks), "tags": _tags(config, mixers, parents),
        "datasets": _datasets(recipe), "languages": _languages(recipe, parents), "papers": papers_of(recipe, mixers=mixers),
    }  # fmt: skip
    if facts is None:
        return CardContent(
            **shared,
            summary="A language model, published with Limbeck.",
            limits=_limits(None, None),
            measured=_task_figures(tasks),
        )
    said = facts.verdict or verdict(facts)
    needed, report = said.teacher_needed, facts.model_dump(mode="json")
    return CardContent(
        **shared,
        summary=_summary(facts, parents, mixers),
        made=_made(facts, recipe, parents),
        recipe=facts.run.recipe,
        stages=_grid(tables.stages_table(facts)),
        verdict=Verdict(said.headline, needed.answer, needed.statements, said.gained, said.lost, said.warnings),
        evaluation=_evaluation(facts),
        protocol=_grid(tables.protocol_table(facts)),
        limits=_limits(facts, said.warnings),
        compute=compute_grid(report, grid_intensity=grid_intensity),
        carbon_grams=carbon_grams(report, grid_intensity=grid_intensity),
        versions=_versions(facts),
        measured=[*_figures(facts), *_task_figures(tasks)],
    )


def carbon_grams(report: Mapping[str, Any], *, grid_intensity: float | None) -> float | None:
    """Grams of CO2 equivalent of a run whose energy was measured, at so many grams a kilowatt-hour; else None."""
    used = _kilowatt_hours(report.get("run", {}))
    return None if used is None or grid_intensity is None else used * grid_intensity


def _kilowatt_hours(part: Mapping[str, Any]) -> float | None:
    joules = part.get("energy_joules")
    return joules / _JOULES_A_KILOWATT_HOUR if isinstance(joules, int | float) and joules >= 0 else None


def _energy_words(part: Mapping[str, Any], note: str) -> str:
    """What training took, and what reported it; else why it is not known."""
    used = _kilowatt_hours(part)
    if used is None:
        return f"not measured: {note}" if note else "not measured"
    return f"{number(used)} kWh ({note})" if note else f"{number(used)} kWh"


def compute_grid(report: Mapping[str, Any], *, grid_intensity: float | None) -> Grid:
    """What training took. Energy only where the run measured it, carbon only where the grid's intensity is given too.

    grid_intensity: grams of CO2 equivalent a kilowatt-hour.
    """
    run, student = report.get("run", {}), report.get("student", {})
    machine = run.get("machine", {})
    seconds = sum(stage.get("seconds") or 0 for stage in student.get("stages", []))
    walls = [value for value in run.get("wall_seconds", {}).values() if value is not None]
    carbon = carbon_grams(report, grid_intensity=grid_intensity)
    note = str(run.get("energy_note") or "")
    rows = [
        ["Training of this model, FLOPs (counted)", count(student.get("flops_spent"))],
        ["Training of this model, time", duration(seconds) if seconds else MISSING],
        ["The whole run with its controls, training time", duration(sum(walls)) if walls else MISSING],
        ["Device", str(machine.get("device", MISSING))],
        [
            "Machine",
            ", ".join(str(machine[key]) for key in ("processor", "accelerator", "system") if machine.get(key))
            or MISSING,
        ],
        *(
            [["Energy, training of this model", _energy_words(student, "")]]
            if _kilowatt_hours(student) is not None
            else []
        ),
        ["Energy", _energy_words(run, note)],
        ["Carbon", _carbon_words(carbon, grid_intensity, measured=_kilowatt_hours(run) is not None)],
    ]
    return Grid(["", ""], rows, text_columns=2, notes=["What the teacher itself once cost is in none of these."])


def _carbon_words(carbon: float | None, intensity: float | None, *, measured: bool) -> str:
    if carbon is not None:
        return f"{number(carbon)} g CO2 equivalent (at {number(intensity)} g a kWh, as given by whoever published it)"
    return "not stated: the intensity of the grid was not given" if measured else "not stated: energy was not measured"


def _config(model: Path) -> dict[str, Any]:
    path = model / "config.json"
    try:
        words = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 5_000_000 else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return words if isinstance(words, dict) else {}


def _what(subject: Subject, config: Mapping[str, Any], mixers: Sequence[str]) -> Grid:
    weights = sum(path.stat().st_size for path in subject.model.glob("*.safetensors"))
    backbone = config.get("backbone") if isinstance(config.get("backbone"), dict) else {}
    student = None if subject.facts is None else subject.facts.student
    rows = [
        ["Kind", "causal language model"],
        ["Class", ", ".join(str(name) for name in (config.get("architectures") or [])[:3]) or MISSING],
        ["Shape", str((backbone or config).get("model_type", MISSING))],
        ["Parameters", MISSING if student is None else f"{student.parameters:,}"],
        ["Weights on disk", f"{memory(weights)}, {config.get('dtype', 'unknown number format')}"],
    ]
    if mixers:
        rows.append(["Layers", ", ".join(f"{mixers.count(word)} {word}" for word in dict.fromkeys(mixers))])
    context = _at(subject.recipe, "data", "context_tokens")
    if isinstance(context, int):
        rows.append(["Trained on windows of", f"{context:,} tokens"])
    if subject.facts is not None:
        rows.append(["Made", f"{subject.facts.run.date[:10]}, with Limbeck {subject.facts.run.limbeck_version}"])
    return Grid(["", ""], rows, text_columns=2)


def _summary(facts: ReportFacts, parents: Sequence[Parent], mixers: Sequence[str]) -> str:
    teachers = [parent.name for parent in parents if "teacher" in parent.role]
    origin = (
        f"distilled with Limbeck from {' and '.join(teachers)}"
        if teachers
        else "trained with Limbeck, without a teacher"
    )
    text = f"A language model of {count(facts.student.parameters)} parameters, {origin}."
    swapped = sum(word != "attention" for word in mixers)
    if swapped:
        where = f"all {swapped} layers" if swapped == len(mixers) else f"{swapped} of its {len(mixers)} layers"
        text += f" In {where} a Hyena operator stands in the place of attention."
    return text


def _made(facts: ReportFacts, recipe: Mapping[str, Any], parents: Sequence[Parent]) -> list[str]:
    kind = _TEACHING.get(str(facts.teaching.get("kind")))
    stages = ", ".join(stage.name for stage in facts.student.stages[:20])
    said = [
        f"Teacher: {', '.join(f'{one.name} ({one.role})' for one in parents) or 'none'}"
        + (f", {kind}." if kind else "."),
        f"Text it was trained on: {_text_names(recipe, 'train')}.",
        f"Held-out text, never trained on: {_text_names(recipe, 'heldout')}.",
        f"Training: {count(facts.student.tokens_spent)} tokens" + (f", in the stages {stages}." if stages else "."),
        f"Seeds: {', '.join(str(seed) for seed in facts.run.seeds[:20])}.",
    ]
    start = _at(recipe, "student", "initialisation")
    if isinstance(start, str) and any("start" in one.role for one in parents):
        said.append(f"Start of the operators that are new: {start}.")
    return said


def _text_names(recipe: Mapping[str, Any], part: str) -> str:
    sources = _at(recipe, "data", part)
    names = []
    for source in sources if isinstance(sources, list) else []:
        words = source if isinstance(source, dict) else {"source": source}
        inside = [str(words[key]) for key in ("config", "split") if words.get(key)]
        names.append(f"{words.get('source')} ({', '.join(inside)})" if inside else str(words.get("source")))
    return ", ".join(names[:20]) or "not recorded"


def _evaluation(facts: ReportFacts) -> dict[str, Grid]:
    found = {
        "Quality on held-out text": tables.quality_table(facts),
        "Text by text": tables.texts_table(facts),
        "Size and budget": tables.budget_table(facts),
        "Time": tables.time_table(facts),
        "Memory": tables.memory_table(facts),
    }
    grids = {name: _grid(table) for name, table in found.items()}
    return {name: grid for name, grid in grids.items() if grid is not None}


def _grid(table: tables.Table | None) -> Grid | None:
    if table is None:
        return None
    groups = [heading for heading, span in table.groups for _ in range(span)] or [""] * len(table.columns)
    columns = [f"{group}: {name}" if group else name for group, name in zip(groups, table.columns, strict=True)]
    return Grid(columns, table.rows, table.text_columns, table.notes)


def _limits(facts: ReportFacts | None, warnings: Sequence[str] | None) -> list[str]:
    said = list(warnings or [])
    if facts is not None:
        said.append(
            f"The figures are of {facts.student.tokens_scored:,} tokens of the texts named above; of other text, other languages and longer "
            "contexts than were measured they say nothing."
        )
    return [
        *said,
        "It continues text. It was not made to follow instructions, and was not examined for harmful, false or biased output.",
        "What its teacher says wrongly, it has learnt too.",
    ]


def _versions(facts: ReportFacts) -> Grid:
    run = facts.run
    rows = [["limbeck", run.limbeck_version], ["torch", run.torch_version], ["transformers", run.transformers_version]]
    rows.append(["python", str(run.machine.get("python", ""))])
    return Grid(["", ""], [row for row in rows if row[1]], text_columns=2)


def _figures(facts: ReportFacts) -> list[Measured]:
    found = []
    protocol = {
        key: facts.protocol[key]
        for key in ("context_tokens", "stride_tokens")
        if isinstance(facts.protocol.get(key), int)
    }
    for text in facts.student.texts[:50]:
        about: dict[str, Any] = {"tokens": text.tokens, **protocol}
        if text.standard_error_nats is not None:
            about["standard_error_nats_per_token"] = round(text.standard_error_nats, 6)
        for metric, value in (("perplexity", text.perplexity), ("bits per byte", text.bits_per_byte)):
            if value is not None:
                found.append(Measured(text.name, metric, round(value, 6), about))
    return found


def _task_figures(rows: Sequence[TaskRow]) -> list[Measured]:
    found = []
    for row in (row for row in rows if row.is_whole):  # a try is no result for machines to rank
        about = {"standard_error": row.standard_error, "items": row.items}
        found.append(
            Measured(
                row.task,
                row.metric,
                round(row.value, 6),
                {key: value for key, value in about.items() if value is not None},
            )
        )
    return found


def _tasks(rows: Sequence[TaskRow]) -> Grid | None:
    if not rows:
        return None
    cells = [
        [row.task, row.metric, number(row.value), MISSING if row.standard_error is None else f"± {number(row.standard_error, 2)}",
         MISSING if row.items is None else f"{row.items:,}", number(row.chance)]
        for row in rows
    ]  # fmt: skip
    notes = ["Error: one standard error over the items. By guessing: what blind choice gives."]
    if tried := [row.task for row in rows if not row.is_whole]:
        notes.append(f"Asked only the first items, which is a try and no result: {', '.join(tried)}.")
    return Grid(["Task", "Metric", "Value", "Error", "Items", "By guessing"], cells, 2, notes)


def _tags(config: Mapping[str, Any], mixers: Sequence[str], parents: Sequence[Parent]) -> list[str]:
    tags = ["limbeck"]
    if any("teacher" in parent.role for parent in parents):
        tags += ["distillation", "knowledge-distillation"]
    if any(word != "attention" for word in mixers):
        tags.append("hyena")
    if "byte" in str(config.get("model_type")):
        tags.append("byte-level")
    return tags


def _datasets(recipe: Mapping[str, Any]) -> list[str]:
    """Hub ids of the training text; files of one's own and the package's text have none."""
    sources = _at(recipe, "data", "train")
    names = (
        [source.get("source") if isinstance(source, dict) else source for source in sources]
        if isinstance(sources, list)
        else []
    )
    return list(
        dict.fromkeys(
            name
            for name in names
            if isinstance(name, str) and name != "factbook" and not is_local(name) and _HUB_DATA.fullmatch(name)
        )
    )


def _languages(recipe: Mapping[str, Any], parents: Sequence[Parent]) -> list[str]:
    known = [code for parent in parents for code in parent.languages]
    if known:
        return list(dict.fromkeys(known))
    return (
        ["en"]
        if _text_names(recipe, "train").startswith("factbook (") and "," not in _text_names(recipe, "train")
        else []
    )


def _at(recipe: Mapping[str, Any], *keys: str) -> Any:
    value: Any = recipe
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
