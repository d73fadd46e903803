"""What the command line shows, and how it ends: facts as tables or JSON, faults as one message and an exit code.

0 done; 1 a fault of Limbeck's own; 2 something the user can mend; 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from limbeck.core.errors import LimbeckError

if TYPE_CHECKING:
    from rich.console import Console

STOPPED = {130: "Ctrl-C", 143: "SIGTERM"}
_COLUMN_GAP = 3


class Commands(TyperGroup):
    """The group of all commands; here every fault becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if type(error).__module__.startswith(("click", "typer")) or _is_closed_pipe(error):
                raise
            raise typer.Exit(settle(error, debug=ctx.params.get("debug", False))) from error


def settle(error: BaseException, *, debug: bool = False) -> int:
    """Say what ended a command, and return the exit code. debug: with where it happened.

    Of several processes under torchrun rank 0 says it; another says what it met alone.
    """
    rank, is_one_of_many = _rank()
    if isinstance(error, KeyboardInterrupt):
        error = SystemExit(130)
    if isinstance(error, SystemExit):
        if error.code not in STOPPED:
            raise error
        if rank == 0:
            say(_stopped(int(error.code)))
        return int(error.code)
    code, message = explain_fault(error)
    if is_one_of_many and _is_lost_process(error):
        message = (
            f"{_summary(error)}\nAnother process of this run ended, or the connection to it did: the reason is what that one says. "
            f"The same command continues.\n{_read_on('fault')}"
        )
    if is_one_of_many:
        from limbeck.core.shared_fault import is_said_by_rank_0

        if is_said_by_rank_0(message, rank=rank):
            return code
    if debug:
        traceback.print_exception(error)
    say(message if rank == 0 else f"rank {rank}: {message}")
    return code


def _rank() -> tuple[int, bool]:
    """This process's number among those that torchrun started, and whether there are others; without loading torch."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) > 1
    except ValueError:
        return 0, False


def _stopped(code: int) -> str:
    return f"stopped by {STOPPED[code]}; the same command continues"


def _is_closed_pipe(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _is_lost_process(error: BaseException) -> bool:
    """Whether torch says that another process is gone: of the reason it knows nothing."""
    is_of_torch = isinstance(error, RuntimeError)
    lost = re.search("connection (closed|reset) by peer|remote process exited", str(error), flags=re.IGNORECASE)
    return is_of_torch and lost is not None


def explain_fault(error: BaseException) -> tuple[int, str]:
    """The exit code and the message for a fault."""
    if isinstance(error, LimbeckError):
        return 2, f"{error}\n{_read_on(error.code)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from limbeck.doctor import free_disk_bytes

        free = free_disk_bytes(Path(error.filename or ".").parent)
        where = f" at {error.filename}" if error.filename else ""
        message = f"the disk is full{where}: {free / 1e6:.1f} MB free. Make room and give the same command again."
        return 2, f"{message}\n{_read_on('environment')}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        message = (
            "out of memory. Set stages.<name>.micro_batch_sequences lower (the result stays the same) and try again."
        )
        return 2, f"{message}\n{_read_on('environment')}"
    told = "This is a fault in Limbeck, not in your recipe. `limbeck --debug ...` shows where."
    return 1, f"{_summary(error)}\n{told}\n{_read_on('fault')}"


def _summary(error: BaseException) -> str:
    detail = str(error).strip().splitlines()
    return f"{type(error).__name__}: {detail[0][:300]}" if detail else type(error).__name__


def _read_on(code: str) -> str:
    return f"({code}: limbeck explain {code})"


def say(text: str) -> None:
    """A line for the person, on stderr."""
    _console(stderr=True).print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def say_beginning(text: str) -> None:
    """`say` before the first heavy import, by one process of a run only."""
    if _rank()[0] == 0:
        say(text)


def show(text: str = "", *, at_words: bool = False) -> None:
    """A line of result, on stdout. `at_words`: a terminal breaks it between words; elsewhere it stays one line."""
    console = _console()
    whole = not (at_words and console.is_terminal)
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=whole)


def print_markdown(text: str) -> None:
    """A page of Markdown as a terminal can show it, on stdout."""
    from rich.markdown import Markdown

    _console().print(Markdown(text))


def show_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print facts: pure JSON, or a table for each section."""
    if as_json:
        text = json.dumps(finite(facts), indent=2, ensure_ascii=False)
        # A byte that is no UTF-8 (of a prompt, say) is a lone surrogate in Python, and escaped in JSON.
        print(text.encode(errors="backslashreplace").decode())
        return
    plain = {key: value for key, value in facts.items() if not isinstance(value, dict | list)}
    if plain:
        _show_rows(None, plain)
    for title, value in facts.items():
        if isinstance(value, dict):
            _show_rows(title, value)
        elif isinstance(value, list) and value:
            _show_list(title, value)


def _show_rows(title: str | None, rows: Mapping[str, Any]) -> None:
    table = _table(title, show_header=False)
    table.add_column(style="dim", min_width=22)
    table.add_column(overflow="fold")
    for key, value in _flat(rows, ""):
        table.add_row(_label(key), words(value, unit=key))
    _console().print(table)


def _show_list(title: str, values: list[Any]) -> None:
    if not all(isinstance(value, dict) for value in values):
        for value in values:
            show(f"{title.rstrip('s')}: {value}")
        return
    columns = list(dict.fromkeys(key for value in values for key in value))
    rows = [[words(value.get(column), unit=column) for column in columns] for value in values]
    is_text = [all(isinstance(value.get(column), str) for value in values) for column in columns]
    narrowest = [
        max(
            map(
                len, [*(part for cell in cells for part in (cell.split() if text else [cell])), *_label(column).split()]
            )
        )
        for column, cells, text in zip(columns, zip(*rows, strict=True), is_text, strict=True)
    ]
    if any(is_text) and sum(narrowest) + _COLUMN_GAP * len(columns) > _console().width:
        _show_one_by_one(title, columns, rows)
        return
    table = _table(title)
    for column, text, least in zip(columns, is_text, narrowest, strict=True):
        table.add_column(_label(column), min_width=least, **({"overflow": "fold"} if text else {"justify": "right"}))
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _show_one_by_one(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table whose words do not fit beside each other: each row by itself, a line for each column."""
    show(_label(title))
    for row in rows:
        _show_rows(None, dict(zip(columns, row, strict=True)))
        show()


def _table(title: str | None, *, show_header: bool = True) -> Any:
    from rich import box
    from rich.table import Table

    style = box.SIMPLE_HEAD if show_header else None
    return Table(
        title=title and _label(title), title_justify="left", box=style, show_header=show_header, pad_edge=False
    )


def _label(name: str) -> str:
    """A key as people read it; the unit stands with the value."""
    return re.sub(r"(?<!parameter)(?<!token) (bytes|seconds)$", "", name.replace("_", " "))


def _flat(rows: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in rows.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def words(value: Any, *, unit: str = "") -> str:
    """A value as people read it; `unit` is the name it goes by, whose ending tells bytes, seconds and operations."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(words(item) for item in value) or "-"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if "/" in unit:  # the name of a place is no unit
        unit = ""
    if unit.endswith("bytes"):
        return _size(value)
    if unit.endswith("seconds"):
        return _duration(value)
    if "flops" in unit:
        return f"{value:.2e}"
    if unit.endswith("tokens") and value >= 1e6:
        return f"{value / 1e6:,.1f} M"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _size(count: float) -> str:
    for unit, scale in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:,.0f} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def finite(value: Any) -> Any:
    """The same value with null for numbers that JSON has no word for, and text for what is no JSON type."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [finite(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextlib.contextmanager
def quiet_stdout(*, when: bool) -> Iterator[None]:
    """Send what libraries print to stderr, so that stdout holds nothing but the JSON printed afterwards."""
    with contextlib.redirect_stdout(sys.stderr) if when else contextlib.nullcontext():
        yield


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)
