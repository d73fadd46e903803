"""Easier batches: rows cut shorter and patches cut smaller, by hand and against a slow loop."""

import random

import pytest
import torch
from torch.testing import assert_close

from limbeck.core.errors import RecipeError
from limbeck.core.symbols import BOS, EOD, EOP
from limbeck.core.types import Batch
from limbeck.train.curriculum import check_curricula, eased, in_force, shorter_patches, shorter_rows


def batch_of(ids, documents=None, mask=None, **kwargs):
    ids_BT = torch.tensor(ids)
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask is None else torch.tensor(mask)
    mask_BT[:, 0] = False
    if documents is None:
        return Batch(ids_BT, mask_BT, **kwargs)
    documents_BT = torch.tensor(documents)
    return Batch(ids_BT, mask_BT, documents_BT, torch.zeros_like(documents_BT), **kwargs)


def test_what_is_in_force():
    curriculum = ((0.3, 4), (0.3, 2))
    found = [in_force(curriculum, step, 10) for step in range(10)]
    assert found == [4, 4, 4, 2, 2, 2, None, None, None, None]
    assert in_force((), 0, 10) is None
    assert [in_force(((1.0, 2),), step, 3) for step in range(3)] == [2, 2, 2]


def test_rows_by_hand():
    batch = batch_of([[1, 2, 3, 4, 5, 6, 7, 8]], [[0, 0, 0, 1, 1, 1, 1, 1]], sources=(3,))
    batch.loss_mask_BT[0, 3] = False
    cut = shorter_rows(batch, 2)
    assert cut.input_ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert cut.loss_mask_BT.tolist() == [[False, True, True, False], [False, True, True, True]]
    assert cut.document_ids_BT.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert cut.position_ids_BT.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert cut.sources == (3, 3)
    assert batch.loss_mask_BT[0, 4], "the batch that was given stays as it is"
    assert shorter_rows(batch_of([[1, 2, 3, 4]], [[0, 0, 1, 1]]), 2).document_ids_BT is None


def test_rows_keep_tokens_and_lose_one_target_a_cut():
    torch.manual_seed(0)
    batch = batch_of(torch.randint(0, 50, (3, 24)).tolist())
    for divisor in (1, 2, 3, 4, 12):
        cut = shorter_rows(batch, divisor)
        assert cut.input_ids_BT.shape == (3 * divisor, 24 // divisor)
        assert_close(cut.input_ids_BT.reshape(3, 24), batch.input_ids_BT)
        assert cut.target_count == batch.target_count - 3 * (divisor - 1)


def test_patches_by_hand():
    # "abcde" closed, "fg" closed, end; at most 3 symbols, so 2 bytes, in a patch.
    batch = batch_of([[97, 98, 99, 100, 101, EOP, 102, 103, EOP, EOD]])
    cut = shorter_patches(batch, 3)
    assert cut.input_ids_BT.tolist() == [[97, 98, EOP, 99, 100, EOP, 101, EOP, 102, 103]]
    assert cut.loss_mask_BT.tolist() == [[False] + [True] * 9]
    assert shorter_patches(batch, 2).input_ids_BT.tolist() == [[97, EOP, 98, EOP, 99, EOP, 100, EOP, 101, EOP]]
    same = shorter_patches(batch, 6)
    assert_close(same.input_ids_BT, batch.input_ids_BT)


def test_patches_in_documents_and_after_other_symbols():
    ids = [[97, 98, 99, 97, 98, EOP, BOS, 97, 98, 99]]
    batch = batch_of(ids, [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]], sources=(1,))
    batch.loss_mask_BT[0, [2, 3, 6]] = False
    cut = shorter_patches(batch, 3)
    # A document that ends within a patch ends the patch, and an EOP that is put in belongs to the byte behind it.
    assert cut.input_ids_BT.tolist() == [[97, 98, 99, 97, EOP, 98, EOP, BOS, 97, 98]]
    assert cut.document_ids_BT.tolist() == [[0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]
    assert cut.position_ids_BT.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert cut.loss_mask_BT.tolist() == [[False, True, False, False, True, True, True, False, True, True]]
    assert cut.sources == (1,)


def slowly(ids, mask, documents, most):
    found, depth = [], 0
    for place, symbol in enumerate(ids):
        if place and documents[place] != documents[place - 1]:
            depth = 0
        if symbol < 256:
            if depth == most - 1:
                found.append((EOP, mask[place], documents[place]))
                depth = 0
            depth += 1
        else:
            depth = 0
        found.append((symbol, mask[place], documents[place]))
    return found[: len(ids)]


@pytest.mark.parametrize("seed", range(20))
def test_patches_against_a_loop(seed):
    chance = random.Random(seed)
    rows, width, most = chance.randint(1, 4), chance.randint(1, 40), chance.randint(2, 6)
    ids = [[chance.choice([1, 2, 250, 255, 0, EOP, EOD, BOS]) for _ in range(width)] for _ in range(rows)]
    documents = [sorted(chance.randint(0, 3) for _ in range(width)) for _ in range(rows)]
    mask = [[chance.random() < 0.7 for _ in range(width)] for _ in range(rows)]
    batch = batch_of(ids, documents, mask)
    cut = shorter_patches(batch, most)
    for row in range(rows):
        wanted = slowly(ids[row], batch.loss_mask_BT[row].tolist(), documents[row], most)
        assert cut.input_ids_BT[row].tolist() == [symbol for symbol, _, _ in wanted]
        assert cut.loss_mask_BT[row].tolist() == [scored for _, scored, _ in wanted]
        assert cut.document_ids_BT[row].tolist() == [document for _, _, document in wanted]
        places: list[int] = []
        for place, (_, _, document) in enumerate(wanted):
            places.append(places[-1] + 1 if place and wanted[place - 1][2] == document else 0)
        assert cut.position_ids_BT[row].tolist() == places
    assert_close(shorter_patches(cut, most).input_ids_BT, cut.input_ids_BT)


def test_both_together_leave_tokens_as_many():
    batch = batch_of([[97] * 8, [98] * 8])
    curricula = {"length": ((0.5, 2),), "patch": ((0.25, 2), (0.5, 4))}
    shapes, closed = [], []
    for step in range(8):
        found = eased(batch, step, 8, **curricula)
        shapes.append(tuple(found.input_ids_BT.shape))
        closed.append(int((found.input_ids_BT == EOP).sum()))
    assert shapes == [(4, 4)] * 4 + [(2, 8)] * 4
    assert closed == [8, 8, 4, 4, 4, 4, 0, 0]
    assert eased(batch, 7, 8, **curricula) is batch


def test_stored_rows_and_tokens_are_refused():
    stored = batch_of([[1, 2, 3, 4]], keys=("a",))
    with pytest.raises(RecipeError, match=r"length_curriculum: these rows come from a target store"):
        shorter_rows(stored, 2)
    with pytest.raises(RecipeError, match=r"patch_curriculum: these rows come from a target store"):
        shorter_patches(stored, 2)
    with pytest.raises(RecipeError, match="not bytes in patches"):
        shorter_patches(batch_of([[5, 300]]), 4)
    with pytest.raises(RecipeError, match="cannot be cut into 3 equal rows"):
        shorter_rows(batch_of([[1, 2, 3, 4]]), 3)


@pytest.mark.parametrize(
    ("length", "patch", "message"),
    [
        (((0.5, 3),), (), r"stages.s.length_curriculum: rows of 16 tokens cannot be cut into 3 equal rows"),
        (((0.5, 16),), (), "2 tokens at least"),
        (((0.5, 0),), (), "cannot be cut into 0"),
        (((0.6, 4), (0.6, 2)), (), "add up to 1 at most"),
        (((0.0, 4),), (), "shares above 0"),
        (((0.3, 2), (0.3, 4)), (), "easier, not harder"),
        ((), ((0.3, 8), (0.3, 4)), "patch_curriculum: .* easier, not harder"),
        ((), ((0.3, 1),), "at least 2 symbols"),
    ],
)
def test_curricula_that_cannot_be_are_refused(length, patch, message):
    with pytest.raises(RecipeError, match=message):
        check_curricula("s", length=length, patch=patch, context_tokens=16)


def test_curricula_that_can_be_pass():
    check_curricula("s", length=((0.3, 4), (0.3, 2)), patch=((0.5, 4), (0.5, 8)), context_tokens=16)
