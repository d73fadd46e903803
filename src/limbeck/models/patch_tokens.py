"""Rows of symbols as a teacher reads them: each patch is one of its tokens, found by its bytes.

A document's first patch is predicted from what the teacher reads before a text. What the row's beginning has cut is read
for what follows, but nothing is said about it (what it was is not known; if it was the first patch of a longer token, the
second is taken for a token too). A piece that is no token is read as single bytes. Patches that are full
are joined where together they are a longer token: that is how it was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from limbeck.core.symbols import BOS, EOD, EOP
from limbeck.core.types import Batch
from limbeck.models.byte_trie import ByteTrie
from limbeck.models.documents import document_positions
from limbeck.nn.patches import read_patches
from limbeck.objectives.byte_trie import FULL, INSIDE, START


@dataclass(frozen=True)
class PatchTokens:
    """What the teacher has to read, and where in its trie the student's symbols stand.

    teacher_batch: rows [B, U] of its tokens, padded at the end, with documents packed as the student's. row_I, source_I:
    where in them the prediction stands that speaks of each patch. start_I: the node where the patch begins; not the root
    where it goes on with a token that began before. place_M: b T + t of each position of the student that is scored (the
    symbol at t+1 counts) and of which the teacher can say something; patch_M its patch among I (never falling), node_M its
    node, state_M how it is met there (`objectives.byte_trie.INSIDE` and others).
    """

    teacher_batch: Batch
    row_I: Tensor
    source_I: Tensor
    start_I: Tensor
    place_M: Tensor
    patch_M: Tensor
    node_M: Tensor
    state_M: Tensor


def patch_tokens(
    batch: Batch, trie: ByteTrie, *, opening: Sequence[int], adds_space: bool = False, adds_to_space: bool = True,
    limit_tokens: int | None = None,
) -> PatchTokens:  # fmt: skip
    """Read rows of symbols, cut anywhere, as the teacher's tokens. The batch lies on the processor.

    opening: what the teacher reads before a text; without it the first token of every document is not predicted.
    adds_space: its tokenizer writes a space before a document; adds_to_space: also before one that begins with a space. If
    not, such a document's first patch is read as it is, and nothing is said about it: to the teacher " a" and "a" are one
    text. limit_tokens: most tokens that it can read in a document; nothing is said about what comes after.
    """
    layout = read_patches(batch.input_ids_BT, patch_bytes=trie.patch_bytes, document_ids_BT=batch.document_ids_BT)
    width = batch.input_ids_BT.shape[1]
    first_M = torch.full_like(layout.sizes_M, -1)
    is_first_N = layout.slots_N == 0
    first_M[layout.patch_N[is_first_N]] = layout.places_N[is_first_N]
    flat = batch.input_ids_BT.flatten().tolist()
    rows = [_TeacherRow(trie, opening, adds_space, adds_to_space, limit_tokens) for _ in range(len(batch.input_ids_BT))]
    before = None
    for first, size, row, document in zip(
        first_M.tolist(), layout.sizes_M.tolist(), layout.rows_M.tolist(), layout.documents_M.tolist(), strict=True
    ):
        if size:
            is_new = document != before
            rows[row].read(first, flat[first : first + size], is_new=is_new, is_cut=is_new and first % width == 0)
            before = document
    for reader in rows:
        reader.end()
    return _to_tensors(batch, rows, trie)


@dataclass
class _Patch:
    """A patch of bytes that has been read and not yet been written: it may be part of a longer token.

    is_closed: it ends in the row. first: the place of its first symbol.
    """

    first: int
    content: bytes
    is_closed: bool


@dataclass
class _TeacherRow:
    """One row as the teacher reads it, written patch by patch."""

    trie: ByteTrie
    opening: Sequence[int]
    adds_space: bool
    adds_to_space: bool
    limit_tokens: int | None
    ids: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    predicted: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Of each patch: its first place, its bytes, the teacher's position that speaks of it, and the node it begins at."""
    document: int = -1
    _waiting: list[_Patch] = field(default_factory=list)
    _begins_at: int = 0
    _is_fresh: bool = True
    _is_over: bool = False
    _is_cut: bool = False
    _opens_text: bool = False

    def read(self, first: int, symbols: list[int], *, is_new: bool, is_cut: bool) -> None:
        """Take up one patch. is_new: it begins a document. is_cut: its beginning may lie before the row."""
        if is_new:
            self.end()
            self._is_fresh = True
        elif self._waiting:
            self._waiting[-1].is_closed = True
        if symbols[0] >= BOS:
            self.end()
            self._read_special(first, symbols[0])
            return
        if self._is_fresh:
            self._begin(is_cut=is_cut)
        is_closed = symbols[-1] == EOP
        content = bytes(symbols[: len(symbols) - is_closed])
        self._waiting.append(_Patch(first, content, is_closed))
        if is_closed and len(content) < self.trie.patch_bytes - 1:
            self.end()

    def end(self) -> None:
        """Write what was held back: nothing joins on to it any more."""
        waiting, self._waiting = self._waiting, []
        while waiting:
            waiting = waiting[self._write_first(waiting) :]

    def _write_first(self, waiting: list[_Patch]) -> int:
        """Write the longest run of patches that is one token, or else what the first is; return how many are dealt with.

        Patches that end with the row before their token is whole are predicted, and not read. Where the full ones among
        them are a token too it is not known of which token they are part, and nothing is said of what follows them.
        """
        whole = len(waiting) - (not waiting[-1].is_closed)
        space = b" " if self._opens_text and self.adds_space else b""
        if space and not self.adds_to_space and waiting[0].content[:1] == b" ":
            space, self._is_cut = b"", True
        goes_on = whole < len(waiting) and self.trie.find(space + _join(waiting)) >= 0
        most = -(-self.trie.longest_bytes // (self.trie.patch_bytes - 1))
        for count in range(min(whole, most), 0, -1):
            for lead in dict.fromkeys((space, b"")):
                if (token := self.trie.token_of.get(lead + _join(waiting[:count]))) is not None:
                    if space and not lead:
                        self._write_bytes(space)
                    self._predict(waiting[:count], lead)
                    self._write([token])
                    return len(waiting) if goes_on else count
        if goes_on or not whole:
            self._predict(waiting, space)
            return len(waiting)
        self._predict(waiting[:1], space)
        self._write_bytes(space + waiting[0].content)
        return 1

    def _predict(self, patches: list[_Patch], lead: bytes) -> None:
        source = self._last()
        read = lead
        for patch in patches:
            if source >= 0 and not self._is_cut:
                start = self.trie.find(read) if read else 0
                self.predicted.append((patch.first, len(patch.content), source, start))
            read += patch.content
        self._is_cut = self._opens_text = False

    def _read_special(self, first: int, symbol: int) -> None:
        if symbol == EOD and not self._is_fresh:
            if self._last() >= 0:
                self.predicted.append((first, 0, self._last(), 0))
            if self.trie.end_id is not None:
                self._write([self.trie.end_id])
                self._opens_text = True
                return
        self._is_fresh = True
        if symbol == BOS:
            self._begin(is_cut=False)

    def _begin(self, *, is_cut: bool) -> None:
        self.document, self._begins_at = self.document + 1, len(self.ids)
        self._is_fresh, self._is_over, self._is_cut, self._opens_text = False, False, is_cut, not is_cut
        self._write(list(self.opening))

    def _last(self) -> int:
        return -1 if self._is_over or len(self.ids) == self._begins_at else len(self.ids) - 1

    def _write_bytes(self, data: bytes) -> None:
        tokens = [self.trie.token_of.get(data[place : place + 1]) for place in range(len(data))]
        if None in tokens:
            self._begin(is_cut=False)
            self._opens_text = False
        self._write([token for token in tokens if token is not None])

    def _write(self, ids: list[int]) -> None:
        limit = self.limit_tokens
        self._is_over |= limit is not None and len(self.ids) - self._begins_at + len(ids) > limit
        if not self._is_over:
            self.ids += ids
            self.documents += [self.document] * len(ids)


def _join(patches: Sequence[_Patch]) -> bytes:
    return b"".join(patch.content for patch in patches)


def _to_tensors(batch: Batch, rows: Sequence[_TeacherRow], trie: ByteTrie) -> PatchTokens:
    table = np.asarray(
        [(number, *found) for number, row in enumerate(rows) for found in row.predicted], dtype=np.int64
    ).reshape(-1, 5)
    row_I, first_I, size_I, source_I, start_I = table.T
    flat = np.append(batch.input_ids_BT.flatten().numpy(), -1)
    slot_P = np.arange(trie.patch_bytes)
    place_IP = first_I[:, None] + slot_P - 1
    ids_IP = flat[np.minimum(place_IP[:, 1:], len(flat) - 1)]
    node_IP = trie.walk(start_I, np.where(slot_P[:-1] < size_I[:, None], ids_IP, -1))
    patch_M, slot_M = np.nonzero((node_IP >= 0) & _is_scored(batch)[place_IP.clip(-1, len(flat) - 2)])
    state_M = np.where(slot_M == 0, START, np.where(slot_M == trie.patch_bytes - 1, FULL, INSIDE))
    found = (row_I, source_I, start_I, place_IP[patch_M, slot_M], patch_M, node_IP[patch_M, slot_M], state_M)
    return PatchTokens(_teacher_batch(rows, trie), *(torch.from_numpy(np.ascontiguousarray(part)) for part in found))


def _is_scored(batch: Batch) -> np.ndarray:
    """True at b T + t where the symbol at t+1 counts and is of the same document; False at -1."""
    scored_BT = torch.zeros_like(batch.loss_mask_BT)
    scored_BT[:, :-1] = batch.loss_mask_BT[:, 1:]
    if batch.document_ids_BT is not None:
        scored_BT[:, :-1] &= batch.document_ids_BT[:, 1:] == batch.document_ids_BT[:, :-1]
    return np.append(scored_BT.flatten().numpy(), False)


def _teacher_batch(rows: Sequence[_TeacherRow], trie: ByteTrie) -> Batch:
    width = max(1, max(len(row.ids) for row in rows))
    padding = next(iter(trie.token_of.values())) if trie.end_id is None else trie.end_id
    ids_BU = torch.full((len(rows), width), padding, dtype=torch.long)
    documents_BU = torch.zeros_like(ids_BU)
    for number, row in enumerate(rows):
        ids_BU[number, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
        documents_BU[number, : len(row.ids)] = torch.tensor(row.documents, dtype=torch.long)
        documents_BU[number, len(row.ids) :] = row.document + 1
    mask_BU = torch.zeros_like(ids_BU, dtype=torch.bool)
    if all(row.document <= 0 for row in rows):
        return Batch(ids_BU, mask_BU)
    return Batch(ids_BU, mask_BU, documents_BU, document_positions(documents_BU))
