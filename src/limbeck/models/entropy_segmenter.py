"""A segmenter that begins a patch where the next byte is hard to guess, judged by counts of byte 4-grams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from limbeck.core.errors import DataError, RecipeError

CONTEXT_BYTES = 3
_LEAST_COUNT = 4
_ROWS_AT_ONCE = 4096
_BYTES_AT_ONCE = 1 << 20
_MILLIBITS = 1000


class _Table(NamedTuple):
    """What is known after each context of one length: contexts as rising numbers, entropy of the next byte in 1/1000 bit."""

    contexts: np.ndarray
    millibits: np.ndarray


class EntropySegmenter:
    """A patch begins where the entropy of the next byte, given the three before it, reaches a threshold.

    The entropies come from counts, interpolated with those of shorter contexts; a context that was seen fewer than four
    times is left out, and the next shorter one stands in. Characters of UTF-8 are never cut. Where a patch begins
    depends on the three bytes before it only. Entropies are kept in whole 1/1000 bits, so that the cuts are the same on
    every machine and after saving.
    Source: the global threshold of BLT, arXiv:2412.09871, section 2.3, with counts in the place of its neural model;
    interpolation of Witten and Bell 1991.
    """

    name = "ngram_entropy"

    def __init__(self, tables: Sequence[tuple[np.ndarray, np.ndarray]], *, threshold_millibits: int):
        """tables: for contexts of 1, 2 and 3 bytes, the contexts as rising numbers and the entropies after them."""
        self.threshold_millibits = threshold_millibits
        self._tables = [_Table(*table) for table in tables]

    @classmethod
    def from_words(cls, argument: str) -> EntropySegmenter:
        """Raises: RecipeError. It has to be fitted on text, so a word alone does not make one."""
        raise RecipeError(
            'segmenter "ngram_entropy" is fitted on text and cannot be had from its name alone. In a recipe it is fitted on '
            "data.train; in Python use ByteTokenizer.fit_entropy(texts), or load the folder of a saved one."
        )

    @classmethod
    def fit(
        cls, documents: Iterable[bytes], *, mean_patch_bytes: float = 4.5, most_bytes: int = 4_000_000
    ) -> EntropySegmenter:
        """Count the 4-grams of documents and choose the threshold that gives them patches of a mean length.

        mean_patch_bytes: before pieces that are too long for a patch are split. most_bytes: how much is read at most.

        Raises: DataError when there is no text; RecipeError when the mean is below one byte.
        """
        if not mean_patch_bytes >= 1:
            raise RecipeError(
                f"the mean length of patches is {mean_patch_bytes} bytes; a patch has at least one. Give 4.5, say."
            )
        data, age = _gather(documents, most_bytes)
        tables = [_Table(*table) for table in _entropies(data, age)]
        fitted = cls(tables, threshold_millibits=0)
        counts = np.bincount(fitted._millibits(data, age)[_may_begin(data) & (age > 0)], minlength=1)
        reaching = np.append(counts[::-1].cumsum()[::-1], 0)
        wanted = len(data) / mean_patch_bytes - (age == 0).sum()
        fitted.threshold_millibits = int(np.abs(reaching - wanted).argmin())
        return fitted

    @classmethod
    def from_facts(cls, facts: dict[str, Any], **_: Any) -> EntropySegmenter:
        """What `facts` describes. Raises: ValueError for tables that cannot be: not one for each length, or out of order."""
        tables = [
            (np.asarray(table["contexts"], dtype=np.int64), np.asarray(table["millibits"], dtype=np.int64))
            for table in facts["tables"]
        ]
        is_right = [
            contexts.ndim == 1 and contexts.shape == millibits.shape and bool((contexts[1:] > contexts[:-1]).all())
            for contexts, millibits in tables
        ]
        if is_right != [True] * CONTEXT_BYTES:
            raise ValueError(f"expected {CONTEXT_BYTES} tables of rising contexts, each with its entropy")
        return cls(tables, threshold_millibits=int(facts["threshold_millibits"]))

    def facts(self) -> dict[str, Any]:
        """All that decides where it cuts, as JSON."""
        tables = [{"contexts": one.contexts.tolist(), "millibits": one.millibits.tolist()} for one in self._tables]
        return {"kind": "ngram_entropy", "threshold_millibits": self.threshold_millibits, "tables": tables}

    def split(self, data: bytes) -> list[int]:
        """Lengths of the pieces; they add up to those of the data."""
        if not data:
            return []
        array = np.frombuffer(data, dtype=np.uint8)
        begins: list[np.ndarray] = []
        for low in range(0, len(array), _BYTES_AT_ONCE):
            before = min(low, CONTEXT_BYTES)
            block = array[low - before : low + _BYTES_AT_ONCE]
            is_hard = self._millibits(block, np.arange(len(block))) >= self.threshold_millibits
            begins.append(np.flatnonzero((is_hard & _may_begin(block))[before:]) + low)
        return np.diff(np.setdiff1d(np.concatenate(begins), 0), prepend=0, append=len(data)).tolist()

    def _millibits(self, data: np.ndarray, age: np.ndarray) -> np.ndarray:
        """Entropy of each byte given those before it. age: how many bytes of its document stand before it."""
        found = np.full(len(data), 8 * _MILLIBITS, dtype=np.int64)
        for length, table in enumerate(self._tables, start=1):
            codes = _codes(data, length)[:-1]
            place = np.minimum(np.searchsorted(table.contexts, codes), max(0, len(table.contexts) - 1))
            if len(table.contexts):
                is_known = (table.contexts[place] == codes) & (age[length:] >= length)
                found[length:][is_known] = table.millibits[place[is_known]]
        return found


def _gather(documents: Iterable[bytes], most_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of documents in one row, and how many bytes of its document stand before each."""
    pieces: list[np.ndarray] = []
    left = most_bytes
    for document in documents:
        piece = np.frombuffer(document[:left], dtype=np.uint8)
        pieces.append(piece)
        left -= len(piece)
        if left <= 0:
            break
    data = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint8)
    if not len(data):
        raise DataError("there is no text to fit the segmenter ngram_entropy on. Give at least one document.")
    return data, np.concatenate([np.arange(len(piece)) for piece in pieces])


def _may_begin(data: np.ndarray) -> np.ndarray:
    """False within a character of UTF-8."""
    return data & 0xC0 != 0x80


def _codes(data: np.ndarray, length: int) -> np.ndarray:
    """Every run of `length` bytes as a number."""
    count = max(0, len(data) - length + 1)
    codes = np.zeros(count, dtype=np.int64)
    for offset in range(length):
        codes = (codes << 8) | data[offset : offset + count]
    return codes


def _entropies(data: np.ndarray, age: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For contexts of 1 to 3 bytes: those seen often enough, and the entropy of the next byte."""
    counts = np.bincount(data, minlength=256)
    kinds = (counts > 0).sum()
    shorter = np.zeros(1, dtype=np.int64)
    shorter_probs = ((counts + kinds / 256) / (counts.sum() + kinds))[None]
    for length in range(1, CONTEXT_BYTES + 1):
        grams, count = np.unique(_codes(data, length + 1)[age[length:] >= length], return_counts=True)
        contexts, begins = np.unique(grams >> 8, return_index=True)
        ends = np.append(begins[1:], len(grams))
        total = np.add.reduceat(count, begins) if len(grams) else count
        suffix = np.searchsorted(shorter, contexts & (256 ** (length - 1) - 1))
        millibits = np.zeros(len(contexts), dtype=np.int64)
        kept_probs = []
        for low in range(0, len(contexts), _ROWS_AT_ONCE):
            rows = slice(low, low + _ROWS_AT_ONCE)
            first, last = begins[rows][0], ends[rows][-1]
            kinds = ends[rows] - begins[rows]
            weight = total[rows] + kinds
            probs = shorter_probs[suffix[rows]] * (kinds / weight)[:, None]
            which = np.searchsorted(contexts[rows], grams[first:last] >> 8)
            probs[which, grams[first:last] & 255] += count[first:last] / weight[which]
            millibits[rows] = np.rint(-_MILLIBITS * (probs * np.log2(probs)).sum(1))
            if length < CONTEXT_BYTES:
                kept_probs.append(probs)
        if length < CONTEXT_BYTES:
            shorter = contexts
            shorter_probs = np.concatenate(kept_probs) if kept_probs else np.zeros((0, 256))
        is_kept = total >= (_LEAST_COUNT if length > 1 else 1)
        yield contexts[is_kept], millibits[is_kept]
