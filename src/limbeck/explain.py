"""`limbeck explain`: what an error code means and the ways out, from pages that come with the package."""

from __future__ import annotations

import sys
from importlib import resources
from typing import Annotated

import typer

from limbeck.console import print_markdown, show_facts
from limbeck.core.errors import unknown_name

EXIT_CODES = {"1": "fault", "130": "stopped", "143": "stopped"}


def explain(
    code: Annotated[
        str | None,
        typer.Argument(help="The word in brackets at the end of a message, or an exit code; none lists all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """Say what an error code means and what to do; works offline."""
    if code is None:
        summaries = {name: summary(name) for name in page_names()}
        if as_json:
            show_facts({"codes": [{"code": name, "summary": text} for name, text in summaries.items()]}, as_json=True)
        else:
            show_facts(summaries, as_json=False)
        return
    name = EXIT_CODES.get(code, code)
    if name not in page_names():
        raise typer.BadParameter(unknown_name("code", code, page_names()), param_hint="CODE")
    if as_json:
        show_facts({"code": name, "summary": summary(name), "page": page(name)}, as_json=True)
    elif _is_terminal():
        print_markdown(page(name))
    else:
        print(page(name), end="")


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def page_names() -> list[str]:
    """The codes that have a page."""
    folder = resources.files("limbeck") / "explanations"
    return sorted(file.name.removesuffix(".md") for file in folder.iterdir() if file.name.endswith(".md"))


def page(name: str) -> str:
    """The page of a code, in Markdown."""
    return (resources.files("limbeck") / "explanations" / f"{name}.md").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The first paragraph of a code's page in one line: what the code means."""
    return " ".join(page(name).split("\n\n")[1].split())
