"""The command that sets the costs of models side by side: efficiency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.console import quiet_stdout, say, show, show_facts

if TYPE_CHECKING:
    from limbeck.evaluate.tables import Table


def efficiency(
    places: Annotated[list[str], typer.Argument(metavar="PLACE...", help="Run folders, model folders or hub ids.")],
    contexts: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            min=1,
            max=10_000_000,
            help="Tokens of the first model to read; may be repeated (128, 512, 2048).",
        ),
    ] = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, max=65_536, help="Texts at once; may be repeated (1, 8).")
    ] = None,
    decode_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens read one by one after them.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="How often each model is timed.")] = 5,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="SOURCE",
            help="Text for quality and times: a file, a folder, SOURCE:SPLIT; may be repeated.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write tables and Pareto plots there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """Size, operations, speed, memory and energy of models by context and batch, and quality against each cost."""
    from limbeck import costing

    with quiet_stdout(when=as_json):
        if out is not None:
            costing.prepare_folder(out)
        facts = costing.measure_places(
            places, contexts=contexts or (128, 512, 2048), batches=batches or (1, 8), decode_tokens=decode_tokens,
            repeats=repeats, texts=texts or [], say=say,
        )  # fmt: skip
        written = [] if out is None else costing.write_costs(out, facts)
    if as_json:
        show_facts(facts, as_json=True)
        return
    for title, table in costing.tables_of(facts).items():
        show_facts({title: _rows(table)}, as_json=False)
        for note in table.notes:
            show(note)
        show()
    for note in facts["notes"]:
        show(note)
    if written:
        show(f"written: {written[1]}")


def _rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]
