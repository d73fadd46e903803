"""Every convolution algorithm against the definition: values, gradients, causality, awkward sizes."""

import pytest
import torch
from torch.testing import assert_close

from limbeck.core.errors import RecipeError
from limbeck.nn.fftconv import (
    CONVOLUTIONS,
    causal_convolution,
    choose_algorithm,
    convolution_window,
    fft_size,
)
from limbeck.nn.reference import convolve_slowly

ALGORITHMS = [*CONVOLUTIONS, "auto"]
SIZES = [(1, 1), (1, 5), (2, 1), (7, 7), (16, 3), (13, 40), (31, 31), (37, 36), (64, 9)]


def random_case(length, taps, *, channels=5, rows=2):
    return torch.randn(rows, channels, length).double(), torch.randn(channels, taps).double()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("length", "taps"), SIZES)
def test_values_and_gradients_are_those_of_the_definition(algorithm, length, taps):
    u, h = (tensor.requires_grad_() for tensor in random_case(length, taps))
    upstream = torch.randn(u.shape).double()
    expected = convolve_slowly(u, h)
    actual = causal_convolution(u, h, algorithm=algorithm)
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, (u, h), upstream), torch.autograd.grad(expected, (u, h), upstream))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_gradients_the_values_are_the_same(algorithm):
    u, h = random_case(29, 11)
    with torch.no_grad():
        assert_close(causal_convolution(u, h, algorithm=algorithm), convolve_slowly(u, h))


@pytest.mark.parametrize("algorithm", ["fft", "chunked_fft"])
def test_the_hand_written_gradient_passes_gradcheck(algorithm):
    u, h = (tensor.requires_grad_() for tensor in random_case(7, 5, channels=3))
    assert torch.autograd.gradcheck(lambda u, h: causal_convolution(u, h, algorithm=algorithm), (u, h))


@pytest.mark.parametrize("needs", ["input", "taps"])
def test_only_the_gradient_that_is_needed(needs):
    u, h = random_case(9, 9)
    wanted, values = (u, h) if needs == "input" else (h, u)
    wanted.requires_grad_()
    upstream = torch.randn(u.shape).double()
    actual = torch.autograd.grad(causal_convolution(u, h, algorithm="fft"), wanted, upstream)
    assert_close(actual, torch.autograd.grad(convolve_slowly(u, h), wanted, upstream))
    assert values.grad is None


def test_more_channels_than_a_block():
    u, h = (tensor.requires_grad_() for tensor in random_case(10, 10, channels=70))
    upstream = torch.randn(u.shape).double()
    actual, expected = (causal_convolution(u, h, algorithm=name) for name in ("chunked_fft", "direct"))
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, (u, h), upstream), torch.autograd.grad(expected, (u, h), upstream))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_future_does_not_move_the_past(algorithm):
    u, h = random_case(41, 41)
    changed = u.clone()
    changed[..., 20:] += 100 * torch.randn(changed[..., 20:].shape).double()
    before, after = (causal_convolution(x, h, algorithm=algorithm)[..., :20] for x in (u, changed))
    assert_close(after, before, rtol=0, atol=1e-14 * float(changed.norm()) * float(h.norm()))


def test_impulse_gives_the_taps_back():
    h = torch.tensor([[1.0, -2.0, 3.0]])
    u = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 0.0]]])
    assert_close(causal_convolution(u, h), torch.tensor([[[0.0, 1.0, -2.0, 3.0, 0.0]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_is_computed_in_float32(dtype, algorithm):
    u, h = random_case(23, 23)
    u_half, h_float = u.to(dtype), h.float()
    actual = causal_convolution(u_half, h_float, algorithm=algorithm)
    assert actual.dtype == dtype
    wide = causal_convolution(u_half.float(), h_float, algorithm=algorithm)
    assert torch.equal(actual, wide.to(dtype))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_does_not_lower_the_precision(algorithm):
    u, h = (tensor.float() for tensor in random_case(23, 23))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = causal_convolution(u, h, algorithm=algorithm)
    assert torch.equal(inside, causal_convolution(u, h, algorithm=algorithm))


def test_float32_stays_close_at_length():
    u, h = random_case(3000, 3000, channels=2, rows=1)
    actual = causal_convolution(u.float(), h.float())
    expected = causal_convolution(u, h)
    assert float((actual - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 30), (9, 17), (4, 12), (9, 18)])
@pytest.mark.parametrize("taps", [1, 6, 18, 40])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_any_window_of_the_full_convolution(start, stop, taps, needs_grad):
    u, h = random_case(9, taps)
    u.requires_grad_(needs_grad)
    padded = torch.nn.functional.pad(u, (0, 30))
    expected = convolve_slowly(padded, h)[..., start:stop]
    assert_close(convolution_window(u, h, start=start, stop=stop), expected)


@pytest.mark.parametrize(
    ("minimum", "size"), [(1, 2), (2, 2), (3, 4), (7, 8), (11, 12), (13, 16), (2041, 2048), (5999, 6000)]
)
def test_fft_sizes_are_friendly(minimum, size):
    assert fft_size(minimum) == size


def test_every_fft_size_is_even_large_enough_and_has_small_factors():
    for minimum in range(1, 3000, 7):
        size = rest = fft_size(minimum)
        assert size >= minimum
        assert size % 2 == 0
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1


def test_an_impossible_fft_is_refused():
    with pytest.raises(ValueError, match="larger than the largest"):
        fft_size(2**30 + 1)


def test_auto_takes_known_names_and_never_direct_for_training():
    for rows in (1, 8):
        for length in (1, 64, 1024, 5000):
            for needs_grad in (False, True):
                for device in ("cpu", "cuda"):
                    name = choose_algorithm(
                        rows=rows, length=length, taps=min(64, length), device_type=device, needs_grad=needs_grad
                    )
                    assert name in CONVOLUTIONS
                    assert not (needs_grad and name == "direct")


def test_unknown_algorithm_suggests_a_known_one():
    u, h = random_case(4, 4)
    with pytest.raises(RecipeError, match='Did you mean "direct"'):
        causal_convolution(u, h, algorithm="direkt")


def test_shapes_that_do_not_fit_are_refused():
    u, _ = random_case(4, 4)
    with pytest.raises(ValueError, match="expected inputs"):
        causal_convolution(u, torch.randn(3, 4).double())


def test_no_tokens_give_no_outputs():
    assert causal_convolution(torch.zeros(2, 5, 0), torch.zeros(5, 3)).shape == (2, 5, 0)
