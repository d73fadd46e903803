"""Models of bytes behind the harness's interface: likelihoods against symbol by symbol without batches, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from tests.evaluate.harness_tasks import write_tasks
from tests.models import toy_tokenizers as toy
from tests.models.test_byte_pool import small_model

from limbeck.core.errors import EvaluationError
from limbeck.core.symbols import BOS, EOD, EOP, PAD
from limbeck.evaluate.byte_harness import (
    ByteLM,
    cut_context,
    read_settings,
    rolling_windows,
    split_request,
)
from limbeck.evaluate.harness import evaluate_task, wrap_model
from limbeck.evaluate.quality import score_text
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.symbol_streams import text_to_bytes

TOKENIZERS = {
    "space": lambda: ByteTokenizer("space", patch_bytes=4),
    "fixed": lambda: ByteTokenizer("fixed:3", patch_bytes=4),
    "bpe": lambda: ByteTokenizer.from_tokenizer(toy.byte_level(300), patch_bytes=8),
}
REQUESTS = [
    ("the cat sat on", " the mat"), ("", "the cat"), ("the c", "at sat"), ("the cat ", "sat"), ("a", ""), ("", ""), ("x" * 9, "y"),
    ("na\u00efve caf", "\u00e9 \u65e5\u672c"), ("half \ud83d", "\ude42 of it"), ("raw \udcff\udc80", "\udcfe and on"), ("\n", "\n\n"),
]  # fmt: skip
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def model_of(tokenizer, trunk="attention", *, dtype=torch.float64):
    return small_model(trunk, patch_bytes=tokenizer.patch_bytes).to(dtype)


def lm_of(name, trunk="attention", **options):
    tokenizer = TOKENIZERS[name]()
    return wrap_model(model_of(tokenizer, trunk), tokenizer, device="cpu", **options)


def instances(*requests):
    return [SimpleNamespace(args=request) for request in requests]


@torch.no_grad()
def next_log_probs(model, row):
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].log_softmax(-1)


def slow_likelihood(model, tokenizer, context, continuation):
    """Symbols of the joined text are read one by one; those after the context's last byte count."""
    stream = tokenizer(context + continuation, add_special_tokens=False)["input_ids"] if context + continuation else []
    size = len(text_to_bytes(context))
    total, greedy, bytes_read = 0.0, True, 0
    for place, symbol in enumerate(stream):
        if bytes_read >= size and continuation:
            log_probs = next_log_probs(model, [BOS, *stream[:place]])
            total += float(log_probs[symbol])
            greedy &= int(log_probs.argmax()) == symbol
        bytes_read += symbol < PAD
    return total, greedy


@pytest.mark.parametrize("trunk", ["attention", "hyena"])
@every_tokenizer
def test_likelihoods_are_those_of_reading_symbol_by_symbol(name, trunk):
    lm = lm_of(name, trunk, batch_size=4)
    found = lm.loglikelihood(instances(*REQUESTS))
    for request, (nats, greedy) in zip(REQUESTS, found, strict=True):
        expected, expected_greedy = slow_likelihood(lm.model, lm.tokenizer, *request)
        assert nats == pytest.approx(expected, abs=1e-10)
        assert greedy is expected_greedy
    assert [found[place] for place in (4, 5)] == [(0.0, True)] * 2


@every_tokenizer
def test_batches_and_padding_change_nothing(name):
    alone = lm_of(name, batch_size=1).loglikelihood(instances(*REQUESTS))
    for size in (2, 5, 64):
        together = lm_of(name, batch_size=size).loglikelihood(instances(*reversed(REQUESTS)))
        assert [nats for nats, _ in reversed(together)] == pytest.approx([nats for nats, _ in alone], abs=1e-11)


def as_text(data):
    return bytes(data).decode(errors="surrogateescape")


@pytest.mark.parametrize("context", ["", "a", "ab\udcff"])
def test_all_ways_to_go_on_have_probability_one(context):
    """Patches of one byte: its end is certain, so what follows is one of 256 bytes or the end of the document.

    What a character becomes depends on its neighbours in UTF-8 no more than in bytes: every byte is asked alone.
    """
    tokenizer = ByteTokenizer("fixed:1", patch_bytes=2)
    lm = ByteLM(model_of(tokenizer), tokenizer, batch_size=64)
    found = lm.loglikelihood(instances(*[(context, as_text([byte])) for byte in range(256)]))
    prompt = [BOS, *tokenizer.encode_bytes(text_to_bytes(context))]
    log_probs = next_log_probs(lm.model, prompt)
    assert sum(math.exp(nats) for nats, _ in found) + float(log_probs[EOD].exp()) == pytest.approx(1, abs=1e-10)
    assert [greedy for _, greedy in found].count(True) == int(log_probs.argmax() < PAD)


def test_all_ways_to_end_a_begun_patch_have_the_probability_of_not_ending_it_here():
    tokenizer = ByteTokenizer("fixed:2", patch_bytes=3)
    lm = ByteLM(model_of(tokenizer), tokenizer, batch_size=64)
    found = lm.loglikelihood(instances(*[("abc", as_text([byte])) for byte in range(256)]))
    closed = next_log_probs(lm.model, [BOS, *b"ab", EOP, *b"c"])[EOP].exp()
    assert sum(math.exp(nats) for nats, _ in found) == pytest.approx(1 - float(closed), abs=1e-10)


@pytest.mark.parametrize("name", ["space", "fixed"])
def test_likelihoods_add_up_over_a_continuation(name):
    """A first part is closed where the text ends with it; that end is taken back before the second is added."""
    lm = lm_of(name)
    for context, first, second in [
        ("the", " cat sat", " on it"),
        ("", "abc", "def"),
        ("a b", " c", " d e"),
        ("ab", "c", "d"),
    ]:
        whole, left, right = (
            nats
            for nats, _ in lm.loglikelihood(
                instances((context, first + second), (context, first), (context + first, second))
            )
        )
        closed = [BOS, *lm.tokenizer.encode_bytes((context + first).encode())]
        end = float(next_log_probs(lm.model, closed[:-1])[EOP])
        assert whole == pytest.approx(left - end + right, abs=1e-10)


def test_boundaries_are_those_of_the_joined_text():
    tokenizer = ByteTokenizer("fixed:3", patch_bytes=4)
    assert split_request(tokenizer, "abcd", "e") == ([BOS, *b"abc", EOP, *b"d"], [*b"e", EOP])
    assert split_request(tokenizer, "abc", "d") == ([BOS, *b"abc"], [EOP, *b"d", EOP])
    assert split_request(tokenizer, "", "abcd") == ([BOS], [*b"abc", EOP, *b"d", EOP])
    assert split_request(tokenizer, "abc", "")[1] == []


def test_long_contexts_lose_whole_patches_on_the_left():
    given = [BOS, *b"abc", EOP, *b"def", EOP, *b"gh"]
    assert cut_context(given, 2, max_length=12) == given
    assert cut_context(given, 2, max_length=11) == [BOS, *b"def", EOP, *b"gh"]
    assert cut_context(given, 2, max_length=8) == [BOS, *b"def", EOP, *b"gh"]
    assert cut_context(given, 2, max_length=7) == [BOS, *b"gh"]
    assert cut_context(given, 50, max_length=7) == [BOS, *b"gh"]
    assert cut_context([BOS], 9, max_length=2) == [BOS]
    lm = lm_of("fixed", max_length=10)
    (found,) = lm.loglikelihood(instances(("abcdefghi", "jk")))
    assert found[0] == pytest.approx(slow_likelihood(lm.model, lm.tokenizer, "ghi", "jk")[0], abs=1e-10)


@pytest.mark.parametrize("length", [2, 3, 7, 30])
def test_windows_of_long_texts_are_the_harness_own(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for size in range(31):
        symbols = list(range(size))
        theirs = get_rolling_token_windows(symbols, prefix_token=BOS, max_seq_len=length, context_len=1)
        assert rolling_windows(symbols, max_length=length) == list(map(make_disjoint_window, theirs))


@every_tokenizer
def test_whole_texts_cost_what_they_cost_in_our_own_evaluation(name, tmp_path):
    lm = lm_of(name, batch_size=3)
    found = evaluate_task(lm, "rolling", folder=write_tasks(tmp_path))
    texts = [row.args[0] for row in instances(*[(text,) for text in read_texts(tmp_path)])]
    ours = score_text(lm.model, lm.tokenizer, texts, context_tokens=512)
    assert found.metrics["bits_per_byte"] == pytest.approx(ours.bits_per_byte, rel=1e-12)
    assert found.metrics["byte_perplexity"] == pytest.approx(2**ours.bits_per_byte, rel=1e-12)


def read_texts(folder):
    import json

    return [json.loads(line)["text"] for line in (folder / "rolling.jsonl").read_text().splitlines()]


def test_texts_longer_than_the_context_are_read_in_windows():
    lm = lm_of("space", max_length=9, batch_size=2)
    texts = ["the cat sat on the mat", "a", "", "one two three four"]
    found = lm.loglikelihood_rolling(instances(*[(text,) for text in texts]))
    for text, nats in zip(texts, found, strict=True):
        total = 0.0
        for given, scored in rolling_windows(lm.tokenizer.encode_bytes(text.encode()), max_length=9):
            for place, symbol in enumerate(scored):
                total += float(next_log_probs(lm.model, given + scored[:place])[symbol])
        assert nats == pytest.approx(total, abs=1e-10)
    assert found[2] == 0.0


def slow_writing(model, tokenizer, context, stops, patches):
    """The likeliest symbol at each step, until a stop string stands in the bytes, EOD, or enough patches are closed."""
    stream = tokenizer(context, add_special_tokens=False)["input_ids"] if context else []
    row, written = [BOS, *(stream[:-1])], []
    while True:
        data = bytes(symbol for symbol in written if symbol < PAD)
        for stop in stops:
            if stop.encode() in data:
                return data[: data.index(stop.encode())].decode(errors="replace")
        if written.count(EOP) == patches or written[-1:] == [EOD]:
            return data.decode(errors="replace")
        written.append(int(next_log_probs(model, row + written).argmax()))


@every_tokenizer
def test_text_is_written_as_step_by_step(name):
    lm = lm_of(name, batch_size=3)
    contexts = ["the cat", "", "a dog ran to the", "on\n", "\udcff\udc80x"]
    usual = lm.generate_until(instances(*[(context, {"max_gen_toks": 3}) for context in contexts]))
    assert usual == [slow_writing(lm.model, lm.tokenizer, context, [], 3) for context in contexts]
    stops = sorted(
        {text[2:4] for text in usual if "\ufffd" not in text[2:4] and len(text) > 3} | {text[1] for text in usual[:1]}
    )
    found = lm.generate_until(
        instances(*[(context, {"until": stops, "max_gen_toks": 3, "do_sample": False}) for context in contexts])
    )
    for text, long in zip(found, usual, strict=True):
        assert long.startswith(text)
        assert not any(stop in text for stop in stops)


def test_settings_of_generation():
    assert read_settings({}) == ([], 256, {"do_sample": False})
    assert read_settings({"until": "\n", "max_gen_toks": 5, "temperature": 0}) == (["\n"], 5, {"do_sample": False})
    assert read_settings({"until": ["", "a"], "max_tokens": 7, "temperature": 0.5, "top_p": 0.9}) == (
        ["a"], 7, {"do_sample": True, "temperature": 0.5, "top_p": 0.9},
    )  # fmt: skip
    assert read_settings({"temperature": 0.7, "do_sample": False})[2] == {"do_sample": False}


@pytest.mark.parametrize("task", ["choice", "rolling", "last_word", "write"])
def test_the_harness_takes_it_for_a_model(task, tmp_path):
    from lm_eval.api.model import LM

    lm = lm_of("space")
    assert isinstance(lm, LM)
    found = evaluate_task(lm, task, folder=write_tasks(tmp_path))
    assert all(map(math.isfinite, found.metrics.values()))


def test_single_precision_is_close_and_half_precision_is_summed_in_single():
    tokenizer = TOKENIZERS["space"]()
    exact = ByteLM(model_of(tokenizer), tokenizer).loglikelihood(instances(*REQUESTS))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        found = ByteLM(model_of(tokenizer, dtype=dtype), tokenizer).loglikelihood(instances(*REQUESTS))
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in exact], abs=tolerance, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_spoiled_weights_stop_with_the_text_they_were_met_in(value):
    lm = lm_of("space")
    with torch.no_grad():
        lm.model.network.embedding.symbols.weight[ord("q")] = value
    with pytest.raises(
        EvaluationError, match=r"(?s)not finite in the request that ends '.*quite a', after its token \d+.*float32"
    ):
        lm.loglikelihood(instances(("a cat", " and"), ("not ", "quite a")))
    with pytest.raises(EvaluationError, match="not finite"):
        lm.loglikelihood_rolling(instances(("quite",)))
    with pytest.raises(EvaluationError, match="not finite in the request that ends 'q'"):
        lm.generate_until(instances(("q", {})))
