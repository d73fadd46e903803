import random

import pytest
import torch
from tests.objectives.trie_toys import END, PATCH_BYTES, PIECES

from limbeck.core.symbols import BOS, EOD, EOP, PAD
from limbeck.core.types import Batch
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.byte_trie import ByteTrie
from limbeck.models.patch_tokens import patch_tokens
from limbeck.models.token_bytes import encode_text, read_token_bytes
from limbeck.objectives.byte_trie import FULL, INSIDE, START

TRIE = ByteTrie.build(PIECES, END, patch_bytes=PATCH_BYTES)
A, B, SPACE, ABC, AB, ABCA, ABCAB, CCCCCC, C = 1, 2, 3, 5, 6, 8, 9, 10, 11


def stream(*contents):
    """Symbols of patches; a string is bytes with EOP, a number itself."""
    return [s for part in contents for s in ((part,) if isinstance(part, int) else (*part, EOP))]


def batch_of(*rows, documents=None):
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = ids != PAD
    mask[:, 0] = False
    if documents is None:
        return Batch(ids, mask)
    documents = torch.tensor(documents)
    mask[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    return Batch(ids, mask, documents)


def read(batch, trie=TRIE, opening=(END,), **options):
    return patch_tokens(batch, trie, opening=opening, **options)


def told(found, width, row=0):
    """What is said of a row: (position, source, the node's bytes, state)."""
    names = {TRIE.find(p[:n]) if n else 0: p[:n] for p in PIECES if p for n in range(len(p) + 1)}
    rows = zip(
        found.place_M.tolist(), found.patch_M.tolist(), found.node_M.tolist(), found.state_M.tolist(), strict=True
    )
    return [
        (place % width, int(found.source_I[patch]), names[node], state)
        for place, patch, node, state in rows
        if place // width == row
    ]


def test_a_row_by_hand():
    """The first patch may have lost its beginning; from the second on each is predicted after the token before it."""
    found = read(batch_of(stream(b"b", b"ab", EOD)))
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B, AB, END]]
    assert found.teacher_batch.document_ids_BT is None
    assert told(found, 6) == [(1, 1, b"", START), (2, 1, b"a", INSIDE), (3, 1, b"ab", INSIDE), (4, 2, b"", START)]


def test_a_row_that_begins_with_its_document():
    found = read(batch_of(stream(BOS, b"b", b"ab")))
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B, AB]]
    assert told(found, 6)[:2] == [(0, 0, b"", START), (1, 0, b"b", INSIDE)]
    silent = read(batch_of(stream(BOS, b"b", b"ab")), opening=())
    assert silent.teacher_batch.input_ids_BT.tolist() == [[B, AB]]
    assert told(silent, 6)[0] == (2, 0, b"", START)


def test_a_row_that_begins_at_the_end_of_a_patch():
    found = read(batch_of([EOP, *stream(b"ab")]))
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, AB]]
    assert told(found, 4)[0] == (0, 0, b"", START)


def test_a_token_that_is_longer_than_a_patch():
    """Read as one token; its second patch begins at the node where the first has ended."""
    found = read(batch_of(stream(b"b", b"cccc", b"cc", b"a")))
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B, CCCCCC, A]]
    said = told(found, 12)
    assert said[4:9] == [
        (5, 1, b"cccc", FULL), (6, 1, b"cccc", START), (7, 1, b"ccccc", INSIDE), (8, 1, b"cccccc", INSIDE), (9, 2, b"", START),
    ]  # fmt: skip
    greedy = read(batch_of(stream(b"b", b"abca", b"b", b"abca", b"a")))
    assert greedy.teacher_batch.input_ids_BT.tolist() == [[END, B, ABCAB, ABCA, A]]


def test_a_row_that_ends_inside_a_token():
    found = read(batch_of(stream(b"b", b"cccc", 99)))
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B]]
    assert told(found, 8)[-1] == (6, 1, b"cccc", START)
    # Whether "abca" is the token or its beginning cannot be seen: nothing is said of what follows.
    open_end = read(batch_of(stream(b"b", b"abca", 98)))
    assert told(open_end, 8)[-1] == (5, 1, b"abca", FULL)
    other = read(batch_of(stream(b"b", b"abca", 99)))
    assert told(other, 8)[-1] == (6, 2, b"", START)


def test_pieces_that_are_no_token():
    """Read as single bytes; predicted as far as tokens begin so. Where a byte has no token, the text begins anew."""
    found = read(batch_of(stream(b"b", b"aca", b"b")))
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B, A, C, A, B]]
    assert told(found, 8)[:3] == [(1, 1, b"", START), (2, 1, b"a", INSIDE), (5, 4, b"", START)]
    broken = read(batch_of(stream(b"b", b"z", b"b")))
    assert broken.teacher_batch.input_ids_BT.tolist() == [[END, B, END, B]]
    assert broken.teacher_batch.document_ids_BT.tolist() == [[0, 0, 1, 1]]
    assert told(broken, 6) == [(1, 1, b"", START), (3, 2, b"", START), (4, 2, b"b", INSIDE)]


def test_packed_documents_are_packed_for_the_teacher():
    row = stream(b"b", EOD, b"ab", EOD, b"c")
    batch = batch_of(row, stream(b"c", b"c"), documents=[[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])
    found = read(batch)
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B, END, END, AB, END, END, C], [END, C, C] + [END] * 5]
    assert found.teacher_batch.document_ids_BT.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert found.teacher_batch.position_ids_BT[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    # The first symbol of a document is nobody's to predict; its second is predicted from what opens a text.
    assert told(found, 9) == [
        (1, 1, b"", START), (3, 3, b"a", INSIDE), (4, 3, b"ab", INSIDE), (5, 4, b"", START), (7, 6, b"c", INSIDE),
    ]  # fmt: skip
    assert told(found, 9, row=1) == [(1, 1, b"", START), (2, 1, b"c", INSIDE)]
    everything = Batch(batch.input_ids_BT, batch.input_ids_BT != PAD, batch.document_ids_BT)
    assert told(read(everything), 9) == told(found, 9)


def test_documents_that_see_each_other():
    """Without document ids the teacher reads on after the end of a text, as the student does."""
    found = read(batch_of(stream(b"b", EOD, b"ab")))
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B, END, AB]]
    assert told(found, 6)[:2] == [(1, 1, b"", START), (2, 2, b"", START)]


def test_only_what_is_scored_and_padding_not_at_all():
    batch = batch_of(stream(b"b", b"ab"), stream(b"b", b"ab", b"c"))
    mask = batch.loss_mask_BT.clone()
    mask[1, 3] = False
    found = read(Batch(batch.input_ids_BT, mask))
    assert [entry[0] for entry in told(found, 7)] == [1, 2, 3]
    assert [entry[0] for entry in told(found, 7, row=1)] == [1, 3, 4, 5]


def test_a_limit_of_the_teacher():
    found = read(batch_of(stream(b"b", b"ab", b"c", b"c")), limit_tokens=3)
    assert found.teacher_batch.input_ids_BT.tolist() == [[END, B, AB]]
    assert told(found, 9)[-1] == (5, 2, b"c", INSIDE)


def test_a_space_that_the_teacher_writes_itself():
    """ "ab" of a document is its " ab", predicted among what begins with a space; "b" it reads as " " and "b"."""
    trie = ByteTrie.build([None, b" ", b" ab", b"ab", b"b", b" a"], 0, patch_bytes=PATCH_BYTES, adds_space=True)
    found = read(batch_of(stream(BOS, b"ab", b"b")), trie, opening=(0,), adds_space=True)
    assert found.teacher_batch.input_ids_BT.tolist() == [[0, 2, 4]]
    assert found.node_M[:3].tolist() == [trie.find(b" "), trie.find(b" a"), trie.find(b" ab")]
    other = read(batch_of(stream(BOS, b"b", b"ab")), trie, opening=(0,), adds_space=True)
    assert other.teacher_batch.input_ids_BT.tolist() == [[0, 1, 4, 3]]
    assert (other.node_M[0], other.source_I[0]) == (0, 1)
    again = read(batch_of(stream(BOS, b"b", EOD, b"ab")), trie, opening=(0,), adds_space=True)
    assert again.teacher_batch.input_ids_BT.tolist() == [[0, 1, 4, 0, 2]]


def spare_with_spaces(kind):
    """Tokenizers that write a space before a text, but not before one that begins with a space; and one that always does."""
    from tests.models import toy_tokenizers as toy
    from tokenizers import pre_tokenizers

    if kind == "byte-level":
        tokenizer = toy.byte_level(400)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return tokenizer
    if kind == "metaspace":
        return toy.changed(toy.sentence_piece(), lambda words: words["pre_tokenizer"].update(prepend_scheme="always"))

    def as_llama(words):
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        parts = [{"type": "Prepend", "prepend": "\u2581"}, replace]
        words.update(pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": parts})

    return toy.changed(toy.sentence_piece(add_space=False), as_llama)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "as Llama's"])
@pytest.mark.parametrize("text", ["Ada met Bo.", " Ada met Bo.", "  Ada", " ", "   the weather", " \n Bo"])
def test_a_document_that_begins_with_a_space_is_read_as_its_tokenizer_reads_it(kind, text):
    tokenizer = spare_with_spaces(kind)
    tokens, bytes_ = read_token_bytes(tokenizer), ByteTokenizer.from_tokenizer(tokenizer)
    trie = ByteTrie.of_tokenizer(tokenizer)
    assert tokens.adds_space
    assert tokens.adds_to_space == (kind == "as Llama's")
    ids = [BOS, *bytes_(text, add_special_tokens=False)["input_ids"], EOD]
    found = read(batch_of(ids), trie, opening=(7,), adds_space=tokens.adds_space, adds_to_space=tokens.adds_to_space)
    assert found.teacher_batch.input_ids_BT[0].tolist() == [7, *encode_text(tokenizer, [text])[0], trie.end_id]
    is_spare = text.startswith(" ") and not tokens.adds_to_space
    first_known = ids.index(EOP) + 1 if is_spare else 1
    assert [place + 1 for place in found.place_M.tolist()] == list(range(first_known, len(ids)))


@pytest.mark.parametrize("seed", range(3))
def test_windows_anywhere_in_a_text(seed):
    """Whatever a window cuts, what is said of a position is where the text's own token stands, after the tokens before it."""
    chance = random.Random(seed)
    # Tokens of which no two can be joined, so that there is one way to read them.
    tokens = chance.choices([A, B, SPACE, C, AB, ABC, CCCCCC], k=30)
    symbols, standing = [], []
    for place, token in enumerate(tokens):
        piece = PIECES[token]
        for low in range(0, len(piece), PATCH_BYTES - 1):
            part = piece[low : low + PATCH_BYTES - 1]
            for n in range(len(part) + 1):
                standing.append((place, piece[: low + n], START if n == 0 else FULL if n == 4 else INSIDE))
            symbols += [*part, EOP]
    width, windows = 19, 0
    for low in range(len(symbols) - width):
        first, prefix, state = standing[low]
        if tokens[first] == CCCCCC and (len(prefix) < 4 or state == FULL):
            continue  # begins in the first patch of a long token, which its second does not tell
        windows += 1
        found = read(batch_of(symbols[low : low + width]))
        said = told(found, width)
        assert [place for place, *_ in said] == list(range(symbols.index(EOP, low) - low, width - 1))
        row = found.teacher_batch.input_ids_BT[0].tolist()
        for place, source, known, at in said:
            token, *expected = standing[low + place + 1]
            assert [known, at] == expected
            # The teacher has read what is left of the first token, and then the text's own tokens.
            whole = token - first - 1
            assert row[source + 1 - whole : source + 1] == tokens[first + 1 : token]
            left = b"".join(PIECES[one] for one in row[1 : source + 1 - whole])
            assert left == PIECES[tokens[first]][len(prefix) :]
    assert windows > 20
