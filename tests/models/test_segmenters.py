"""Every segmenter on every kind of bytes: lossless, deterministic, as saved; and by hand."""

import copy
import functools
import itertools
import json
import pickle
import random
import subprocess
import sys

import pytest
from tests.models import toy_tokenizers as toy
from tokenizers import Regex, Tokenizer, normalizers

from limbeck.core.errors import CheckpointError, DataError, RecipeError, VocabularyError
from limbeck.models.bare_folder import SEGMENTER_FILE
from limbeck.models.bpe_segmenter import BORDERS_FILE, BpeSegmenter
from limbeck.models.entropy_segmenter import EntropySegmenter
from limbeck.models.segmenters import (
    check_fit,
    limit_pieces,
    open_segmenter,
    read_segmenter,
    save_segmenter,
    segmenter_fingerprint,
)
from limbeck.models.simple_segmenters import FixedSegmenter, SpaceSegmenter
from limbeck.models.token_bytes import encode_text, read_token_bytes
from limbeck.models.tokenizers import tokenizer_fingerprint

FIT = [text.encode() for text in toy.TEXT] * 3


def nfc_tokenizer():
    return toy.changed(toy.byte_level(320), lambda words: words.update(normalizer={"type": "NFC"}))


@functools.cache
def segmenters():
    return {
        "space": SpaceSegmenter(),
        "fixed": FixedSegmenter(5),
        "entropy": EntropySegmenter.fit(FIT),
        "bpe": BpeSegmenter.from_tokenizer(toy.byte_level(400)),
        "bytes": BpeSegmenter.from_tokenizer(toy.byte_level(257)),
        "nfc": BpeSegmenter.from_tokenizer(nfc_tokenizer()),
        "sentencepiece": BpeSegmenter.from_tokenizer(toy.sentence_piece()),
        "no space": BpeSegmenter.from_tokenizer(toy.sentence_piece(add_space=False)),
        "unigram": BpeSegmenter.from_tokenizer(toy.sentence_piece(360, kind="unigram")),
    }


NAMES = [
    "space",
    "fixed",
    "entropy",
    "bpe",
    "bytes",
    "nfc",
    "sentencepiece",
    "no space",
    "unigram",
]


@functools.cache
def samples():
    """Bytes of every kind, by what they are."""
    chance = random.Random(3)
    alphabets = {
        "ascii": "abcdefgh  \n\t.,-'0123456789AZ",
        "mixed": "aé ßя日語한🙂\u0301\u200d\ufeff\u00a0\u3000 \r\n\0",
        "combining": "e\u0301a\u0308o\u0302 n\u0303 ",
    }
    found = {
        "empty": b"", "one byte": b"a", "one continuation": b"\x80", "one lead": b"\xf0", "NUL": b"\0", "NULs": b"a\0b\0\0 c\0",
        "space": b" ", "spaces": b" " * 40 + b"x" + b" " * 3, "windows": b"one\r\ntwo\r\n\r\n three\r", "long word": b"x" * 1000,
        "emoji": "🙂🙂 👩‍👩‍👧 a🙂b".encode(), "cjk": "日本語のテキスト、中文。한국어 텍스트".encode(),
        "not composed": "e\u0301te\u0301 and \u00e9t\u00e9, a\u030a \u212b".encode(), "surrogate": b"a\xed\xa0\x80b \xed\xbf\xbf",
        "overlong": b"\xc0\xaf \xe0\x80\xaf", "cut": "日本".encode()[:-1], "cut front": "日本".encode()[1:],
        "names": b"<|endoftext|> </s> <s><unk> <0x0A> [UNK]", "own marks": "\u2581a \u2581\u2581b \u0120c".encode(),
    }  # fmt: skip
    for number in range(12):
        found[f"random {number}"] = chance.randbytes(chance.randint(1, 400))
        for name, letters in alphabets.items():
            text = "".join(chance.choices(letters, k=chance.randint(1, 200))).encode()
            found[f"{name} {number}"] = text
            place = chance.randrange(len(text))
            found[f"{name} broken {number}"] = text[:place] + chance.randbytes(1) + text[place + 1 :]
    return found


def pieces(segmenter, data):
    ends = list(itertools.accumulate(segmenter.split(data)))
    return [data[low:high] for low, high in zip([0, *ends], ends)]


@pytest.mark.parametrize("name", NAMES)
def test_lossless_deterministic_and_independent_of_what_came_before(name):
    segmenter = segmenters()[name]
    first = {what: segmenter.split(data) for what, data in samples().items()}
    for what, data in samples().items():
        lengths = first[what]
        assert sum(lengths) == len(data), what
        assert all(type(length) is int and length >= 1 for length in lengths), what
    for what, data in reversed(samples().items()):
        assert segmenter.split(data) == first[what], what


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_copied_segmenters_cut_alike(name, tmp_path):
    segmenter = segmenters()[name]
    save_segmenter(segmenter, tmp_path, patch_bytes=9)
    read, patch_bytes = read_segmenter(tmp_path)
    assert (read.name, patch_bytes) == (segmenter.name, 9)
    assert read.facts() == segmenter.facts()
    assert segmenter_fingerprint(read) == segmenter_fingerprint(segmenter)
    sent = pickle.loads(pickle.dumps(segmenter))  # noqa: S301 (as a data loader's worker gets it)
    for other in (read, copy.deepcopy(segmenter), sent):
        for what, data in samples().items():
            assert other.split(data) == segmenter.split(data), what


def test_fingerprints_tell_segmenters_apart():
    found = [segmenter_fingerprint(segmenter) for segmenter in (*segmenters().values(), FixedSegmenter(4))]
    assert len(set(found)) == len(found)
    renamed = BpeSegmenter.from_tokenizer(toy.byte_level(400), name="other/name")
    assert renamed.name == "bpe:other/name"
    assert segmenter_fingerprint(renamed) == segmenter_fingerprint(segmenters()["bpe"])


def test_limited_pieces():
    assert limit_pieces([], 3) == []
    assert limit_pieces([1, 3, 2], 3) == [1, 3, 2]
    assert limit_pieces([4, 1, 7, 6], 3) == [3, 1, 1, 3, 3, 1, 3, 3]
    chance = random.Random(0)
    for _ in range(50):
        lengths = [chance.randint(1, 40) for _ in range(chance.randint(1, 20))]
        most = chance.randint(1, 20)
        expected = [min(most, length - low) for length in lengths for low in range(0, length, most)]
        assert limit_pieces(lengths, most) == expected


def test_spaces_by_hand():
    text = "The cat, (a  b)\r\n\r\nDon't 3.14 naïve кошка 日本 한국 🙂🙂 e\u0301te\u0301\u00a0x"
    assert [piece.decode() for piece in pieces(SpaceSegmenter(), text.encode())] == [
        "The", " cat", ", (a", "  b", ")\r\n\r\nDon", "'t", " 3", ".14", " naïve", " кошка", " 日", "本", " 한국", " 🙂", "🙂",
        " e\u0301te\u0301", "\u00a0x",
    ]  # fmt: skip
    assert pieces(SpaceSegmenter(), b"  a") == [b"  a"]
    assert pieces(SpaceSegmenter(), b"a  ") == [b"a", b"  "]


@pytest.mark.parametrize("name", ["space", "entropy"])
def test_what_comes_later_moves_no_border_and_no_character_is_cut(name):
    segmenter = segmenters()[name]
    for what, data in samples().items():
        whole = set(itertools.accumulate(segmenter.split(data)))
        for end in range(1, len(data), 7):
            begun = set(itertools.accumulate(segmenter.split(data[:end]))) - {end}
            assert begun == {place for place in whole if place < end}, what
        if what.split()[0] in ("mixed", "cjk", "emoji") and "broken" not in what:
            for piece in pieces(segmenter, data):
                piece.decode()


def test_fixed_by_hand():
    assert FixedSegmenter(3).split(b"abcdefgh") == [3, 3, 2]
    assert FixedSegmenter(3).split(b"abcdef") == [3, 3]
    assert open_segmenter("fixed:7", patch_bytes=16).name == "fixed:7"


@pytest.mark.parametrize("name", ["bpe", "bytes", "sentencepiece", "no space", "unigram"])
def test_pieces_are_the_bytes_of_the_tokens(name):
    tokenizer = {
        "bpe": toy.byte_level(400), "bytes": toy.byte_level(257), "sentencepiece": toy.sentence_piece(),
        "no space": toy.sentence_piece(add_space=False), "unigram": toy.sentence_piece(360, kind="unigram"),
    }[name]  # fmt: skip
    tokens, segmenter = read_token_bytes(tokenizer), segmenters()[name]
    for text in [*toy.TEXT, " Ada met Bo", "x\u0301 🙂 日本", "<|endoftext|> here"]:
        expected = [tokens.pieces[token] for token in encode_text(tokenizer, [text])[0]]
        if b"".join(expected) != text.encode():
            assert tokens.adds_space
            expected[0] = expected[0][1:]
        assert pieces(segmenter, text.encode()) == [piece for piece in expected if piece], text


def test_bytes_that_are_no_utf8_stand_alone_between_tokens():
    segmenter = segmenters()["bpe"]
    assert pieces(segmenter, b"Ada\xff\xfe Bo\x80") == [b"Ada", b"\xff", b"\xfe", b" Bo", b"\x80"]
    segmenter = segmenters()["sentencepiece"]
    ada = pieces(segmenter, b"Ada")
    assert pieces(segmenter, b"Ada\xffAda") == [*ada, b"\xff", *ada]


def test_words_that_a_normaliser_rewrites_are_cut_before_words_and_the_others_as_ever():
    segmenter = segmenters()["nfc"]
    text = "the cat saw the e\u0301te\u0301 cat"
    plain = pieces(segmenter, b"the cat saw the")
    found = pieces(segmenter, text.encode())
    assert found[: len(plain)] == plain
    assert b"".join(found) == text.encode()
    assert " e\u0301te\u0301".encode() in [
        b"".join(found[low:high]) for low in range(len(found)) for high in range(len(found))
    ]
    assert pieces(segmenter, b" cat") == found[-len(pieces(segmenter, b" cat")) :]


def test_a_normaliser_that_drops_characters_loses_none_here():
    tokenizer = toy.byte_level(400)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[jq~]"), "")
    segmenter = BpeSegmenter.from_tokenizer(tokenizer)
    for data in (b"j", b"aj b qq wordq", b" ~jq~"):
        assert b"".join(pieces(segmenter, data)) == data
    assert pieces(segmenter, b"jq~jq") == [b"jq", b"~jq"]


def test_long_texts_are_tokenised_in_parts_that_end_before_a_space(monkeypatch):
    from limbeck.models import bpe_segmenter

    segmenter = segmenters()["bpe"]
    text = "Ada met Bo. " * 30 + "x" * 100 + " Ada"
    whole = pieces(segmenter, text.encode())
    monkeypatch.setattr(bpe_segmenter, "_CHARACTERS_AT_ONCE", 40)
    monkeypatch.setattr(bpe_segmenter, "_SPACE_WITHIN", 20)
    parts = list(bpe_segmenter._parts(text.encode()))
    assert max(map(len, parts)) <= 40
    assert len(parts) > 10
    assert all(part.startswith(" ") for part in parts[1:8])
    assert pieces(segmenter, text.encode())[:90] == whole[:90]
    assert b"".join(pieces(segmenter, text.encode())) == text.encode()


def test_a_tokenizer_that_hides_its_bytes_is_refused_with_the_reason():
    with pytest.raises(VocabularyError, match="It loses: upper case"):
        BpeSegmenter.from_tokenizer(toy.word_piece())


def test_a_tokenizer_of_python_code_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(VocabularyError, match="Python code"):
        BpeSegmenter.from_tokenizer(ByT5Tokenizer())


def test_merges_that_are_left_out_at_random_are_refused():
    tokenizer = toy.byte_level(400)
    tokenizer.backend_tokenizer.model.dropout = 0.5
    with pytest.raises(VocabularyError, match="at random"):
        BpeSegmenter.from_tokenizer(tokenizer)


def test_a_call_that_padded_or_truncated_leaves_no_trace():
    tokenizer = toy.byte_level(400)
    tokenizer.pad_token = tokenizer.eos_token
    before = tokenizer_fingerprint(tokenizer)
    assert BpeSegmenter.from_tokenizer(tokenizer).tokenizer_fingerprint == before
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    segmenter = BpeSegmenter.from_tokenizer(tokenizer)
    assert segmenter.tokenizer_fingerprint == before
    assert segmenter.split(b"Ada met Bo") == segmenters()["bpe"].split(b"Ada met Bo")


def test_entropies_by_hand():
    """After "a" comes "b" three times in four: with Witten and Bell's weights, 4 occurrences and 2 kinds."""
    import math

    segmenter = EntropySegmenter.fit([b"ab", b"ab", b"ab", b"ac"])
    unigram = [(count + 3 / 256) / (8 + 3) for count in (4, 3, 1)] + [3 / 256 / 11] * 253
    after_a = [(count + 2 * base) / (4 + 2) for count, base in zip([0, 3, 1] + [0] * 253, unigram)]
    bits = -sum(p * math.log2(p) for p in after_a)
    table = segmenter.facts()["tables"][0]
    assert table == {"contexts": [97], "millibits": [round(1000 * bits)]}
    assert all(not table["contexts"] or table["contexts"] == [97] for table in segmenter.facts()["tables"])


def test_entropies_against_a_slow_reference():
    import math
    from collections import Counter

    documents = [text.encode() for text in toy.TEXT]
    counts = [Counter() for _ in range(4)]
    for document in documents:
        for length in range(4):
            for end in range(length, len(document)):
                counts[length][document[end - length : end + 1]] += 1

    @functools.cache
    def probs(context):
        after = {gram[-1]: count for gram, count in counts[len(context)].items() if gram[:-1] == context}
        kinds, total = len(after), sum(after.values())
        base = probs(context[1:]) if context else [1 / 256] * 256
        return [(after.get(byte, 0) + kinds * base[byte]) / (total + kinds) for byte in range(256)]

    facts = EntropySegmenter.fit(documents).facts()
    seen = 0
    for length, table in enumerate(facts["tables"], start=1):
        for code, millibits in zip(table["contexts"], table["millibits"]):
            bits = -sum(p * math.log2(p) for p in probs(code.to_bytes(length, "big")))
            assert abs(1000 * bits - millibits) <= 0.51
            seen += 1
    assert seen > 30


@pytest.mark.parametrize("mean", [1.0, 2.0, 4.5, 9.0])
def test_the_threshold_gives_the_mean_length_asked_for(mean):
    chance = random.Random(5)
    lexicon = ["".join(chance.choices("etaoinshrdlu", range(12, 0, -1), k=chance.randint(2, 8))) for _ in range(400)]
    text = " ".join(chance.choices(lexicon, k=4000)).encode()
    segmenter = EntropySegmenter.fit([text], mean_patch_bytes=mean)
    assert abs(len(text) / len(segmenter.split(text)) / mean - 1) < 0.05
    assert EntropySegmenter.fit([text], mean_patch_bytes=mean).facts() == segmenter.facts()


def test_the_threshold_is_the_best_there_is_and_no_document_sees_another():
    """After "ba" anything may come, after another "a" nearly always "b": 20 places to begin a patch, and 80 documents."""
    documents = [b"ab"] * 60 + [b"ba" + bytes([letter]) for letter in b"cdefghijkl"] * 2
    segmenter = EntropySegmenter.fit(documents, mean_patch_bytes=180 / 100)
    assert segmenter.split(b"ab") == [2]
    assert segmenter.split(b"bac") == [2, 1]


def test_long_data_are_cut_in_blocks_without_a_seam(monkeypatch):
    from limbeck.models import entropy_segmenter

    segmenter = segmenters()["entropy"]
    data = b"".join(FIT)
    whole = segmenter.split(data)
    for size in (1, 2, 7, 50):
        monkeypatch.setattr(entropy_segmenter, "_BYTES_AT_ONCE", size)
        assert segmenter.split(data) == whole


def test_fitting_reads_no_more_than_it_may_and_refuses_nothing_to_read():
    assert EntropySegmenter.fit([b"abcd", b"efgh"], most_bytes=4).facts() == EntropySegmenter.fit([b"abcd"]).facts()
    for documents in ([], [b"", b""]):
        with pytest.raises(DataError, match="no text"):
            EntropySegmenter.fit(documents)
    with pytest.raises(RecipeError, match="at least one"):
        EntropySegmenter.fit([b"abc"], mean_patch_bytes=0.5)
    assert EntropySegmenter.fit([b"a"]).split(b"abc") == [1, 1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("spaec", 'Did you mean "space"'),
        ("space:3", "takes nothing"),
        ("fixed", "expected a number"),
        ("fixed:-1", "expected a number"),
        ("fixed:0", "at least one byte"),
        ("fixed:16", "fixed:15"),
        ("ngram_entropy", "fitted on text"),
        ("", "unknown segmenter"),
    ],
)
def test_words_that_name_no_segmenter(words, message):
    with pytest.raises(RecipeError, match=message):
        open_segmenter(words, patch_bytes=16)


def test_a_patch_holds_at_least_a_byte():
    check_fit(SpaceSegmenter(), 2)
    with pytest.raises(RecipeError, match="2 or more"):
        check_fit(SpaceSegmenter(), 1)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no"):
        read_segmenter(tmp_path)
    save_segmenter(segmenters()["bpe"], tmp_path, patch_bytes=16)
    borders, words = tmp_path / BORDERS_FILE, tmp_path / SEGMENTER_FILE
    kept = borders.read_bytes()
    borders.write_bytes(kept.replace(b"0", b"1", 1))
    with pytest.raises(CheckpointError, match="checksum"):
        read_segmenter(tmp_path)
    borders.unlink()
    with pytest.raises(CheckpointError, match=BORDERS_FILE):
        read_segmenter(tmp_path)
    facts = json.loads(words.read_text())
    for change, message in (
        ({"format": 2}, "Update"),
        ({"segmenter": {"kind": "spaec"}}, "Did you mean"),
        ({"segmenter": {}}, "damaged"),
        ({"patch_bytes": "x"}, "damaged"),
    ):
        words.write_text(json.dumps(facts | change))
        with pytest.raises(CheckpointError, match=message):
            read_segmenter(tmp_path)
    words.write_text("{")
    with pytest.raises(CheckpointError):
        read_segmenter(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"tables": []}, {"tables": [{"contexts": [3, 1], "millibits": [1, 2]}] * 3}, {"threshold_millibits": float("inf")},
        {"tables": [{"contexts": [1, 3], "millibits": [1]}] * 3}, {"tables": [{"contexts": [[1]], "millibits": [[1]]}] * 3},
    ],
)  # fmt: skip
def test_entropies_that_cannot_be_are_refused(tmp_path, change):
    """Contexts out of order would be looked up in vain, and patches begin elsewhere than in training, unseen."""
    save_segmenter(segmenters()["entropy"], tmp_path, patch_bytes=16)
    words = json.loads((tmp_path / SEGMENTER_FILE).read_text())
    words["segmenter"].update(change)
    (tmp_path / SEGMENTER_FILE).write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="damaged"):
        read_segmenter(tmp_path)


def test_segmenters_do_not_need_transformers(tmp_path):
    save_segmenter(segmenters()["bpe"], tmp_path, patch_bytes=16)
    code = (
        "import sys, pathlib, limbeck.models.symbol_streams, limbeck.models.segmenters as s;"
        f"seg, _ = s.read_segmenter(pathlib.Path({str(tmp_path)!r}));"
        f"assert seg.split(b'Ada met Bo') == {segmenters()['bpe'].split(b'Ada met Bo')};"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_library_writes_comes_back():
    text = toy.byte_level(400).backend_tokenizer.to_str()
    assert Tokenizer.from_str(text).to_str() == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "text") for name in ("space", "fixed", "entropy", "bpe", "sentencepiece", "nfc")),
        *((name, "random") for name in ("space", "entropy", "bpe")),
        ("nfc", "not composed"),
    ],
)
def test_ten_megabytes(name, kind):
    data = {
        "text": ("Ada met Bo. Bo saw Ada, and кошка 日本 🙂 again.\r\n" * 170_000).encode(),
        "not composed": ("Ada met Bo again, " * 20 + "e\u0301te\u0301 ").encode() * 27_000,
        "random": random.Random(1).randbytes(10_000_000),
    }[kind][:10_000_000]
    segmenter = segmenters()[name]
    lengths = segmenter.split(data)
    assert sum(lengths) == len(data)
    assert min(lengths) >= 1
