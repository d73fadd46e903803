"""Writing a store so that a kill at any moment loses at most the shards in work.

While a capture runs, `progress/` holds `capture.json` (where it began) and one small file beside each finished shard with
its checksum. The manifest gets the new shards at the very end, in one write; then `progress/` goes. Whoever gives the
same command again finds the finished shards, makes the others, and ends with the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError, StoreError
from limbeck.core.files import read_json, sha256_file, write_atomic, write_json
from limbeck.store.manifest import (
    PROGRESS,
    Manifest,
    ShardFacts,
    is_store,
    is_unfinished,
    read_manifest,
    shard_file,
    write_manifest,
)
from limbeck.store.shards import ShardBuilder
from limbeck.store.store import TargetStore

_DONE = ".done-progress"


class CaptureSession:
    """One capture into a folder: new, continued after a stop, or appended to what is there.

    manifest: what the new rows are, without shards. main: whether this process writes what belongs to all of them.
    before: the store without this capture's shards. first_shard: number of this capture's first one.
    Nothing is written before `begin`.
    Raises: StoreError when the folder holds a store of another teacher, tokenizer or codec, or something else.
    """

    def __init__(self, folder: Path | str, manifest: Manifest, *, main: bool = True):
        self.folder, self.main = Path(folder), main
        self.rows_per_shard = manifest.rows_per_shard
        there = read_manifest(self.folder) if is_store(self.folder) else None
        if there is None and not is_unfinished(self.folder) and self.folder.exists() and any(self.folder.iterdir()):
            raise StoreError(f"{self.folder}: this folder is not empty and holds no store. Capture into a new folder.")
        different = there.differences(manifest) if there is not None else []
        if different:
            raise StoreError(
                f"{self.folder}: the store there cannot take these rows (there against now): {'; '.join(different)}. "
                "Capture into another folder."
            )
        self.first_shard = self._planned_first(default=len(there.shards) if there is not None else 0)
        self.before = manifest.with_shards(())
        if there is not None and self.first_shard:
            self.before = there.with_shards(
                there.shards[: self.first_shard],
                captures=tuple(first for first in there.captures if first < self.first_shard),
                context_tokens=max(there.context_tokens, manifest.context_tokens),
                teacher={**there.teacher, **manifest.teacher},
            )

    def _planned_first(self, *, default: int) -> int:
        plan = self.folder / PROGRESS / "capture.json"
        if not plan.exists():
            return default
        try:
            words = read_json(plan)
            first, rows = int(words["first_shard"]), int(words["rows_per_shard"])
        except (LimbeckError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{plan}: damaged ({error}). Remove the folder it is in and capture again.") from error
        if rows != self.rows_per_shard:
            raise StoreError(
                f"{self.folder}: the capture that was stopped here wrote {rows} rows to a shard, now {self.rows_per_shard} "
                "are asked for. Give the same settings, or capture into another folder."
            )
        return first

    def known_keys(self) -> set[str]:
        """The keys of rows that the store had before this capture."""
        return {key.decode() for key in TargetStore(self.folder, manifest=self.before).all_keys()}

    def begin(self) -> None:
        """Say on the disk what is being captured."""
        if not self.main:
            return
        plan = {"first_shard": self.first_shard, "rows_per_shard": self.rows_per_shard}
        write_json(self.folder / PROGRESS / "capture.json", plan)
        shutil.rmtree(self.folder / _DONE, ignore_errors=True)
        if not is_store(self.folder):
            write_manifest(self.folder, self.before)

    def is_written(self, number: int, keys: Sequence[str]) -> bool:
        """Whether shard `number` was written whole by a run that was stopped.

        Raises: StoreError when it holds other rows than these: the text or its order is not what it was.
        """
        note = self._read_note(number)
        if note is None:
            return False
        facts, digest = note
        if digest != _keys_digest(keys):
            raise StoreError(
                f"{self.folder}: the capture that was stopped here had other text in shard {number} (or the same in another order). "
                "Give the same text, context length and batch size, or capture into another folder."
            )
        path = self.folder / facts.file
        return path.exists() and sha256_file(path) == facts.sha256

    def write_shard(self, number: int, content: bytes, keys: Sequence[str], *, tokens: int, scored_tokens: int) -> None:
        """Put a shard on the disk, and then the note that it is whole."""
        checksum = hashlib.sha256(content).hexdigest()
        facts = ShardFacts(shard_file(number), len(keys), tokens, scored_tokens, len(content), checksum)
        write_atomic(self.folder / facts.file, content)
        write_json(self._note(number), {"keys": _keys_digest(keys), "facts": asdict(facts)})

    def manifest_with(self, shards: int, **changes: Any) -> Manifest:
        """The manifest once this capture's `shards` shards are all there. Raises: StoreError naming the first that is not."""
        found = []
        for number in range(self.first_shard, self.first_shard + shards):
            note = self._read_note(number)
            if note is None:
                raise StoreError(
                    f"{self.folder}: shard {number} was not written. When several processes capture, all of them need the "
                    "same folder and the same text. Give the same command again."
                )
            found.append(note[0])
        captures = (*self.before.captures, self.first_shard) if self.first_shard else (0,)
        return self.before.with_shards((*self.before.shards, *found), captures=captures, **changes)

    def finish(self, manifest: Manifest) -> None:
        """Make the capture part of the store."""
        for stray in [*self.folder.glob(".*.tmp"), *self.folder.glob("shards/.*.tmp")]:
            stray.unlink(missing_ok=True)
        write_atomic(self.folder / "README.md", _card(manifest))
        write_manifest(self.folder, manifest)
        (self.folder / PROGRESS).rename(self.folder / _DONE)
        shutil.rmtree(self.folder / _DONE)

    def _note(self, number: int) -> Path:
        return self.folder / PROGRESS / f"{number:05d}.json"

    def _read_note(self, number: int) -> tuple[ShardFacts, str] | None:
        path = self._note(number)
        if not path.exists():
            return None
        try:
            words = read_json(path)
            return ShardFacts(**words["facts"]), str(words["keys"])
        except (LimbeckError, KeyError, TypeError):
            return None


def _keys_digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _card(manifest: Manifest) -> str:
    """A data set card, so that `datasets.load_dataset(folder)` finds the shards and a reader knows what they are."""
    columns = {
        "targets": "`key`, `input_ids`, `document_starts`, `scored` (packed bits; null for running text), `text`, `token_bytes`, the "
        "teacher's log-probability of each next token (`next_log_prob_*`), its targets (`target_*`), hidden states (`layer_*`). "
        "The byte planes of targets are described in limbeck's `store/codec.py`; `limbeck store inspect` prints what is in them.",
        "text": "`key`, `prompt`, `completion`.",
    }[manifest.kind]
    return (
        "---\nconfigs:\n- config_name: default\n  data_files: shards/*.parquet\n---\n"
        f"# Targets of {manifest.teacher.get('name', 'a teacher')}\n\n"
        f"A limbeck target store: {manifest.rows:,} rows, {manifest.tokens:,} tokens. Facts and checksums are in `manifest.json`.\n\n"
        f"Columns: {columns}\n"
    )


class ShardWriter:
    """Puts the rows of a builder on the disk as shard `number` of a session."""

    def __init__(self, session: CaptureSession, number: int, builder: ShardBuilder):
        self.session, self.number, self.builder = session, number, builder

    @property
    def keys(self) -> list[str]:
        """Names of the rows so far."""
        return [row["key"] for row in self.builder.rows]

    def write(self) -> None:
        """Encode and write."""
        builder = self.builder
        self.session.write_shard(
            self.number, builder.to_bytes(), self.keys, tokens=builder.tokens, scored_tokens=builder.scored_tokens
        )


class BackgroundWriter:
    """Runs jobs in order on one thread, so that encoding and disk do not hold up a teacher.

    At most `waiting` jobs wait; then `submit` does. A job's error comes out of the next `submit` or of `close`.
    """

    def __init__(self, *, waiting: int = 8):
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done."""
        self._raise()
        self._jobs.put(job)

    def close(self) -> None:
        """Wait until all jobs are done."""
        self._jobs.put(None)
        self._thread.join()
        self._raise()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
            return
        self._error = self._error or InterruptedError()
        with contextlib.suppress(BaseException):
            self.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            # After an error jobs are only taken off the queue, so that nobody waits for its room.
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error
