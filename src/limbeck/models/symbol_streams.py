"""Bytes to a stream of symbols and back, and text to bytes and back. See `core/symbols.py` for the grammar."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from limbeck.core.symbols import BOS, EOP
from limbeck.models.segmenters import Segmenter, limit_pieces

_ESCAPED = re.compile("([\udc80-\udcff]+)")


def text_to_bytes(text: str) -> bytes:
    """UTF-8, of any string of Python: nothing is refused and nothing is lost.

    Characters U+DC80 to U+DCFF are taken for the raw bytes that Python reads files with (`surrogateescape`); other lone
    surrogates become the three bytes that UTF-8 would give them (`surrogatepass`).
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        handlers = ("surrogatepass", "surrogateescape")
        return b"".join(part.encode(errors=handlers[n % 2]) for n, part in enumerate(_ESCAPED.split(text)))


def encode_document(data: bytes, segmenter: Segmenter, *, patch_bytes: int) -> list[int]:
    """The symbols of a document: its bytes, with an EOP after each piece. No EOD; an empty document has no symbol."""
    lengths = np.asarray(limit_pieces(segmenter.split(data), patch_bytes - 1), dtype=np.int64)
    stream = np.full(len(data) + len(lengths), EOP, dtype=np.int64)
    is_byte = np.ones(len(stream), dtype=bool)
    is_byte[np.cumsum(lengths + 1) - 1] = False
    stream[is_byte] = np.frombuffer(data, dtype=np.uint8)
    return stream.tolist()


def open_prompt(ids: list[int]) -> list[int]:
    """A text to be continued: BOS in front, and its last patch left open, for the text may go on in the midst of it.

    ids: as `encode_document` gives them.
    """
    return [BOS, *(ids[:-1] if ids and ids[-1] == EOP else ids)]


def decode_symbols(ids: Iterable[int]) -> bytes:
    """The bytes of a stream; symbols that are no bytes give none."""
    return bytes(symbol for symbol in ids if 0 <= symbol < 256)
