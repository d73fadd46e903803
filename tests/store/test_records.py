import hashlib

import numpy as np
import torch
from tests.store.small_store import make_batches

from limbeck.core.types import Batch
from limbeck.store.records import TextRecord, batch_keys, batch_rows, make_batch, row_key, usual_scored


def test_a_key_is_made_of_ids_and_starts_alone():
    content = (3).to_bytes(8, "little") + b"\x01\0\0\0\x02\0\0\0\x05\0\0\0" + b"\x02\0\0\0"
    assert row_key([1, 2, 5], [2]) == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert row_key(np.array([1, 2, 5], dtype=np.int64), np.array([2])) == row_key([1, 2, 5], [2])
    assert len({row_key([1, 2, 5], [2]), row_key([1, 2, 5], []), row_key([1, 2, 5, 2], []), row_key([1, 2], [])}) == 4


def test_keys_of_texts_know_where_the_prompt_ends():
    assert TextRecord("ab", "c").key != TextRecord("a", "bc").key


def test_usual_scored_leaves_out_first_tokens():
    assert usual_scored(5, [2]).tolist() == [False, True, False, True, True]


def test_rows_of_a_batch_and_back():
    for batch in make_batches(2):
        rows = batch_rows(batch)
        again = make_batch(rows, width=batch.input_ids_BT.shape[1])
        for name in ("input_ids_BT", "loss_mask_BT", "document_ids_BT", "position_ids_BT"):
            one, other = getattr(batch, name), getattr(again, name)
            assert (one is None and other is None) or torch.equal(one, other), name
        assert batch_keys(batch) == batch_keys(again) == list(again.keys)


def test_shorter_rows_are_padded_on_the_right_and_not_scored():
    rows = batch_rows(make_batches(1)[0])
    padded = make_batch(rows, width=20)
    assert torch.equal(padded.input_ids_BT[:, :13], make_batches(1)[0].input_ids_BT)
    assert not padded.loss_mask_BT[:, 13:].any()
    assert batch_keys(padded) == [row.key for row in rows]


def test_document_numbers_themselves_do_not_matter():
    ids = torch.tensor([[4, 5, 6, 7]])
    mask = torch.tensor([[False, True, False, True]])
    one, two = (Batch(ids, mask, torch.tensor([numbers])) for numbers in ([0, 0, 1, 1], [7, 7, 2, 2]))
    assert batch_keys(one) == batch_keys(two)
