"""One row of a target store, as it is handed to a writer and as it comes back.

A row is one window of text of T tokens. Position t of the targets speaks of token t+1. Targets are kept at positions
whose next token is scored; everywhere else a row that was read back says "unknown": id -1, all mass in the tail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from limbeck.core.types import Batch


@dataclass
class RowRecord:
    """What a teacher says about one window.

    input_ids: T token ids. document_starts: sorted positions > 0 at which another document begins. scored: T booleans,
    True where the token is a target that counts. ids [T, K]: kept token ids, -1 in unused places. log_probs [T, K]: the
    teacher's log-probabilities of them in nats at temperature 1, -inf in unused places. tail [T]: log of the mass of
    all other tokens. ids, log_probs and tail are None for a row without targets.
    weights [T, K]: for sampled targets, see `SparseTargets`. next_log_prob [T]: log-probability of the token that
    follows, kept or not; NaN where it is unknown. hidden: [T, D] by layer. text: the bytes of the window and
    token_bytes: how many of them belong to each token (0 for special tokens).
    """

    input_ids: Sequence[int] | np.ndarray
    document_starts: Sequence[int]
    scored: Sequence[bool] | np.ndarray
    ids: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    tail: np.ndarray | None = None
    weights: np.ndarray | None = None
    next_log_prob: np.ndarray | None = None
    hidden: Mapping[int, np.ndarray] = field(default_factory=dict)
    text: bytes | None = None
    token_bytes: np.ndarray | None = None

    @property
    def key(self) -> str:
        """The row's name in a store."""
        return row_key(self.input_ids, self.document_starts)


@dataclass(frozen=True)
class TextRecord:
    """A prompt and what a teacher wrote to it. Only the completion is scored; any tokenizer may read it."""

    prompt: str
    completion: str

    @property
    def key(self) -> str:
        """The row's name in a store."""
        prompt = self.prompt.encode()
        return _digest(len(prompt).to_bytes(8, "little") + prompt + self.completion.encode())


def row_key(input_ids: Sequence[int] | np.ndarray, document_starts: Sequence[int]) -> str:
    """A name made of the content alone: BLAKE2b, 128 bits, of token ids and document starts, in hexadecimal."""
    ids = np.asarray(input_ids, dtype="<i4")
    return _digest(len(ids).to_bytes(8, "little") + ids.tobytes() + np.asarray(document_starts, dtype="<i4").tobytes())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def usual_scored(length: int, document_starts: Sequence[int]) -> np.ndarray:
    """The mask of a window of running text: every token counts but the first of the window and of each document."""
    scored = np.ones(length, dtype=bool)
    scored[:1] = False
    scored[list(document_starts)] = False
    return scored


def batch_rows(batch: Batch) -> list[RowRecord]:
    """The rows of a batch without targets."""
    ids_BT = batch.input_ids_BT.cpu().numpy().astype(np.int32)
    mask_BT = batch.loss_mask_BT.cpu().numpy().astype(bool)
    if batch.document_ids_BT is None:
        starts: list[list[int]] = [[] for _ in ids_BT]
    else:
        documents_BT = batch.document_ids_BT.cpu().numpy()
        starts = [(np.flatnonzero(np.diff(row)) + 1).tolist() for row in documents_BT]
    return [RowRecord(*parts) for parts in zip(ids_BT, starts, mask_BT, strict=True)]


def batch_keys(batch: Batch) -> list[str]:
    """The name of each row of a batch: given by the batch, or made of its content."""
    return list(batch.keys) if batch.keys is not None else [row.key for row in batch_rows(batch)]


def make_batch(rows: Sequence[RowRecord], *, width: int) -> Batch:
    """A batch [B, width] of rows as they were captured; shorter ones are padded on the right with 0, not scored."""
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    begins_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        ids_BT[number, :length] = torch.as_tensor(np.asarray(row.input_ids, dtype=np.int64))
        mask_BT[number, :length] = torch.as_tensor(np.asarray(row.scored, dtype=bool))
        begins_BT[number, list(row.document_starts)] = 1
    keys = tuple(row.key for row in rows)
    if not begins_BT.any():
        return Batch(ids_BT, mask_BT, keys=keys)
    positions_T = torch.arange(width)
    last_begin_BT = torch.where(begins_BT == 1, positions_T, 0).cummax(dim=1).values
    return Batch(ids_BT, mask_BT, begins_BT.cumsum(dim=1), positions_T - last_begin_BT, keys)
