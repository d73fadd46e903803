"""The bytes of tokens: texts are put together from them exactly, or the tokenizer is refused."""

import functools

import pytest
from tests.models import toy_tokenizers as toy
from transformers import ByT5Tokenizer

from limbeck.core.errors import VocabularyError
from limbeck.models.teacher import EMBEDDED, load_tokenizer
from limbeck.models.token_bytes import encode_text, leading_special_tokens, read_token_bytes

HARD = "na\u00efve  caf\u00e9\n\n\tX🙂ꙮ \u00a0end \u0301 日本 <|endoftext|> </s "


@functools.cache
def kinds():
    return {
        "byte-level": toy.byte_level(400),
        "bytes only": toy.byte_level(257),
        "embedded": load_tokenizer(EMBEDDED),
        "sentencepiece": toy.sentence_piece(),
        "sentencepiece without space": toy.sentence_piece(add_space=False),
        "unigram": toy.sentence_piece(360, kind="unigram"),
        "byt5": ByT5Tokenizer(),
    }


@pytest.mark.parametrize("name", list(kinds()))
def test_texts_come_back_byte_for_byte(name):
    tokenizer = kinds()[name]
    tokens = read_token_bytes(tokenizer)
    for text in [*toy.TEXT, HARD]:
        ids = encode_text(tokenizer, [text])[0]
        front = b" " if tokens.adds_space else b""
        assert tokens.join(ids) == front + text.encode()
        assert sum(tokens.lengths[token] for token in ids) == len(front + text.encode())
        assert not set(ids) & set(tokens.special_names)


def test_kinds_and_special_tokens():
    found = {name: read_token_bytes(tokenizer) for name, tokenizer in kinds().items()}
    assert {name: tokens.kind for name, tokens in found.items()} == {
        "byte-level": "byte-level", "bytes only": "byte-level", "embedded": "byte-level", "sentencepiece": "sentencepiece",
        "sentencepiece without space": "sentencepiece", "unigram": "sentencepiece", "byt5": "bytes",
    }  # fmt: skip
    assert [name for name, tokens in found.items() if tokens.adds_space] == ["sentencepiece", "unigram"]
    assert found["sentencepiece"].special_names == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert found["sentencepiece"].end_id == 2
    assert found["sentencepiece"].pieces[:3] == (None, None, None)
    assert found["sentencepiece"].pieces[3 + 0x0A] == b"\n"
    assert not found["byte-level"].is_text[0]


def test_what_a_tokenizer_writes_in_front():
    assert leading_special_tokens(toy.sentence_piece()) == [1]
    assert leading_special_tokens(toy.sentence_piece(begin=False)) == []
    assert leading_special_tokens(toy.byte_level(300)) == []
    assert leading_special_tokens(ByT5Tokenizer()) == []


def test_added_tokens_that_are_text_stand_for_themselves():
    tokenizer = toy.byte_level(300)
    tokenizer.add_tokens(["    ", "éé"])
    tokens = read_token_bytes(tokenizer)
    ids = encode_text(tokenizer, ["x    ééy"])[0]
    assert len(tokenizer) - 1 in ids
    assert tokens.join(ids) == "x    ééy".encode()


def test_a_lower_casing_word_piece_is_refused_with_what_it_loses():
    with pytest.raises(VocabularyError, match="upper case, runs of spaces, line breaks"):
        read_token_bytes(toy.word_piece())


def test_a_normaliser_that_lower_cases_is_refused():
    tokenizer = toy.changed(toy.byte_level(300), lambda words: words.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(VocabularyError, match="It loses: upper case"):
        read_token_bytes(tokenizer)


def test_a_tokenizer_without_byte_fallback_is_refused():
    def drop_bytes(words):
        words["model"]["byte_fallback"] = False

    with pytest.raises(VocabularyError, match="rare characters"):
        read_token_bytes(toy.changed(toy.sentence_piece(), drop_bytes))


def test_unicode_normalisation_alone_is_not_refused():
    tokenizer = toy.changed(toy.byte_level(300), lambda words: words.update(normalizer={"type": "NFC"}))
    tokens = read_token_bytes(tokenizer)
    assert tokens.join(encode_text(tokenizer, ["cafe\u0301"])[0]) == "caf\u00e9".encode()
