import numpy as np
import pytest
import torch
from tests.models import toy_tokenizers as toys
from tests.objectives.trie_toys import END, PATCH_BYTES, PIECES, path_of, spelled

from limbeck.core.errors import VocabularyError
from limbeck.core.symbols import EOD, PAD
from limbeck.models.byte_trie import ByteTrie
from limbeck.models.token_bytes import read_token_bytes


def prefixes_of(pieces, end):
    texts = [piece for token, piece in enumerate(pieces) if piece and token != end]
    return {piece[:n] for piece in texts for n in range(len(piece) + 1)}


def check_trie(trie, pieces, end):
    """Every prefix is a node, above exactly the tokens that begin so, and nothing else is."""
    nodes = trie.nodes
    prefixes = prefixes_of(pieces, end)
    assert len(nodes.low_M) == len(prefixes) + (end is not None)
    tokens = nodes.token_W.tolist()
    for prefix in prefixes:
        node = trie.find(prefix) if prefix else 0
        low, own, high = (int(part[node]) for part in (nodes.low_M, nodes.own_M, nodes.high_M))
        expected = {t for t, piece in enumerate(pieces) if piece and t != end and piece.startswith(prefix)}
        assert set(tokens[low:high]) == expected | ({end} if prefix == b"" and end is not None else set())
        assert set(tokens[low:own]) == {t for t in expected if pieces[t] == prefix}
        children = range(int(nodes.child_M1[node]), int(nodes.child_M1[node + 1]))
        symbols = sorted({p[len(prefix)] for p in prefixes if len(p) > len(prefix) and p.startswith(prefix)})
        assert nodes.symbol_M[children].tolist() == symbols + ([EOD] if prefix == b"" and end is not None else [])
        assert trie.depth_M[node] == len(prefix)


def test_a_toy_trie():
    trie = ByteTrie.build(PIECES, END, patch_bytes=PATCH_BYTES)
    check_trie(trie, PIECES, END)
    assert trie.find(b"aba") == trie.find(b"\xff\xff") == -1
    assert trie.token_of[b"ab"] == 6
    assert ByteTrie.build(PIECES, END, written=[4]).token_of[b"ab"] == 4
    assert (trie.tokens, trie.longest_bytes) == (13, 6)


def test_a_trie_without_end_and_of_one_token():
    check_trie(ByteTrie.build([b"abc"], None), [b"abc"], None)
    with pytest.raises(VocabularyError, match="no token"):
        ByteTrie.build([None, b""], 0)


@pytest.mark.parametrize(
    "make", [lambda: toys.byte_level(400), toys.sentence_piece], ids=["byte-level", "sentencepiece"]
)
def test_the_trie_of_a_tokenizer(make):
    tokens = read_token_bytes(make())
    trie = ByteTrie.build(tokens.pieces, tokens.end_id, adds_space=tokens.adds_space)
    check_trie(trie, tokens.pieces, tokens.end_id)


def test_walking_leaves_the_trie_where_no_token_goes_on():
    trie = ByteTrie.build(PIECES, END, patch_bytes=PATCH_BYTES)
    symbols = np.asarray([[97, 98, 99, 97], [97, 99, 97, 98], [98, 32, -1, -1]])
    met = trie.walk(np.asarray([0, 0, 0]), symbols)
    assert met[0].tolist() == [0, *(trie.find(b"abca"[:n]) for n in range(1, 5))]
    assert met[1].tolist() == [0, trie.find(b"a"), -1, -1, -1]
    assert met[2].tolist() == [0, trie.find(b"b"), trie.find(b"b "), -1, -1]
    onwards = trie.walk(np.asarray([trie.find(b"abca")]), np.asarray([[98]]))
    assert onwards.tolist() == [[trie.find(b"abca"), trie.find(b"abcab")]]


def path_symbols(trie, number):
    symbols = trie.paths_CP[number].tolist()
    return tuple(symbols[: symbols.index(PAD)] if PAD in symbols else symbols)


def test_paths_are_the_first_patches_of_tokens_and_what_follows_them():
    trie = ByteTrie.build(PIECES, END, patch_bytes=PATCH_BYTES)
    paths = trie.token_paths(torch.arange(-1, len(PIECES) + 3))
    assert paths[0] == -1
    for token, path in enumerate(paths[1:].tolist()):
        expected = path_of(token) if token < len(PIECES) else None
        assert (path_symbols(trie, path) if path >= 0 else None) == expected
    for entry, token in enumerate(trie.nodes.token_W.tolist()):
        rest = (spelled(token) or b"")[PATCH_BYTES - 1 :]
        onward = int(trie.entry_paths[PATCH_BYTES - 1][entry])
        assert (bytes(path_symbols(trie, onward)[:-1]) if onward >= 0 else b"") == rest
    assert len({tuple(row) for row in trie.paths_CP.tolist()}) == len(trie.paths_CP)


def test_a_tokenizer_that_adds_a_space_has_paths_without_it():
    trie = ByteTrie.build([None, b" a", b" abcde", b" ", b"xy"], 0, patch_bytes=4, adds_space=True)
    found = {
        (trie.nodes.token_W[entry].item(), path_symbols(trie, path)[:-1])
        for entry, path in enumerate(trie.entry_paths[1].tolist())
        if path >= 0
    }
    assert found == {(1, tuple(b"a")), (2, tuple(b"abc"))}
    onwards = [path_symbols(trie, path)[:-1] for path in trie.entry_paths[4].tolist() if path >= 0]
    assert onwards == [tuple(b"de")]


def test_of_tokens_with_the_same_bytes_the_one_that_is_written():
    """SentencePiece writes its character where there is one, and a byte where there is none."""
    tokenizer = toys.sentence_piece()
    tokens, trie = read_token_bytes(tokenizer), ByteTrie.of_tokenizer(tokenizer)
    names = tokenizer.get_vocab()
    assert trie.token_of[b"a"] == names["a"] != names["<0x61>"]
    assert trie.token_of[b"\xff"] == names["<0xFF>"]
    for text in toys.TEXT:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [trie.token_of[tokens.pieces[token]] for token in ids] == ids
