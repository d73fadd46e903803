"""Long prompts without gradients take another route, by blocks of tokens; the numbers are those of the usual one."""

import copy

import pytest
import torch
from torch.testing import assert_close

from limbeck.nn import blockwise
from limbeck.nn.blockwise import LONG_PROMPT, TOKEN_BLOCK
from limbeck.nn.hyena import HyenaOperator

WIDTH = 6
LENGTHS = [LONG_PROMPT, TOKEN_BLOCK + 1, 2 * TOKEN_BLOCK + 5]


def make(*, dtype=torch.float64, **options):
    operator = HyenaOperator(WIDTH, inner_width=7, **options).to(dtype).eval()
    with torch.no_grad():
        operator.skip_bias.normal_()
        operator.short_bias.normal_()
    return operator


def hidden(length, *, rows=2, dtype=torch.float64):
    return torch.randn(rows, length, WIDTH).to(dtype)


def left_padding(length, *, padded):
    mask_BT = torch.ones(2, length, dtype=torch.bool)
    mask_BT[1, :padded] = False
    return mask_BT


@torch.no_grad()
def by_blocks(operator, x, **options):
    assert blockwise.pays(x)
    return operator(x, **options)


@torch.no_grad()
def in_chunks(operator, x, split, mask):
    state = operator.init_state(x.shape[0], device=x.device, dtype=x.dtype)
    chunks, masks = x.split(split, dim=1), mask.split(split, dim=1)
    outputs = [operator.advance(chunk, state, mask_BT=part)[0] for chunk, part in zip(chunks, masks, strict=True)]
    assert state.length == x.shape[1]
    return torch.cat(outputs, dim=1)


def test_only_long_prompts_without_gradients_go_by_blocks():
    assert not blockwise.pays(hidden(LONG_PROMPT))
    with torch.no_grad():
        assert blockwise.pays(hidden(LONG_PROMPT))
        assert not blockwise.pays(hidden(LONG_PROMPT - 1))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("short_conv", [1, 3, 4, 18])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_outputs_are_the_same(order, short_conv, length):
    operator, x = make(order=order, short_conv=short_conv), hidden(length)
    assert_close(by_blocks(operator, x), operator(x).detach())
    mask = left_padding(length, padded=TOKEN_BLOCK // 2)
    assert_close(by_blocks(operator, x, mask_BT=mask), operator(x, mask_BT=mask).detach())


@pytest.mark.parametrize("filter", ["modal", "implicit", "explicit"])
@pytest.mark.parametrize("short_conv", [1, 2, 4])
@pytest.mark.parametrize("order", [2, 3])
def test_any_split_gives_the_same(order, short_conv, filter):
    operator = make(order=order, short_conv=short_conv, filter=filter)
    length = 2 * LONG_PROMPT + TOKEN_BLOCK + 12
    x, mask = hidden(length), left_padding(length, padded=LONG_PROMPT + 3)
    expected = operator(x, mask_BT=mask).detach()
    for split in ([length], [5, LONG_PROMPT, 1, 1, TOKEN_BLOCK + 1, 3, LONG_PROMPT + 1]):
        assert_close(in_chunks(operator, x, split, mask), expected)


@pytest.mark.parametrize("filter", ["modal", "explicit"])
def test_one_row_one_short_tap_kept_leaves_other_states_alone(filter):
    operator, x = make(short_conv=2, filter=filter), hidden(2 * LONG_PROMPT, rows=1)
    with torch.no_grad():
        state = operator.init_state(1, device="cpu", dtype=x.dtype)
        operator.advance(x[:, :LONG_PROMPT], state)
        branch = state.clone()
        first, _ = operator.advance(x[:, LONG_PROMPT:], state)
        again, _ = operator.advance(x[:, LONG_PROMPT:], branch)
    assert torch.equal(first, again)
    assert_close(first, operator(x).detach()[:, LONG_PROMPT:])


def test_without_biases_and_with_one_document():
    operator, x = make(bias=False), hidden(LONG_PROMPT + 1)
    assert_close(by_blocks(operator, x), operator(x).detach())
    assert_close(by_blocks(operator, x, document_ids_BT=torch.full((2, LONG_PROMPT + 1), 7)), operator(x).detach())


def test_a_document_border_is_still_respected():
    operator, x = make(), hidden(2 * LONG_PROMPT)
    ids_BT = torch.arange(2 * LONG_PROMPT).expand(2, -1) // LONG_PROMPT
    with torch.no_grad():
        parts = [operator(part) for part in x.split(LONG_PROMPT, dim=1)]
        assert_close(operator(x, document_ids_BT=ids_BT), torch.cat(parts, dim=1))


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_a_linear_map_that_is_more_than_that_is_called_once_on_the_whole(name):
    operator, x, calls = make(), hidden(TOKEN_BLOCK + 1), []
    getattr(operator, name).register_forward_hook(lambda _m, args, out: calls.append(args[0].shape) or 2 * out)
    found = by_blocks(operator, x)
    assert calls == [(2, TOKEN_BLOCK + 1, WIDTH if name == "in_proj" else 7)]
    assert_close(found, operator(x).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_half_precision_is(dtype):
    operator, x = make(dtype=torch.float32), hidden(LONG_PROMPT + 7, dtype=torch.float32)
    expected = operator(x).detach()
    half = by_blocks(copy.deepcopy(operator).to(dtype), x.to(dtype))
    assert half.dtype == dtype
    assert_close(half.float(), expected, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=dtype):
        mixed = by_blocks(operator, x)
    assert mixed.dtype == dtype
    assert_close(mixed.float(), expected, atol=0.1, rtol=0.1)


def test_gradients_do_not_notice_a_prompt_in_between():
    operator, x = make(), hidden(LONG_PROMPT)
    twin = copy.deepcopy(operator)
    by_blocks(operator, x)
    for one in (operator, twin):
        one(x).square().mean().backward()
    for ours, theirs in zip(operator.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_inference_mode():
    operator, x = make(), hidden(LONG_PROMPT)
    with torch.inference_mode():
        found = operator(x)
    assert_close(found, operator(x).detach())
