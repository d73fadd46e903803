"""Where text comes from: the factbook, files and folders, or a data set of the Hugging Face hub."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.core.errors import DataError
from limbeck.data.factbook import read_factbook

_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_HELDOUT_EVERY = 50
_OUR_SPLITS = ("train", "heldout", "all")


@dataclass(frozen=True)
class TextSource:
    """One source of documents.

    source: `factbook`, a path to a .txt/.md/.jsonl/.parquet file or a folder of them, or a hub data set id.
    split: `train` leaves out every 50th document and `heldout` is exactly those, while `all` takes everything; another
    word is a hub data set's own split, taken whole. field: the column of structured files. config: a hub data set's
    configuration. rows: `documents` when each row is one, `lines` when rows are lines of running text (as WikiText has
    them) to be gathered into documents. weight: how often its tokens are used, relative to their number.
    """

    source: str
    split: str = "train"
    field: str = "text"
    config: str | None = None
    weight: float = 1.0
    rows: str = "documents"


def read_documents(source: TextSource) -> Iterator[str]:
    """Yield the non-empty documents of a source, in a fixed order.

    Raises: DataError when the source is missing, is not text, or lacks the field; the message names file and line.
    """
    if source.source == "factbook":
        yield from read_factbook(source.split)
        return
    path = Path(source.source).expanduser()
    if path.exists():
        documents = _as_documents(_read_path(path, source.field), source)
        yield from _pick_split(documents, source.split, name=source.source)
    elif path.suffix in _SUFFIXES or source.source.startswith((".", "/", "~")):
        raise DataError(
            f"text source {source.source}: no such file or folder. Give an existing path, or a hub data set id."
        )
    else:
        own_split = source.split in _OUR_SPLITS
        documents = _as_documents(_read_hub(source, split="train" if own_split else source.split), source)
        yield from _pick_split(documents, source.split, name=source.source) if own_split else documents


def is_on_the_hub(source: TextSource) -> bool:
    """Whether `read_documents` would ask the hub for this source."""
    path = Path(source.source).expanduser()
    is_named_as_path = path.suffix in _SUFFIXES or source.source.startswith((".", "/", "~"))
    return not (source.source == "factbook" or path.exists() or is_named_as_path)


def split_share(split: str) -> float:
    """The share of a file's documents that a split takes."""
    return {"train": 1 - 1 / _HELDOUT_EVERY, "heldout": 1 / _HELDOUT_EVERY}.get(split, 1.0)


def file_bytes(source: TextSource, *, rows: Sequence[str]) -> float:
    """Bytes of text in all files of a source, estimated without reading on from `rows`, the first texts of its files.

    Plain files are all text, Parquet files say how long a column is; of JSON lines the share of text is that of `rows`.
    """
    files = _files(Path(source.source).expanduser())
    lines = next((_line_bytes(file, len(rows)) for file in files if file.suffix == ".jsonl"), 0)
    share = min(1.0, sum(len(row.encode()) for row in rows) / lines) if lines else 1.0
    sizes = {
        ".jsonl": lambda file: share * file.stat().st_size,
        ".parquet": lambda file: _column_bytes(file, source.field),
    }
    return float(sum(sizes.get(file.suffix, lambda file: file.stat().st_size)(file) for file in files))


def _line_bytes(path: Path, count: int) -> int:
    with open(path, "rb") as stream:
        return sum(len(raw) for raw in itertools.islice((raw for raw in stream if raw.strip()), count))


def _column_bytes(path: Path, field: str) -> int:
    import pyarrow.parquet

    facts = pyarrow.parquet.read_metadata(path)
    groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def _as_documents(rows: Iterator[str], source: TextSource) -> Iterator[str]:
    if source.rows == "lines":
        return _gather(row if row.endswith("\n") else row + "\n" for row in rows)
    return (row for row in rows if row)


def _gather(lines: Iterable[str]) -> Iterator[str]:
    """Lines of running text in documents: a new one begins at the first blank line once 2,000 characters have gathered."""
    gathered: list[str] = []
    size = 0
    for line in lines:
        if not line.strip() and size >= 2000:
            yield "".join(gathered)
            gathered, size = [], 0
        gathered.append(line)
        size += len(line)
    if "".join(gathered).strip():
        yield "".join(gathered)


def _pick_split(documents: Iterator[str], split: str, *, name: str) -> Iterator[str]:
    if split not in _OUR_SPLITS:
        raise DataError(f'text source {name}: files have the splits train, heldout and all, not "{split}".')
    for index, document in enumerate(documents):
        is_heldout = index % _HELDOUT_EVERY == _HELDOUT_EVERY - 1
        if split == "all" or is_heldout == (split == "heldout"):
            yield document


def _read_path(path: Path, field: str) -> Iterator[str]:
    for file in _files(path):
        try:
            yield from _READERS[file.suffix](file, field)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror or error}). Check its permissions, or give another file."
            ) from error


def _files(path: Path) -> list[Path]:
    """The files of a path, in order. Raises: DataError when there is none of a known kind."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"text source {path}: the folder holds no {', '.join(_SUFFIXES)} file.")
        return files
    if path.suffix not in _SUFFIXES:
        raise DataError(f"text source {path}: unknown kind of file. Known: {', '.join(_SUFFIXES)}.")
    return [path]


def _read_plain(path: Path, field: str) -> Iterator[str]:
    with open(path, "rb") as stream:
        yield from _gather(_decode(raw, path, number) for number, raw in enumerate(stream, start=1))


def _decode(raw: bytes, path: Path, number: int) -> str:
    if b"\0" in raw:
        raise DataError(f"{path}:{number}: this is not text (a NUL byte). Give a UTF-8 text file.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = _decode(raw, path, number)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON ({error}).") from error
            yield from _take_field(row, field, where=f"{path}:{number}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise DataError(
                f'{path}: no column "{field}". Columns: {", ".join(table.schema_arrow.names)}. Set `field`.'
            )
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                yield from _take_field({field: value}, field, where=str(path))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


def _take_field(row: object, field: str, *, where: str) -> Iterator[str]:
    if not isinstance(row, dict) or field not in row:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f'{where}: no field "{field}" (found: {found}). Set `field` to the one that holds the text.')
    value = row[field]
    if value is None:
        return
    if not isinstance(value, str):
        raise DataError(f'{where}: field "{field}" holds {type(value).__name__}, not text.')
    yield value


def _read_hub(source: TextSource, *, split: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(source.source, source.config, split=split, streaming=True)
        for row in rows:
            yield from _take_field(row, source.field, where=f"{source.source}[{split}]")
    except DataError:
        raise
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise DataError(
            f"text source {source.source} (config {source.config}, split {split}): cannot be read from the hub: {first} "
            "Check the name and the network, or download it and give the path of a local .jsonl or .parquet file."
        ) from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
