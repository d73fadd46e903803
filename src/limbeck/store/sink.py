"""A place for finished rows, one after the other: what served teachers, merges and conversions write to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.store.manifest import Manifest
from limbeck.store.records import RowRecord, TextRecord
from limbeck.store.shards import Columns, RowFormat, ShardBuilder
from limbeck.store.writing import CaptureSession, ShardWriter


class RowSink:
    """Call it with a row; shards are written as they fill, and `finish` makes them a store.

    A row that the store has already is counted and left out. When a run was stopped, hand over the same rows in the same
    order again: shards that are whole are not written twice. Rows may come from several threads.
    manifest: what the rows are, without shards; its context_tokens is raised to the longest row.
    Raises: StoreError when the folder holds a store that cannot take them, or a row is not what the store holds.
    """

    def __init__(self, folder: Path | str, manifest: Manifest):
        self.rows = self.duplicates = self.context_tokens = 0
        self._session = CaptureSession(folder, manifest)
        self._form = RowFormat.of(manifest)
        self._known = self._session.known_keys()
        self._builder = ShardBuilder(self._form)
        self._shards = 0
        self._lock = threading.Lock()
        self._session.begin()

    def __call__(self, record: RowRecord | TextRecord) -> None:
        """One row more."""
        with self._lock:
            if not self._is_new(record.key):
                return
            self._builder.add(record)
            if isinstance(record, RowRecord):
                self.context_tokens = max(self.context_tokens, len(record.input_ids))
            self._close_when_full()

    def add_columns(self, columns: Columns) -> None:
        """One row more, as it came out of another shard of the same format."""
        with self._lock:
            if self._is_new(columns["key"]):
                self._builder.add_encoded(columns)
                self._close_when_full()

    def finish(
        self,
        fidelity: Callable[[Manifest], Mapping[str, Any] | None] | None = None,
        teacher: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write what is left and the manifest. fidelity: makes the report from the manifest. teacher: facts to add, such as usage."""
        with self._lock:
            if self._builder.rows:
                self._write()
            whole = self._session.manifest_with(self._shards)
            whole = replace(
                whole, teacher={**whole.teacher, **(teacher or {})}, context_tokens=max(whole.context_tokens, self.context_tokens)
            )  # fmt: skip
            if fidelity is not None:
                whole = replace(whole, fidelity=fidelity(whole))
            self._session.finish(whole)
            return whole

    def _is_new(self, key: str) -> bool:
        if key in self._known:
            self.duplicates += 1
            return False
        self._known.add(key)
        self.rows += 1
        return True

    def _close_when_full(self) -> None:
        if len(self._builder.rows) == self._session.rows_per_shard:
            self._write()

    def _write(self) -> None:
        number = self._session.first_shard + self._shards
        writer = ShardWriter(self._session, number, self._builder)
        if not self._session.is_written(number, writer.keys):
            writer.write()
        self._builder = ShardBuilder(self._form)
        self._shards += 1
