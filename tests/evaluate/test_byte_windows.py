"""Which symbols of a text a byte-level model is scored on, and how many bytes they are."""

import functools

import pytest
import torch
from tests.models import toy_tokenizers as toy

from limbeck.core.symbols import BOS, EOP
from limbeck.evaluate.windows import prepare_document, prepare_documents
from limbeck.models.byte_tokenizer import ByteTokenizer

TEXT = "the c\u00e4t s\u00e4t 🙂 on the\tmat \u2014 e\u0301  ends \u65e5\u672c"
ODD = "a\ud800 \udcff\udc80 b"


@functools.cache
def kinds():
    return {
        "space": ByteTokenizer(), "fixed": ByteTokenizer("fixed:3", patch_bytes=4),
        "bpe": ByteTokenizer.from_tokenizer(toy.byte_level(400)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["space", "fixed", "bpe"])
def test_every_byte_of_a_whole_text_is_scored(name):
    tokenizer = kinds()[name]
    document = prepare_document(tokenizer, TEXT, index=0)
    assert document.ids == [BOS, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    assert document.ids[-1] == EOP
    assert (document.first_target, document.bytes, document.words) == (1, len(TEXT.encode()), len(TEXT.split()))
    assert document.tokens == len(document.ids) - 1


@pytest.mark.parametrize("text", [TEXT, ODD])
@pytest.mark.parametrize("name", ["space", "fixed", "bpe"])
def test_a_budget_may_cut_a_patch_or_a_character_and_the_bytes_stay_exact(name, text):
    tokenizer = kinds()[name]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for budget in range(1, len(whole) + 3):
        document = prepare_document(tokenizer, text, index=0, budget=budget)
        assert document.ids == [BOS, *whole[:budget]]
        assert document.tokens == min(budget, len(whole))
        assert document.bytes == sum(symbol < 256 for symbol in whole[:budget])
        assert document.words <= len(text.encode(errors="surrogatepass").split())


def test_documents_and_budget_together():
    tokenizer = kinds()["space"]
    found = prepare_documents(tokenizer, ["ab cd", "", "e", "fgh"], max_tokens=10)
    assert [(one.index, one.tokens, one.bytes) for one in found] == [(0, 7, 5), (2, 2, 1), (3, 1, 1)]


def test_bits_per_byte_of_a_model_that_knows_nothing():
    """Uniform over 260 symbols: log2(260) bits for every symbol, ends of patches included, over the bytes alone."""
    import math

    from limbeck.evaluate.quality import score_text

    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = type("Config", (), {"vocab_size": 260})()

        def forward(self, input_ids, **_):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.weight.new_zeros(*input_ids.shape, 260))

    tokenizer = kinds()["space"]
    score = score_text(Uniform(), tokenizer, [TEXT, "x y z"], context_tokens=16)
    symbols = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (TEXT, "x y z"))
    data = len((TEXT + "x y z").encode())
    assert score.tokens == symbols
    assert score.bytes == data
    assert score.bits_per_byte == pytest.approx(math.log2(260) * symbols / data)
