"""Whether a store is whole and says what its manifest says; and what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.errors import StoreError
from limbeck.store.manifest import Manifest, ShardFacts, is_unfinished, read_manifest
from limbeck.store.records import RowRecord
from limbeck.store.shards import RowFormat, ShardReader, row_columns, shard_problem

_MOST_PROBLEMS = 100


def inspect_store(folder: Path | str) -> dict[str, Any]:
    """What a store's manifest says, and how its bytes are spent.

    Returns facts: folder, kind, finished, teacher, tokenizer, vocabulary_size, codec, hidden_layers, context_tokens, rows,
    tokens, scored_tokens, shards, bytes, bytes_per_token, bytes_per_token_by_column, fidelity.
    Raises: StoreError when there is no store or its manifest is damaged or newer.
    """
    manifest = read_manifest(Path(folder))
    tokens = max(manifest.tokens, 1)
    return {
        "folder": str(folder), "kind": manifest.kind, "finished": not is_unfinished(Path(folder)),
        "schema": manifest.schema, "teacher": dict(manifest.teacher), "tokenizer": manifest.tokenizer,
        "vocabulary_size": manifest.vocabulary_size, "codec": manifest.codec, "hidden_layers": list(manifest.hidden_layers),
        "context_tokens": manifest.context_tokens, "rows": manifest.rows, "tokens": manifest.tokens,
        "scored_tokens": sum(shard.scored_tokens for shard in manifest.shards), "captures": len(manifest.captures),
        "shards": len(manifest.shards), "bytes": manifest.bytes, "bytes_per_token": manifest.bytes / tokens,
        "bytes_per_token_by_column": {
            name: size / tokens for name, size in _column_bytes(Path(folder), manifest).items()
        },
        "fidelity": manifest.fidelity,
    }  # fmt: skip


def _column_bytes(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Compressed bytes of each family of columns (`target_gap_0` and `target_gap_1` count as `target_gap`)."""
    import pyarrow.parquet as pq

    found: dict[str, int] = {}
    for shard in manifest.shards:
        if shard_problem(folder, shard, checksum=False) is not None:
            continue
        metadata = pq.read_metadata(folder / shard.file)
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                name = column.path_in_schema.split(".")[0].rstrip("0123456789").rstrip("_")
                found[name] = found.get(name, 0) + column.total_compressed_size
    return found


def verify_store(folder: Path | str) -> dict[str, Any]:
    """Read everything: files, checksums, keys, token ids, text, targets.

    Returns facts: folder, rows, tokens, shards, bytes, and problems: a list of sentences, empty when the store is sound.
    Whether the targets are the teacher's is for `teachers.fidelity` to say. Nothing is raised for a damaged store.
    """
    folder = Path(folder)
    facts: dict[str, Any] = {"folder": str(folder), "rows": 0, "tokens": 0, "shards": 0, "bytes": 0, "problems": []}
    try:
        manifest = read_manifest(folder)
        form = RowFormat.of(manifest)
    except StoreError as error:
        return {**facts, "problems": [str(error)]}
    facts |= {"rows": manifest.rows, "tokens": manifest.tokens, "shards": len(manifest.shards), "bytes": manifest.bytes}
    facts["problems"] = [problem for problem, _ in zip(_problems(folder, manifest, form), range(_MOST_PROBLEMS))]
    return facts


def _problems(folder: Path, manifest: Manifest, form: RowFormat) -> Iterator[str]:
    if is_unfinished(folder):
        yield f"{folder}: its capture was stopped before its end. Give the same capture command again."
    listed = {shard.file for shard in manifest.shards}
    for path in sorted(folder.glob("shards/*.parquet")):
        if f"shards/{path.name}" not in listed and not is_unfinished(folder):
            yield f"{path}: a shard that the manifest does not list."
    seen: set[str] = set()
    for shard in manifest.shards:
        problem = shard_problem(folder, shard, checksum=True)
        if problem is not None:
            yield problem
            continue
        yield from _shard_problems(folder, shard, form, seen)


def _shard_problems(folder: Path, shard: ShardFacts, form: RowFormat, seen: set[str]) -> Iterator[str]:
    try:
        reader = ShardReader(folder, shard, form, check=False)
    except StoreError as error:
        yield str(error)
        return
    row = tokens = scored = 0
    for group in range(len(reader.ends)):
        try:
            table = reader.group(group, form.schema().names)
        except StoreError as error:
            yield str(error)
            return
        for place in range(table.num_rows):
            columns = row_columns(table, place)
            try:
                record = form.decode(columns, targets=True, layers=tuple(form.hidden_width))
            except (StoreError, TypeError, ValueError) as error:
                yield f"{reader.path}: row {row}: {error}"
            else:
                yield from (
                    f"{reader.path}: row {row}: {problem}" for problem in _row_problems(columns["key"], record, seen)
                )
                if isinstance(record, RowRecord):
                    tokens += len(record.input_ids)
                    scored += int(np.asarray(record.scored)[1:].sum())
            row += 1
    if form.codec is not None and (tokens, scored) != (shard.tokens, shard.scored_tokens):
        yield f"{reader.path}: {tokens} tokens, {scored} scored, where the manifest says {shard.tokens} and {shard.scored_tokens}."


def _row_problems(key: Any, record: Any, seen: set[str]) -> Iterator[str]:
    if record.key != key:
        yield f"its key is {key}, but its content has the key {record.key}."
    if key in seen:
        yield f"the key {key} occurs twice in the store."
    seen.add(key)
    if not isinstance(record, RowRecord):
        return
    if (record.text is None) != (record.token_bytes is None):
        yield "it has text without the bytes of its tokens, or these without text."
    elif record.text is not None and record.token_bytes is not None and _apart(record):
        yield "the bytes of its tokens are not the bytes of its text."


def _apart(record: RowRecord) -> bool:
    lengths, text = np.asarray(record.token_bytes), record.text or b""
    return len(lengths) != len(record.input_ids) or int(lengths.sum()) != len(text)
