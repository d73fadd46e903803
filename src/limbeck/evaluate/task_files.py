"""Which files of a folder hold the items of a task, and their raw rows: JSON lines, packed ones, Parquet, Arrow.

A file belongs to a task by its own name, else by the nearest folder that bears a task's name. Nothing is believed of its
content: sizes have limits, and a file that cannot be read gives one message.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.errors import EvaluationError

MOST_FILE_BYTES = 256 * 2**20
MOST_LINE_BYTES = 2**20
MOST_ROWS = 200_000
MOST_FILES_SEARCHED = 200_000

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
_BATCH_ROWS = 256
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip


@dataclass(frozen=True)
class DataFolder:
    """A folder that is searched. files: all below it, in order."""

    root: Path
    files: tuple[Path, ...]

    def name(self, path: Path) -> str:
        """A file of it in words that hold on any machine."""
        return path.relative_to(self.root).as_posix()


@dataclass(frozen=True)
class Known:
    """How the files of a task may be called.

    names: what a file's name begins with or a folder is called, the best first: where files of several are there, those
    of the first one count. texts: files of running text. split: the one that the stock task is scored on. whole: a file's
    name is to be one of `names` and no more than its split.
    """

    names: tuple[str, ...]
    split: str
    texts: tuple[str, ...] = ()
    whole: bool = False


def search_folder(folder: Path) -> DataFolder:
    """All files of a folder and its subfolders. Raises: EvaluationError when there is no folder, or far too many files."""
    if not folder.is_dir():
        raise EvaluationError(
            f"--task-data {folder}: there is no such folder. Give the folder that holds the tasks' files."
        )
    found: list[Path] = []
    for place, _, names in os.walk(folder):
        found += [path for name in names if (path := Path(place) / name).is_file()]
        if len(found) > MOST_FILES_SEARCHED:
            raise EvaluationError(
                f"--task-data {folder} holds more than {MOST_FILES_SEARCHED:,} files. Give a folder with the tasks' files alone."
            )
    return DataFolder(folder, tuple(sorted(found)))


def find_files(task: str, known: Mapping[str, Known], folder: DataFolder) -> tuple[Path, ...]:
    """The file of a task, or all pieces of it in order; none when nothing bears its name.

    known: the names of every task, so that a file of another one is not taken for this one's.
    Of several splits the one counts that the task is scored on, else any but the training one.
    Raises: EvaluationError when several files could still be meant, and when a piece is missing.
    """
    ranks = {path: rank for path in folder.files if (rank := _rank(task, known, folder, path)) is not None}
    found = [path for path in ranks if ranks[path] == min(ranks.values())]
    splits = {path: _split(folder, path) for path in found}
    scored = known[task].split
    found = (
        [path for path in found if splits[path] == scored]
        or [path for path in found if splits[path] != "train"]
        or found
    )
    if not found:
        return ()
    pieces = {(path.parent, _SHARD.sub("", _stem(path)), _suffix(path), _total(path)) for path in found}
    if len(pieces) > 1:
        names = ", ".join(map(str, found[:4]))
        raise EvaluationError(
            f"{task}: {len(found)} files could be its data ({names}). Leave one of them in the folder of --task-data."
        )
    total = _total(found[0])
    if len(found) != total:
        raise EvaluationError(
            f"{task}: {found[0]} is one of {total} pieces, of which {len(found)} are there. Put the others beside it."
        )
    return tuple(sorted(found))


def expected_names(known: Known) -> str:
    """In words what would have been found."""
    first = known.names[-1]
    kinds = f"{first}{'' if known.whole else '*'}.jsonl, .jsonl.gz, .parquet or .arrow"
    return f"{' or '.join(known.texts) + ', ' if known.texts else ''}{kinds}, or such files in a folder {first}"


def _rank(task: str, known: Mapping[str, Known], folder: DataFolder, path: Path) -> int | None:
    """Which of the task's names the file has by itself or by its nearest folder with a task's name."""
    if path.name in known[task].texts:
        return 0
    if not _suffix(path) or path.name.startswith("cache-"):  # what `datasets` keeps beside a saved data set
        return None
    own = _plain(_SHARD.sub("", _stem(path)))
    if claims := _claims(known, lambda name, of: _begins(own, name, whole=of.whole)):
        return claims.get(task)
    for around in _folders(folder, path, with_root=True):
        label = _plain(re.split("--|___", around)[-1])  # of a cache: datasets--Rowan--hellaswag, Rowan___hellaswag
        if claims := _claims(known, lambda name, _of, label=label: label == name):
            return claims.get(task)
    return None


def _claims(known: Mapping[str, Known], is_meant: Callable[..., bool]) -> dict[str, int]:
    """The tasks that bear a label, each with the rank of its best name."""
    ranks = {task: [n for n, name in enumerate(of.names) if is_meant(_plain(name), of)] for task, of in known.items()}
    return {task: found[0] for task, found in ranks.items() if found}


def _begins(own: str, name: str, *, whole: bool) -> bool:
    return own.startswith(name) and (not whole or own[len(name) :].lstrip("_") in ("", *_SPLITS))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _folders(folder: DataFolder, path: Path, *, with_root: bool) -> Iterator[str]:
    """Names of the folders around a file, the nearest first."""
    yield from reversed(path.relative_to(folder.root).parts[:-1])
    if with_root:
        yield folder.root.resolve().name


def _split(folder: DataFolder, path: Path) -> str | None:
    """The split that the file's name says, else the nearest folder's."""
    said = [_SPLITS[word] for word in re.split(r"[^a-z0-9]+", _stem(path).lower()) if word in _SPLITS]
    said = said[-1:] or [
        _SPLITS[name.lower()] for name in _folders(folder, path, with_root=False) if name.lower() in _SPLITS
    ]
    return said[0] if said else None


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _stem(path: Path) -> str:
    return path.name.removesuffix(_suffix(path))


def _total(path: Path) -> int:
    shard = _SHARD.search(_stem(path))
    return int(shard[2]) if shard else 1


def read_text(path: Path) -> str:
    """A file of running text. Raises: EvaluationError when it is too large or not UTF-8."""
    _check_size(path, path.stat().st_size)
    return _decode(path.read_bytes().removeprefix(BOM_UTF8), str(path))


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """The raw rows of a file's pieces, each with where it stands.

    Raises: EvaluationError when a file is too large or cannot be read, has too long or too many rows, or none at all.
    """
    count = 0
    for path in paths:
        _check_size(path, path.stat().st_size)
        for where, row in _read_lines(path) if ".jsonl" in _suffix(path) else _read_table(path):
            count += 1
            if count > MOST_ROWS:
                raise EvaluationError(
                    f"{where}: more than {MOST_ROWS:,} rows; a task has none of that. Is it the right file?"
                )
            yield where, row
    if not count:
        raise EvaluationError(f"{paths[0]} is empty: expected one item of the task per row.")


def _check_size(path: Path, size: int) -> None:
    if size > MOST_FILE_BYTES:
        raise EvaluationError(
            f"{path} has {size:,} bytes; task files of up to {MOST_FILE_BYTES:,} are read, unpacked. Is it the right file?"
        )


def _too_long(where: str) -> EvaluationError:
    return EvaluationError(
        f"{where}: a row of more than {MOST_LINE_BYTES:,} bytes; a task has none of that. Is it the right file?"
    )


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    size = 0
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115 (closed below)
    with opened as stream:
        for number in itertools.count(1):
            try:
                line = stream.readline(MOST_LINE_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise _unreadable(path, "gzip", error) from error
            if not line:
                return
            where = f"{path}:{number}"
            _check_size(path, size := size + len(line))
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if len(line) > MOST_LINE_BYTES:
                raise _too_long(where)
            if line.strip():
                yield where, _parse(line, where)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{where}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(line, where))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: not JSON ({error}). Expected one JSON object per line.") from error


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
    size = number = 0
    with contextlib.closing(_batches(path)) as batches:
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)  # offsets that point outside of a column would end the process
                _check_size(path, size := size + batch.nbytes)
                rows = batch.to_pylist()
            except (
                pyarrow.ArrowException,
                OSError,
                ValueError,
                MemoryError,
            ) as error:  # spoilt sizes ask for terabytes
                raise _unreadable(path, kind, error) from error
            for row in rows:
                where = f"{path}, row {(number := number + 1)}"
                if len(str(row)) > MOST_LINE_BYTES:
                    raise _too_long(where)
                yield where, row


def _batches(path: Path) -> Generator[Any, None, None]:
    """Record batches of a Parquet file, of an Arrow stream (what `datasets` saves) or of an Arrow file."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=_BATCH_ROWS)
        return
    with open(path, "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not is_file:
            yield from pyarrow.ipc.open_stream(stream)
            return
        reader = pyarrow.ipc.open_file(stream)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _unreadable(path: Path, kind: str, error: BaseException) -> EvaluationError:
    first = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return EvaluationError(f"{path}: not a readable {kind} file ({first}). Save it again, or give the items as .jsonl.")
