"""The few words at the head of a GGUF file that say what it is: name and licence. Weights are not read.

Source: the GGUF specification (versions 2 and 3): a magic word, counts, then keys with typed values.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from limbeck.core.errors import PublishError

_MOST_KEYS = 500
_MOST_BYTES = 1_000_000
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def read_gguf_words(path: Path) -> dict[str, Any]:
    """The `general.*` keys of a GGUF file with text, numbers or lists of texts as values.

    Reading ends at the tokenizer, before which every writer puts them. Raises: PublishError for another kind of file.
    """
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise PublishError(f"{path} is no GGUF file. Name the teacher's own file, or give --licence.")
        try:
            return _read_words(stream)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise PublishError(
                f"{path} is damaged at its head ({error}). Get the file again, or give --licence."
            ) from error


def _read_words(stream: BinaryIO) -> dict[str, Any]:
    version = _number(stream, "I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    _number(stream, "Q")
    keys = _number(stream, "Q")
    words: dict[str, Any] = {}
    for _ in range(min(keys, _MOST_KEYS)):
        key = _text(stream)
        if key.startswith("tokenizer.") or stream.tell() > _MOST_BYTES:
            break
        value = _value(stream, _number(stream, "I"))
        if key.startswith("general."):
            words[key] = value
    return words


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(stream)
    if kind == _LIST:
        inner, length = _number(stream, "I"), _number(stream, "Q")
        if inner == _LIST or length > _MOST_BYTES:
            raise ValueError("a list that is too long")
        return [_value(stream, inner) for _ in range(length)]
    if kind not in _NUMBERS:
        raise ValueError(f"a value of unknown kind {kind}")
    return _number(stream, _NUMBERS[kind])


def _number(stream: BinaryIO, form: str) -> Any:
    size = struct.calcsize("<" + form)
    return struct.unpack("<" + form, stream.read(size))[0]


def _text(stream: BinaryIO) -> str:
    length = _number(stream, "Q")
    if length > _MOST_BYTES:
        raise ValueError(f"a text of {length:,} bytes")
    raw = stream.read(length)
    if len(raw) != length:
        raise ValueError("it ends too early")
    return raw.decode("utf-8", errors="replace")
