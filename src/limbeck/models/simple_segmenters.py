"""Segmenters that need no fitting and no files: before words, and every so many bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.core.errors import RecipeError


def _begins_space() -> np.ndarray:
    """Which bytes are like a space: True for every byte that begins a character which is no letter or digit.

    ASCII is taken as it is. Of the bytes that begin a longer character, those of scripts which put spaces between words
    (Latin to Arabic, Indic, Georgian, Hangul) count as letters; punctuation, symbols, Chinese and Japanese characters
    and emoji count as spaces, so that each begins a patch of its own. Bytes within a character never do.
    """
    table = np.zeros(256, dtype=bool)
    table[:0x80] = [not chr(byte).isalnum() for byte in range(0x80)]
    table[[0xC2, *range(0xE2, 0xEA), 0xEE, 0xEF, *range(0xF0, 0xF5)]] = True
    return table


_SPACE_LIKE = _begins_space()


class SpaceSegmenter:
    """A patch begins before each run of space-like bytes that follows another byte: ` a`, ` word`, `, then`.

    Characters are never cut, and where a patch begins depends on what came before only.
    Source: SpaceByte, arXiv:2404.14408, section 3. There a patch ends *after* the space, and every character that takes
    several bytes is space-like; here letters of scripts with spaces are letters.
    """

    name = "space"

    @classmethod
    def from_words(cls, argument: str) -> SpaceSegmenter:
        """`space`. Raises: RecipeError when something follows the word."""
        if argument:
            raise RecipeError(f'segmenter "space:{argument}": space takes nothing after a colon. Write space.')
        return cls()

    @classmethod
    def from_facts(cls, facts: dict[str, Any], **_: Any) -> SpaceSegmenter:
        """What `facts` describes."""
        return cls()

    def facts(self) -> dict[str, Any]:
        """All that decides where it cuts, as JSON."""
        return {"kind": "space"}

    def split(self, data: bytes) -> list[int]:
        """Lengths of the pieces; they add up to those of the data."""
        if not data:
            return []
        is_space = _SPACE_LIKE[np.frombuffer(data, dtype=np.uint8)]
        begins = np.flatnonzero(is_space[1:] & ~is_space[:-1]) + 1
        return np.diff(begins, prepend=0, append=len(data)).tolist()


class FixedSegmenter:
    """Pieces of `length_bytes` bytes each; the last may be shorter. Source: MegaByte, arXiv:2305.07185, section 2."""

    def __init__(self, length_bytes: int):
        if length_bytes < 1:
            raise RecipeError(f'segmenter "fixed:{length_bytes}": a piece has at least one byte. Write fixed:4, say.')
        self.length_bytes = length_bytes

    @property
    def name(self) -> str:
        """As a recipe writes it."""
        return f"fixed:{self.length_bytes}"

    @classmethod
    def from_words(cls, argument: str) -> FixedSegmenter:
        """`fixed:4`. Raises: RecipeError when no number follows."""
        if not (argument.isascii() and argument.isdigit()):
            raise RecipeError(
                f'segmenter "fixed:{argument}": expected a number of bytes after the colon, as in fixed:4.'
            )
        return cls(int(argument))

    @classmethod
    def from_facts(cls, facts: dict[str, Any], **_: Any) -> FixedSegmenter:
        """What `facts` describes."""
        return cls(int(facts["length_bytes"]))

    def facts(self) -> dict[str, Any]:
        """All that decides where it cuts, as JSON."""
        return {"kind": "fixed", "length_bytes": self.length_bytes}

    def split(self, data: bytes) -> list[int]:
        """Lengths of the pieces; they add up to those of the data."""
        whole, rest = divmod(len(data), self.length_bytes)
        return [self.length_bytes] * whole + [rest] * (rest > 0)
