"""Packed slots, pools and embeddings, each against a loop."""

import pytest
import torch
from tests.nn.small_byte_models import plain_block

from limbeck.core.errors import RecipeError
from limbeck.nn.byte_local import (
    POOLS,
    LocalBlock,
    PackedSlots,
    Pool,
    SymbolEmbedding,
    attend_by_length,
    attend_padded,
    inverse_places,
)

LENGTHS = torch.tensor([3, 1, 5, 3, 2, 1, 5, 7])


def local_block(*, causal, qk_norm=True):
    torch.manual_seed(1)
    return LocalBlock(
        8, 2, 16, activation="relu2", causal=causal, qk_norm=qk_norm, zero_init=False, dropout=0.0
    ).double()  # fmt: skip


def rows_of(packed, x_ND):
    return [x_ND[start : start + length] for start, length in zip(packed.starts_R.tolist(), LENGTHS.tolist())]


def test_packing_puts_short_sequences_first():
    packed = PackedSlots.of(LENGTHS)
    assert packed.groups == ((2, 1), (1, 2), (2, 3), (2, 5), (1, 7))
    assert packed.starts_R.tolist() == [4, 0, 10, 7, 2, 1, 15, 20]
    assert packed.ranks_R.tolist() == [3, 0, 5, 4, 2, 1, 6, 7]
    assert packed.total == int(LENGTHS.sum())
    blocks = packed.split(torch.arange(packed.total))
    assert [block.tolist() for block in blocks[:3]] == [[[0], [1]], [[2, 3]], [[4, 5, 6], [7, 8, 9]]]
    assert PackedSlots.of(torch.zeros(0, dtype=torch.long)).groups == ()
    places = torch.tensor([2, 0, 1])
    assert inverse_places(places).tolist() == [1, 2, 0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend", [attend_by_length, attend_padded])
def test_attention_stays_within_each_sequence(attend, causal):
    packed, block = PackedSlots.of(LENGTHS), local_block(causal=causal)
    x_ND = torch.randn(packed.total, 8, dtype=torch.float64, requires_grad=True)
    found_ND = attend(block.attention, block.attention.project(x_ND), packed)
    alone = torch.empty_like(found_ND)
    for start, length in zip(packed.starts_R.tolist(), LENGTHS.tolist()):
        q, k, v = block.attention.project(x_ND[start : start + length].unsqueeze(0))
        alone[start : start + length] = block.attention.attend(q, k, v)[0]
    torch.testing.assert_close(found_ND, alone, atol=1e-12, rtol=0)
    weight_ND = torch.randn_like(found_ND)
    gradients = [torch.autograd.grad(y, x_ND, weight_ND, retain_graph=True)[0] for y in (found_ND, alone)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_is_the_plain_block_on_every_sequence(causal, qk_norm):
    packed, block = PackedSlots.of(LENGTHS), local_block(causal=causal, qk_norm=qk_norm)
    x_ND = torch.randn(packed.total, 8, dtype=torch.float64)
    for found, x in zip(rows_of(packed, block(x_ND, packed)), rows_of(packed, x_ND), strict=True):
        torch.testing.assert_close(found, plain_block(block, x, causal=causal), atol=1e-12, rtol=0)


def slow_pool(kind, x_LD, query):
    if kind == "mean":
        return sum(x_LD) / len(x_LD)
    if kind == "max":
        return torch.stack([max(column, key=lambda value: value.item()) for column in x_LD.T])
    if kind == "last":
        return x_LD[-1]
    weights = [torch.exp((x_D * query).sum() / len(query) ** 0.5) for x_D in x_LD]
    return sum(weight * x_D for weight, x_D in zip(weights, x_LD, strict=True)) / sum(weights)


@pytest.mark.parametrize("kind", POOLS)
def test_pools_against_a_loop(kind):
    torch.manual_seed(2)
    packed = PackedSlots.of(LENGTHS)
    pool = Pool(6, kind).double()
    leaves = [torch.randn(packed.total, 6, dtype=torch.float64, requires_grad=True)]
    if pool.query is not None:
        torch.nn.init.normal_(pool.query)
        leaves.append(pool.query)
    found_RD = pool(leaves[0], packed)[packed.ranks_R]
    slow_RD = torch.stack([slow_pool(kind, x_LD, pool.query) for x_LD in rows_of(packed, leaves[0])])
    torch.testing.assert_close(found_RD, slow_RD, atol=1e-12, rtol=0)
    weight_RD = torch.randn_like(found_RD)
    for found, slow in zip(
        torch.autograd.grad(found_RD, leaves, weight_RD), torch.autograd.grad(slow_RD, leaves, weight_RD), strict=True
    ):
        torch.testing.assert_close(found, slow, atol=1e-12, rtol=0)


def test_pool_by_hand():
    packed = PackedSlots.of(torch.tensor([2]))
    x_ND = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    expected = {"mean": [2.0, -3.0], "max": [3.0, -2.0], "last": [3.0, -4.0], "attention": [2.0, -3.0]}
    assert {kind: Pool(2, kind)(x_ND, packed)[0].tolist() for kind in POOLS} == expected
    with pytest.raises(RecipeError, match='Did you mean "mean"'):
        Pool(2, "meen")


def test_ngrams_start_as_nothing_and_stay_within_the_patch():
    torch.manual_seed(3)
    symbols = torch.tensor([5, 6, 7, 5, 6, 7, 6, 7])
    slots = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    plain, embedding = SymbolEmbedding(10, 4), SymbolEmbedding(10, 4, ngram_rows=64)
    plain.load_state_dict({"symbols.weight": embedding.symbols.weight})
    torch.testing.assert_close(embedding(symbols, slots), plain(symbols, slots), rtol=0, atol=0)
    torch.nn.init.normal_(embedding.ngrams.weight)
    x_ND, plain_ND = embedding(symbols, slots), plain(symbols, slots)
    torch.testing.assert_close(x_ND[:3], x_ND[3:6], rtol=0, atol=0)
    torch.testing.assert_close(x_ND[[0, 6]], plain_ND[[0, 6]], rtol=0, atol=0)
    added = x_ND - plain_ND
    assert (added[[1, 2, 7]].norm(dim=1) > 0.1).all()
    # The pair 6 7 adds the same in the second place as in the third, where the triple comes on top.
    assert (added[2] - added[7]).norm() > 0.1
    # A pair adds one row of the table.
    assert (embedding.ngrams.weight - added[7]).norm(dim=1).min() < 1e-6
    earlier = embedding(torch.tensor([5, 6, 7, 5, 6, 9, 6, 9]), slots)
    torch.testing.assert_close(earlier[:5], x_ND[:5], rtol=0, atol=0)
    assert (earlier[5] - x_ND[5]).norm() > 0.1


def test_hashes_spread_out():
    pairs = torch.cartesian_prod(torch.arange(97, 123), torch.arange(97, 123))
    embedding = SymbolEmbedding(260, 1, ngram_rows=4096)
    with torch.no_grad():
        embedding.symbols.weight.zero_()
        embedding.ngrams.weight.copy_(torch.arange(4096.0).unsqueeze(1))
    rows = embedding(pairs.flatten(), torch.tensor([0, 1]).repeat(len(pairs)))[1::2]
    # 676 pairs thrown into 4096 rows at random fill 622.
    assert len(rows.unique()) > 580
