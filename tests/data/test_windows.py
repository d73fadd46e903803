"""Windows, masks, document borders, and an order that is a function of the sample number."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from limbeck.core.errors import DataError
from limbeck.data.order import Mixture, interleave
from limbeck.data.text import TextSource
from limbeck.data.windows import TokenWindows, cached_windows, tokenise


def encode(texts):
    return [[ord(letter) for letter in text] for text in texts]


def windows(text_lengths, context=8, **kwargs):
    documents = ["abcdefghijklmnop"[:n] for n in text_lengths]
    tokens, starts = tokenise(documents, encode, end_token=0, max_tokens=None)
    return TokenWindows(tokens, starts, context_tokens=context, **kwargs)


def test_documents_are_closed_and_counted():
    tokens, starts = tokenise(["ab", "", "c"], encode, end_token=0, max_tokens=None)
    assert tokens.tolist() == [97, 98, 0, 99, 0]
    assert starts.tolist() == [0, 3]


def test_first_tokens_of_documents_are_never_targets():
    batch = windows([4, 9, 2]).rows([0, 1])
    assert batch.input_ids_BT.shape == (2, 8)
    assert batch.loss_mask_BT[0].tolist() == [False, True, True, True, True, False, True, True]
    assert batch.document_ids_BT is not None
    assert batch.document_ids_BT[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.position_ids_BT[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.document_ids_BT[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


def test_crossing_documents_needs_no_ids():
    batch = windows([4, 9, 2], cross_documents=True).rows([0])
    assert batch.document_ids_BT is None
    assert batch.loss_mask_BT[0].sum() == 7


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="fewer than one window of 64"):
        windows([4], context=64)
    with pytest.raises(DataError, match="text is empty"):
        tokenise(["", ""], encode, end_token=0, max_tokens=None)


def test_cache_is_read_back_and_mended(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("hello world " * 20)

    def opened():
        return cached_windows(
            TextSource(str(file), split="all"), encode, folder=tmp_path / "cache", tokenizer_fingerprint="t", end_token=0,
            context_tokens=16, cross_documents=False, max_tokens=None,
        )  # fmt: skip

    expected = opened().tokens.copy()
    target = next((tmp_path / "cache").glob("*.tokens.npy"))
    before = target.read_bytes()
    target.write_bytes(before[:-3] + b"\1\2\3")
    assert np.array_equal(opened().tokens, expected)
    assert target.read_bytes() == before


def test_every_window_once_an_epoch_and_a_new_order_each():
    mixture = Mixture([windows([15] * 8)], weights=[1.0], seed=1)
    count = len(mixture.sources[0])
    first = [mixture.locate(i)[1] for i in range(count)]
    second = [mixture.locate(i)[1] for i in range(count, 2 * count)]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    assert first == [Mixture([windows([15] * 8)], weights=[1.0], seed=1).locate(i)[1] for i in range(count)]


def test_sources_are_mixed_in_proportion():
    one, two = windows([15] * 8), windows([15] * 8)
    mixture = Mixture([one, two], weights=[1.0, 3.0], seed=0)
    drawn = [mixture.locate(i) for i in range(2048)]
    share = sum(source for source, _ in drawn) / len(drawn)
    assert abs(share - 0.75) < 0.01
    turns = [place for source, place in drawn if source == 0]
    assert sorted(turns[: len(one)]) == list(range(len(one)))


def test_batches_stack_rows_with_and_without_documents():
    mixture = Mixture([windows([40, 7, 40])], weights=[1.0], seed=0)
    batch = mixture.batch(0, len(mixture.sources[0]))
    for row in range(batch.input_ids_BT.shape[0]):
        alone = mixture.sources[0].rows([mixture.locate(row)[1]])
        assert_close(batch.input_ids_BT[row], alone.input_ids_BT[0])
        assert_close(batch.loss_mask_BT[row], alone.loss_mask_BT[0])


def test_interleave_is_even():
    pattern = interleave([1.0, 1.0])
    assert np.array_equal(np.bincount(pattern), [512, 512])
    assert torch.tensor(pattern[:4]).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
