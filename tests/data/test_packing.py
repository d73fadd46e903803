"""Rows filled with documents: every token once, no row short, the fullest fit, and the same rows every time."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from limbeck.core.errors import DataError
from limbeck.data.order import Mixture
from limbeck.data.packing import PackedWindows, pack_documents
from limbeck.data.text import TextSource
from limbeck.data.windows import TokenWindows, cached_windows


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def pieces(lengths, row_tokens, **kwargs):
    """Rows as lists of (document, offset in it, length), and the plan."""
    starts = starts_of(lengths)
    plan = pack_documents(starts, total=int(sum(lengths)), row_tokens=row_tokens, **kwargs)
    rows = []
    for row in range(len(plan)):
        rows.append([])
        for piece in range(plan.first_R[row], plan.first_R[row + 1]):
            start = int(plan.starts_N[piece])
            document = int(np.searchsorted(starts, start, side="right")) - 1
            rows[-1].append((document, start - int(starts[document]), int(plan.lengths_N[piece])))
    return rows, plan


def test_by_hand():
    # The 8 leaves room for 2, which nothing fits: the longest, 7, is cut. Its rest is as long as the 5, which is whole.
    rows, plan = pieces([4, 7, 5, 4, 3, 8], 10)
    assert rows == [[(5, 0, 8), (1, 0, 2)], [(2, 0, 5), (1, 2, 5)], [(0, 0, 4), (3, 0, 4), (4, 0, 2)]]
    assert (plan.continued_rows, plan.dropped_tokens) == (0, 1)


def test_a_long_document_goes_on_in_the_next_rows():
    rows, plan = pieces([25, 3], 10)
    assert rows == [[(1, 0, 3), (0, 0, 7)], [(0, 7, 10)]]
    assert (plan.continued_rows, plan.dropped_tokens) == (1, 8)


def test_of_equals_the_first_and_no_further_than_the_look_ahead():
    rows, _ = pieces([5, 5, 5, 10], 10, look_ahead=2)
    assert rows == [[(0, 0, 5), (1, 0, 5)], [(3, 0, 10)]]
    rows, _ = pieces([6, 4, 9, 1], 10, look_ahead=1)
    assert rows == [[(0, 0, 6), (1, 0, 4)], [(2, 0, 9), (3, 0, 1)]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("mean", "row_tokens", "look_ahead"), [(5, 16, 10), (40, 16, 10), (16, 16, 1), (9, 64, 1000)])
def test_every_token_stands_in_one_row_but_those_of_the_last(seed, mean, row_tokens, look_ahead):
    lengths = 1 + np.random.default_rng(seed).poisson(mean, size=97)
    rows, plan = pieces(lengths, row_tokens, look_ahead=look_ahead)
    assert all(sum(length for _, _, length in row) == row_tokens for row in rows)
    seen = np.zeros(int(sum(lengths)), dtype=int)
    starts = starts_of(lengths)
    for row in rows:
        for document, offset, length in row:
            assert offset + length <= lengths[document]
            seen[starts[document] + offset : starts[document] + offset + length] += 1
    assert seen.max() == 1
    assert (seen == 0).sum() == plan.dropped_tokens < row_tokens
    assert plan.continued_rows == sum(row[0][1] > 0 for row in rows)
    # Only the last piece of a row may be cut short.
    for row in rows:
        assert all(offset + length == lengths[document] for document, offset, length in row[:-1])


def packed(lengths, context=10, **kwargs):
    tokens = np.arange(sum(lengths), dtype=np.int32)
    return PackedWindows(tokens, starts_of(lengths), context_tokens=context, **kwargs)


def test_batches_keep_documents_apart():
    windows = packed([4, 7, 5, 4, 3, 8, 10])
    batch = windows.rows([0, 1, 2])
    assert len(windows) == 4
    assert batch.input_ids_BT[0].tolist() == list(range(31, 41))
    assert batch.input_ids_BT[1].tolist() == [*range(23, 31), 4, 5]
    assert batch.loss_mask_BT[1].tolist() == [False] + [True] * 7 + [False, True]
    assert batch.document_ids_BT[1].tolist() == [0] * 8 + [1, 1]
    assert batch.position_ids_BT[1].tolist() == [*range(8), 0, 1]
    assert batch.document_ids_BT[0].tolist() == [0] * 10
    alone = windows.rows([0])
    assert alone.document_ids_BT is None
    assert alone.position_ids_BT is None


def test_crossing_documents_needs_no_ids():
    batch = packed([4, 7, 5, 4, 3, 8], cross_documents=True).rows([0, 1, 2])
    assert batch.document_ids_BT is None
    assert batch.loss_mask_BT.sum() == 27


def test_rows_are_the_same_every_time_and_mix_with_others():
    lengths = 1 + np.random.default_rng(3).poisson(12, size=60)
    one, two = packed(lengths, 16), packed(lengths, 16)
    every = range(len(one))
    assert torch.equal(one.rows(every).input_ids_BT, two.rows(every).input_ids_BT)
    stream = TokenWindows(np.arange(800, dtype=np.int32), np.array([0]), context_tokens=16)
    mixture = Mixture([one, stream], weights=[1.0, 1.0], seed=0)
    assert mixture.tokens == (len(one) + 50) * 16
    batch = mixture.batch(0, 8)
    for row, source in enumerate(batch.sources):
        alone = mixture.sources[source].rows([mixture.locate(row)[1]])
        assert_close(batch.input_ids_BT[row], alone.input_ids_BT[0])
        assert_close(batch.loss_mask_BT[row], alone.loss_mask_BT[0])


def test_documents_in_a_row_are_trained_on_as_if_alone():
    """The loss of a packed row is that of its documents one by one, whatever stands beside them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    from limbeck.models.packing import forward_batch

    model = transformers.GPTNeoXForCausalLM(config).double().eval()
    windows = packed([4, 7, 5, 4, 3, 8])
    batch = windows.rows(range(len(windows)))
    with torch.no_grad():
        logits = forward_batch(model, batch).logits
        for row in range(len(windows)):
            for document in batch.document_ids_BT[row].unique():
                inside = batch.document_ids_BT[row] == document
                alone = model(input_ids=batch.input_ids_BT[row, inside][None]).logits[0]
                assert_close(logits[row, inside], alone, atol=1e-12, rtol=0)


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="fewer than one window of 64"):
        packed([5, 6], 64)


def test_the_cache_serves_both_ways_of_making_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "hello world"}\n{"text": "good"}\n{"text": "morning all"}\n' * 20)

    def opened(packing):
        return cached_windows(
            TextSource(str(file), split="all"), lambda texts: [[ord(c) for c in text] for text in texts],
            folder=tmp_path / "cache", tokenizer_fingerprint="t", end_token=0, context_tokens=17, cross_documents=False,
            max_tokens=None, packing=packing,
        )  # fmt: skip

    stream, documents = opened("stream"), opened("documents")
    assert np.array_equal(stream.tokens, documents.tokens)
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    assert isinstance(stream, TokenWindows)
    first = documents.rows([0])
    assert bytes(first.input_ids_BT[0].tolist()) == b"hello world\0good\0"
    assert documents.plan.continued_rows < len(documents) / 2
