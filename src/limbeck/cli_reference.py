"""docs/cli.md, made from the commands themselves: `python -m limbeck.cli_reference > docs/cli.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from limbeck.cli import app

_INTRODUCTION = """# Command reference

Every command with its words and options. Made from the program (`limbeck COMMAND --help`); do not edit by hand.
Results go to stdout, messages to stderr. A message that refuses something ends with a code: `limbeck explain CODE` says more. Exit codes:
0 done, 1 a fault of Limbeck's own, 2 something that can be mended, 130 and 143 stopped by Ctrl-C and SIGTERM.

| option of all commands | meaning |
| --- | --- |
"""


def render() -> str:
    """The whole page."""
    group = get_command(app)
    common = "".join(_row(parameter) for parameter in group.params)
    return _INTRODUCTION + common + "".join(_sections(group, "limbeck"))


def _sections(group: Any, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _sections(command, f"{path} {name}")
        elif not command.hidden:
            yield _section(command, f"{path} {name}")


def _section(command: Any, path: str) -> str:
    words = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join([path, *(_metavar(word) for word in words), *(["[OPTIONS]"] if options else [])])
    rows = "".join(_row(parameter) for parameter in (*words, *options))
    table = f"\n| word or option | meaning |\n| --- | --- |\n{rows}" if rows else ""
    return f"\n## {path}\n\n```text\n{usage}\n```\n\n{_plain(command.help or '')}\n{table}"


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = _metavar(parameter)
    else:
        kind = "" if parameter.is_flag else f" {_metavar(parameter)}"
        name = ", ".join((*parameter.opts, *parameter.secondary_opts)) + kind
    default = parameter.default
    shown = default is not None and not parameter.is_flag and not callable(default) and not parameter.required
    told = f" Default: `{default}`." if shown and default != () else ""
    many = (
        " May be repeated."
        if getattr(parameter, "multiple", False) and "repeated" not in (parameter.help or "")
        else ""
    )
    return f"| `{name}` | {_plain(parameter.help or '')}{many}{told} |\n".replace("|  |", "| |")


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.param_type_name == "argument":
        name = str(parameter.name).upper()
        return name if parameter.required else f"[{name}]"
    return "VALUE"


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
