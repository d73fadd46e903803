"""The report's tables, once for both the page and the Markdown: captions, columns and cells as words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from limbeck.evaluate.facts import ModelFacts, ReportFacts, SpeedRow
from limbeck.evaluate.verdict import perplexity_ratio
from limbeck.evaluate.wording import MISSING, count, duration, energy, memory, number, percent, ratio

MODEL_NAMES = {
    "teacher": "Teacher",
    "student": "Student",
    "copied": "Control: copied, no align",
    "from_scratch": "Control: from scratch",
    "without_teacher": "Control: same start, no teacher",
    "equal_flops": "Control: no teacher, equal FLOPs",
    "teacher_more": "Control: teacher, more tokens",
}


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `text_columns` columns are words, the rest are figures, set to the right.

    `groups` are headings over several columns: (heading, how many columns).
    """

    columns: list[str]
    rows: list[list[str]]
    text_columns: int = 1
    groups: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def quality_table(facts: ReportFacts) -> Table:
    """Every model and the floor: how well it predicts and how near it is to the teacher."""
    columns = [
        "",
        "Perplexity",
        "Error",
        "To teacher",
        "Bits per byte",
        "Word perplexity",
        "KL, nats",
        "Same first choice",
    ]
    rows = [[MODEL_NAMES[name], *_quality_cells(model, facts.teacher)] for name, model in facts.models().items()]
    if facts.floor is not None:
        floor = facts.floor
        figures = [number(floor.perplexity), MISSING, ratio(floor.ratio_to_teacher), number(floor.bits_per_byte)]
        rows.append(["Floor: attention set to zero", *figures, *[MISSING] * (len(columns) - 5)])
    notes = [
        "Error: one standard error of the perplexity. To teacher: perplexity over the teacher's. KL and same first "
        "choice: against the teacher's predictions."
    ]
    return Table(columns, rows, notes=notes)


def _quality_cells(model: ModelFacts, teacher: ModelFacts | None) -> list[str]:
    error = model.standard_error_nats
    return [
        number(model.perplexity),
        MISSING if error is None or model.perplexity is None else f"± {number(error * model.perplexity, 2)}",
        ratio(perplexity_ratio(model, teacher)),
        number(model.bits_per_byte),
        number(model.word_perplexity),
        number(model.kl_to_teacher, 3),
        percent(model.top1_agreement),
    ]


def budget_table(facts: ReportFacts) -> Table:
    """Every model's size and what its training took in this run; energy where any of it was measured."""
    models = facts.models().items()
    measured = any(model.energy_joules is not None for _, model in models)
    rows = [
        [
            MODEL_NAMES[name],
            count(model.parameters),
            memory(model.parameter_bytes),
            count(model.tokens_spent),
            count(model.flops_spent),
            *([energy(model.energy_joules)] if measured else []),
        ]
        for name, model in models
    ]
    notes = [
        "Tokens, FLOPs and energy: training within this run; what the teacher itself once cost is not in it.",
        _energy_words(facts),
    ]
    columns = ["", "Parameters", "Size", "Tokens trained on", "FLOPs", *(["Energy"] if measured else [])]
    return Table(columns, rows, notes=[note for note in notes if note])


def _energy_words(facts: ReportFacts) -> str:
    """Where the energy is from, or why there is none; nothing of a report from before it was looked at."""
    run = facts.run
    if run.energy_joules is not None:
        return f"Energy of all training, further seeds included: {energy(run.energy_joules)} ({run.energy_note})."
    return f"Energy: not measured: {run.energy_note}." if run.energy_note else ""


def teaching_table(facts: ReportFacts) -> Table | None:
    """Who taught, how near its stored targets are to it, and what it cost; None when nothing is known of that."""
    teaching = facts.teaching
    if not teaching:
        return None
    rows = [["Teacher", str(teaching.get("name"))], ["Kind", str(teaching.get("kind"))]]
    if teaching.get("other_tokenizer"):
        rows.append(
            ["Tokens", "other than the student's; its perplexity is put in the student's tokens, by bits per byte"]
        )
    fidelity = teaching.get("fidelity") or {}
    named = {"mean_kl_nats": "Store: mean KL to the teacher, nats", "p99_kl_nats": "Store: 99th percentile of it"}
    named |= {"mean_mass_kept": "Store: probability kept", "bytes_per_token": "Store: bytes per token"}
    rows += [[words, number(fidelity[key], 3)] for key, words in named.items() if key in fidelity]
    usage = (teaching.get("store_teacher") or {}).get("usage") or {}
    for when, words in (("now", "Tokens asked for"), ("before", "Tokens asked for, kept from before")):
        spent = usage.get(when) or {}
        if spent.get("answers"):
            tokens = f"{count(spent['prompt_tokens'])} in, {count(spent['completion_tokens'])} out"
            rows.append([words, f"{tokens}, {count(spent['answers'])} answers"])
    if usage.get("cost") is not None:
        rows.append(["Cost, in the currency of the prices", number(usage["cost"])])
    return Table(["", ""], rows, text_columns=2)


def texts_table(facts: ReportFacts) -> Table | None:
    """The models text by text; None when there is only one text."""
    names = list(dict.fromkeys(text.name for model in facts.models().values() for text in model.texts))
    if len(names) < 2:
        return None
    rows = [
        [
            name,
            MODEL_NAMES[who],
            number(text.perplexity),
            number(text.bits_per_byte),
            number(text.word_perplexity),
            number(text.nats_per_token),
            MISSING if text.standard_error_nats is None else f"± {number(text.standard_error_nats, 2)}",
            f"{text.tokens:,}",
            f"{text.bytes:,}",
        ]
        for name in names
        for who, model in facts.models().items()
        for text in model.texts
        if text.name == name
    ]
    columns = ["Text", "Model", "Perplexity", "Bits per byte", "Word perplexity", "Nats per token", "Error"]
    return Table([*columns, "Tokens", "Bytes"], rows, text_columns=2)


def stages_table(facts: ReportFacts) -> Table | None:
    """What each model was put through."""
    rows = [
        [
            MODEL_NAMES[who],
            stage.name,
            stage.kind,
            count(stage.tokens),
            count(stage.flops),
            duration(stage.seconds),
            number(stage.final_loss),
        ]
        for who, model in facts.models().items()
        for stage in model.stages
    ]
    columns = ["Model", "Stage", "Kind", "Tokens", "FLOPs", "Time", "Final loss"]
    return Table(columns, rows, text_columns=3) if rows else None


def layers_table(facts: ReportFacts) -> Table | None:
    """Which mixer each layer has, and its held-out error."""
    if not facts.layers:
        return None
    noted = any(layer.note for layer in facts.layers)
    rows = [
        [
            str(layer.index),
            layer.mixer if layer.replaced else f"{layer.mixer} (kept)",
            *([layer.note] if noted else []),
            number(layer.nmse_initial, 3),
            number(layer.nmse_calibrated, 3),
            number(layer.nmse_after_align, 3),
        ]
        for layer in facts.layers
    ]
    words = ["Layer", "Mixer", *(["Note"] if noted else [])]
    notes = [
        "NMSE: squared error of the mixer's output on held-out text, over the mean square of the attention's output. "
        "0 is exact, 1 no better than silence."
    ]
    columns = [*words, "NMSE at the start", "NMSE calibrated", "NMSE after align"]
    return Table(columns, rows, text_columns=len(words), notes=notes)


def time_table(facts: ReportFacts) -> Table | None:
    """Prefill and decode time of teacher and student by context length."""
    if facts.speed is None or not facts.speed.rows:
        return None
    rows = [
        [
            f"{row.context:,}",
            *_pair(row, "prefill_seconds", duration),
            ratio(row.prefill_speedup),
            *_pair(row, "decode_seconds_per_token", duration),
            ratio(row.decode_speedup),
            *_pair(row, "decode_worst_seconds", duration),
        ]
        for row in facts.speed.rows
    ]
    groups = [("", 1), ("Prefill", 3), ("Decode, per token", 3), ("Slowest single token", 2)]
    columns = ["Context", "Teacher", "Student", "Speed-up", "Teacher", "Student", "Speed-up", "Teacher", "Student"]
    notes = ["A speed-up above ×1 means the student is faster.", facts.speed.note, *_skipped(facts.speed.rows)]
    return Table(columns, rows, groups=groups, notes=[note for note in notes if note])


def memory_table(facts: ReportFacts) -> Table | None:
    """Cache and peak memory of teacher and student by context length."""
    if facts.speed is None or not facts.speed.rows:
        return None
    rows = [
        [
            f"{row.context:,}",
            *_pair(row, "cache_bytes", memory),
            ratio(row.cache_ratio),
            *_pair(row, "peak_memory_bytes", memory),
            ratio(row.memory_ratio),
        ]
        for row in facts.speed.rows
    ]
    methods = {
        one.memory_method
        for row in facts.speed.rows
        for one in (row.teacher, row.student)
        if one is not None and one.memory_method
    }
    groups = [("", 1), ("Cache", 3), ("Peak above the start", 3)]
    columns = ["Context", "Teacher", "Student", "Ratio", "Teacher", "Student", "Ratio"]
    return Table(columns, rows, groups=groups, notes=[f"Peak memory: {method}." for method in sorted(methods)])


def _pair(row: SpeedRow, name: str, unit: Callable[[float | None], str]) -> list[str]:
    return [MISSING if one is None else unit(getattr(one, name)) for one in (row.teacher, row.student)]


def _skipped(rows: list[SpeedRow]) -> list[str]:
    return [
        f"{who} at {row.context:,} tokens: not measured, {one.skipped}."
        for row in rows
        for who, one in (("Teacher", row.teacher), ("Student", row.student))
        if one is not None and one.skipped
    ]


def environment_table(facts: ReportFacts) -> Table:
    """Versions, machine and seeds."""
    run = facts.run
    pairs: list[tuple[str, Any]] = [
        ("Seeds", ", ".join(str(seed) for seed in run.seeds)),
        ("Teacher source", run.teacher_source),
        ("Limbeck", run.limbeck_version),
        ("PyTorch", run.torch_version),
        ("Transformers", run.transformers_version),
        *run.machine.items(),
    ]
    return _pairs_table(pairs)


def wall_table(facts: ReportFacts) -> Table | None:
    """Wall time of each part of the run."""
    rows = [[part, duration(seconds)] for part, seconds in facts.run.wall_seconds.items()]
    return Table(["Part", "Wall time"], rows) if rows else None


def protocol_table(facts: ReportFacts) -> Table | None:
    """How quality was measured."""
    pairs = [(name.replace("_", " "), value) for name, value in facts.protocol.items()]
    return _pairs_table(pairs) if pairs else None


def _pairs_table(pairs: list[tuple[str, Any]]) -> Table:
    rows = [[name, str(value)] for name, value in pairs if value is not None and value != ""]
    return Table(["", ""], rows, text_columns=2)
