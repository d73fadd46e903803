"""The command that hands a model on: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.console import quiet_stdout, say, show, show_facts


def push(
    place: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder of a finished run, or of a saved model.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its name on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create it so that only you (or your team) see it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder that would be published, and touch no network.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where that folder is written (default: beside the run)."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence",
            "--license",
            metavar="SPDX",
            help="The model's licence, such as apache-2.0 (default: its teacher's).",
        ),
    ] = None,
    accept_licence: Annotated[
        bool,
        typer.Option(
            "--accept-licence",
            "--accept-license",
            help="I have read the licences that stand in the way, and may publish.",
        ),
    ] = False,
    message: Annotated[
        str | None,
        typer.Option("--message", metavar="TEXT", help="Message of the commit; needed to write over another model."),
    ] = None,
    grid_intensity: Annotated[
        float | None,
        typer.Option(
            "--grid-intensity",
            min=0,
            metavar="G",
            help="Grams of CO2 equivalent a kWh, for a run whose energy was measured.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """Publish a student on the hub, with a card that says what it is, what it is worth and what it may be used for."""
    from limbeck import publishing

    with quiet_stdout(when=as_json):
        facts = publishing.push(
            place, repo_id, private=private, dry_run=dry_run, out=out, licence=licence, accept_licence=accept_licence, message=message,
            grid_intensity=grid_intensity, say=say,
        )  # fmt: skip
    if as_json:
        show_facts(facts, as_json=True)
        return
    show_facts(_brief(facts), as_json=False)
    show(
        f"published: {facts['url']}"
        if facts["published"]
        else f"written, not published: {Path(facts['folder']) / 'README.md'}"
    )


def _brief(facts: dict[str, Any]) -> dict[str, Any]:
    """What people look at first; warnings were said already."""
    keys = ("repo_id", "licence", "parents", "files", "left_out", "total_bytes")
    return {key: facts[key] for key in keys if facts[key] or key == "licence"}
