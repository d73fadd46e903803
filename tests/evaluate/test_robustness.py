"""Spoilt text scored: the same bytes for every model, hand values, and what cannot be read said in words."""

import math
import statistics

import pytest
import torch
from tests.evaluate.small_models import VOCABULARY, FixedLogits, build_model
from torch.testing import assert_close

from limbeck.core.errors import DataError
from limbeck.evaluate.perturbations import PERTURBATIONS, perturb
from limbeck.evaluate.quality import score_text
from limbeck.evaluate.robustness import JudgedModel, score_robustness, unreadable_reason
from limbeck.evaluate.scoring import NonFiniteLogits
from limbeck.models.symbol_streams import text_to_bytes

DOCUMENTS = ["the cat sat on the mat", "a dog ran to the cat and sat", "on the mat the dog ran and ran"] * 4
SYMBOLS = 260


class Bytes:
    """The least a tokenizer of bytes has to do."""

    bos_token_id = 257

    def __call__(self, text, **_):
        return {
            "input_ids": list(text_to_bytes(text))
            if isinstance(text, str)
            else [list(map(int, text_to_bytes(one))) for one in text]
        }

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="surrogateescape")

    def decode_bytes(self, ids):
        return bytes(ids)


class Upper(Bytes):
    """A tokenizer that loses case."""

    def __call__(self, text, **_):
        return super().__call__(text.upper() if isinstance(text, str) else [one.upper() for one in text])


class Capitals:
    """A tokenizer that shows no bytes and loses case."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(one) for one in text.upper()]}

    def decode(self, ids, *, skip_special_tokens):
        return "".join(map(chr, ids))


@pytest.fixture
def uniform(bos_tokenizer):
    return {
        "tokens": JudgedModel(FixedLogits(torch.zeros(VOCABULARY)), bos_tokenizer),
        "bytes": JudgedModel(FixedLogits(torch.zeros(SYMBOLS)), Bytes()),
    }


def test_uniform_models_pay_for_their_tokens(uniform, bos_tokenizer):
    """A model that knows nothing pays log2 of its vocabulary a token: noise costs it the tokens that words fall apart into."""
    facts = score_robustness(
        uniform, DOCUMENTS, perturbations=["random_case", "full_width"], levels=[2], seeds=[0, 1, 2]
    )

    def by_hand(documents):
        ids = bos_tokenizer(documents, add_special_tokens=False)["input_ids"]
        return sum(map(len, ids)) * math.log2(VOCABULARY) / sum(len(text.encode()) for text in documents)

    clean = by_hand(DOCUMENTS)
    assert_close(facts["clean"]["tokens"]["bits_per_byte"], clean)
    for row in facts["rows"]:
        rate = PERTURBATIONS[row["perturbation"]].rates[1]
        spoilt = [[perturb(text, row["perturbation"], rate=rate, seed=seed) for text in DOCUMENTS] for seed in range(3)]
        paid = [by_hand(texts) for texts in spoilt]
        found = row["models"]["tokens"]
        assert_close(found["bits_per_byte"], statistics.fmean(paid))
        assert_close(found["seed_spread"], statistics.stdev(paid))
        assert_close(found["ratio"], statistics.fmean(paid) / clean)
        assert found["standard_error"] > 0
        sizes = [sum(len(text.encode()) for text in texts) for texts in spoilt]
        assert_close(row["bytes"], statistics.fmean(sizes))
        of_bytes = row["models"]["bytes"]
        assert_close(of_bytes["bits_per_byte"], math.log2(SYMBOLS))
        assert_close(of_bytes["ratio"], 1.0)
        clean_bytes = sum(map(len, DOCUMENTS))
        assert_close(of_bytes["bits_ratio"], statistics.fmean(sizes) / clean_bytes)
    ratios = [row["models"]["tokens"]["ratio"] for row in facts["rows"]]
    assert_close(facts["mean_ratio"], {"tokens": statistics.fmean(ratios), "bytes": 1.0})
    assert facts["mean_ratio"]["tokens"] > 1


def test_a_figure_is_that_of_score_text(model, bos_tokenizer):
    facts = score_robustness(
        {"one": JudgedModel(model, bos_tokenizer, 16)}, DOCUMENTS, perturbations=["typos"], levels=[3], seeds=[7]
    )
    spoilt = [perturb(text, "typos", rate=0.1, seed=7) for text in DOCUMENTS]
    score = score_text(model, bos_tokenizer, spoilt, context_tokens=16)
    found = facts["rows"][0]["models"]["one"]
    assert_close(found["bits_per_byte"], score.bits_per_byte)
    bits = torch.tensor(score.block_nats, dtype=torch.float64) / math.log(2)
    sizes = torch.tensor([len(text) for text in spoilt], dtype=torch.float64)
    left = bits - bits.sum() / sizes.sum() * sizes
    assert_close(found["standard_error"], float((12 / 11 * left.square().sum()).sqrt() / sizes.sum()))
    assert found["seed_spread"] is None
    assert facts["clean"]["one"]["context_tokens"] == 16


def test_few_documents_have_the_error_of_their_windows(model, bos_tokenizer):
    judged = {"one": JudgedModel(model, bos_tokenizer, 8)}
    facts = score_robustness(judged, DOCUMENTS[:2], perturbations=["upper"], levels=[3], seeds=[0])
    score = score_text(model, bos_tokenizer, DOCUMENTS[:2], context_tokens=8)
    expected = score.standard_error_nats * score.tokens / math.log(2) / score.bytes
    assert_close(facts["clean"]["one"]["standard_error"], expected)


def test_raw_bytes_are_read_by_bytes_alone(uniform):
    facts = score_robustness(uniform, DOCUMENTS, perturbations=["raw_bytes", "lower"], levels=[3], seeds=[0])
    raw, lower = (row["models"] for row in facts["rows"])
    assert "not UTF-8" in raw["tokens"]["unreadable"]
    assert_close(raw["bytes"]["bits_per_byte"], math.log2(SYMBOLS))
    assert_close(facts["mean_ratio"]["tokens"], lower["tokens"]["ratio"])


def test_documents_that_one_model_cannot_read_are_left_out_for_all(uniform):
    models = uniform | {"loud": JudgedModel(FixedLogits(torch.zeros(SYMBOLS)), Upper())}
    facts = score_robustness(models, ["LOUD TEXT", "soft", "NOISE"], perturbations=["lower"], levels=[3], seeds=[0])
    assert facts["protocol"]["documents_left_out"] == 1
    assert facts["protocol"]["bytes"] == len("LOUD TEXTNOISE")
    assert "do not give the bytes back" in facts["rows"][0]["models"]["loud"]["unreadable"]
    assert facts["mean_ratio"] == {"tokens": None, "bytes": None, "loud": None}
    with pytest.raises(DataError, match="no document can be read by all \\(loud"):
        score_robustness(models, ["soft"])


def test_the_budget_counts_bytes_and_splits_no_character(uniform):
    facts = score_robustness(
        uniform, ["é" * 10, "日本語"], perturbations=["upper"], levels=[3], seeds=[0], max_bytes=24
    )
    assert facts["protocol"]["bytes"] == 23
    assert facts["protocol"]["documents"] == 2


def test_windows_hold_equal_text(uniform, bos_tokenizer):
    facts = score_robustness(uniform, DOCUMENTS, perturbations=["upper"], levels=[1], seeds=[0], context_bytes=100)
    assert facts["clean"]["bytes"]["context_tokens"] == 100
    per_byte = facts["clean"]["tokens"]["tokens_per_byte"]
    assert facts["clean"]["tokens"]["context_tokens"] == round(100 * per_byte) < 100
    known = JudgedModel(build_model("llama"), bos_tokenizer)  # made for 64 positions
    facts = score_robustness({"one": known}, DOCUMENTS, perturbations=["upper"], levels=[1], seeds=[0])
    assert facts["clean"]["one"]["context_tokens"] == 64


def test_what_a_tokenizer_cannot_take_is_said(bos_tokenizer):
    assert unreadable_reason(bos_tokenizer, "the cat 日本 é") is None
    assert "not UTF-8" in unreadable_reason(bos_tokenizer, "a\udcff")
    assert "not UTF-8" in unreadable_reason(bos_tokenizer, "a\ud800")
    assert "do not give the text back" in unreadable_reason(bos_tokenizer, "a <s> b")
    assert unreadable_reason(Bytes(), "a\udcff <s>") is None
    assert unreadable_reason(Capitals(), "A") is None
    assert "do not give the text back" in unreadable_reason(Capitals(), "a")


def test_a_model_of_nan_is_named(uniform):
    spoiled = {"sick": JudgedModel(FixedLogits(torch.full((SYMBOLS,), torch.nan)), Bytes())}
    with pytest.raises(NonFiniteLogits, match="model sick gives logits that are not finite"):
        score_robustness(uniform | spoiled, DOCUMENTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"perturbations": ["typo"]}, 'Did you mean "typos"'),
        ({"levels": [4]}, "level 4"),
        ({"seeds": []}, "a seed"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"documents": []}, "the text is empty"),
        ({"documents": ["", ""]}, "the text is empty"),
        ({"models": {}}, "needs a model"),
    ],
)
def test_bad_input_is_refused(uniform, words, message):
    with pytest.raises(DataError, match=message):
        score_robustness(**({"models": uniform, "documents": DOCUMENTS} | words))


def test_text_that_vanishes_has_no_figure(uniform):
    facts = score_robustness(uniform, ["a"], perturbations=["delete"], levels=[3], seeds=range(40))
    assert facts["rows"][0]["models"]["bytes"] == {"unreadable": "nothing is left of the text"}
