"""From a server's name of a token to its id: by id, by bytes, by spelling, in that order, or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from limbeck.core.errors import TeacherError, VocabularyError
from limbeck.models.token_bytes import TokenBytes, read_token_bytes

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ID_NAME = re.compile(r"token_id:(\d{1,9})")


class TokenNames:
    """The tokens of one tokenizer by what servers call them.

    vocabulary_size: ids are below it. token_bytes: the bytes of each; None for a tokenizer that hides them, with which
    only ids are understood. A token is taken by its id where the server gives one, and then its bytes (or spelling),
    where given too, must be those of that id here; else by its bytes; else by its spelling. Where a piece and a
    SentencePiece byte (<0x41> beside "A") spell the same, the piece is meant; any other ambiguity is refused.
    """

    def __init__(self, tokenizer: Any):
        vocabulary = tokenizer.get_vocab()
        self.vocabulary_size = max(vocabulary.values()) + 1
        self.token_bytes: TokenBytes | None = None
        self._ids: dict[bytes, list[int]] = {}
        self._byte_pieces = frozenset(number for name, number in vocabulary.items() if _BYTE_PIECE.fullmatch(name))
        try:
            self.token_bytes = read_token_bytes(tokenizer)
        except VocabularyError as error:
            self._hidden = str(error)
            return
        specials = {number: name.encode() for number, name in self.token_bytes.special_names.items()}
        for number, piece in enumerate(self.token_bytes.pieces):
            spelling = specials.get(number) if piece is None else piece
            if spelling:
                self._ids.setdefault(spelling, []).append(number)

    def find(self, name: Mapping[str, Any] | str) -> int:
        """The id of a token as a server names it: an object with `id`, `bytes` or `token`, or its spelling alone.

        Raises: VocabularyError, naming the token, when it is not one of the tokenizer's, or may be several.
        """
        parts = name if isinstance(name, Mapping) else {"token": name}
        number, content = _read_name(parts)
        if number is not None:
            return self._check(number, content, parts)
        if self.token_bytes is None:
            raise VocabularyError(f"{_told(parts)} has no id. {self._hidden}")
        if not content:
            raise VocabularyError(f"{_told(parts)} has neither an id nor bytes. Use a server that gives token ids.")
        if "\ufffd".encode() in content:
            raise VocabularyError(f"{_told(parts)} is no whole character. Use a server that gives token ids or bytes.")
        candidates = self._ids.get(content, [])
        if len(candidates) > 1:
            candidates = [one for one in candidates if one not in self._byte_pieces] or candidates
        if len(candidates) == 1:
            return candidates[0]
        if not candidates:
            raise VocabularyError(
                f"{_told(parts)} is not in the tokenizer ({self.vocabulary_size} tokens). Name the served model's own "
                "tokenizer, or use a server that gives token ids."
            )
        raise VocabularyError(f"{_told(parts)} may be any of the ids {candidates}. Use a server that gives token ids.")

    def is_merged(self, name: Mapping[str, Any] | str) -> bool:
        """Whether an entry stands for several tokens, of which it has the last one's id.

        llama.cpp's server waits until characters are whole, and drops what it knew of the tokens before.
        """
        parts = name if isinstance(name, Mapping) else {"token": name}
        number, content = _read_name(parts)
        if content and not parts.get("bytes") and "\ufffd".encode() in content:
            return False
        piece = None if number is None else self._piece(number)
        if not piece or not content or content == piece or not content.endswith(piece):
            return False
        return not _is_whole(piece)

    def spell(self, number: int) -> str:
        """An id and its text, for messages."""
        piece = self._piece(number)
        return f"{number}" if piece is None else f"{number} ({piece.decode('utf-8', 'replace')!r})"

    def _piece(self, number: int) -> bytes | None:
        return self.token_bytes.pieces[number] if self.token_bytes and number < len(self.token_bytes.pieces) else None

    def _check(self, number: int, content: bytes | None, parts: Mapping[str, Any]) -> int:
        if number >= self.vocabulary_size:
            raise VocabularyError(
                f"{_told(parts)} has the id {number}, but the tokenizer has {self.vocabulary_size} tokens. Name the "
                "served model's own tokenizer."
            )
        piece = self._piece(number)
        # Servers print special tokens as nothing, and bytes that are no whole character as the replacement character.
        if piece is not None and content and "\ufffd".encode() not in content and content != piece:
            raise VocabularyError(
                f"{_told(parts)} has the id {number}, which is {self.spell(number)} here: the served model has another "
                "tokenizer. Name its own."
            )
        return number


def _is_whole(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_name(parts: Mapping[str, Any]) -> tuple[int | None, bytes | None]:
    """The id and the bytes that a name tells, None for what it does not."""
    token, given, number = parts.get("token"), parts.get("bytes"), parts.get("id")
    if not (token is None or isinstance(token, str)) or not (number is None or (type(number) is int and number >= 0)):
        raise TeacherError(f"the server names a token {str(dict(parts))[:120]}; that cannot be read.")
    if token is not None and (match := _ID_NAME.fullmatch(token)):
        return int(match[1]), None
    if isinstance(given, list) and given:
        try:
            return number, bytes(given)
        except (TypeError, ValueError):
            raise TeacherError(f"the server names a token {str(dict(parts))[:120]}; its bytes are none.") from None
    if token is not None and token.startswith("bytes:"):
        return number, _unescape(token.removeprefix("bytes:"))
    return number, token.encode("utf-8", "replace") if token is not None else None


def _unescape(text: str) -> bytes:
    r"""The bytes of a spelling such as `\xf0\x9f` or ` \xe2\x80`."""
    parts = re.split(r"\\x([0-9a-fA-F]{2})", text)
    return b"".join(bytes.fromhex(part) if index % 2 else part.encode() for index, part in enumerate(parts))


def _told(parts: Mapping[str, Any]) -> str:
    return f"the server's token {str(parts.get('token', parts.get('id')))[:60]!r}"
