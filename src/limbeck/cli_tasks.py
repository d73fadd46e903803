"""The options of `eval` and `compare` that are about tasks, and what is shown of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.console import quiet_stdout, show_facts

Suite = Annotated[
    str | None, typer.Option(metavar="NAME", help="Run a suite of tasks instead of scoring text: tiny (docs/tasks.md).")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", help="Only this task or group of the suite; may be repeated."),
]
TaskData = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the tasks' files (default: the hub).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many items of each task.")]
BatchSize = Annotated[int, typer.Option(min=1, max=65_536, help="Requests the model reads at once, for a suite.")]
TaskCache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Where answers to tasks are kept (default: the run folder)."),
]
KeepTasks = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write the tasks' descriptions there, for lm-eval --include_path.")
]


def wants_suite(suite: str | None, *, scoring: dict[str, Any], asking: dict[str, Any]) -> bool:
    """Whether a suite is meant. Raises: typer.BadParameter when options of text and of tasks are mixed."""
    given = [option for option, value in scoring.items() if value]
    if suite and given:
        raise typer.BadParameter(f"{given[0]} is about text, --suite about tasks. Give one of them.")
    if not suite and any(value is not None and value != [] for value in asking.values()):
        raise typer.BadParameter("these are options of a suite of tasks: give --suite tiny as well.")
    return bool(suite)


def show_suite(places: list[str], suite: str | None, *, batch_size: int, as_json: bool, **asking: Any) -> None:
    """Run a suite and print its tables, or all facts as JSON. Raises: EvaluationError at the end when something failed."""
    from limbeck import examining
    from limbeck.core.errors import EvaluationError
    from limbeck.evaluate.task_tables import as_shown

    stream = sys.stderr  # the harness is kept silent, the progress is not

    def tell(line: str) -> None:
        if not as_json:
            print(line, file=stream, flush=True)

    with quiet_stdout(when=as_json):
        facts = examining.examine(
            places, suite=suite or "", batch_size=batch_size, say=tell, **asking | {"tasks": asking["tasks"] or []}
        )
    show_facts(facts if as_json else as_shown(facts), as_json=as_json)
    if facts["failed"]:
        raise EvaluationError("\n".join(facts["failed"]))
