"""A finished store, opened for reading: rows by number or by key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.errors import StoreError
from limbeck.store.manifest import PROGRESS, Manifest, is_unfinished, read_manifest
from limbeck.store.records import RowRecord, TextRecord
from limbeck.store.shards import RowFormat, ShardReader, row_columns, shard_problem

_OPEN_SHARDS = 64
_CACHE_BYTES = 256 * 2**20


class TargetStore:
    """Rows of a store in a fixed order, by number 0 .. len - 1.

    Each shard's checksum is compared when it is first touched, or for all of them by `check`. Row groups that were read
    stay in memory, the latest 256 MB of them.
    Raises: StoreError when the folder is no store, its schema is newer, its capture is unfinished, or a shard is
    missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path | str, *, manifest: Manifest | None = None):
        self.folder = Path(folder)
        if manifest is None and is_unfinished(self.folder):
            raise StoreError(
                f"{self.folder}: its capture was stopped before its end ({PROGRESS}/ is there). "
                "Give the same capture command again; it goes on from there."
            )
        self.manifest = manifest or read_manifest(self.folder)
        self.form = RowFormat.of(self.manifest)
        for shard in self.manifest.shards:
            problem = shard_problem(self.folder, shard, checksum=False)
            if problem:
                raise StoreError(f"{problem} Restore the file from a copy, or capture into a new folder.")
        self._ends = np.cumsum([shard.rows for shard in self.manifest.shards], dtype=np.int64)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._checked: set[int] = set()
        self._groups: OrderedDict[tuple[int, int, tuple[str, ...]], Any] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.RLock()
        self._sorted_keys: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest row."""
        return self.manifest.context_tokens

    @property
    def teacher_name(self) -> str:
        """Whose targets these are."""
        return str(self.manifest.teacher.get("name", "unknown"))

    @property
    def teacher(self) -> str | None:
        """Fingerprint of that teacher."""
        return self.manifest.teacher.get("fingerprint")

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer that made the token ids."""
        return self.manifest.tokenizer

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids are below it; None in a store of texts."""
        return self.manifest.vocabulary_size

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states are there."""
        return self.manifest.hidden_layers

    def check(self) -> None:
        """Compare every shard's checksum now. Raises StoreError naming the first damaged one."""
        for number in range(len(self.manifest.shards)):
            self._reader(number)

    def all_keys(self) -> np.ndarray:
        """The keys of all rows in order, as an array of 32 ASCII bytes each."""
        found = [self._reader(number).column("key") for number in range(len(self.manifest.shards))]
        return np.array([key for part in found for key in part], dtype="S32")

    def tables(self) -> Iterator[Any]:
        """All rows in order as Arrow tables of a row group each, columns as they are on the disk."""
        for number in range(len(self.manifest.shards)):
            reader = self._reader(number)
            for group in range(len(reader.ends)):
                yield reader.group(group, self.form.schema().names)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """The row number of each key, -1 where the store has none."""
        if not len(self) or not len(keys):
            return np.full(len(keys), -1, dtype=np.int64)
        if self._sorted_keys is None:
            found = self.all_keys()
            order = np.argsort(found, kind="stable")
            self._sorted_keys = found[order], order
        in_order, order = self._sorted_keys
        asked = np.array([key.encode("ascii", "replace")[:33] for key in keys], dtype="S33")
        places = np.minimum(np.searchsorted(in_order, asked), len(in_order) - 1)
        return np.where(in_order[places] == asked, order[places], -1)

    def row(self, number: int, *, targets: bool = True, layers: Sequence[int] = ()) -> RowRecord:
        """One row of a store of targets; targets and hidden states are decoded only where they are asked for."""
        record = self._record(number, targets=targets, layers=layers)
        if not isinstance(record, RowRecord):
            raise StoreError(f"{self.folder}: this is a store of texts; it has no targets.")
        return record

    def text(self, number: int) -> TextRecord:
        """One prompt and completion of a store of texts."""
        record = self._record(number, targets=False, layers=())
        if not isinstance(record, TextRecord):
            raise StoreError(f"{self.folder}: this is a store of targets; it has no prompts.")
        return record

    def _record(self, number: int, *, targets: bool, layers: Sequence[int]) -> RowRecord | TextRecord:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        within = int(number - (self._ends[shard - 1] if shard else 0))
        with self._lock:
            reader = self._reader(shard)
            group, place = reader.locate(within)
            columns = row_columns(self._group(shard, group, self._names(targets, layers)), place)
        try:
            return self.form.decode(columns, targets=targets, layers=layers)
        except StoreError as error:
            raise StoreError(f"{reader.path}: row {within}: {error}") from error

    def _names(self, targets: bool, layers: Sequence[int]) -> tuple[str, ...]:
        wanted = tuple(f"layer_{layer}_" for layer in layers)
        return tuple(
            name
            for name in self.form.schema().names
            if not (name.startswith(("target_", "next_log_prob_")) and not targets)
            and not (name.startswith("layer_") and not name.startswith(wanted))
        )

    def _group(self, shard: int, group: int, names: tuple[str, ...]) -> Any:
        place = (shard, group, names)
        if place in self._groups:
            self._groups.move_to_end(place)
            return self._groups[place]
        table = self._reader(shard).group(group, names)
        self._groups[place] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._groups) > 1:
            self._cached_bytes -= self._groups.popitem(last=False)[1].nbytes
        return table

    def _reader(self, number: int) -> ShardReader:
        with self._lock:
            if number in self._readers:
                self._readers.move_to_end(number)
                return self._readers[number]
            check = number not in self._checked
            reader = ShardReader(self.folder, self.manifest.shards[number], self.form, check=check)
            self._checked.add(number)
            self._readers[number] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader
