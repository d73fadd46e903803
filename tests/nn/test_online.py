"""Memories of a running convolution: any mix of chunks and single tokens gives the convolution of the whole."""

import pytest
import torch
from torch.testing import assert_close

from limbeck.nn import online
from limbeck.nn.fftconv import causal_convolution
from limbeck.nn.filters import ExplicitFilter, ImplicitFilter, LongFilter, ModalFilter
from limbeck.nn.online import BLOCK, STATE_BLOCK, ModalRecurrence, OnlineConvolution, init_memory
from limbeck.nn.taps import KnownTaps

CHANNELS, ROWS, LENGTH = 3, 2, 5 * BLOCK + 11
SPLITS = {
    "steps": [1] * LENGTH,
    "whole": [LENGTH],
    "prompt then steps": [BLOCK + 7] + [1] * (LENGTH - BLOCK - 7),
    "chunks of every kind": [1, 2, BLOCK, 3, 17, 16, 1, 1, 40, 15, 1, BLOCK + 1, 5, LENGTH - 2 * BLOCK - 103],
    "chunks that end blocks": [BLOCK] * 5 + [11],
}


class Unbounded(LongFilter):
    """Taps 1 / (t + 1) without end: no recurrence of fixed size gives them."""

    def __init__(self):
        super().__init__(CHANNELS, support=None)
        self.scale_C = torch.nn.Parameter(torch.rand(CHANNELS) + 0.5)

    def evaluate(self, length):
        lag = torch.arange(length, dtype=self.scale_C.dtype)
        return self.scale_C[:, None] / (lag + 1)


FILTER_CASES = {
    "unbounded": Unbounded,
    "modal": lambda: ModalFilter(CHANNELS, modes=3),
    "one tap": lambda: ExplicitFilter(CHANNELS, filter_length=1),
    "below a block": lambda: ExplicitFilter(CHANNELS, filter_length=5),
    "a block": lambda: ExplicitFilter(CHANNELS, filter_length=BLOCK),
    "odd above a block": lambda: ExplicitFilter(CHANNELS, filter_length=BLOCK + 13),
    "longer than the text": lambda: ExplicitFilter(CHANNELS, filter_length=1000),
    "implicit": lambda: ImplicitFilter(CHANNELS, filter_length=2 * BLOCK + 1),
}


def begin(long_filter, dtype=torch.float64, rows=ROWS):
    return init_memory(long_filter, rows, device="cpu", dtype=dtype)


def feed(memory, u, long_filter, split):
    outputs = []
    for chunk in u.split(split, dim=-1):
        if chunk.shape[-1] == 1 and len(outputs) % 2:
            outputs.append(memory.step(chunk[..., 0], long_filter).unsqueeze(-1).clone())
        else:
            outputs.append(memory.extend(chunk, long_filter))
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("case", FILTER_CASES)
@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_any_split_gives_the_convolution_of_the_whole(case, split):
    assert sum(SPLITS[split]) == LENGTH
    long_filter = FILTER_CASES[case]().double().eval()
    u = torch.randn(ROWS, CHANNELS, LENGTH).double()
    expected = causal_convolution(u, long_filter(LENGTH))
    assert_close(feed(begin(long_filter), u, long_filter, SPLITS[split]), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_modal_filter_is_exact_in_the_general_memory_too():
    long_filter = ModalFilter(CHANNELS, modes=3).double().eval()
    u = torch.randn(ROWS, CHANNELS, LENGTH).double()
    memory = OnlineConvolution.empty(ROWS, CHANNELS, device="cpu", dtype=torch.float64)
    expected = causal_convolution(u, long_filter(LENGTH))
    assert_close(feed(memory, u, long_filter, [30, *[1] * (LENGTH - 30)]), expected)


@torch.no_grad()
def test_many_tokens_in_float32_stay_close():
    for long_filter in (Unbounded().eval(), ModalFilter(CHANNELS).eval(), ExplicitFilter(CHANNELS).eval()):
        u = torch.randn(1, CHANNELS, 3000)
        expected = causal_convolution(u.double(), long_filter(3000).double())
        actual = feed(begin(long_filter, torch.float32, rows=1), u, long_filter, [1100, *[1] * 1900])
        assert float((actual - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("support", [5, BLOCK, 100])
@torch.no_grad()
def test_bounded_support_bounds_the_memory(support):
    long_filter = ExplicitFilter(CHANNELS, filter_length=support).eval()
    memory = begin(long_filter, torch.float32, rows=1)
    sizes = set()
    for _ in range(20 * BLOCK):
        memory.step(torch.randn(1, CHANNELS), long_filter)
        sizes.add(memory.history_BCL.shape[-1] + memory.pending_BCH.shape[-1])
    assert max(sizes) <= support + 4 * max(BLOCK, support)
    memory.extend(torch.randn(1, CHANNELS, 5000), long_filter)
    assert memory.history_BCL.shape[-1] + memory.pending_BCH.shape[-1] <= support + 4 * max(BLOCK, support)


@torch.no_grad()
def test_unbounded_memory_grows_with_the_text_and_not_with_the_number_of_chunks():
    long_filter = Unbounded().eval()
    memory = begin(long_filter, torch.float32, rows=1)
    for _ in range(60):
        memory.extend(torch.randn(1, CHANNELS, 20), long_filter)
    assert memory.history_BCL.shape[-1] + memory.pending_BCH.shape[-1] <= 4 * 1200


@torch.no_grad()
def test_each_pair_of_tokens_meets_once():
    """With all taps one and inputs 1, output t counts the inputs seen: t + 1."""
    long_filter = ExplicitFilter(1, filter_length=2000).double().eval()
    long_filter.taps_CK.fill_(1.0)
    memory = begin(long_filter, rows=1)
    counts = torch.cat([memory.step(torch.ones(1, 1).double(), long_filter).clone() for _ in range(1000)])
    assert_close(counts[:, 0], torch.arange(1, 1001).double())


@pytest.mark.parametrize("case", ["unbounded", "modal", "odd above a block"])
@torch.no_grad()
def test_rows_reordered_midway_go_on_as_if_they_had_always_been_there(case):
    long_filter = FILTER_CASES[case]().double().eval()
    u = torch.randn(3, CHANNELS, 200).double()
    rows = torch.tensor([2, 0, 0, 1])
    memory = begin(long_filter, rows=3)
    feed(memory, u[..., :93], long_filter, [50, *[1] * 43])
    memory = memory.map(lambda tensor: tensor.index_select(0, rows))
    rest = feed(memory, u[rows, :, 93:], long_filter, [1] * 107)
    assert_close(rest, causal_convolution(u, long_filter(200))[rows, :, 93:])


@pytest.mark.parametrize("case", ["unbounded", "modal"])
@torch.no_grad()
def test_a_copy_goes_its_own_way(case):
    long_filter = FILTER_CASES[case]().double().eval()
    u = torch.randn(ROWS, CHANNELS, 120).double()
    memory = begin(long_filter)
    feed(memory, u[..., :70], long_filter, [40, *[1] * 30])
    twin = memory.map(torch.clone)
    feed(twin, torch.randn(ROWS, CHANNELS, 30).double(), long_filter, [1] * 30)
    rest = feed(memory, u[..., 70:], long_filter, [1] * 50)
    assert_close(rest, causal_convolution(u, long_filter(120))[..., 70:])


@pytest.mark.parametrize("case", ["unbounded", "modal", "implicit"])
def test_gradients_of_a_first_chunk_are_those_of_the_convolution(case):
    long_filter = FILTER_CASES[case]().double()
    u = torch.randn(ROWS, CHANNELS, 40).double().requires_grad_()
    inputs = (u, *long_filter.parameters())
    actual = begin(long_filter).extend(u, long_filter)
    expected = causal_convolution(u, long_filter(40))
    assert_close(
        torch.autograd.grad(actual.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


@pytest.mark.parametrize("case", ["unbounded", "modal"])
def test_with_gradients_on_chunks_go_on_exactly_and_single_tokens_too(case):
    long_filter = FILTER_CASES[case]().double()
    u = torch.randn(ROWS, CHANNELS, 40).double().requires_grad_()
    memory = begin(long_filter)
    actual = torch.cat([memory.extend(chunk, long_filter) for chunk in u.split([9, 1, 1, 29], dim=-1)], dim=-1)
    assert_close(actual, causal_convolution(u, long_filter(40)))
    actual.sum().backward()
    assert torch.isfinite(u.grad).all()


def test_going_on_does_not_spoil_the_gradients_of_an_earlier_chunk():
    long_filter, begun = Unbounded().double(), 4 * BLOCK
    u = torch.randn(ROWS, CHANNELS, 6 * BLOCK).double().requires_grad_()
    memory = begin(long_filter)
    loss = memory.extend(u[..., :begun], long_filter).square().sum()
    with torch.no_grad():
        feed(memory, u[..., begun:], long_filter, [1] * (2 * BLOCK))
    (actual,) = torch.autograd.grad(loss, u)
    (expected,) = torch.autograd.grad(causal_convolution(u, long_filter(begun))[..., :begun].square().sum(), u)
    assert_close(actual, expected)


def test_poles_and_state_are_as_precise_as_the_model_and_never_less_than_float32():
    long_filter = ModalFilter(CHANNELS)
    assert begin(long_filter, torch.bfloat16).state_BNC.dtype == torch.complex64
    assert begin(long_filter, torch.float64).state_BNC.dtype == torch.complex128
    assert isinstance(begin(long_filter), ModalRecurrence)
    assert begin(ExplicitFilter(CHANNELS), torch.float16).block_inputs_BPC.dtype == torch.float32


@torch.no_grad()
def test_known_taps_serve_every_length_with_few_evaluations():
    asked = []

    def evaluate(length):
        asked.append(length)
        return torch.arange(1.0, length + 1).expand(2, -1)

    known = KnownTaps(evaluate, support=100)
    for length in range(1, 200):
        assert torch.equal(known.head(length), torch.arange(1.0, min(length, 100) + 1).expand(2, -1))
    assert len(asked) <= 8
    assert known.tile_spectrum(8) is known.tile_spectrum(8)


def test_the_horizon_is_a_power_of_two_within_the_support():
    for total in (0, 1, 63, 64, 65, 1000, 5000):
        for support in (None, 1, 65, 1024):
            horizon = online._next_horizon(total, support)
            assert horizon & (horizon - 1) == 0
            assert horizon >= BLOCK
            assert horizon <= max(BLOCK, total, 2)
            assert support is None or horizon < max(2 * BLOCK, 2 * support)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, STATE_BLOCK - 1, STATE_BLOCK, 3 * STATE_BLOCK, 3 * STATE_BLOCK + 1])
def test_the_state_after_a_chunk_is_that_of_the_recurrence_also_after_the_weights_change(length):
    long_filter, u = ModalFilter(CHANNELS, modes=3).double().eval(), torch.randn(ROWS, CHANNELS, length).double()
    for _ in range(2):
        memory, slow = begin(long_filter), begin(long_filter)
        memory.extend(u, long_filter)
        for u_BC in u.unbind(-1):
            slow.step(u_BC, long_filter)
        assert_close(memory.state_BNC, slow.state_BNC)
        long_filter.angle_CN.add_(0.1)
