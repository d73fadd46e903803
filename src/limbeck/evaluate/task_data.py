"""The items of evaluation tasks from files on this machine, checked row by row before anything uses them.

A folder is searched for known file names; every row must have the columns of the task, of the right types and of sane
sizes. What comes out are rows in the form that lm-eval's own task descriptions read.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.errors import EvaluationError
from limbeck.evaluate.task_files import DataFolder, Known, expected_names, find_files, read_rows, read_text

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskItems:
    """The items of one task.

    rows: as the task's description reads them. texts: for each item the pieces of running text it consists of, with the
    right answer, which is what a training text might have contained. choices: how many answers each item offers: 0 where
    the model has to find it alone, -1 where nothing is asked. source: where they are from, in words. sha256: of the rows.
    """

    rows: tuple[Row, ...]
    texts: tuple[tuple[str, ...], ...]
    choices: tuple[int, ...]
    source: str
    sha256: str

    def chance(self, limit: int | None = None) -> float | None:
        """Expected accuracy of blind guessing on the first items; None where nothing can be guessed."""
        choices = self.choices[:limit]
        return None if min(choices) < 0 else statistics.fmean(1 / count if count else 0.0 for count in choices)

    def likelihoods(self, limit: int | None = None) -> tuple[int, ...]:
        """How many likelihoods each of the first items asks for."""
        return tuple(max(1, count) for count in self.choices[:limit])


@dataclass(frozen=True)
class _Form:
    """How a task's rows look. files: how they may be called. check: a raw row to a clean one. choices: as in
    `TaskItems`. texts: its running text."""

    files: Known
    check: Callable[[Mapping[str, Any]], Row]
    choices: Callable[[Row], int]
    texts: Callable[[Row], tuple[str, ...]]


class _BadRow(ValueError):
    """What is wrong with one row."""


def read_items(task: str, folder: DataFolder | None) -> TaskItems | None:
    """The items of a task from a file of the folder; None when none has a known name.

    task: the name of the task in lm-eval. folder: what `search_folder` found.
    Raises: EvaluationError when a file is too large, cannot be read, or has a row without the task's columns; the message
    names file and row. Also when several files could be meant.
    """
    form = _form(task)
    known = {name: of.files for name, of in _FORMS.items()} | {task: form.files}
    paths = () if folder is None else find_files(task, known, folder)
    if folder is None or not paths:
        return None
    return _items(_checked(paths, form), form, source=f"file {folder.name(paths[0])}")


def file_names(task: str) -> str:
    """In words the files that `read_items` searches for."""
    form = _form(task)
    return "a file that bears the paradigm's name" if form.check is _blimp else expected_names(form.files)


def items_of_rows(task: str, raw: Iterable[Any], *, source: str) -> TaskItems:
    """The same of rows that are in memory already. Raises: EvaluationError."""
    form = _form(task)
    rows = [_check(form, row, where=f"{source}, row {number}") for number, row in enumerate(raw, start=1)]
    if not rows:
        raise EvaluationError(f"{source} has no items.")
    return _items(rows, form, source=source)


def _items(rows: Sequence[Row], form: _Form, *, source: str) -> TaskItems:
    return TaskItems(
        rows=tuple(rows),
        texts=tuple(form.texts(row) for row in rows),
        choices=tuple(form.choices(row) for row in rows),
        source=source,
        sha256=rows_sha256(rows),
    )


def rows_sha256(rows: Sequence[Row]) -> str:
    """SHA-256 of rows as they are written to a file."""
    return hashlib.sha256(to_json_lines(rows).encode()).hexdigest()


def to_json_lines(rows: Sequence[Row]) -> str:
    """Rows as a .jsonl file holds them."""
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def _form(task: str) -> _Form:
    if task in _FORMS:
        return _FORMS[task]
    name = task.removeprefix("blimp_")
    return _Form(Known((name, f"blimp_{name}"), "train", whole=True), _blimp, lambda _row: 2, _blimp_texts)


def _checked(paths: Sequence[Path], form: _Form) -> list[Row]:
    if paths[0].name in form.files.texts:
        return [{"page": page} for page in split_articles(read_text(paths[0]))]
    return [_check(form, row, where=where) for where, row in read_rows(paths)]


def _check(form: _Form, row: Any, *, where: str) -> Row:
    try:
        if not isinstance(row, Mapping):
            raise _BadRow(f"{type(row).__name__}, not an object")
        return form.check(row)
    except _BadRow as error:
        raise EvaluationError(f"{where}: {error}. docs/tasks.md lists the columns of each task.") from error


def split_articles(text: str) -> list[str]:
    """Running WikiText as articles: a new one begins at each heading of level 1 (` = Title = `)."""
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.strip()
        is_title = heading.startswith("= ") and heading.endswith(" =") and not heading.startswith("= = ")
        if is_title and len(heading) > 3:
            articles.append([])
        articles[-1].append(line)
    joined = ("\n".join(lines) for lines in articles)
    if not (pages := [page for page in joined if page.strip()]):
        raise EvaluationError("wikitext: the text is empty. Give the raw text of its test split.")
    return pages


def _text(row: Mapping[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    if column not in row:
        raise _BadRow(f'no column "{column}" (found: {", ".join(map(str, list(row)[:12]))})')
    value = row[column]
    if not isinstance(value, str):
        raise _BadRow(f'column "{column}" holds {type(value).__name__}, expected text')
    if not value.strip() and not may_be_empty:
        raise _BadRow(f'column "{column}" is empty')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f'column "{column}" holds half a character (a lone surrogate)')
    return value


def _whole(row: Mapping[str, Any], column: str, most: int, *, least: int = 0) -> int:
    value = row.get(column)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 4:
        value = int(value)
    if not isinstance(value, int) or not least <= value <= most:
        raise _BadRow(f'column "{column}" holds {str(value)[:40]!r}, expected a number from {least} to {most}')
    return int(value)


def _texts(value: Any, column: str, *, least: int, most: int) -> list[str]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise _BadRow(f'column "{column}" is to be a list of {least} to {most} texts')
    return [_text({column: one}, column) for one in value]


def _arc(row: Mapping[str, Any]) -> Row:
    choices = row.get("choices")
    if not isinstance(choices, Mapping):
        raise _BadRow('column "choices" is to be an object with the lists "text" and "label"')
    texts = _texts(choices.get("text"), "choices.text", least=2, most=10)
    labels = _texts(choices.get("label"), "choices.label", least=len(texts), most=len(texts))
    key = _text(row, "answerKey")
    if labels.count(key) != 1:
        raise _BadRow(f'column "answerKey" holds {key[:20]!r}, expected one of {", ".join(labels)[:60]}')
    return {"question": _text(row, "question"), "choices": {"text": texts, "label": labels}, "answerKey": key}


def _piqa(row: Mapping[str, Any]) -> Row:
    return {name: _text(row, name) for name in ("goal", "sol1", "sol2")} | {"label": _whole(row, "label", 1)}


def _sciq(row: Mapping[str, Any]) -> Row:
    named = ("question", "distractor1", "distractor2", "distractor3", "correct_answer")
    return {name: _text(row, name) for name in named} | {"support": _text(row, "support", may_be_empty=True)}


def _hellaswag(row: Mapping[str, Any]) -> Row:
    return {
        "activity_label": _text(row, "activity_label"),
        "ctx_a": _text(row, "ctx_a"),
        "ctx_b": _text(row, "ctx_b", may_be_empty=True),
        "endings": _texts(row.get("endings"), "endings", least=4, most=4),
        "label": str(_whole(row, "label", 3)),
    }


def _boolq(row: Mapping[str, Any]) -> Row:
    if "label" not in row and isinstance(row.get("answer"), bool):
        row = {**row, "label": int(row["answer"])}
    return {name: _text(row, name) for name in ("passage", "question")} | {"label": _whole(row, "label", 1)}


def _winogrande(row: Mapping[str, Any]) -> Row:
    clean = {name: _text(row, name) for name in ("sentence", "option1", "option2")}
    if "_" not in clean["sentence"]:
        raise _BadRow('column "sentence" has no "_" for the options')
    return clean | {"answer": str(_whole(row, "answer", 2, least=1))}


def _lambada(row: Mapping[str, Any]) -> Row:
    if "text" not in row and {"context", "continuation"} <= set(row):
        text = f"{_text(row, 'context').rstrip(' ')} {_text(row, 'continuation').strip()}"
    else:
        text = _text(row, "text")
    if " " not in text.strip() or text.endswith(" "):
        raise _BadRow("the text is to end in the word that is asked for, after a space")
    return {"text": text}


def _wikitext(row: Mapping[str, Any]) -> Row:
    return {"page": _text(row, "page")}


def _logiqa(row: Mapping[str, Any]) -> Row:
    label = _text(row, "label")
    if label not in ("a", "b", "c", "d"):
        raise _BadRow(f'column "label" holds {label[:20]!r}, expected a, b, c or d')
    options = _texts(row.get("options"), "options", least=4, most=4)
    return {name: _text(row, name) for name in ("context", "question")} | {"options": options, "label": label}


def _wsc(row: Mapping[str, Any]) -> Row:
    clean: Row = {name: _text(row, name) for name in ("text", "span1_text", "span2_text")}
    words = len(clean["text"].split(" "))
    places = {name: _whole(row, name, words - 1) for name in ("span1_index", "span2_index")}
    return clean | places | {"label": _whole(row, "label", 1)}


def _blimp(row: Mapping[str, Any]) -> Row:
    return {name: _text(row, name) for name in ("sentence_good", "sentence_bad")}


def _blimp_texts(row: Row) -> tuple[str, ...]:
    return (row["sentence_good"],)


def _arc_texts(row: Row) -> tuple[str, ...]:
    return row["question"], row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]


def _hellaswag_texts(row: Row) -> tuple[str, ...]:
    return (f"{row['ctx_a']} {row['ctx_b']} {row['endings'][int(row['label'])]}",)


def _winogrande_texts(row: Row) -> tuple[str, ...]:
    return (row["sentence"].replace("_", row[f"option{row['answer']}"], 1),)


_FORMS: dict[str, _Form] = {
    "arc_easy": _Form(Known(("arc_easy",), "test"), _arc, lambda row: len(row["choices"]["text"]), _arc_texts),
    "arc_challenge": _Form(Known(("arc_challenge",), "test"), _arc, lambda row: len(row["choices"]["text"]), _arc_texts),
    "logiqa": _Form(
        Known(("logiqa",), "test"), _logiqa, lambda _row: 4,
        lambda row: (row["context"], row["question"], row["options"]["abcd".index(row["label"])]),
    ),
    "wsc": _Form(
        Known(("wsc.fixed", "wsc"), "validation"), _wsc, lambda _row: 2, lambda row: (row["text"],)
    ),
    "piqa": _Form(
        Known(("piqa",), "validation"), _piqa, lambda _row: 2, lambda row: (row["goal"], row[f"sol{row['label'] + 1}"])
    ),
    "sciq": _Form(
        Known(("sciq",), "test"), _sciq, lambda _row: 4, lambda row: (row["support"], row["question"], row["correct_answer"])
    ),
    "hellaswag": _Form(Known(("hellaswag",), "validation"), _hellaswag, lambda _row: 4, _hellaswag_texts),
    "boolq": _Form(
        Known(("boolq",), "validation"), _boolq, lambda _row: 2, lambda row: (row["passage"], row["question"])
    ),
    "winogrande": _Form(
        Known(("winogrande_xl", "winogrande"), "validation"), _winogrande, lambda _row: 2, _winogrande_texts
    ),
    "lambada_openai": _Form(
        Known(("lambada_openai",), "test"), _lambada, lambda _row: 0, lambda row: (row["text"],)
    ),
    "wikitext": _Form(
        Known(("wikitext-2-raw-v1", "wikitext_document_level", "wikitext"), "test", texts=("test.raw.txt", "wiki.test.raw")),
        _wikitext, lambda _row: -1, lambda row: (row["page"],),
    ),
}  # fmt: skip
