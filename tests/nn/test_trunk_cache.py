"""A trunk that reads on from a cache gives what one pass over the whole gives, row by row."""

import pytest
import torch
from tests.nn.test_trunk import BASE, HYENA, every_variant, inputs, trunk_of

from limbeck.nn.trunk import TrunkCache


def empty(trunk, rows, dtype=torch.float64):
    return TrunkCache.empty(trunk, rows, "cpu", dtype)


@every_variant
@torch.no_grad()
def test_any_split_gives_what_one_pass_gives(options):
    trunk, x_BSD = trunk_of(**options), inputs(2, 12)
    cache = empty(trunk, 2)
    parts = [trunk(part_BSD, cache=cache) for part_BSD in x_BSD.split([3, 1, 1, 4, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), trunk(x_BSD), atol=1e-10, rtol=1e-10)
    assert cache.lengths_B.tolist() == [12, 12]


@every_variant
@torch.no_grad()
def test_ragged_rows_and_some_rows_only(options):
    trunk, x_BSD = trunk_of(**options), inputs(4, 10)
    whole_BSD = trunk(x_BSD)
    cache, read = empty(trunk, 4), [0] * 4
    calls = [
        ([0, 1, 2, 3], [2, 0, 3, 1]),
        ([2, 0], [1, 4]),
        ([3, 1, 2], [5, 0, 2]),
        ([1], [6]),
        ([0, 1, 2, 3], [1, 1, 1, 1]),
        ([0, 3], [1, 2]),
        ([0, 1, 2, 3], [2, 3, 3, 1]),
    ]
    generator = torch.Generator().manual_seed(0)
    for rows, counts in calls:
        length = max(counts) + 1
        part_NSD = torch.full((len(rows), length, BASE["width"]), 1e3, dtype=torch.float64)
        mask_NS = torch.zeros(len(rows), length, dtype=torch.bool)
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            where = torch.randperm(length, generator=generator)[:count].sort().values
            part_NSD[place, where] = x_BSD[row, read[row] : read[row] + count]
            mask_NS[place, where] = True
        out_NSD = trunk(part_NSD, mask_BS=mask_NS, cache=cache, rows_N=torch.tensor(rows))
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            expected_SD = whole_BSD[row, read[row] : read[row] + count]
            torch.testing.assert_close(out_NSD[place, mask_NS[place]], expected_SD, atol=1e-10, rtol=1e-10)
            read[row] += count
        assert not out_NSD[~mask_NS].any()
        assert cache.lengths == read


@pytest.mark.parametrize("options", [{}, HYENA, {"loop": [1, 2, 2]}], ids=["attention", "hyena", "loop"])
@torch.no_grad()
def test_rows_can_be_selected_repeated_and_cloned(options):
    trunk, x_BSD = trunk_of(**options), inputs(3, 8)
    cache = empty(trunk, 3)
    trunk(x_BSD[:, :4], mask_BS=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]).bool(), cache=cache)
    chosen = cache.select(torch.tensor([2, 0, 2]))
    assert chosen.lengths == [1, 4, 1]
    next_BSD = inputs(3, 2) + 1
    out_BSD = trunk(next_BSD, cache=chosen)
    for place, past_SD in enumerate((x_BSD[2, :1], x_BSD[0, :4], x_BSD[2, :1])):
        whole_SD = trunk(torch.cat((past_SD, next_BSD[place])).unsqueeze(0))[0, -2:]
        torch.testing.assert_close(out_BSD[place], whole_SD, atol=1e-10, rtol=1e-10)
    assert cache.lengths == [4, 2, 1]
    twice = cache.repeat(2)
    assert twice.lengths == [4, 4, 2, 2, 1, 1]
    copy = cache.clone()
    before = trunk(next_BSD, cache=copy.clone())
    trunk(next_BSD + 5, cache=cache)
    torch.testing.assert_close(trunk(next_BSD, cache=copy), before, atol=0, rtol=0)


@torch.no_grad()
def test_crop_goes_back_and_hyena_says_that_it_cannot():
    trunk, x_BSD = trunk_of(repeat=2), inputs(2, 8)
    cache = empty(trunk, 2)
    trunk(x_BSD, cache=cache)
    shorter = cache.crop(torch.tensor([3, 5]))
    out_BSD = trunk(x_BSD[:, :1] * 2, cache=shorter)
    for row, length in enumerate((3, 5)):
        whole_SD = trunk(torch.cat((x_BSD[row, :length], x_BSD[row, :1] * 2)).unsqueeze(0))[0, -1:]
        torch.testing.assert_close(out_BSD[row], whole_SD, atol=1e-10, rtol=1e-10)
    with pytest.raises(ValueError, match="cannot be cut"):
        shorter.crop([9, 9])
    mixed = trunk_of(**HYENA)
    cache = empty(mixed, 1)
    mixed(x_BSD[:1], cache=cache)
    assert cache.crop([8]).lengths == [8]
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop([7])


@pytest.mark.parametrize("options", [{}, HYENA], ids=["attention", "hyena"])
def test_gradients_flow_through_the_present_and_not_into_the_past(options):
    trunk = trunk_of(**options)
    past_BSD, now_BSD = inputs(1, 3).requires_grad_(), (inputs(1, 5) + 1).requires_grad_()
    cache = empty(trunk, 1)
    trunk(past_BSD, cache=cache)
    out_BSD = trunk(now_BSD, cache=cache)
    past_grad, now_grad = torch.autograd.grad(out_BSD.square().sum(), (past_BSD, now_BSD), allow_unused=True)
    assert past_grad is None
    one_pass = trunk(torch.cat((past_BSD.detach(), now_BSD), dim=1))[:, 3:]
    expected = torch.autograd.grad(one_pass.square().sum(), now_BSD)[0]
    torch.testing.assert_close(now_grad, expected, atol=1e-9, rtol=1e-8)


def test_several_calls_can_be_learned_from_together():
    trunk = trunk_of()
    parts = [(inputs(2, length) + length).requires_grad_() for length in (3, 1, 2)]
    cache = empty(trunk, 2)
    together = torch.autograd.grad(sum(trunk(part_BSD, cache=cache).square().sum() for part_BSD in parts), parts)
    for number, part_BSD in enumerate(parts):
        past_BSD = torch.cat([part.detach() for part in parts[:number]] + [part_BSD], dim=1)
        now_BSD = trunk(past_BSD)[:, -part_BSD.shape[1] :]
        expected = torch.autograd.grad(now_BSD.square().sum(), part_BSD)[0]
        torch.testing.assert_close(together[number], expected, atol=1e-9, rtol=1e-8)


@torch.no_grad()
def test_a_long_past_grows_the_cache():
    trunk, x_BSD = trunk_of(layers=1), inputs(1, 150)
    cache = empty(trunk, 1)
    parts = [trunk(part, cache=cache) for part in x_BSD.split([60, 1, 1, 1, 1, 1, 1, 80, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), trunk(x_BSD), atol=1e-10, rtol=1e-10)
    assert cache.memories[0].keys_BCGd.shape[1] < 4 * 150


def test_misuse_is_refused():
    trunk, x_BSD = trunk_of(layers=1), inputs(2, 3)
    with pytest.raises(ValueError, match="exclude each other"):
        trunk(x_BSD, document_ids_BS=torch.zeros(2, 3), cache=empty(trunk, 2))
    with pytest.raises(ValueError, match="once in a call"):
        trunk(x_BSD, cache=empty(trunk, 2), rows_N=[1, 1])
    with pytest.raises(ValueError, match="2 rows of entries are given for 3"):
        trunk(x_BSD, cache=empty(trunk, 3))
