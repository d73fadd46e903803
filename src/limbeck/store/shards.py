"""Rows as Parquet: one row of the table is one window, and its targets are one block of the codec.

Every column is compressed (zstd) over a row group of about 8,192 tokens, which is what a random access reads. No dictionary,
no statistics, no dates: the same rows give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.errors import StoreError
from limbeck.core.files import sha256_file
from limbeck.store.codec import CodecSettings, decode_hidden, decode_targets, encode_hidden, encode_targets
from limbeck.store.manifest import Manifest, ShardFacts
from limbeck.store.records import RowRecord, TextRecord, usual_scored

Columns = dict[str, Any]

_GROUP_TOKENS = 8192
_ZSTD_LEVEL = 9


@dataclass(frozen=True)
class RowFormat:
    """How rows of one store become columns and come back. codec: None for a store of texts."""

    codec: CodecSettings | None
    hidden_width: Mapping[int, int]
    hidden_values: str

    @classmethod
    def of(cls, manifest: Manifest) -> RowFormat:
        """The format that a manifest describes. Raises StoreError for a codec this version does not know."""
        codec = CodecSettings.from_json(manifest.codec) if manifest.kind == "targets" else None
        widths = {int(layer): int(width) for layer, width in manifest.hidden_width.items()}
        return cls(codec, widths, manifest.hidden_values)

    @property
    def hidden_columns(self) -> tuple[str, ...]:
        """The codec's names of the planes of one layer."""
        return tuple(encode_hidden(np.zeros((1, 1)), values=self.hidden_values))

    def schema(self) -> Any:
        """The Arrow schema of every shard."""
        import pyarrow as pa

        if self.codec is None:
            return pa.schema([(name, pa.string()) for name in ("key", "prompt", "completion")])
        fields = [
            ("key", pa.string()), ("input_ids", pa.list_(pa.int32())), ("document_starts", pa.list_(pa.int32())),
            ("scored", pa.binary()), ("text", pa.binary()), ("token_bytes", pa.list_(pa.uint16())),
            ("next_log_prob_0", pa.binary()), ("next_log_prob_1", pa.binary()),
        ]  # fmt: skip
        fields += [(f"target_{name}", pa.binary()) for name in self.codec.columns]
        fields += [
            (f"layer_{layer}_{name}", pa.binary()) for layer in self.hidden_width for name in self.hidden_columns
        ]
        return pa.schema(fields)

    def encode(self, record: RowRecord | TextRecord) -> Columns:
        """One row's columns. Raises StoreError when the record is not what this store holds."""
        if isinstance(record, TextRecord):
            if self.codec is not None:
                raise StoreError("a text was handed to a store of targets; make a store of kind text for it.")
            return {"key": record.key, "prompt": record.prompt, "completion": record.completion}
        if self.codec is None:
            raise StoreError("token ids were handed to a store of texts; make a store of kind targets for them.")
        ids, starts = np.asarray(record.input_ids, dtype=np.int32), list(record.document_starts)
        scored = np.asarray(record.scored, dtype=bool)
        _check_window(ids, starts, scored, self.codec.vocabulary_size)
        usual = np.array_equal(scored, usual_scored(len(ids), starts))
        columns: Columns = {
            "key": record.key, "input_ids": ids, "document_starts": np.asarray(starts, dtype=np.int32),
            "scored": None if usual else np.packbits(scored).tobytes(), "text": record.text,
            "token_bytes": None if record.token_bytes is None else np.asarray(record.token_bytes, dtype=np.uint16),
        }  # fmt: skip
        columns.update(self._encode_targets(record, _before(scored)))
        for layer, width in self.hidden_width.items():
            if layer not in record.hidden or record.hidden[layer].shape != (len(ids), width):
                raise StoreError(
                    f"a row has no hidden states [{len(ids)}, {width}] of layer {layer}, which this store keeps."
                )
            planes = encode_hidden(record.hidden[layer], values=self.hidden_values)
            columns.update({f"layer_{layer}_{name}": plane for name, plane in planes.items()})
        return columns

    def _encode_targets(self, record: RowRecord, said: np.ndarray) -> Columns:
        assert self.codec is not None
        if record.ids is None or record.log_probs is None or record.tail is None:
            raise StoreError("a row without targets was handed to a store of targets.")
        weights = None if record.weights is None else record.weights[said]
        planes = encode_targets(record.ids[said], record.log_probs[said], record.tail[said], weights, codec=self.codec)
        columns: Columns = {f"target_{name}": plane for name, plane in planes.items()}
        columns |= {"next_log_prob_0": None, "next_log_prob_1": None}
        if record.next_log_prob is not None:
            low_high = record.next_log_prob[said].astype("<f2").view(np.uint8).reshape(-1, 2)
            columns |= {"next_log_prob_0": low_high[:, 0].tobytes(), "next_log_prob_1": low_high[:, 1].tobytes()}
        return columns

    def decode(self, columns: Mapping[str, Any], *, targets: bool, layers: Sequence[int]) -> RowRecord | TextRecord:
        """A row back from its columns. Raises StoreError when they hold what no writer writes."""
        if self.codec is None:
            return TextRecord(columns["prompt"], columns["completion"])
        ids, starts = columns["input_ids"], columns["document_starts"]
        if ids is None or starts is None:
            raise StoreError("a row has no token ids.")
        length = len(ids)
        scored = usual_scored(length, [start for start in starts if 0 <= start < length])
        if columns["scored"] is not None:
            scored = np.unpackbits(np.frombuffer(columns["scored"], dtype=np.uint8), count=length).astype(bool)
        record = RowRecord(ids, starts.tolist(), scored, text=columns["text"], token_bytes=columns["token_bytes"])
        _check_window(ids, record.document_starts, scored, self.codec.vocabulary_size)
        if targets:
            self._decode_targets(record, columns, _before(scored))
        record.hidden = {
            layer: decode_hidden(
                {name: columns[f"layer_{layer}_{name}"] for name in self.hidden_columns},
                length, width=self.hidden_width[layer], values=self.hidden_values,
            )
            for layer in layers
        }  # fmt: skip
        return record

    def _decode_targets(self, record: RowRecord, columns: Mapping[str, Any], said: np.ndarray) -> None:
        assert self.codec is not None
        length, count = len(said), int(said.sum())
        rows = decode_targets({name: columns[f"target_{name}"] for name in self.codec.columns}, count, self.codec)
        # What the width of the widest position leaves empty need not be carried on.
        width = max(1, int((rows.ids >= 0).sum(axis=1).max(initial=0)))
        record.ids = np.full((length, width), -1, dtype=np.int64)
        record.log_probs = np.full((length, width), -np.inf, dtype=np.float32)
        record.tail = np.zeros(length, dtype=np.float32)
        record.ids[said], record.log_probs[said] = rows.ids[:, :width], rows.log_probs[:, :width]
        record.tail[said] = rows.tail_log_prob
        if rows.weights is not None:
            record.weights = np.zeros((length, width), dtype=np.float32)
            record.weights[said] = rows.weights[:, :width]
        low, high = columns["next_log_prob_0"], columns["next_log_prob_1"]
        if low is not None and high is not None:
            if len(low) != count or len(high) != count:
                raise StoreError(f"column next_log_prob holds {len(low)} numbers, expected {count}.")
            both = np.stack([np.frombuffer(low, dtype=np.uint8), np.frombuffer(high, dtype=np.uint8)], axis=1)
            record.next_log_prob = np.full(length, np.nan, dtype=np.float32)
            record.next_log_prob[said] = both.view("<f2")[:, 0]


def _before(scored: np.ndarray) -> np.ndarray:
    """True at positions whose next token is scored: those have targets."""
    return np.append(scored[1:], False)


def _check_window(ids: np.ndarray, starts: Sequence[int], scored: np.ndarray, vocabulary_size: int) -> None:
    if len(ids) == 0 or len(scored) != len(ids):
        raise StoreError(f"a row has {len(ids)} tokens and a mask of {len(scored)}: expected the same number, not 0.")
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        raise StoreError(
            f"a row has token id {ids.max() if ids.max() >= vocabulary_size else ids.min()}, outside the teacher's vocabulary of {vocabulary_size}."
        )
    if any(not 0 < start < len(ids) for start in starts) or list(starts) != sorted(set(starts)):
        raise StoreError(f"a row of {len(ids)} tokens has document starts {list(starts)[:8]}.")


class ShardBuilder:
    """Gathers encoded rows into the bytes of one shard."""

    def __init__(self, form: RowFormat):
        self.form = form
        self.rows: list[Columns] = []
        self.tokens = self.scored_tokens = 0

    def add(self, record: RowRecord | TextRecord) -> None:
        """One row more."""
        self.rows.append(self.form.encode(record))
        if isinstance(record, RowRecord):
            self.tokens += len(record.input_ids)
            self.scored_tokens += int(np.asarray(record.scored)[1:].sum())

    def add_encoded(self, columns: Columns) -> None:
        """One row more, as it came out of another shard."""
        self.rows.append(columns)
        if self.form.codec is not None:
            scored, length = columns["scored"], len(columns["input_ids"])
            self.tokens += length
            self.scored_tokens += (
                length - 1 - len(columns["document_starts"]) if scored is None
                else int(np.unpackbits(np.frombuffer(scored, dtype=np.uint8), count=length)[1:].sum())
            )  # fmt: skip

    def to_bytes(self) -> bytes:
        """The Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self.form.schema()
        columns = [pa.array([row[name] for row in self.rows], type=schema.field(name).type) for name in schema.names]
        longest = max((len(row["input_ids"]) for row in self.rows), default=1) if self.form.codec is not None else 64
        sink = io.BytesIO()
        pq.write_table(
            pa.Table.from_arrays(columns, schema=schema), sink, row_group_size=max(1, _GROUP_TOKENS // longest),
            compression="zstd", compression_level=_ZSTD_LEVEL, use_dictionary=False, write_statistics=False, store_schema=False,
        )  # fmt: skip
        return sink.getvalue()


class ShardReader:
    """One shard, opened by memory map; row groups are read as they are asked for.

    Raises: StoreError when the file is missing, does not have the manifest's size or checksum, or lacks columns.
    """

    def __init__(self, folder: Path, facts: ShardFacts, form: RowFormat, *, check: bool = True):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.form = Path(folder) / facts.file, form
        problem = shard_problem(folder, facts, checksum=check)
        if problem:
            raise StoreError(f"{problem} Restore the file from a copy, or capture into a new folder.")
        try:
            self.file = pq.ParquetFile(self.path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self.path}: not a readable Parquet file ({_first_line(error)}).") from error
        missing = set(form.schema().names) - set(self.file.schema_arrow.names)
        if missing or self.file.metadata.num_rows != facts.rows:
            raise StoreError(
                f"{self.path}: {self.file.metadata.num_rows} rows, without the columns {sorted(missing)}; expected {facts.rows} rows with all."
            )
        counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.metadata.num_row_groups)]
        self.ends = np.cumsum(counts)

    def locate(self, row: int) -> tuple[int, int]:
        """(row group, place within it) of a row."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        return group, row - (int(self.ends[group - 1]) if group else 0)

    def group(self, number: int, names: Sequence[str]) -> Any:
        """Some columns of a row group as an Arrow table."""
        return self._read(lambda: self.file.read_row_group(number, columns=list(names)))

    def column(self, name: str) -> list[Any]:
        """One column of the whole shard."""
        return self._read(lambda: self.file.read(columns=[name])).column(name).to_pylist()

    def _read(self, read: Any) -> Any:
        import pyarrow as pa

        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self.path}: damaged ({_first_line(error)}). Restore the file from a copy.") from error


def row_columns(table: Any, place: int) -> Columns:
    """One row of an Arrow table as plain columns: bytes, strings and arrays."""
    columns: Columns = {}
    for name in table.column_names:
        scalar = table.column(name)[place]
        is_list = hasattr(scalar, "values") and scalar.is_valid
        columns[name] = scalar.values.to_numpy(zero_copy_only=False) if is_list else scalar.as_py()
    return columns


def shard_problem(folder: Path, facts: ShardFacts, *, checksum: bool) -> str | None:
    """What is wrong with a shard's file, in a sentence, or None."""
    path = Path(folder) / facts.file
    if not path.is_file():
        return f"{path}: the shard is missing (a hole of {facts.rows} rows)."
    size = path.stat().st_size
    if size != facts.bytes:
        return (
            f"{path}: {size} bytes where the manifest says {facts.bytes}: the shard is truncated or of another store."
        )
    if checksum and sha256_file(path) != facts.sha256:
        return f"{path}: its checksum is not the manifest's: the shard is damaged, or of another store."
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
