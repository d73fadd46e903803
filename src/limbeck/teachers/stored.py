"""A teacher that was written down: its targets, and its text, from a store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import StoreError, VocabularyError
from limbeck.core.types import Batch, SparseTargets, Targets
from limbeck.store.records import RowRecord, batch_keys
from limbeck.store.store import TargetStore
from limbeck.teachers.base import TargetSource, Wanted, refuse_missing
from limbeck.teachers.capture import NEXT_LOG_PROB

_KEYS_NAMED = 5


class StoredTargets:
    """Hands over what a store holds about the rows of a batch, found by `Batch.keys` or by the rows' content.

    expected_*: what the store must be of, None for whatever it is. Every row's token ids are compared with the store's, so
    that no target can reach another token.
    Raises: StoreError when the store is of another tokenizer, vocabulary or teacher than expected, or is damaged.
    """

    def __init__(
        self,
        store: TargetStore | Path | str,
        *,
        expected_tokenizer: str | None = None,
        expected_vocabulary_size: int | None = None,
        expected_teacher: str | None = None,
    ):
        self.store = store if isinstance(store, TargetStore) else TargetStore(store)
        self._wanted = Wanted()
        if self.store.manifest.kind != "targets":
            raise StoreError(
                f"{self.store.folder}: this store holds texts, not targets. Train on it with cross-entropy, or capture targets."
            )
        self._expect(
            "tokenizer",
            expected_tokenizer,
            self.store.tokenizer,
            "Capture with this tokenizer, or use an objective across tokenizers.",
        )
        self._expect(
            "vocabulary size",
            expected_vocabulary_size,
            self.store.vocabulary_size,
            "Capture with the teacher of this run.",
        )
        self._expect(
            "teacher",
            expected_teacher,
            self.store.teacher,
            "Capture with the teacher of this run, or name that store's teacher in the recipe.",
        )

    def _expect(self, what: str, expected: object, found: object, advice: str) -> None:
        if expected is not None and expected != found:
            raise StoreError(
                f"{self.store.folder}: made with another {what}: {found} ({self.store.teacher_name}), where {expected} is expected. {advice}"
            )

    @property
    def name(self) -> str:
        """The stored teacher's name."""
        return f"{self.store.teacher_name} (stored)"

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids of the targets are below it."""
        return self.store.vocabulary_size

    def prepare(self, wanted: Wanted) -> None:
        """Say what will be wanted. Raises: TeacherError, or StoreError naming layers that were not captured."""
        offers = [
            "logits",
            *(["hidden"] if self.store.hidden_layers else []),
            *(["features"] if wanted.features == (NEXT_LOG_PROB,) else []),
        ]
        refuse_missing(
            wanted, source=self.name, offers=offers,
            advice="Capture again with the hidden layers that the objectives need, or use a live teacher.",
        )  # fmt: skip
        missing = sorted(set(wanted.hidden) - set(self.store.hidden_layers))
        if missing:
            raise StoreError(
                f"{self.store.folder}: hidden states of layers {missing} are wanted, but the store has layers "
                f"{list(self.store.hidden_layers)}. Capture them, or ask for these."
            )
        self._wanted = wanted

    def targets(self, batch: Batch) -> Targets:
        """What the store holds about a batch, on its device.

        Raises: StoreError when a row is not in the store or its shard is damaged; VocabularyError when a row's token
        ids are not those that were captured.
        """
        rows = self.rows(batch)
        ids_BT = batch.input_ids_BT.cpu().numpy()
        for row, ids in zip(rows, ids_BT, strict=True):
            if not np.array_equal(ids[: len(row.input_ids)], row.input_ids):
                raise VocabularyError(
                    f"{self.store.folder}: a row of the batch has other token ids than the row of the store it is said to be. "
                    "Rows in another tokenizer's ids need an objective across tokenizers (ULD or chunk likelihood)."
                )
        device = batch.input_ids_BT.device
        shape = ids_BT.shape
        hidden = {
            layer: _stack([row.hidden[layer] for row in rows], shape, 0.0).to(device) for layer in self._wanted.hidden
        }
        features: dict[str, Tensor] = {}
        if NEXT_LOG_PROB in self._wanted.features:
            unknown = np.full(shape[1], np.nan, dtype=np.float32)
            known = [unknown[: len(row.input_ids)] if row.next_log_prob is None else row.next_log_prob for row in rows]
            features[NEXT_LOG_PROB] = _stack(known, shape, np.nan).to(device)
        return Targets(sparse_targets(rows, shape, device) if self._wanted.logits else None, hidden, features)

    def rows(self, batch: Batch) -> list[RowRecord]:
        """The store's rows for a batch's, with what was said to be wanted. Raises: StoreError naming rows it does not have."""
        keys = batch_keys(batch)
        numbers = self.store.find(keys)
        absent = [key for key, number in zip(keys, numbers, strict=True) if number < 0]
        if absent:
            raise StoreError(_holes(self.store, absent))
        return [self.store.row(int(number), layers=self._wanted.hidden) for number in numbers]

    def missing_keys(self, batches: Iterable[Batch]) -> list[str]:
        """Keys of rows that the store does not have, in order; for a look before training starts."""
        missing: list[str] = []
        for batch in batches:
            keys = batch_keys(batch)
            missing += [key for key, number in zip(keys, self.store.find(keys), strict=True) if number < 0]
        return missing

    def check(self, batches: Iterable[Batch]) -> None:
        """Before training: every shard is whole and every row is there. Raises: StoreError naming what is not."""
        self.store.check()
        missing = self.missing_keys(batches)
        if missing:
            raise StoreError(_holes(self.store, missing))


def _holes(store: TargetStore, keys: Sequence[str]) -> str:
    named = ", ".join(keys[:_KEYS_NAMED]) + (", ..." if len(keys) > _KEYS_NAMED else "")
    return (
        f"{store.folder}: the store has no targets for {len(keys)} of the rows asked for ({named}). Capture the same text with the same "
        "context length and tokenizer (rows that are there are not captured twice), or train on the store's own rows."
    )


def sparse_targets(
    rows: Sequence[RowRecord], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> SparseTargets:
    """Rows' targets as tensors [B, T, K], K that of the widest row."""
    width = max(0 if row.ids is None else row.ids.shape[1] for row in rows)
    wide = (*shape, width)

    def stacked(name: str, nothing: float, size: tuple[int, ...]) -> Tensor:
        return _stack([getattr(row, name) for row in rows], size, nothing).to(device)

    return SparseTargets(
        stacked("ids", -1, wide),
        stacked("log_probs", -np.inf, wide),
        stacked("tail", 0.0, tuple(shape)),
        stacked("weights", 0.0, wide) if rows[0].weights is not None else None,
    )


def _stack(arrays: Sequence[np.ndarray], shape: tuple[int, ...], nothing: float) -> Tensor:
    """Arrays of different lengths and widths in one tensor, `nothing` where they do not reach."""
    if len(shape) == 2 and arrays[0].ndim == 2:
        shape = (*shape, arrays[0].shape[1])
    out = np.full(shape, nothing, dtype=arrays[0].dtype)
    for target, array in zip(out, arrays, strict=True):
        target[tuple(slice(size) for size in array.shape)] = array
    return torch.from_numpy(out)


_: type[TargetSource] = StoredTargets
