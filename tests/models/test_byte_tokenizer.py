"""The tokenizer of bytes: the grammar of its streams, prompts, padding, saving, streaming, and that nothing is lost."""

import functools
import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
from tests.models import toy_tokenizers as toy
from tests.models.test_segmenters import samples
from torch.testing import assert_close
from transformers import AutoTokenizer, TextIteratorStreamer

from limbeck.core.errors import RecipeError, VocabularyError
from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.symbol_streams import text_to_bytes
from limbeck.models.token_bytes import encode_text, leading_special_tokens, read_token_bytes
from limbeck.models.tokenizers import encoder, tokenizer_fingerprint
from limbeck.models.vocabulary import compare_tokenizers

TEXTS = [
    *toy.TEXT, "", "a", " ", "one\r\ntwo\r\n", "e\u0301te\u0301 \u00e9", "\0 a\0", "<bos> is <eod> text <pad><eop> <|endoftext|> </s>",
    "x" * 100, "lone \ud800 and raw \udcff\udc80\udfff", "👩‍👩‍👧 日本語 한국어",
]  # fmt: skip


@functools.cache
def kinds():
    return {
        "space": ByteTokenizer(),
        "fixed": ByteTokenizer("fixed:3", patch_bytes=4),
        "entropy": ByteTokenizer.fit_entropy(toy.TEXT, patch_bytes=8),
        "bpe": ByteTokenizer.from_tokenizer(toy.byte_level(400)),
        "sentencepiece": ByteTokenizer.from_tokenizer(toy.sentence_piece(), patch_bytes=5),
        "small": ByteTokenizer(patch_bytes=2),
    }


NAMES = ["space", "fixed", "entropy", "bpe", "sentencepiece", "small"]


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_come_back_and_keep_the_grammar(name):
    tokenizer = kinds()[name]
    for what, data in samples().items():
        ids = tokenizer.encode_bytes(data)
        assert tokenizer.decode_bytes(ids) == data, what
        assert all(type(symbol) is int for symbol in ids)
        assert not data or ids[-1] == EOP
        patches = [list(group) for is_end, group in itertools.groupby(ids, lambda symbol: symbol == EOP) if not is_end]
        assert ids.count(EOP) == len(patches), what
        assert all(len(patch) < tokenizer.patch_bytes and max(patch) < 256 for patch in patches), what
        assert tokenizer.encode_bytes(data) == ids


@pytest.mark.parametrize("name", NAMES)
def test_plain_streams_of_texts(name):
    tokenizer = kinds()[name]
    expected = [tokenizer.encode_bytes(text_to_bytes(text)) for text in TEXTS]
    assert tokenizer(TEXTS, add_special_tokens=False)["input_ids"] == expected
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == expected
    assert encoder(tokenizer)(TEXTS) == expected
    assert encode_text(tokenizer, TEXTS) == expected
    assert encode_text(tokenizer, TEXTS[::-1]) == expected[::-1]
    for text, ids in zip(TEXTS, expected):
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
        assert tokenizer.decode(ids, errors="surrogateescape").encode(errors="surrogateescape") == text_to_bytes(text)
        if "\ud800" not in text:
            assert tokenizer.decode(ids) == text
            assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == text


def test_texts_as_bytes():
    assert text_to_bytes("é\ud800\udcff x\udc80\udc81\udfff") == b"\xc3\xa9\xed\xa0\x80\xff x\x80\x81\xed\xbf\xbf"
    for data in samples().values():
        assert text_to_bytes(data.decode(errors="surrogateescape")) == data


def test_a_prompt_begins_with_bos_and_ends_in_an_open_patch():
    tokenizer = kinds()["space"]
    assert tokenizer("a cat")["input_ids"] == [BOS, 97, EOP, 32, 99, 97, 116]
    assert tokenizer("a cat ")["input_ids"] == [BOS, 97, EOP, 32, 99, 97, 116, EOP, 32]
    assert tokenizer("")["input_ids"] == [BOS]
    assert tokenizer.encode("a cat") == tokenizer("a cat")["input_ids"]
    assert tokenizer("a", " b")["input_ids"] == [BOS, 97, EOP, 32, 98]
    assert tokenizer("a b", return_special_tokens_mask=True)["special_tokens_mask"] == [1, 0, 0, 0, 0]
    full = "x" * 15
    assert tokenizer(full)["input_ids"] == [BOS, *full.encode()]
    assert tokenizer("abcdef", truncation=True, max_length=4)["input_ids"] == [BOS, 97, 98, 99]


def test_batches_are_padded_on_the_left():
    tokenizer = kinds()["space"]
    batch = tokenizer(["a", "", "b cd"], padding=True, return_tensors="pt")
    assert_close(
        batch["input_ids"],
        torch.tensor([
            [PAD, PAD, PAD, PAD, BOS, 97], [PAD, PAD, PAD, PAD, PAD, BOS], [BOS, 98, EOP, 32, 99, 100],
        ]),
    )  # fmt: skip
    assert_close(batch["attention_mask"], (batch["input_ids"] != PAD).long())
    assert tokenizer.batch_decode(batch["input_ids"]) == ["a", "", "b cd"]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a", "", "b cd"]
    plain = tokenizer(["a", "b cd"], padding=True, add_special_tokens=False)
    assert plain["input_ids"][0] == [PAD, PAD, PAD, PAD, 97, EOP]
    assert plain["attention_mask"][0] == [0, 0, 0, 0, 1, 1]


def test_decoding_for_the_eye():
    tokenizer = kinds()["space"]
    ids = [BOS, *"日本".encode()[:-1], EOP, EOD, PAD]
    assert tokenizer.decode(ids) == "日\ufffd"
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == "日\ufffd"
    assert tokenizer.decode(97) == "a"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(ids, errors="surrogateescape") == "日\udce6\udc9c"


def test_roles_and_sizes():
    tokenizer = kinds()["space"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOD, PAD)
    assert len(tokenizer) == tokenizer.vocab_size == SYMBOLS
    assert sorted(tokenizer.get_vocab().values()) == list(range(SYMBOLS))
    assert sorted(tokenizer.all_special_ids) == [PAD, BOS, EOD]
    assert not tokenizer.is_fast


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_is_the_same_for_auto_tokenizer(name, tmp_path):
    tokenizer = kinds()[name]
    tokenizer.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()} - {"tokenizer_config.json"}
    assert written <= set(ByteTokenizer.vocab_files_names.values())  # what is fetched from the hub
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ByteTokenizer
    assert (loaded.patch_bytes, loaded.segmenter.name) == (tokenizer.patch_bytes, tokenizer.segmenter.name)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    for data in samples().values():
        assert loaded.encode_bytes(data) == tokenizer.encode_bytes(data)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert str(tmp_path) not in (tmp_path / "tokenizer_config.json").read_text()
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(again)) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("model_type", ["gpt_neox", "limbeck_bytepool"])
def test_it_is_found_in_a_fresh_process_beside_any_model(model_type, tmp_path):
    kinds()["bpe"].save_pretrained(tmp_path)
    trunk = {"width": 8, "layers": 1, "heads": 1, "feed_forward": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "trunk": trunk}))
    code = (
        "import sys, limbeck; from transformers import AutoTokenizer;"
        f"print(AutoTokenizer.from_pretrained({str(tmp_path)!r})('Ada met Bo, caf\\xe9')['input_ids'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == kinds()["bpe"]("Ada met Bo, caf\xe9")["input_ids"]


def test_fingerprints_tell_segmenters_and_lengths_apart():
    found = [tokenizer_fingerprint(tokenizer) for tokenizer in (*kinds().values(), ByteTokenizer(patch_bytes=17))]
    assert len(set(found)) == len(found)
    assert tokenizer_fingerprint(ByteTokenizer("space", 16)) == tokenizer_fingerprint(kinds()["space"])


def test_its_bytes_are_known_and_the_end_of_a_patch_is_text_of_no_length():
    for tokenizer in kinds().values():
        tokens = read_token_bytes(tokenizer)
        assert (tokens.kind, tokens.end_id, tokens.adds_space) == ("symbols", EOD, False)
        assert len(tokens.pieces) == SYMBOLS
        assert tokens.pieces[:256] == tuple(bytes([byte]) for byte in range(256))
        assert tokens.pieces[256:] == (None, None, None, b"")
        assert tokens.special_names == {PAD: "<pad>", BOS: "<bos>", EOD: "<eod>"}
        assert tokens.is_text[EOP]
        assert tokens.lengths[EOP] == 0
        assert leading_special_tokens(tokenizer) == [BOS]


def test_comparing_tokenizers():
    one, other = kinds()["space"], kinds()["bpe"]
    assert compare_tokenizers(one, ByteTokenizer()).verdict == "identical"
    assert compare_tokenizers(one, other).verdict == "different"
    assert compare_tokenizers(one, toy.byte_level(400)).verdict == "different"


def test_borders_of_another_tokenizer():
    teacher = toy.byte_level(400)
    tokenizer = ByteTokenizer.from_tokenizer(teacher, patch_bytes=6)
    assert tokenizer.segmenter.tokenizer_fingerprint == tokenizer_fingerprint(teacher)
    assert ByteTokenizer.from_tokenizer(tokenizer).segmenter is tokenizer.segmenter
    with pytest.raises(VocabularyError, match="upper case"):
        ByteTokenizer.from_tokenizer(toy.word_piece())


def test_a_tokenizer_by_the_name_of_its_folder(tmp_path):
    toy.byte_level(400).save_pretrained(tmp_path / "teacher")
    tokenizer = ByteTokenizer(f"bpe:{tmp_path / 'teacher'}")
    assert tokenizer.segmenter.name == "bpe:teacher"
    assert tokenizer.encode_bytes(b"Ada met Bo") == kinds()["bpe"].encode_bytes(b"Ada met Bo")


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="2 or more"):
        ByteTokenizer(patch_bytes=1)
    with pytest.raises(RecipeError, match="does not fit"):
        ByteTokenizer("fixed:16")
    with pytest.raises(RecipeError, match="Did you mean"):
        ByteTokenizer("spce")
    with pytest.raises(RecipeError, match="bytes_per_patch"):
        ByteTokenizer.fit_entropy(toy.TEXT, bytes_per_patch=20)
    tokenizer = ByteTokenizer()
    assert tokenizer.add_tokens(["<eop>", "a"]) == 0
    with pytest.raises(VocabularyError, match="takes no others"):
        tokenizer.add_tokens(["<tool>"])


def stream(tokenizer, ids):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.put(torch.tensor([[BOS]]))
    pieces = []
    for symbol in ids:
        streamer.put(torch.tensor([symbol]))
        while not streamer.text_queue.empty():
            pieces.append(streamer.text_queue.get())
    streamer.end()
    last = streamer.text_queue.get()
    return pieces, last


@pytest.mark.parametrize("name", ["space", "fixed", "bpe", "small"])
def test_streaming_shows_no_half_characters(name):
    tokenizer = kinds()[name]
    chance = random.Random(7)
    for _ in range(20):
        text = "".join(chance.choices("ab é日本🙂🙂한\u0301\u200d\n ", k=60))
        ids = [*tokenizer.encode_bytes(text.encode()), EOD]
        pieces, last = stream(tokenizer, ids)
        assert "".join(pieces) + last == text
        cut, rest = stream(tokenizer, ids[: chance.randrange(1, len(ids))])
        shown = "".join(cut)
        assert "\ufffd" not in shown
        assert text.startswith(shown + rest.rstrip("\ufffd"))
        assert rest.count("\ufffd") <= 1
    assert len(stream(tokenizer, tokenizer.encode_bytes(b"one two three"))[0]) > 2


def test_streaming_bytes_that_are_no_utf8():
    tokenizer = kinds()["space"]
    pieces, last = stream(tokenizer, tokenizer.encode_bytes(b"ok \xff\xfe word \x80."))
    assert "".join(pieces) + last == "ok \ufffd\ufffd word \ufffd."
