"""What models cost as tables: once for the screen and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.evaluate.report import markdown_table
from limbeck.evaluate.tables import Table
from limbeck.evaluate.trade_offs import TradeOff
from limbeck.evaluate.wording import MISSING, count, memory, number

Rows = Sequence[Mapping[str, Any]]


def models_table(models: Rows) -> Table:
    """Each model: what it holds, what it weighs, how well it predicts."""
    columns = ["Model", "Parameters", "Shipped", "float32", "float16", "int8", "Bytes a token", "Bits per byte"]
    has_tasks = any(model.get("accuracy") is not None for model in models)
    rows = [
        [
            model["place"], count(model["parameters"]), memory(model["folder_bytes"]),
            *(memory(model["shipped_bytes"][kind]) for kind in ("float32", "float16", "int8")),
            number(model["bytes_per_token"], 3), _plus_minus(model["bits_per_byte"], model["standard_error"]),
            *([number(model["accuracy"], 3)] if has_tasks else []),
        ]
        for model in models
    ]  # fmt: skip
    notes = [
        "Parameters: shared ones once. Shipped: the folder as it is on the disk, tokenizer included; float32, float16, int8: "
        "the weights alone if they were saved so."
    ]
    return Table([*columns, *(["Accuracy"] if has_tasks else [])], rows, notes=notes)


def speed_table(rows: Rows) -> Table:
    """By context and batch: operations, tokens a second with the spread, memory."""
    columns = ["Model", "Context", "Batch", "FLOPs a token", "Prefill tokens/s", "Decode tokens/s"]
    columns += ["Prefill peak", "Decode peak", "Cache"]
    cells = [
        [
            row["place"], f"{row['context']:,}", str(row["batch"]), count(row["forward_flops_per_token"]),
            _spread(row, "prefill", "tokens"), _spread(row, "decode", "tokens"), memory(row["prefill_peak_memory_bytes"]),
            memory(row["decode_peak_memory_bytes"]), memory(row["cache_bytes"]),
        ]
        for row in rows
    ]  # fmt: skip
    skipped = [
        f"{row['place']} at context {row['context']:,}, batch {row['batch']}: skipped, {row['skipped']}."
        for row in rows
        if row["skipped"]
    ]
    methods = sorted({row["memory_method"] for row in rows if row["memory_method"]})
    notes = [f"Peak: beside the weights; {method}." for method in methods]
    return Table(columns, cells, notes=["Medians, in brackets the slowest and the fastest repeat.", *notes, *skipped])


def bytes_table(rows: Rows) -> Table:
    """The same by the byte of text, so that models with other tokens compare."""
    columns = ["Model", "Context", "Batch", "Tokens", "FLOPs a byte", "Prefill bytes/s", "Decode bytes/s"]
    cells = [
        [
            row["place"], f"{row['context']:,}", str(row["batch"]), f"{row['tokens']:,}", count(row["forward_flops_per_byte"]),
            _spread(row, "prefill", "bytes"), _spread(row, "decode", "bytes"),
        ]
        for row in rows
    ]  # fmt: skip
    notes = ["Context: tokens of the first model. Tokens: what the same text takes in the model's own."]
    return Table(columns, cells, notes=notes)


def energy_table(rows: Rows) -> Table | None:
    """Joules as the machine reports them; None where it reports nothing."""
    keys = [f"{phase}_joules_per_{unit}" for phase in ("prefill", "decode") for unit in ("token", "byte")]
    if not any(row[key] is not None for row in rows for key in keys):
        return None
    columns = ["Model", "Context", "Batch", "Prefill J/token", "Prefill J/byte", "Decode J/token", "Decode J/byte"]
    cells = [
        [row["place"], f"{row['context']:,}", str(row["batch"]), *(number(row[key], 3) for key in keys)] for row in rows
    ]
    return Table(columns, cells, notes=sorted({f"Energy: {row['energy']}." for row in rows if row["energy"]}))


def fronts_table(found: Sequence[TradeOff]) -> Table | None:
    """Who is on each front; None when fewer than two models have both figures."""
    columns = ["Quality", "Against", "Context", "Batch", "On the front"]
    rows = [
        [
            one.quality.words, one.cost.words, MISSING if one.context is None else f"{one.context:,}",
            MISSING if one.batch is None else str(one.batch), ", ".join(one.front),
        ]
        for one in found
    ]  # fmt: skip
    notes = [
        "On the front: no other model is as good in both and better in one, by the medians alone. Where brackets or errors "
        "overlap, the order may be chance."
    ]
    return Table(columns, rows, text_columns=2, notes=notes) if rows else None


def all_tables(facts: Mapping[str, Any], found: Sequence[TradeOff]) -> dict[str, Table]:
    """The tables of a measurement, by their titles."""
    tables: dict[str, Table | None] = {
        "Models": models_table(facts["models"]),
        "Cost by context and batch": speed_table(facts["rows"]),
        "By the byte": bytes_table(facts["rows"]) if facts["protocol"]["by_byte"] else None,
        "Energy": energy_table(facts["rows"]),
        "Pareto fronts": fronts_table(found),
    }
    return {title: table for title, table in tables.items() if table is not None}


def markdown(facts: Mapping[str, Any], found: Sequence[TradeOff], drawings: Mapping[str, str]) -> str:
    """efficiency.md. drawings: what each SVG file beside it shows, by its name."""
    parts = ["# Efficiency", facts["date"], "\n".join(f"- {note}" for note in facts["notes"])]
    for title, table in all_tables(facts, found).items():
        parts += [f"## {title}", str(markdown_table(table)).strip()]
    parts += [f"![{words}]({name})" for name, words in drawings.items()]
    parts += [
        "## Machine",
        "\n".join(f"- {name}: {value}" for name, value in facts["machine"].items() if value is not None),
    ]
    return "\n\n".join(parts) + "\n"


def _spread(row: Mapping[str, Any], phase: str, unit: str) -> str:
    value, ends = row[f"{phase}_{unit}_per_second"], row[f"{phase}_{unit}_per_second_range"]
    if value is None:
        return "skipped" if row["skipped"] else MISSING
    return number(value, 3) if ends is None else f"{number(value, 3)} ({number(ends[0], 3)} to {number(ends[1], 3)})"


def _plus_minus(value: float | None, error: float | None) -> str:
    return MISSING if value is None else number(value) if error is None else f"{number(value)} ± {number(error, 2)}"
