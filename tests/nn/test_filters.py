"""Filters against number-by-number evaluation, their memory of taps, their precision, and fitting."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from limbeck.core.errors import RecipeError
from limbeck.nn.filters import FILTERS, ExplicitFilter, ImplicitFilter, ModalFilter
from limbeck.nn.modal import modal_taps
from limbeck.nn.reference import taps_slowly

OPTIONS = {"implicit": {"filter_length": 23}, "explicit": {"filter_length": 23}, "modal": {"modes": 3}}
KINDS = list(OPTIONS)


def make(kind, channels=4):
    return FILTERS[kind](channels, **OPTIONS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 23, 40])
def test_taps_are_those_of_the_definition(kind, length):
    long_filter = make(kind).double()
    actual = long_filter(length)
    assert actual.shape == (4, length if kind == "modal" else min(length, 23))
    assert_close(actual, taps_slowly(long_filter, length))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_evaluation_is_the_beginning_of_a_longer_one(kind):
    long_filter = make(kind).double()
    assert_close(long_filter(9), long_filter(23)[:, :9])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(kind):
    long_filter = make(kind, channels=2).double()
    names = [name for name, _ in long_filter.named_parameters()]

    def taps(*values):
        return torch.func.functional_call(long_filter, dict(zip(names, values, strict=True)), (6,))

    assert torch.autograd.gradcheck(taps, tuple(long_filter.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_taps_are_finite_and_neither_dead_nor_huge(kind):
    taps = FILTERS[kind](64)(1024)
    energy = taps.square().sum(-1).mean()
    assert torch.isfinite(taps).all()
    assert 0.05 < float(energy) < 20


def test_modal_filters_have_poles_inside_the_unit_circle_even_when_trained_far_off():
    long_filter = ModalFilter(3)
    with torch.no_grad():
        long_filter.decay_CN.fill_(-40.0)
    assert float(long_filter.poles_CN().abs().max()) <= 1.0


def test_modal_taps_keep_their_phase_far_out():
    rate, angle = torch.full((1, 1), 1e-6), torch.full((1, 1), 3.0)
    residue = torch.ones(1, 1, dtype=torch.complex64)
    wide = modal_taps(rate.double(), angle.double(), residue.to(torch.complex128), length=20000)
    assert_close(modal_taps(rate, angle, residue, length=20000).double(), wide, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_kept_in_eval_mode_and_renewed_when_a_weight_changes(kind):
    long_filter = make(kind).eval()
    with torch.no_grad():
        known = long_filter.known_taps()
        first = known.head(8)
        assert long_filter.known_taps() is known
        next(iter(reversed(list(long_filter.parameters())))).add_(0.5)
        renewed = long_filter.known_taps()
        assert renewed is not known
        assert_close(renewed.head(8), long_filter(8))
        assert not torch.equal(renewed.head(8), first)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_not_kept_while_gradients_or_training_need_them_fresh(kind):
    long_filter = make(kind).eval()
    assert long_filter.known_taps() is not long_filter.known_taps()
    assert long_filter.known_taps().head(5).requires_grad
    long_filter.train()
    with torch.no_grad():
        assert long_filter.known_taps() is not long_filter.known_taps()


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_through_data_is_seen_after_the_next_eval(kind):
    long_filter = make(kind).eval()
    with torch.no_grad():
        long_filter.known_taps().head(8)
        for parameter in long_filter.parameters():
            parameter.data.mul_(1.5)
        long_filter.eval()
        assert_close(long_filter.known_taps().head(8), long_filter(8))


@pytest.mark.parametrize("kind", KINDS)
def test_taps_kept_under_inference_mode_can_be_trained_with_afterwards(kind):
    long_filter = make(kind).eval()
    with torch.inference_mode():
        long_filter.known_taps().head(8)
    with torch.no_grad():
        kept = long_filter.known_taps().head(8)
    signal = torch.randn(4, 8, requires_grad=True)
    (signal * kept).sum().backward()
    assert signal.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_saved_weights_give_the_same_taps(kind, tmp_path):
    long_filter = make(kind).eval()
    with torch.no_grad():
        expected = long_filter.known_taps().head(9).clone()
        twin = copy.deepcopy(long_filter)
        assert twin._known is None
        assert torch.equal(twin.known_taps().head(9), expected)
        save_file(long_filter.state_dict(), tmp_path / "filter.safetensors")
        loaded = make(kind).eval()
        loaded.known_taps().head(9)
        loaded.load_state_dict(load_file(tmp_path / "filter.safetensors"))
        assert torch.equal(loaded.known_taps().head(9), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_stay_in_float32_in_a_half_precision_model(kind, dtype):
    long_filter = make(kind)
    expected = long_filter(9)
    half = copy.deepcopy(long_filter).to(dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert torch.equal(half(9), expected)
    assert {parameter.dtype for parameter in half.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_loaded_in_half_precision_are_computed_in_float32(kind):
    long_filter = make(kind)
    for name, parameter in list(long_filter.named_parameters()):
        setattr(long_filter, name, torch.nn.Parameter(parameter.detach().bfloat16()))
    assert long_filter(9).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_lower_the_precision_of_taps(kind):
    long_filter = make(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = long_filter(9)
    assert torch.equal(inside, long_filter(9))


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_decay_survives_copies_moves_and_replacement(kind):
    long_filter = make(kind)
    long_filter.__setattr__("spare", torch.nn.Parameter(torch.zeros(2)))
    for version in (long_filter, copy.deepcopy(long_filter), long_filter.double()):
        assert all(getattr(parameter, "_no_weight_decay", False) for parameter in version.parameters())


def sum_of_exponentials(channels, length):
    t = torch.arange(length).double()
    rates = torch.logspace(-2, -0.5, channels).double()[:, None]
    return torch.exp(-rates * t) - 0.6 * torch.exp(-3 * rates * t) * torch.cos(0.3 * t)


def test_the_modal_fit_finds_a_sum_of_exponentials():
    target = sum_of_exponentials(5, 120)
    long_filter = ModalFilter(5, modes=4).double()
    before = float((long_filter(120) - target).norm() / target.norm())
    error = long_filter.fit(target)
    assert error < 1e-3 < before
    assert_close(error, float((long_filter(120) - target).norm() / target.norm()))
    start = ModalFilter(5, modes=4).double().fit(target, steps=0)
    assert error < start / 10


def test_the_implicit_fit_improves_on_its_closed_form_start():
    target = sum_of_exponentials(5, 60)
    torch.manual_seed(1)
    start = ImplicitFilter(5, filter_length=60).fit(target, steps=0)
    torch.manual_seed(1)
    long_filter = ImplicitFilter(5, filter_length=60)
    error = long_filter.fit(target, steps=40)
    assert error < start
    assert error < 0.1
    assert_close(error, float((long_filter(60) - target).norm() / target.norm()), rtol=1e-3, atol=1e-6)


def test_the_explicit_fit_is_exact():
    target = sum_of_exponentials(5, 20)
    long_filter = ExplicitFilter(5, filter_length=30).double()
    assert long_filter.fit(target) == 0.0
    assert_close(long_filter(30), torch.nn.functional.pad(target, (0, 10)))


@pytest.mark.parametrize("kind", ["implicit", "explicit"])
def test_the_error_counts_what_lies_beyond_the_support(kind):
    target = torch.ones(3, 40)
    error = FILTERS[kind](3, filter_length=30).fit(target, steps=0)
    assert error >= (10 / 40) ** 0.5 - 1e-6


def test_weights_move_the_fit_to_what_matters():
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(3, 64, generator=generator).double()
    weights = torch.where(torch.arange(64) < 8, 1.0, 1e-4).double()
    plain, weighted = ModalFilter(3, modes=4).double(), ModalFilter(3, modes=4).double()
    plain.fit(target)
    error = weighted.fit(target, weights=weights)
    head = (weighted(64) - target)[:, :8].norm()
    assert head < (plain(64) - target)[:, :8].norm()
    wrong = (weights * (weighted(64) - target).square()).sum() / (weights * target.square()).sum()
    assert_close(error, float(wrong.sqrt()))


def test_a_weighted_modal_fit_ends_where_the_weighted_error_is_stationary():
    t = torch.arange(60).double()
    target = (1 / (1 + t)).expand(2, -1) ** torch.tensor([[0.5], [1.0]]).double()
    weights = 1 / (1 + t)
    long_filter = ModalFilter(2, modes=2).double()
    long_filter.fit(target, weights=weights, steps=200)
    wrong = (weights * (long_filter(60) - target).square()).sum()
    for slope in torch.autograd.grad(wrong, tuple(long_filter.parameters())):
        assert float(slope.abs().max()) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_leaves_gradients_as_they_were_and_survives_zero_targets(kind):
    long_filter = make(kind).requires_grad_(False)
    error = long_filter.fit(torch.zeros(4, 10), steps=3)
    assert error == pytest.approx(0.0, abs=1e-3) or error < float("inf")
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in long_filter.parameters())
    assert torch.isfinite(long_filter(10)).all()
    assert float(long_filter(10).abs().max()) < 1e-6


def test_fitting_works_inside_no_grad():
    with torch.no_grad():
        assert ImplicitFilter(2, filter_length=16).fit(sum_of_exponentials(2, 16), steps=5) < 1.0


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ImplicitFilter(4, embedding_size=4), "must be odd"),
        (lambda: ExplicitFilter(4, filter_length=0), "at least 1 channel and 1 tap"),
        (lambda: ModalFilter(4, modes=0), "modes and longest_memory"),
    ],
)
def test_impossible_options_are_refused(build, words):
    with pytest.raises(RecipeError, match=words):
        build()


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected target taps"):
        ModalFilter(4).fit(torch.zeros(3, 10))
