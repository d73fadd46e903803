"""The tokens of a vocabulary as a trie of bytes, and as what a patch of bytes may hold.

The trie itself is `objectives.byte_trie.TrieNodes`; here it is made of a tokenizer's byte pieces. A *path* is the content
of one patch: bytes and the symbol that closes it, or the end of the document alone. Tokens with the same bytes share a
path. A token that is longer than a patch has several, one after the other, and shares the first with all tokens that
begin so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import VocabularyError
from limbeck.core.symbols import EOD, EOP, PAD, SYMBOLS
from limbeck.models.token_bytes import TokenBytes, encode_text, read_token_bytes
from limbeck.objectives.byte_trie import TrieNodes


@dataclass(frozen=True)
class ByteTrie:
    """The tokens of a vocabulary by their bytes. Made by `build`.

    nodes: the trie. depth_M: symbols on the way to each node. key_M: parent * SYMBOLS + symbol of each node but the root,
    rising. token_of: which token text with these bytes is read as. end_id: the end-of-text token, whose symbol is EOD; None for none.
    patch_bytes: most symbols in a patch, the closing one included. longest_bytes: of all tokens. paths_CP: what a patch may
    hold (int16), PAD after the end. entry_paths: by how many bytes of a token stand in patches before, the path with which each
    entry goes on, -1 for none.
    """

    nodes: TrieNodes
    depth_M: np.ndarray
    key_M: np.ndarray
    token_of: dict[bytes, int]
    end_id: int | None
    patch_bytes: int
    longest_bytes: int
    paths_CP: Tensor
    entry_paths: dict[int, Tensor]

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, *, patch_bytes: int = 16) -> ByteTrie:
        """The trie of a tokenizer of transformers.

        Raises: VocabularyError when it hides the bytes of its tokens.
        """
        tokens = read_token_bytes(tokenizer)
        return cls.build(
            tokens.pieces, tokens.end_id, patch_bytes=patch_bytes, adds_space=tokens.adds_space,
            written=_written_tokens(tokenizer, tokens),
        )  # fmt: skip

    @classmethod
    def build(
        cls, pieces: Sequence[bytes | None], end_id: int | None, *, patch_bytes: int = 16, adds_space: bool = False,
        written: Collection[int] = (),
    ) -> ByteTrie:  # fmt: skip
        """The trie of the byte pieces of tokens by id (`TokenBytes.pieces`; None and b"" have no place in it).

        adds_space: the tokenizer writes a space of its own before a document, which the text and so the patches have not.
        written: of tokens with the same bytes, those that it writes; by default the last.

        Raises: VocabularyError when no token has bytes.
        """
        found = sorted((piece, token) for token, piece in enumerate(pieces) if piece and token != end_id)
        if not found:
            raise VocabularyError(
                "no token of the vocabulary stands for text, so there is nothing to make a byte trie of."
            )
        texts = [piece for piece, _ in found]
        symbols = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int64)
        lengths = np.asarray([len(piece) for piece in texts])
        tokens = [token for _, token in found]
        if end_id is not None:
            symbols, lengths, tokens = np.append(symbols, EOD), np.append(lengths, 1), [*tokens, end_id]
        nodes, depth_M, key_M = _grow(symbols, lengths, np.asarray(tokens))
        paths, entry_paths = _paths(texts, end_id is not None, patch_bytes - 1, adds_space)
        token_of = dict(found) | {piece: token for piece, token in found if token in written}
        table_CP = _path_table(paths, patch_bytes)
        longest = max(len(piece) for piece in texts)
        return cls(nodes, depth_M, key_M, token_of, end_id, patch_bytes, longest, table_CP, entry_paths)

    @property
    def tokens(self) -> int:
        """Ids of tokens with symbols are below this."""
        return int(self.nodes.token_W.max()) + 1

    def token_paths(self, ids: Tensor) -> Tensor:
        """The path of each token's first patch, of the shape of `ids`; -1 for ids below 0 and tokens without symbols."""
        path_V = torch.full((self.tokens + 1,), -1, dtype=torch.long)
        path_V[self.nodes.token_W] = self.entry_paths[0]
        return path_V[torch.where((ids < 0) | (ids >= self.tokens), self.tokens, ids)]

    def walk(self, start_I: np.ndarray, symbols_IP: np.ndarray) -> np.ndarray:
        """Nodes [I, P+1] that are met from each start along its symbols; -1 from where no token goes on so."""
        node_I = start_I
        met = [node_I]
        for symbol_I in symbols_IP.T:
            wanted_I = node_I * SYMBOLS + symbol_I
            place_I = np.minimum(np.searchsorted(self.key_M, wanted_I), len(self.key_M) - 1)
            is_there_I = (node_I >= 0) & (symbol_I >= 0) & (self.key_M[place_I] == wanted_I)
            node_I = np.where(is_there_I, place_I + 1, -1)
            met.append(node_I)
        return np.stack(met, axis=1)

    def find(self, data: bytes) -> int:
        """The node of these bytes; -1 when no token begins with them."""
        symbols_1P = np.frombuffer(data, dtype=np.uint8).astype(np.int64)[None]
        return int(self.walk(np.zeros(1, dtype=np.int64), symbols_1P)[0, -1])


def _written_tokens(tokenizer: Any, tokens: TokenBytes) -> set[int]:
    """Of tokens that have the same bytes, those that the tokenizer writes for them, as far as a few tries show it.

    SentencePiece has a token for each byte beside that of its character; tokens that were added may repeat others.
    """
    alike: dict[bytes, list[int]] = defaultdict(list)
    for token, piece in enumerate(tokens.pieces):
        if piece:
            alike[piece].append(token)
    texts = [piece.decode(errors="replace") for piece, ids in alike.items() if len(ids) > 1]
    tries = [before + text + after for before in ("", "\n", "0") for after in ("", "\n") for text in texts]
    return {token for ids in encode_text(tokenizer, tries) for token in ids}


def _grow(symbols: np.ndarray, length_W: np.ndarray, token_W: np.ndarray) -> tuple[TrieNodes, np.ndarray, np.ndarray]:
    """Nodes level by level: at depth d one begins wherever an entry differs from the one before within d symbols."""
    begin_W = np.cumsum(length_W) - length_W
    common_W = _common_with_previous(symbols, begin_W, length_W)
    lows, highs, parents, letters = [np.zeros(1, np.int64)], [np.asarray([len(token_W)])], [np.zeros(1, np.int64)], []
    letters.append(np.asarray([-1]))
    first_of_level = 0
    for depth in range(1, int(length_W.max()) + 1):
        borders = np.append(np.flatnonzero(common_W < depth), len(token_W))
        low = np.flatnonzero((common_W < depth) & (length_W >= depth))
        lows.append(low)
        highs.append(borders[np.searchsorted(borders, low, side="right")])
        parents.append(first_of_level + np.searchsorted(lows[-2], low, side="right") - 1)
        letters.append(symbols[begin_W[low] + depth - 1])
        first_of_level += len(lows[-2])
    depth_M = np.repeat(np.arange(len(lows)), [len(level) for level in lows])
    low_M, high_M, parent_M, symbol_M = (np.concatenate(levels) for levels in (lows, highs, parents, letters))
    degree_M = np.bincount(parent_M[1:], minlength=len(low_M))
    child_M1 = 1 + np.append(0, np.cumsum(degree_M))
    own_M = np.where(degree_M > 0, low_M[np.minimum(child_M1[:-1], len(low_M) - 1)], high_M)
    nodes = TrieNodes(*(torch.from_numpy(part) for part in (token_W, low_M, own_M, high_M, child_M1, symbol_M)))
    return nodes, depth_M, parent_M[1:] * SYMBOLS + symbol_M[1:]


def _common_with_previous(symbols: np.ndarray, begin_W: np.ndarray, length_W: np.ndarray) -> np.ndarray:
    """How many first symbols each entry shares with the one before it."""
    common_W = np.zeros(len(length_W), dtype=np.int64)
    same, depth = np.arange(1, len(length_W)), 0
    while len(same):
        same = same[(length_W[same] > depth) & (length_W[same - 1] > depth)]
        same = same[symbols[begin_W[same] + depth] == symbols[begin_W[same - 1] + depth]]
        depth += 1
        common_W[same] = depth
    return common_W


def _paths(
    texts: Sequence[bytes], has_end: bool, most: int, adds_space: bool
) -> tuple[dict[bytes, int], dict[int, Tensor]]:
    """A number for all bytes that a patch may hold (b"": none, the end of the document), and those of each entry."""
    numbers: dict[bytes, int] = {b"": 0} if has_end else {}
    longest = max(len(text) for text in texts)
    found = {}
    for before in sorted({*range(0, longest, most), *(range(1, longest, most) if adds_space else ())}):
        # After the space that stands in no patch, only what begins with it goes on.
        is_usual = before % most == 0
        row = [
            numbers.setdefault(text[before : before + most], len(numbers))
            if len(text) > before and (is_usual or text[:1] == b" ")
            else -1
            for text in texts
        ]
        found[before] = torch.tensor(row + [0 if before == 0 else -1] * has_end)
    return numbers, found


def _path_table(paths: dict[bytes, int], patch_bytes: int) -> Tensor:
    table_CP = np.full((len(paths), patch_bytes), PAD, dtype=np.int16)
    for content, number in paths.items():
        table_CP[number, : len(content)] = np.frombuffer(content, dtype=np.uint8)
        table_CP[number, len(content)] = EOP if content else EOD
    return torch.from_numpy(table_CP)
