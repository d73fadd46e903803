import pytest
import torch
from tests.evaluate.small_models import build_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.errors import DataError
from limbeck.evaluate.windows import position_limit, prepare_document, prepare_documents, sliding_windows

HARD_TEXT = "the cät sät 🙂 on the\tmat — naïve  ends "


@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 10, 31])
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (8, 8), (8, 3), (8, 1), (50, 50)])
@pytest.mark.parametrize("first_target", [1, 2])
def test_each_token_is_scored_once_with_the_promised_context(tokens, context, stride, first_target):
    windows = sliding_windows(tokens, document=0, first_target=first_target, context=context, stride=stride)
    seen = []
    for window in windows:
        assert 0 < window.length <= context
        targets = range(window.first_target, window.stop + 1)
        assert len(targets) == window.tokens
        for target in targets:
            before = target - window.start
            assert before >= min(target, context - stride + 1)
            seen.append(target)
    assert seen == list(range(first_target, tokens))


def test_windows_by_hand():
    windows = sliding_windows(8, document=3, first_target=1, context=4, stride=2)
    assert [(window.document, window.start, window.stop, window.first_target) for window in windows] == [
        (3, 0, 4, 1),
        (3, 2, 6, 5),
        (3, 4, 7, 7),
    ]


def test_without_beginning_of_text_the_first_token_is_context_only(plain_tokenizer):
    document = prepare_document(plain_tokenizer, "the cat sat", index=0)
    ids = plain_tokenizer("the cat sat")["input_ids"]
    first = plain_tokenizer.decode(ids[:1])
    assert (document.ids, document.first_target) == (ids, 1)
    assert document.bytes == len("the cat sat") - len(first)


def test_with_beginning_of_text_every_byte_is_scored(bos_tokenizer):
    document = prepare_document(bos_tokenizer, HARD_TEXT, index=0)
    assert document.ids[0] == bos_tokenizer.bos_token_id
    assert document.first_target == 1
    assert document.bytes == len(HARD_TEXT.encode())
    assert document.words == len(HARD_TEXT.split())


@pytest.mark.parametrize("budget", range(1, 40))
@pytest.mark.parametrize("bos", [True, False])
def test_bytes_are_those_of_the_scored_tokens_and_no_character_is_split(bos, budget, bos_tokenizer, plain_tokenizer):
    tokenizer = bos_tokenizer if bos else plain_tokenizer
    document = prepare_document(tokenizer, HARD_TEXT, index=0, budget=budget)
    if document is None:
        assert budget < 4
        return
    scored = tokenizer.decode(document.ids[document.first_target :], clean_up_tokenization_spaces=False)
    assert document.tokens <= budget
    assert document.bytes == len(scored.encode())
    assert document.words == len(scored.split())
    assert "\ufffd" not in scored


def test_a_first_character_of_several_tokens_is_left_out_whole(plain_tokenizer):
    document = prepare_document(plain_tokenizer, "🙂ab", index=0)
    assert document.bytes == 2
    assert document.first_target == 4


class OffsetFree:
    """A tokenizer of words without offsets, as slow tokenizers are."""

    is_fast = False
    bos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids):
        return " ".join(str(number) for number in ids)


def test_a_tokenizer_without_offsets_counts_by_decoding():
    document = prepare_document(OffsetFree(), "11 12 13 14", index=0, budget=2)
    assert (document.ids, document.bytes, document.words) == ([0, 11, 12], len("11 12"), 2)
    whole = prepare_document(OffsetFree(), " 11  12\n", index=0)
    assert whole.bytes == len(" 11  12\n")


def test_max_tokens_cuts_in_the_order_given(plain_tokenizer):
    documents = ["the cat sat on the mat", "", "a dog ran to the cat", "on the mat the dog ran"]
    everything = prepare_documents(plain_tokenizer, documents, max_tokens=None)
    assert [document.index for document in everything] == [0, 2, 3]
    first = everything[0].tokens
    cut = prepare_documents(plain_tokenizer, documents, max_tokens=first + 2)
    assert [document.tokens for document in cut] == [first, 2]
    exact = prepare_documents(plain_tokenizer, documents, max_tokens=first)
    assert len(exact) == 1


@pytest.mark.parametrize("documents", [[], [""], ["a"], ["", "b"], "a string", [7]])
def test_nothing_to_score_is_refused(plain_tokenizer, documents):
    with pytest.raises(DataError):
        prepare_documents(plain_tokenizer, documents, max_tokens=None)


def test_a_single_token_is_enough_after_beginning_of_text(bos_tokenizer):
    assert prepare_documents(bos_tokenizer, ["a"], max_tokens=None)[0].tokens == 1


def test_max_tokens_below_one_is_refused(plain_tokenizer):
    with pytest.raises(DataError, match="max_tokens"):
        prepare_documents(plain_tokenizer, ["the cat"], max_tokens=0)


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 64), ("opt", 64), ("gpt_neox", None), ("llama", None)])
def test_position_limit_is_that_of_a_learned_table(family, limit):
    assert position_limit(build_model(family, dtype=torch.float32)) == limit


def test_positions_within_a_patch_are_no_limit():
    trunk = {"width": 8, "layers": 1, "heads": 1, "feed_forward": 8}
    config = AutoConfig.for_model("limbeck_bytepool", local_width=8, local_heads=1, trunk=trunk)
    assert position_limit(AutoModelForCausalLM.from_config(config)) is None


def test_position_limit_ignores_other_embeddings():
    assert position_limit(nn.ModuleDict({"embed_tokens": nn.Embedding(5, 2), "composer": nn.Embedding(5, 2)})) is None
