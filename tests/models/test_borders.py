"""Offsets of tokens in a text, and where two tokenizations meet, by hand."""

import torch
from tests.models import toy_tokenizers as toy

from limbeck.models.borders import Offsets, meet, offsets_in_text, settled_until
from limbeck.models.token_bytes import encode_text, read_token_bytes


def test_settled_until():
    assert settled_until(b"a bc", is_closed=True) == 4
    assert settled_until(b"a bc", is_closed=False) == 1
    assert settled_until(b"abc", is_closed=False) == 0
    assert settled_until(b"a " + b"x" * 40, is_closed=False) == 42 - 32


def test_where_a_normaliser_rewrites_words_only_the_borders_around_them_count():
    tokenizer = toy.changed(toy.byte_level(320), lambda words: words.update(normalizer={"type": "NFC"}))
    tokens = read_token_bytes(tokenizer)
    text = "the e\u0301te\u0301 cat"
    ids = torch.tensor(encode_text(tokenizer, [text])[0]).numpy()
    offsets = offsets_in_text(ids, text, tokens, tokenizer)
    assert offsets.ends[-1] == len(text.encode())
    borders = set(offsets.borders.tolist())
    assert {0, 3, 11, 15} <= borders
    assert not borders & {5, 6, 7, 8, 9, 10}


def test_a_token_across_the_end_of_what_is_rewritten():
    """The tokens of "e\u0301 a" are C3, A9 20 and 61: none ends where the rewritten character does."""
    plain = toy.byte_level_of_merges([("\u00a9", "\u0120")])
    tokenizer = toy.changed(plain, lambda words: words.update(normalizer={"type": "NFC"}))
    tokens, text = read_token_bytes(tokenizer), "e\u0301 a"
    ids = encode_text(tokenizer, [text])[0]
    assert [tokens.pieces[token] for token in ids] == [b"\xc3", b"\xa9 ", b"a"]
    offsets = offsets_in_text(torch.tensor(ids).numpy(), text, tokens, tokenizer)
    assert offsets.ends.tolist() == [3, 4, 5]
    assert offsets.is_border.tolist() == [False, True, True]


def test_meeting_by_hand():
    student = Offsets(0, torch.tensor([2, 4, 5, 9]).numpy(), torch.ones(4, dtype=torch.bool).numpy())
    teacher = Offsets(0, torch.tensor([4, 5, 7, 9]).numpy(), torch.ones(4, dtype=torch.bool).numpy())
    everything = torch.ones(4, dtype=torch.bool).numpy()
    found = meet(student, teacher, student_scored=everything, teacher_scored=everything, until=9)
    assert found.student_chunk.tolist() == [0, 0, 1, 2]
    assert found.teacher_chunk.tolist() == [0, 1, 2, 2]
    assert (found.chunks, found.student_last.tolist(), found.teacher_last.tolist()) == (3, [1, 2, 3], [0, 1, 3])
    first_unscored = torch.tensor([False, True, True, True]).numpy()
    found = meet(student, teacher, student_scored=first_unscored, teacher_scored=everything, until=8)
    assert found.student_chunk.tolist() == [-1, -1, 0, -1]
    assert found.teacher_chunk.tolist() == [-1, 0, -1, -1]
    assert found.chunks == 1
