"""Two tokenizations of one text as offsets in bytes: where they meet, and the chunks between those places."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from limbeck.models.token_bytes import TokenBytes

# Longer than nearly all tokens. The end of a window may cut a word, and a tokenizer that is shown half a word puts
# borders where it would put none in the whole word.
_UNSETTLED_BYTES = 32
_WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True)
class Meeting:
    """How the tokens of two models lie to each other in one stretch of text.

    student_chunk, teacher_chunk: for each token, the number of the chunk it belongs to, -1 for none. chunks: how many.
    student_last, teacher_last: for each place inside or at the end of the text where both have a border, the token of
    each that ends there.
    """

    student_chunk: np.ndarray
    teacher_chunk: np.ndarray
    chunks: int
    student_last: np.ndarray
    teacher_last: np.ndarray


@dataclass(frozen=True)
class Offsets:
    """Where the tokens of one model end in a text, in bytes.

    begin: where the first token begins; below 0 when it begins before the text. ends: never falling. is_border: False
    for tokens that end at no place of the text, because the tokenizer has rewritten that part of it; their `ends` says
    where that part ends.
    """

    begin: int
    ends: np.ndarray
    is_border: np.ndarray

    def behind_own_space(self) -> Offsets:
        """The same offsets if the first token begins with a space of the tokenizer's own, which has no place.

        A token that is this space alone goes with the one after it: its likelihood is part of writing that text.
        """
        is_after = self.ends > 0
        return Offsets(
            self.begin, np.where(is_after, self.ends, self.ends[is_after.argmax()]), self.is_border & is_after
        )

    @property
    def borders(self) -> np.ndarray:
        """All places where a token begins or ends."""
        return np.append(self.ends[self.is_border], self.begin)


def meet(
    student: Offsets, teacher: Offsets, *, student_scored: np.ndarray, teacher_scored: np.ndarray, until: int
) -> Meeting:
    """Find the common borders of two tokenizations and the chunks between them.

    *_scored: whether the model predicts the token. A chunk counts only if both predict all of its tokens. until: borders
    after this offset are not trusted. Tokens that end at or before offset 0 lie before the text. A token of no length,
    which ends a patch of bytes, belongs to the chunk of the byte before it: what the model pays for the end counts there.
    """
    borders = np.intersect1d(student.borders, teacher.borders)
    borders = borders[(borders >= 0) & (borders <= until)]
    student_chunk = np.searchsorted(borders, student.ends) - 1
    teacher_chunk = np.searchsorted(borders, teacher.ends) - 1
    count = max(0, len(borders) - 1)
    valid = np.ones(count + 1, dtype=bool)
    valid[count] = False  # also what -1, a token before the first border, points at
    for chunk, scored in ((student_chunk, student_scored), (teacher_chunk, teacher_scored)):
        valid[np.minimum(chunk, count)[~scored]] = False
    number = np.where(valid, np.cumsum(valid) - 1, -1)
    inside = borders[borders > 0]
    return Meeting(
        number[np.minimum(student_chunk, count)],
        number[np.minimum(teacher_chunk, count)],
        int(valid.sum()),
        np.searchsorted(student.ends, inside, side="right") - 1,
        np.searchsorted(teacher.ends, inside, side="right") - 1,
    )


def settled_until(data: bytes, *, is_closed: bool) -> int:
    """Up to which byte the borders of any tokenizer stay where they are if the text goes on.

    is_closed: the text ends here by itself, so that all borders are final. Otherwise its last word may be half a word.
    """
    if is_closed:
        return len(data)
    last_space = max(data.rfind(space) for space in (b" ", b"\n", b"\t"))
    return max(last_space, len(data) - _UNSETTLED_BYTES, 0)


def offsets_in_text(ids: np.ndarray, text: str, tokens: TokenBytes, tokenizer: Any) -> Offsets:
    """Where the tokens that a tokenizer makes of a text end in it.

    A space that the tokenizer adds at the front belongs to no place. Where the tokenizer rewrites text (Unicode
    normalisation), only the borders around what is rewritten are borders of the text.
    """
    data, written = text.encode(), tokens.join(ids.tolist())
    ends = np.cumsum(tokens.lengths[ids])
    has_own_space = written != data and tokens.adds_space and written.startswith(b" ")
    if has_own_space:
        written, ends = written[1:], np.maximum(ends - 1, 0)
    if written == data:
        offsets = Offsets(0, ends, np.ones(len(ends), dtype=bool))
    else:
        is_text = tokens.is_text[ids]
        stops = np.asarray([(0, 0), *_corresponding(text, data, written, tokenizer, ends[~is_text])])
        place = np.searchsorted(stops[:, 1], ends)
        place[~is_text] = np.searchsorted(stops[:, 1], ends[~is_text], side="right") - 1
        offsets = Offsets(0, np.maximum.accumulate(stops[place, 0]), (stops[place, 1] == ends) & is_text)
    return offsets.behind_own_space() if has_own_space else offsets


def _corresponding(
    text: str, data: bytes, written: bytes, tokenizer: Any, unwritten: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Offsets in a text, and in what the tokenizer made of it, that stand at the same place; rising.

    unwritten: offsets in `written` of tokens whose text is not known; nothing between the first and the last of them
    corresponds for sure.
    """
    words = _WORD.findall(text)
    for rewrite in _rewritings(tokenizer):
        rewritten = [rewrite(word).encode() for word in words]
        if b"".join(rewritten) == written:
            pieces = list(zip([word.encode() for word in words], rewritten, strict=True))
            yield from _corresponding_in(pieces, len(written), 0)
            return
    yield from _corresponding_in([(data, written)], *_span(unwritten, len(written)))


def _span(offsets: np.ndarray, length: int) -> tuple[int, int]:
    return (int(offsets.min()), int(offsets.max())) if len(offsets) else (length, 0)


def _corresponding_in(pieces: list[tuple[bytes, bytes]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Of each piece before and after, what is equal at its front (up to `first`) and at its back (from `last` on)."""
    low, low_written = 0, 0
    for before, after in pieces:
        front = min(_common_length(before, after), max(0, first - low_written))
        while 0 < front < len(before) and _continues_character(before[front]):
            front -= 1
        back = min(_common_length(before[front:][::-1], after[front:][::-1]), max(0, low_written + len(after) - last))
        while back and _continues_character(before[-back]):
            back -= 1
        yield from ((low + n, low_written + n) for n in range(1, front + 1))
        low, low_written = low + len(before), low_written + len(after)
        if front < max(len(before), len(after)):
            yield from ((low - n, low_written - n) for n in range(back, -1, -1))


def _continues_character(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _rewritings(tokenizer: Any) -> list[Callable[[str], str]]:
    known: list[Callable[[str], str]] = [partial(unicodedata.normalize, "NFC"), partial(unicodedata.normalize, "NFKC")]
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return known if normalizer is None else [normalizer.normalize_str, *known]


def _common_length(one: bytes, other: bytes) -> int:
    shortest = min(len(one), len(other))
    differs = np.frombuffer(one[:shortest], np.uint8) != np.frombuffer(other[:shortest], np.uint8)
    return int(differs.argmax()) if differs.any() else shortest
