"""The commands that judge a model beyond one score: robustness."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from limbeck.console import quiet_stdout, show_facts


def robustness(
    places: Annotated[list[str], typer.Argument(metavar="PLACE...", help="Run folders, model folders or hub ids.")],
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="SOURCE", help="Text to spoil: a file, a folder, SOURCE:SPLIT; may be repeated."
        ),
    ] = None,
    perturbations: Annotated[
        list[str] | None, typer.Option("--perturbation", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    levels: Annotated[
        list[int] | None, typer.Option("--level", min=1, max=3, help="Only this level, 1 to 3; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How often each perturbation is drawn.")] = 3,
    max_bytes: Annotated[int, typer.Option(min=16, help="Bytes of clean text to use.")] = 32_768,
    context_bytes: Annotated[
        int | None,
        typer.Option(min=2, help="Clean text a model sees at once (default: as its run was judged, or 2048)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """What noise, typos, casing and other scripts cost: bits per byte beside the clean text, the same bytes for all."""
    from limbeck import evaluation

    with quiet_stdout(when=as_json):
        facts = evaluation.compare_robustness(
            places, texts=texts or [], perturbations=perturbations or [], levels=levels or [], seeds=range(seeds),
            max_bytes=max_bytes, context_bytes=context_bytes,
        )  # fmt: skip
    show_facts(facts if as_json else _table(facts), as_json=as_json)


def _table(facts: dict[str, Any]) -> dict[str, Any]:
    """Rows as people read them: bits per byte, the spread over seeds, and how many times the clean text's."""
    clean = {"perturbation": "clean", "level": None, "rate": 0.0} | {
        name: _plus_minus(of["bits_per_byte"], of["standard_error"]) for name, of in facts["clean"].items()
    }
    rows = [
        {key: row[key] for key in ("perturbation", "level", "rate")}
        | {name: _cell(of) for name, of in row["models"].items()}
        for row in facts["rows"]
    ]
    reasons = {
        f"{name}: no figure for {row['perturbation']}: {of['unreadable']}"
        for row in facts["rows"]
        for name, of in row["models"].items()
        if "unreadable" in of
    }
    meaning = "± is the standard error over the text in the clean row, the spread over seeds in the others"
    text = {key: facts["protocol"][key] for key in ("documents", "documents_left_out", "bytes")}
    return {
        "text": text, "bits_per_byte": [clean, *rows], "mean_ratio_to_clean": facts["mean_ratio"],
        "notes": [meaning, *sorted(reasons)],
    }  # fmt: skip


def _cell(of: dict[str, Any]) -> str:
    if "unreadable" in of:
        return "-"
    return f"{_plus_minus(of['bits_per_byte'], of['seed_spread'])} (x{of['ratio']:.2f})"


def _plus_minus(value: float, spread: float | None) -> str:
    return f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"
