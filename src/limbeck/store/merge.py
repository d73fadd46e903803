"""Several stores of one teacher become one, each row once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.core.errors import StoreError
from limbeck.store.manifest import Manifest, is_store, is_unfinished
from limbeck.store.shards import row_columns
from limbeck.store.sink import RowSink
from limbeck.store.store import TargetStore


def merge_stores(
    folders: Sequence[Path | str], into: Path | str, *, rows_per_shard: int | None = None
) -> dict[str, Any]:
    """Write the rows of several stores, in the order given and each key once, into a new one. The stores stay as they are.

    rows_per_shard: None takes the largest of theirs. The fidelity of the whole is the mean of the parts', weighted by their
    tokens; the percentile and the largest are the worst of the parts'.
    Returns facts: folder, rows, tokens, duplicates, shards, bytes_per_token.
    Raises: StoreError when the stores differ in teacher, tokenizer or codec, or one is damaged.
    """
    if len(folders) < 2:
        raise StoreError(f"merge needs two stores at least, {len(folders)} given.")
    stores = [TargetStore(folder) for folder in folders]
    first = stores[0].manifest
    for store in stores[1:]:
        different = first.differences(store.manifest)
        if different:
            raise StoreError(
                f"{store.folder} and {stores[0].folder} cannot be one store: {'; '.join(reversed(different))} "
                f"({stores[0].folder} against {store.folder})."
            )
    manifest = replace(
        first, shards=(), captures=(0,), fidelity=None,
        context_tokens=max(store.context_tokens for store in stores),
        rows_per_shard=rows_per_shard or max(store.manifest.rows_per_shard for store in stores),
    )  # fmt: skip
    if is_store(Path(into)) and not is_unfinished(Path(into)):
        raise StoreError(f"{into}: there is a store already. Merge into a new folder.")
    sink = RowSink(into, manifest)
    for store in stores:
        for table in store.tables():
            for place in range(table.num_rows):
                sink.add_columns(row_columns(table, place))
    whole = sink.finish(lambda whole: _merged_fidelity([store.manifest for store in stores], whole))
    return {
        "folder": str(into), "rows": whole.rows, "tokens": whole.tokens,
        "duplicates": sink.duplicates, "shards": len(whole.shards),
        "bytes_per_token": whole.bytes / whole.tokens if whole.tokens else None,
    }  # fmt: skip


def _merged_fidelity(parts: Sequence[Manifest], whole: Manifest) -> Mapping[str, Any] | None:
    reports = [(part.fidelity, part.tokens) for part in parts if part.fidelity and part.fidelity.get("positions")]
    if len(reports) < len(parts) or not whole.tokens:
        return None
    total = sum(tokens for _, tokens in reports)
    merged: dict[str, Any] = {"positions": sum(report["positions"] for report, _ in reports)}
    for name in reports[0][0]:
        values = [report.get(name) for report, _ in reports]
        if name.startswith(("p99_", "max_")):
            merged[name] = max(float(value or 0) for value in values)
        elif name.startswith(("mean_", "top1_")):
            known = all(value is not None for value in values)
            merged[name] = sum(report[name] * tokens for report, tokens in reports) / total if known else None
    return {**merged, "bytes_per_token": float(f"{whole.bytes / whole.tokens:.6g}")}
