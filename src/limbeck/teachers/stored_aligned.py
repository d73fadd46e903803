"""A store's targets for a student with another tokenizer: how likely the teacher finds stretches of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import StoreError, VocabularyError
from limbeck.core.types import AlignedText, Batch, Targets
from limbeck.models.borders import Offsets, meet, offsets_in_text, settled_until
from limbeck.models.token_bytes import TokenBytes
from limbeck.store.records import RowRecord
from limbeck.teachers.base import TargetSource, Wanted, refuse_missing
from limbeck.teachers.stored_windows import EncodedRow, StoreWindows, Stretch, text_tokens


class StoredAlignedTargets:
    """Likelihoods of chunks of text from a store, for rows of a `StoreWindows` that reads it with another tokenizer.

    tokenizer: the student's; tokens: its `read_token_bytes`. Borders of tokens are compared in bytes of the captured text, as
    `models.alignment` does for a live teacher; here the teacher's tokens are those it was captured with. Sorted
    probabilities are those of the kept entries.
    Raises: StoreError when the store does not keep text and the log-probability of every token.
    """

    def __init__(self, windows: StoreWindows, *, tokenizer: Any, tokens: TokenBytes):
        if windows.encode is None or windows.store.manifest.kind != "targets":
            raise StoreError(
                f"{windows.store.folder}: likelihoods of chunks are for windows of a store of targets read with another tokenizer."
            )
        if windows.store.row(0).next_log_prob is None:
            raise StoreError(
                f"{windows.store.folder}: the store does not keep the log-probability of every token, which an objective across "
                "tokenizers needs. Capture again from a teacher that gives whole distributions."
            )
        self.windows, self._tokenizer, self._tokens = windows, tokenizer, tokens

    @property
    def name(self) -> str:
        """The stored teacher's name."""
        return f"{self.windows.store.teacher_name} (stored)"

    @property
    def vocabulary_size(self) -> int | None:
        """None: nothing is said in the student's vocabulary."""
        return None

    def prepare(self, wanted: Wanted) -> None:
        """Raises: TeacherError when more than `aligned` is wanted."""
        refuse_missing(
            wanted, source=self.name, offers=("aligned",),
            advice="Logits of another vocabulary mean nothing to the student: use an objective across tokenizers.",
        )  # fmt: skip

    def targets(self, batch: Batch) -> Targets:
        """What the store says about the chunks of a batch, on its device.

        Raises: StoreError for rows that are not the store's; VocabularyError for rows that the windows did not encode.
        """
        store = self.windows.store
        numbers = store.find(batch.keys or ())
        if batch.keys is None or (numbers < 0).any():
            raise StoreError(
                f"{store.folder}: the batch holds rows that are not of this store. Train on the store's own rows."
            )
        encoded = self.windows.encode_rows(numbers.tolist())
        ids_BT, scored_BT = batch.input_ids_BT.cpu().numpy(), batch.loss_mask_BT.cpu().numpy()
        rows = []
        for number, row, ids, scored in zip(numbers, encoded, ids_BT, scored_BT, strict=True):
            if ids[: len(row.ids)].tolist() != row.ids:
                raise VocabularyError(
                    f"{store.folder}: a row of the batch was encoded by another tokenizer than the windows'."
                )
            rows.append(self._align(row, scored, store.row(int(number))))
        return Targets(aligned=_to_tensors(rows, ids_BT.shape, batch.input_ids_BT.device))

    def _align(self, encoded: EncodedRow, scored: np.ndarray, row: RowRecord) -> _AlignedRow:
        assert row.next_log_prob is not None
        assert row.log_probs is not None
        found = _AlignedRow(np.full(len(scored), -1, dtype=np.int64))
        said, is_text = np.append(np.asarray(row.scored)[1:], False), text_tokens(row)
        for part, (stretch, low, high) in enumerate(encoded.parts):
            places = np.arange(stretch.first_token, stretch.end_token)
            places = places[is_text[places]]
            if high == low or not len(places):
                continue
            is_last = part == len(encoded.parts) - 1
            student = offsets_in_text(np.asarray(encoded.ids[low:high]), stretch.text, self._tokens, self._tokenizer)
            meeting = meet(
                student, _teacher_offsets(row, places, stretch),
                student_scored=scored[low:high], teacher_scored=said[places - 1] & (places > 0),
                until=_trusted_until(row, places, stretch, is_closed=stretch.closed or not is_last),
            )  # fmt: skip
            chunk = meeting.student_chunk
            found.student_chunk[low:high] = np.where(chunk >= 0, chunk + len(found.chunk_log_probs), -1)
            sums = np.zeros(meeting.chunks)
            known = meeting.teacher_chunk >= 0
            np.add.at(sums, meeting.teacher_chunk[known], row.next_log_prob[places[known] - 1].astype(np.float64))
            found.chunk_log_probs.extend(sums.tolist())
            for mine, its in zip(meeting.student_last + low, places[meeting.teacher_last], strict=True):
                if said[its] and mine + 1 < len(scored) and scored[mine + 1]:
                    found.positions.append(int(mine))
                    found.sorted_probs.append(np.exp(row.log_probs[its]))
        return found


@dataclass
class _AlignedRow:
    student_chunk: np.ndarray
    chunk_log_probs: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sorted_probs: list[np.ndarray] = field(default_factory=list)


def _teacher_offsets(row: RowRecord, places: np.ndarray, stretch: Stretch) -> Offsets:
    ends = np.cumsum(np.asarray(row.token_bytes, dtype=np.int64)[places]) - stretch.skipped_bytes
    return Offsets(-stretch.skipped_bytes, ends, np.ones(len(ends), dtype=bool))


def _trusted_until(row: RowRecord, places: np.ndarray, stretch: Stretch, *, is_closed: bool) -> int:
    """Up to which byte of the stretch's text borders mean the same to both."""
    assert row.text is not None
    begins = int(np.asarray(row.token_bytes)[: stretch.first_token].sum()) + stretch.skipped_bytes
    data = stretch.text.encode()
    captured = row.text[begins : begins + len(data)]
    if captured == data:
        return settled_until(data, is_closed=is_closed)
    same = np.frombuffer(captured, np.uint8) == np.frombuffer(data[: len(captured)], np.uint8)
    return int(same.argmin()) if not same.all() else len(same)


def _to_tensors(rows: Sequence[_AlignedRow], shape: tuple[int, ...], device: torch.device) -> AlignedText:
    chunks = max((len(row.chunk_log_probs) for row in rows), default=0)
    positions = max((len(row.positions) for row in rows), default=0)
    kept = max((len(probs) for row in rows for probs in row.sorted_probs), default=0)
    log_prob_BC, mask_BC = torch.zeros(len(rows), chunks), torch.zeros(len(rows), chunks, dtype=torch.bool)
    position_BP = torch.full((len(rows), positions), -1, dtype=torch.long)
    probs_BPK = torch.zeros(len(rows), positions, kept)
    student_BT: Tensor = torch.full(tuple(shape), -1, dtype=torch.long)
    for number, row in enumerate(rows):
        student_BT[number] = torch.from_numpy(row.student_chunk)
        log_prob_BC[number, : len(row.chunk_log_probs)] = torch.tensor(row.chunk_log_probs)
        mask_BC[number, : len(row.chunk_log_probs)] = True
        position_BP[number, : len(row.positions)] = torch.tensor(row.positions, dtype=torch.long)
        for place, probs in enumerate(row.sorted_probs):
            probs_BPK[number, place, : len(probs)] = torch.from_numpy(probs)
    return AlignedText(*(tensor.to(device) for tensor in (student_BT, log_prob_BC, mask_BC, position_BP, probs_BPK)))


_: type[TargetSource] = StoredAlignedTargets
