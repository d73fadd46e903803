"""The bytes of every token: what two models with different tokenizers have in common.

Byte-level BPE writes each byte as one printable character; SentencePiece writes a space as U+2581 and bytes outside its
vocabulary as <0x0A>. Which of the ways fits is not guessed from names: the bytes of test sentences are put together
from their tokens, and the way that gives the sentences back is taken. A tokenizer for which none does, because it
lower-cases text or drops white space, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from limbeck.core.errors import VocabularyError
from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS

PROBES = {
    "upper case": "Upper And lower CASE, McCoy's",
    "runs of spaces": "a  b   c     d",
    "line breaks and tabs": "one\ntwo\n\n\tthree",
    "digits and signs": "3.14 + 2 = 5,14; (x_1 ≠ 0) #ok @me 100%",
    "accents": "na\u00efve caf\u00e9 \u00fcber \u00e9t\u00e9",
    "other scripts": "日本語 кошка עברית हिन्दी",
    "rare characters": "🙂 ꙮ 𓂀 ℝ",
}
"""Text that a tokenizer must give back byte for byte, by what it shows. All of it is in Unicode's composed form (NFC)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """The text of each token of a tokenizer, as bytes.

    pieces: by token id; None for special tokens and ids without a token, which stand for no text. A piece of no bytes is
    part of a text without a length of its own: the symbol that ends a patch of bytes. special_names: what special tokens
    are called, by id. end_id: the end-of-text token. kind: "byte-level", "sentencepiece", "bytes" or "symbols".
    adds_space: the tokenizer writes a space of its own before the first word of a text, so the bytes of a document's
    tokens begin with a space that the document has not. adds_to_space: it does so too where a text begins with a space.
    """

    pieces: tuple[bytes | None, ...]
    special_names: dict[int, str]
    end_id: int | None
    kind: str
    adds_space: bool
    adds_to_space: bool = False

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes that these tokens stand for; special tokens stand for none."""
        return b"".join(self.pieces[token] or b"" for token in ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of every token, by id (int64); 0 for special tokens."""
        return np.asarray([len(piece or b"") for piece in self.pieces], dtype=np.int64)

    @cached_property
    def is_text(self) -> np.ndarray:
        """True, by id, where a token stands for text."""
        return np.asarray([piece is not None for piece in self.pieces])


def read_token_bytes(tokenizer: Any) -> TokenBytes:
    """Find the bytes of every token of a Hugging Face tokenizer.

    Raises: VocabularyError when the tokens do not show their bytes: text cannot be put together from them again. The
    message says what is lost.
    """
    if hasattr(tokenizer, "decode_bytes"):
        return _symbol_bytes(tokenizer)
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    special = _special_ids(tokenizer)
    literal = {
        token: str(added)
        for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token not in special
    }
    for kind, spell in _SPELLINGS.items():
        pieces = _spelled(names, special, literal, spell)
        if pieces is None:
            continue
        candidate = TokenBytes(
            pieces, {token: names.get(token, "") for token in special}, tokenizer.eos_token_id, kind, adds_space=False
        )
        for adds_space in (False, True):
            if all(_gives_back(tokenizer, candidate, probe, adds_space=adds_space) for probe in PROBES.values()):
                adds_to_space = candidate.join(encode_text(tokenizer, [" a"])[0]) != b" a"
                return TokenBytes(
                    pieces, candidate.special_names, candidate.end_id, kind, adds_space, adds_space and adds_to_space
                )
    raise VocabularyError(
        f"{_name(tokenizer)} does not show the bytes of its tokens: text put together from them is not the text that "
        f"went in. {_what_is_lost(tokenizer)} Texts cannot be aligned through such a tokenizer. Choose a model with a "
        "byte-level or a SentencePiece tokenizer with byte fallback, or train on the teacher's text alone."
    )


def encode_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as text: nothing is added, and the name of a special token inside a text stays text."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def leading_special_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself writes before a text (a beginning-of-text token, or none)."""
    plain, dressed = encode_text(tokenizer, ["a"])[0], tokenizer("a", verbose=False)["input_ids"]
    if hasattr(tokenizer, "decode_bytes"):
        plain = plain[:1]  # the last patch of a prompt is open
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return list(dressed[:start])
    return []


def _symbol_bytes(tokenizer: Any) -> TokenBytes:
    """The symbols of a byte-level model: bytes, special symbols, and the end of a patch, which is text of no length."""
    pieces: list[bytes | None] = [bytes([byte]) for byte in range(256)] + [None] * (SYMBOLS - 256)
    pieces[EOP] = b""
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    return TokenBytes(
        tuple(pieces), {token: names[token] for token in (PAD, BOS, EOD)}, EOD, "symbols", adds_space=False
    )


def _byte_level_table() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on.

    Source: Radford et al. 2019 (GPT-2), whose table every byte-level BPE tokenizer uses.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_level_table()


def _byte_level(name: str) -> bytes:
    """A name outside the table is a token written as it is, as the library's own decoder takes it."""
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    return name.encode()


def _sentence_piece(name: str) -> bytes:
    one_byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(one_byte[1], 16)]) if one_byte else name.replace("\u2581", " ").encode()


def _single_byte(name: str) -> bytes:
    return name.encode("latin-1")


_SPELLINGS: dict[str, Callable[[str], bytes]] = {
    "byte-level": _byte_level,
    "bytes": _single_byte,
    "sentencepiece": _sentence_piece,
}


def _spelled(
    names: dict[int, str], special: set[int], literal: dict[int, str], spell: Callable[[str], bytes]
) -> tuple[bytes | None, ...] | None:
    """The pieces under one spelling, or None when a token cannot be read so."""
    pieces: list[bytes | None] = [None] * (max(names) + 1)
    for token, name in names.items():
        if token in special:
            continue
        try:
            pieces[token] = literal[token].encode() if token in literal else spell(name)
        except (KeyError, UnicodeEncodeError):
            return None
    return tuple(pieces)


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token for token, kind in added.items() if kind.special}


def _gives_back(tokenizer: Any, candidate: TokenBytes, probe: str, *, adds_space: bool) -> bool:
    prefix = b" " if adds_space else b""
    return candidate.join(encode_text(tokenizer, [probe])[0]) == prefix + probe.encode()


def _what_is_lost(tokenizer: Any) -> str:
    def survives(probe: str) -> bool:
        try:
            return tokenizer.decode(encode_text(tokenizer, [probe])[0]).strip(" ") == probe
        except Exception:
            return False

    lost = [what for what, probe in PROBES.items() if not survives(probe)]
    return f"It loses: {', '.join(lost)}." if lost else "Its tokens are spelled in a way that is not known here."


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or f"this tokenizer ({type(tokenizer).__name__})"
