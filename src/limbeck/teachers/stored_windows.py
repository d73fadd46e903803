"""A store's own text as rows to train on, in the teacher's tokens or in another tokenizer's."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from limbeck.core.errors import StoreError
from limbeck.core.symbols import EOP, SYMBOLS
from limbeck.core.types import Batch
from limbeck.store.records import RowRecord, make_batch
from limbeck.store.store import TargetStore

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Stretch:
    """A part of a row's text that is encoded by itself.

    text: what was readable of its bytes. skipped_bytes: how many before it were not, because the window began inside a
    character. first_token, end_token: its tokens in the row as captured. closed: whether its last token there is a
    special one, which stands for no text.
    """

    text: str
    scored: bool
    begins_document: bool = False
    closed: bool = False
    first_token: int = 0
    end_token: int = 0
    skipped_bytes: int = 0


@dataclass(frozen=True)
class EncodedRow:
    """A row in another tokenizer's ids. parts: each stretch with the places [low, high) of its tokens."""

    key: str
    ids: list[int]
    scored: list[bool]
    document_starts: list[int]
    parts: list[tuple[Stretch, int, int]]


class StoreWindows:
    """Rows of a store, in the interface of `data.windows.TokenWindows`; every batch carries the rows' keys.

    Without `encode`: token ids, masks and documents as they were captured. With it: each row's text in another tokenizer's
    ids. Then documents, and scored and unscored parts, are encoded apart; `end_token` is put where the teacher's special
    token stood; rows are cut or padded on the right (with `padding_token`, not scored) to `context_tokens`, which defaults
    to the store's own.
    Raises: StoreError when the store is empty, or has no text to encode.
    """

    def __init__(
        self,
        store: TargetStore | Path | str,
        *,
        encode: Encode | None = None,
        end_token: int | None = None,
        padding_token: int = 0,
        context_tokens: int | None = None,
    ):
        self.store = store if isinstance(store, TargetStore) else TargetStore(store)
        self.encode, self.end_token, self.padding_token = encode, end_token, padding_token
        self.context_tokens = context_tokens or self.store.context_tokens
        is_text = self.store.manifest.kind == "text"
        if len(self.store) == 0:
            raise StoreError(f"{self.store.folder}: the store is empty.")
        if is_text and (encode is None or context_tokens is None):
            raise StoreError(
                f"{self.store.folder}: a store of texts needs a tokenizer and a context length to be read with."
            )
        if encode is None and self.context_tokens < self.store.context_tokens:
            raise StoreError(
                f"{self.store.folder}: rows have {self.store.context_tokens} tokens, and data.context_tokens is {self.context_tokens}. "
                "Set it to theirs, or capture shorter rows."
            )
        if encode is not None and not is_text and self.store.row(0, targets=False).text is None:
            raise StoreError(
                f"{self.store.folder}: the store keeps no text (its capture had no bytes of tokens), so only its own tokenizer can read it."
            )

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers as one batch [B, context_tokens]."""
        if self.encode is None:
            return make_batch([self.store.row(index, targets=False) for index in indices], width=self.context_tokens)
        return self._padded(self.encode_rows(indices))

    def encode_rows(self, indices: Sequence[int]) -> list[EncodedRow]:
        """The rows with these numbers in the other tokenizer's ids, at most `context_tokens` of them."""
        assert self.encode is not None
        rows = [self._stretches(int(index)) for index in indices]
        encoded = iter(self.encode([stretch.text for _, parts in rows for stretch in parts]))
        found = []
        for key, stretches in rows:
            row = EncodedRow(key, [], [], [], [])
            for stretch in stretches:
                self._append(row, stretch, next(encoded))
            found.append(row)
        return found

    def _append(self, row: EncodedRow, stretch: Stretch, ids: Sequence[int]) -> None:
        low = len(row.ids)
        text = list(ids)[: self.context_tokens - low]
        end = [self.end_token] if stretch.closed and self.end_token is not None else []
        row.ids.extend((text + end)[: self.context_tokens - low])
        added = len(row.ids) - low
        row.scored.extend([stretch.scored] * added)
        if stretch.begins_document and added and low:
            row.document_starts.append(low)
        if added and (low == 0 or stretch.begins_document):
            row.scored[low] = False
        row.parts.append((stretch, low, low + len(text)))

    def _stretches(self, index: int) -> tuple[str, list[Stretch]]:
        if self.store.manifest.kind == "targets":
            row = self.store.row(index, targets=False)
            return row.key, split_row(row)
        record = self.store.text(index)
        return record.key, [Stretch(record.prompt, False), Stretch(record.completion, True, closed=True)]

    def _padded(self, rows: Sequence[EncodedRow]) -> Batch:
        ids_BT = torch.full((len(rows), self.context_tokens), self.padding_token, dtype=torch.long)
        mask_BT = torch.zeros(len(rows), self.context_tokens, dtype=torch.bool)
        begins_BT = torch.zeros_like(ids_BT)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row.ids)] = torch.as_tensor(row.ids, dtype=torch.long)
            mask_BT[number, : len(row.ids)] = torch.as_tensor(row.scored, dtype=torch.bool)
            begins_BT[number, row.document_starts] = 1
        keys = tuple(row.key for row in rows)
        if not begins_BT.any():
            return Batch(ids_BT, mask_BT, keys=keys)
        positions_T = torch.arange(self.context_tokens)
        last_begin_BT = torch.where(begins_BT == 1, positions_T, 0).cummax(dim=1).values
        return Batch(ids_BT, mask_BT, begins_BT.cumsum(dim=1), positions_T - last_begin_BT, keys)


def split_row(row: RowRecord) -> list[Stretch]:
    """A row's text in stretches that do not cross documents nor borders between scored and unscored tokens."""
    assert row.text is not None
    assert row.token_bytes is not None
    lengths, scored = np.asarray(row.token_bytes, dtype=np.int64), np.asarray(row.scored, dtype=bool).copy()
    offsets, is_text = np.concatenate([[0], np.cumsum(lengths)]), text_tokens(row)
    # The first token of a document is never scored; that is no border in its text.
    for start in [0, *row.document_starts]:
        if start + 1 < len(scored):
            scored[start] = scored[start + 1]
    borders = sorted({0, *row.document_starts, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(lengths)})
    stretches = []
    for low, high in pairwise(borders):
        text, skipped = read_bytes(row.text[offsets[low] : offsets[high]])
        closed = not is_text[high - 1]
        stretches.append(
            Stretch(text, bool(scored[low]), low in row.document_starts, bool(closed), int(low), int(high), skipped)
        )
    return stretches


def text_tokens(row: RowRecord) -> np.ndarray:
    """Which tokens of a row are part of its text: all with bytes, and in a row of symbols the ends of patches, which have none."""
    assert row.token_bytes is not None
    ids, has_bytes = np.asarray(row.input_ids), np.asarray(row.token_bytes) > 0
    is_of_symbols = bool((ids < SYMBOLS).all()) and ids[has_bytes].astype(np.uint8).tobytes() == row.text
    return has_bytes | (ids == EOP) if is_of_symbols else has_bytes


def read_bytes(data: bytes) -> tuple[str, int]:
    """Text whose ends may lie inside a character, and how many bytes were left out at its beginning.

    What is left of a cut character is dropped; bytes in between that are no UTF-8 become U+FFFD.
    """
    first = 0
    while first < min(3, len(data)) and data[first] & 0xC0 == 0x80:
        first += 1
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data[first:]), first
