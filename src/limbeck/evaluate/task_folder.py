"""A folder of task descriptions that lm-eval reads, with the items beside them.

A description is lm-eval's own one (`include:`) with the data replaced by a file, so prompts, metrics and versions stay
lm-eval's, and `lm_eval --include_path FOLDER` runs the very same thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from limbeck.core.errors import EnvironmentFault, EvaluationError
from limbeck.core.files import sha256_file, write_atomic
from limbeck.evaluate.probes import probe_description, probe_items
from limbeck.evaluate.suite import SuiteTask
from limbeck.evaluate.task_data import TaskItems, file_names, items_of_rows, read_items, rows_sha256, to_json_lines
from limbeck.evaluate.task_files import search_folder


@dataclass(frozen=True)
class ReadyTask:
    """A task that can be run. folder: where its description is. sha256: of all that describes it, the items included."""

    task: SuiteTask
    folder: Path
    items: TaskItems
    sha256: str

    def write(self) -> None:
        """Write its description and items again where another process has put others of the same name in their place."""
        write_description(self.task, self.items, self.folder)

    def check(self, loaded: Any) -> None:
        """See that what lm-eval has loaded are these items. Raises: OtherItems."""
        rows = loaded.dataset["test"]
        if rows_sha256([dict(row) for row in rows]) != self.items.sha256:
            raise OtherItems(
                f"the items in {self.folder} are not those of {self.items.source}: another evaluation writes there at the same "
                "time, with other data. Give one of the two a folder of its own: --keep-tasks DIR."
            )


class OtherItems(EvaluationError):
    """The folder of descriptions holds other items than were put there."""


def prepare_tasks(
    tasks: Iterable[SuiteTask], *, data: Path | None, folder: Path
) -> tuple[dict[str, ReadyTask], dict[str, str]]:
    """Write FOLDER/<task>.yaml and <task>.jsonl for every task whose items can be had; say of the others why not.

    data: a folder to search for the tasks' files; what is not there is asked of the hub, through lm-eval's own description.

    Raises: EvaluationError when `data` is no folder; EnvironmentFault when lm-eval is missing.
    """
    stock_folder()
    searched = None if data is None else search_folder(data)
    ready: dict[str, ReadyTask] = {}
    missing: dict[str, str] = {}
    unreachable: dict[str, str] = {}
    for task in tasks:
        try:
            items = probe_items(task.name) if task.stock is None else read_items(task.name, searched)
            if items is None:
                if task.group in unreachable:
                    raise _NotThere(unreachable[task.group])
                items = hub_items(task)
            ready[task.name] = ReadyTask(task, folder, items, write_description(task, items, folder))
        except EvaluationError as error:
            missing[task.name] = str(error)
            if isinstance(error, _NotThere):
                unreachable[task.group] = str(error)
    for group in dict.fromkeys(of.task.group for of in ready.values() if of.task.group != of.task.name):
        write_group(group, [name for name, of in ready.items() if of.task.group == group], folder)
    return ready, missing


class _NotThere(EvaluationError):
    """Data that are neither in a file nor on the hub."""


def stock_folder() -> Path:
    """Where lm-eval keeps its own task descriptions. Raises: EnvironmentFault when it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise EnvironmentFault(
            'the tasks are run by lm-evaluation-harness, which is not installed. Install it: pip install "limbeck[eval]"'
        )
    return Path(found.origin).parent / "tasks"


def hub_items(task: SuiteTask) -> TaskItems:
    """A task's items as lm-eval gets them, from the hub or from what was fetched before.

    Raises: EvaluationError when they cannot be had.
    """
    source = f"the hub, as lm-eval's {task.stock} says"
    with tempfile.TemporaryDirectory() as place:
        _write_once(Path(place) / f"{task.name}.yaml", _yaml({"include": str(_stock(task)), "task": task.name}))
        try:
            rows = _load_rows(task.name, Path(place))
        except Exception as error:
            first = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise _NotThere(
                f"no file of it is in --task-data ({file_names(task.name)}), and the hub does not give it ({first}). "
                "docs/tasks.md names the files and their columns."
            ) from error
    return items_of_rows(task.name, rows, source=source)


def _load_rows(name: str, folder: Path) -> list[dict[str, Any]]:
    from lm_eval.tasks import TaskManager

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(_quiet("lm_eval", "datasets", "huggingface_hub"))
        manager: Any = TaskManager(include_path=str(folder), include_defaults=False)
        loaded = getattr(manager, "load", None) or manager.load_task_or_group
        found = loaded([name])
        task = found.get("tasks", found)[name]
        documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
        return [dict(row) for row in documents]


@contextlib.contextmanager
def _quiet(*names: str) -> Any:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_description(task: SuiteTask, items: TaskItems, folder: Path) -> str:
    """Write FOLDER/<task>.yaml and <task>.jsonl.

    Files that have the right content already are left alone (a new date would make `datasets` read them again).
    Returns the SHA-256 of all that describes the task: lm-eval's own description and code beside it, ours, the items.
    Raises: EvaluationError when this lm-eval does not have the task.
    """
    words = probe_description(task.name) if task.stock is None else {"include": str(_stock(task)), "task": task.name}
    stable = {key: value for key, value in words.items() if key != "include"}
    data = (folder / f"{task.name}.jsonl").resolve()
    _write_once(data, to_json_lines(items.rows))
    words |= {
        "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(data)}},
        "training_split": None, "validation_split": None, "test_split": "test",
    }  # fmt: skip
    _write_once(folder / f"{task.name}.yaml", _yaml(words))
    parts = [*_stock_sums(task), json.dumps(stable, sort_keys=True), items.sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_group(group: str, names: Iterable[str], folder: Path) -> None:
    """Write FOLDER/<group>.yaml: the macro average of those tasks, as lm-eval describes groups."""
    words: dict[str, Any] = {
        "group": group,
        "task": list(names),
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
        "metadata": {"version": 2.0},
    }
    _write_once(folder / f"{group}.yaml", _yaml(words))


def _stock(task: SuiteTask) -> Path:
    path = stock_folder() / str(task.stock)
    if not path.is_file():
        raise EvaluationError(
            f"{task.name}: lm-eval {importlib.metadata.version('lm_eval')} has no {task.stock}. Install another version: "
            'pip install "limbeck[eval]"'
        )
    return path


def _stock_sums(task: SuiteTask) -> list[str]:
    """Sums of lm-eval's description and of the templates and code that may belong to it."""
    if task.stock is None:
        return []
    path = _stock(task)
    beside = [other for other in path.parent.iterdir() if other.suffix == ".py" or other.stem.startswith("_template")]
    return [sha256_file(part) for part in (path, *sorted(beside))]


def _yaml(words: Mapping[str, Any]) -> str:
    stream = StringIO()
    writer = YAML(typ="safe")
    writer.default_flow_style = False
    writer.dump(dict(words), stream)
    return stream.getvalue()


def _write_once(path: Path, content: str) -> None:
    if not path.is_file() or path.read_bytes() != content.encode():
        write_atomic(path, content)
