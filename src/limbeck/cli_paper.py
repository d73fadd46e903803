"""`limbeck paper`: the tables of a paper, with ours beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.console import quiet_stdout, say, show, show_facts


def _pairs(words: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for word in words or []:
        name, sign, value = word.partition("=")
        if not (name and sign and value):
            raise typer.BadParameter(f'"{word}": expected NAME=VALUE', param_hint=option)
        pairs[name] = value
    return pairs


def paper(
    name: Annotated[str | None, typer.Argument(help="Which paper; without a name, all that are known.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="A finished run whose models fill the rows.")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="ROLE=PLACE", help="A model for one row; may be repeated.")
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="NAME=SOURCE", help="One of the paper's texts; may be repeated."),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of task files; without it, the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items of each task.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=16, help="Most tokens of each text to score.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens a model sees at once.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Requests a model reads at a time.")] = 8,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the tables there, as JSON and Markdown.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """A paper's tables again: the published figure in one column, yours beside it."""
    from limbeck.evaluate.published import PAPERS

    if name is None:
        show_facts({known: f"{about.title} ({about.source})" for known, about in PAPERS.items()}, as_json=as_json)
        return
    from limbeck import paper_tables

    paper_tables.find_paper(name)
    given = paper_tables.places_of_run(run) if run is not None else {}
    with quiet_stdout(when=as_json):
        facts = paper_tables.reproduce(
            name, models=given | _pairs(models, "--model"), texts=_pairs(texts, "--text"), data=task_data, limit=limit,
            max_tokens=max_tokens, context_tokens=context, batch_size=batch_size, say=say,
        )  # fmt: skip
        files = paper_tables.write_tables(facts, out) if out is not None else []
    if as_json:
        show_facts(facts, as_json=True)
        return
    show_facts({"perplexity": _rows(facts["perplexity"]), "tasks": _rows(facts["tasks"])}, as_json=False)
    for note in facts["notes"]:
        show(note)
    for file in files:
        show(f"written: {file}")


def _rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": row["role"], "column": row["column"],
            "published": "not confirmed" if row["published"] is None else f"{row['published']:g}",
            "ours": f"not run here: needs {row['needs']}" if row["ours"] is None else _plus_minus(row),
        }
        for row in rows
    ]  # fmt: skip


def _plus_minus(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['ours']:.4g}" if error is None else f"{row['ours']:.4g} ± {error:.2g}"
