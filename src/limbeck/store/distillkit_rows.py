"""DistillKit's published data sets as target stores.

Their rows are lists of lists of small numbers in large row groups, which cannot be read at random; they are converted once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.errors import StoreError
from limbeck.store.codec import CodecSettings, SparseRows
from limbeck.store.distillkit import read_distillkit
from limbeck.store.distillkit_settings import DistillKitSettings, LegacySettings
from limbeck.store.manifest import Manifest
from limbeck.store.records import RowRecord, usual_scored
from limbeck.store.sink import RowSink

_ROWS_CHECKED = 32
_SETTINGS_FILES = ("compression_config.yaml", "compression_config.json")


def convert_distillkit(
    source: Path | str,
    into: Path | str,
    *,
    teacher: str,
    tokenizer: str | None,
    settings: DistillKitSettings | LegacySettings | None = None,
    values: str = "uint8",
    rows_per_shard: int = 32,
) -> dict[str, Any]:
    """Write a folder of DistillKit's Parquet files as a store; given again after a stop, it goes on.

    teacher: its name. tokenizer: fingerprint of its tokenizer. settings: those of the capture; None reads the file that
    DistillKit's capture leaves beside its data. values: of `CodecSettings`. Packed rows: where attention_mask changes another
    document begins; where it is 0, or labels are -100, nothing is scored.
    Returns facts: folder, rows, tokens, duplicates, next_token_kept (share of positions whose next token is among the kept ones).
    Raises: StoreError when settings are missing or do not fit, or the targets are shifted against the tokens.
    """
    files = _files(Path(source))
    settings = settings or read_settings(files[0].parent)
    vocabulary = settings.d if isinstance(settings, DistillKitSettings) else settings.vocab_size
    share = _check_shift(Path(source), islice(_rows(files, settings), _ROWS_CHECKED))
    codec = CodecSettings(vocabulary, values=values, k=settings.k)
    facts = {"name": teacher, "fingerprint": None, "converted_from": "DistillKit"}
    sink = RowSink(
        into, Manifest("targets", facts, tokenizer, vocabulary, codec.to_json(), rows_per_shard=rows_per_shard)
    )
    for record in _rows(files, settings):
        sink(record)
    whole = sink.finish()
    return {
        "folder": str(into), "rows": whole.rows, "tokens": whole.tokens, "duplicates": sink.duplicates, "next_token_kept": share,
    }  # fmt: skip


def read_settings(folder: Path) -> DistillKitSettings | LegacySettings:
    """The settings that DistillKit's capture writes beside its data. Raises StoreError when they are not there or not readable."""
    for name in _SETTINGS_FILES:
        path = Path(folder) / name
        if path.exists():
            words = _read_words(path)
            return LegacySettings.from_json(words) if "vocab_size" in words else DistillKitSettings.from_json(words)
    raise StoreError(
        f"{folder}: no {' or '.join(_SETTINGS_FILES)} beside the data. DistillKit's codec cannot be read without its settings: "
        "copy the section from the data set's card into such a file."
    )


def _read_words(path: Path) -> Mapping[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        words = json.loads(text) if path.suffix == ".json" else YAML(typ="safe", pure=True).load(text)
    except (ValueError, OSError, YAMLError) as error:
        raise StoreError(f"{path}: not readable ({str(error).splitlines()[0]}).") from error
    if not isinstance(words, dict):
        raise StoreError(f"{path}: expected a table of words, found {type(words).__name__}.")
    return words


def _files(source: Path) -> list[Path]:
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    if not files:
        raise StoreError(f"{source}: no Parquet file there.")
    return files


def _rows(files: list[Path], settings: DistillKitSettings | LegacySettings) -> Iterator[RowRecord]:
    for path in files:
        pairs = zip(read_distillkit(path, settings), _masks(path), strict=True)
        for number, ((ids, targets), (segments, labels)) in enumerate(pairs):
            try:
                yield _record(ids, targets, segments, labels)
            except StoreError as error:
                raise StoreError(f"{path}, row {number}: {error}") from error


def _masks(path: Path) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
    """Each row's attention_mask and labels, where the file has them."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = [name for name in ("attention_mask", "labels") if name in file.schema_arrow.names]
    if not names:
        yield from ((None, None) for _ in range(file.metadata.num_rows))
        return
    for batch in file.iter_batches(batch_size=1, columns=names):
        found = {name: batch.column(name)[0].as_py() for name in names}
        arrays = {name: None if row is None else np.asarray(row, dtype=np.int64) for name, row in found.items()}
        yield arrays.get("attention_mask"), arrays.get("labels")


def _record(ids: np.ndarray, targets: SparseRows, segments: np.ndarray | None, labels: np.ndarray | None) -> RowRecord:
    length, given = len(ids), len(targets.ids)
    if given not in (length, length - 1):
        raise StoreError(f"{given} positions of targets for {length} tokens: expected {length} or {length - 1}.")
    for name, mask in (("attention_mask", segments), ("labels", labels)):
        if mask is not None and len(mask) != length:
            raise StoreError(f"{name} has {len(mask)} entries for {length} tokens.")
    starts = [] if segments is None else (np.flatnonzero(np.diff(segments)) + 1).tolist()
    scored = usual_scored(length, starts)
    if segments is not None:
        scored &= segments != 0
    if labels is not None:
        scored &= labels != -100
    if given < length:
        last = (np.full((1, targets.ids.shape[1]), -1), np.full((1, targets.ids.shape[1]), -np.inf), np.zeros(1))
        parts = [np.concatenate([part, end]) for part, end in zip(targets[:3], last, strict=True)]
        targets = SparseRows(parts[0], parts[1], parts[2], None)
    return RowRecord(ids, starts, scored, targets.ids, targets.log_probs, targets.tail_log_prob)


def _check_shift(source: Path, rows: Iterator[RowRecord]) -> float | None:
    """Share of scored positions whose next token is kept, and the certainty that no neighbour fits better."""
    found = dict.fromkeys((-1, 0, 1), 0)
    positions = 0
    for row in rows:
        assert row.ids is not None
        ids, scored = np.asarray(row.input_ids), np.asarray(row.scored)
        places = np.flatnonzero(scored[1:])
        places = places[(places >= 1) & (places + 2 < len(ids))]
        positions += len(places)
        for shift in found:
            found[shift] += int((row.ids[places] == ids[places + 1 + shift, None]).any(axis=1).sum())
    if positions == 0:
        return None
    best = max(found, key=lambda shift: found[shift])
    if best != 0 and found[best] > found[0]:
        raise StoreError(
            f"{source}: position t of the targets fits token t{best + 1:+d}, not the next one ({found[best] / positions:.0%} of those "
            f"tokens are kept, against {found[0] / positions:.0%}). These data are shifted; they would teach the wrong tokens."
        )
    return found[0] / positions
