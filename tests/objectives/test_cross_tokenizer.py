"""Cross-tokenizer losses by hand, against slow float64 references, and their invariants."""

import math

import pytest
import torch
from torch.testing import assert_close

from limbeck.objectives.cross_tokenizer import (
    CHUNK_DIVERGENCES,
    border_earth_mover,
    border_earth_movers,
    chunk_likelihood,
    chunk_log_probs,
    target_log_probs,
)


def one(value):
    return torch.tensor([[value]], dtype=torch.float64)


YES = torch.tensor([[True]])


def coin_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_chunk_likelihood_by_hand():
    student, teacher = one(math.log(0.25)), one(math.log(0.5))
    found = {
        name: float(chunk_likelihood(student, teacher, YES, temperature=1.0, divergence=name, floor_nats=0.0))
        for name in CHUNK_DIVERGENCES
    }
    # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) and its mirror image, and |1/2 - 1/4|.
    assert_close(found["forward_kl"], 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert_close(found["reverse_kl"], 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert_close(found["total_variation"], 0.25)
    assert_close(found["forward_kl"], 0.14384103622589045)


def test_chunk_likelihood_with_temperature_by_hand():
    """At temperature 2 probabilities 1/4 and 1/16 become 1/2 and 1/4, and the result counts twice."""
    student, teacher = one(math.log(1 / 16)), one(math.log(1 / 4))
    found = chunk_likelihood(student, teacher, YES, temperature=2.0, floor_nats=0.0)
    assert_close(float(found), 2 * 0.14384103622589045)


def test_the_limit_of_temperature_by_hand():
    """a = 1 nat, b = 2 nats: 1 log(1/2) - 1 + 2."""
    found = chunk_likelihood(one(-2.0), one(-1.0), YES, floor_nats=0.0)
    assert_close(float(found), 1 - math.log(2))
    for divergence, limit in (("reverse_kl", 2 * math.log(2) - 2 + 1), ("total_variation", 1.0)):
        found = chunk_likelihood(one(-2.0), one(-1.0), YES, divergence=divergence, floor_nats=0.0)
        assert_close(float(found), limit)


@pytest.mark.parametrize("divergence", list(CHUNK_DIVERGENCES))
def test_the_limit_is_approached(divergence):
    student, teacher = -torch.rand(2, 5, dtype=torch.float64) * 9, -torch.rand(2, 5, dtype=torch.float64) * 9
    mask = torch.ones(2, 5, dtype=torch.bool)
    limit = chunk_likelihood(student, teacher, mask, divergence=divergence)
    near = chunk_likelihood(student, teacher, mask, divergence=divergence, temperature=1e5)
    assert_close(near, limit, rtol=1e-3, atol=1e-6)


def slow_chunk_likelihood(student, teacher, mask, temperature, divergence):
    rows = []
    for s, t, m in zip(student.flatten(), teacher.flatten(), mask.flatten(), strict=True):
        p, q = ((t - 1e-6) / temperature).exp(), ((s - 1e-6) / temperature).exp()
        if divergence == "reverse_kl":
            p, q = q, p
        if divergence == "total_variation":
            value = 0.5 * ((p - q).abs() + ((1 - p) - (1 - q)).abs())
        else:
            value = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        rows.append(temperature * value if m else value * 0)
    return torch.stack(rows).view(student.shape)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("divergence", list(CHUNK_DIVERGENCES))
def test_chunk_likelihood_against_reference(divergence, temperature):
    student = (-torch.rand(3, 5, dtype=torch.float64) * 5).requires_grad_()
    teacher = (-torch.rand(3, 5, dtype=torch.float64) * 5).requires_grad_()
    mask = torch.rand(3, 5) > 0.3
    fast = chunk_likelihood(student, teacher, mask, temperature=temperature, divergence=divergence)
    slow = slow_chunk_likelihood(student, teacher.detach(), mask, temperature, divergence)
    assert_close(fast, slow)
    (fast_gradient,) = torch.autograd.grad(fast.sum(), student, retain_graph=True)
    (slow_gradient,) = torch.autograd.grad(slow.sum(), student)
    assert_close(fast_gradient, slow_gradient)
    assert torch.autograd.grad(fast.sum(), teacher, allow_unused=True)[0] is None
    assert (fast >= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 100.0, math.inf])
@pytest.mark.parametrize("divergence", list(CHUNK_DIVERGENCES))
def test_zero_on_equals_with_zero_gradient(divergence, temperature):
    student = torch.tensor([[-0.0, -1e-8, -0.5, -30.0, -400.0]], requires_grad=True)
    mask = torch.ones(1, 5, dtype=torch.bool)
    found = chunk_likelihood(student, student.detach(), mask, temperature=temperature, divergence=divergence)
    assert torch.equal(found, torch.zeros(1, 5))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert_close(gradient, torch.zeros(1, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 100.0, math.inf])
@pytest.mark.parametrize("divergence", list(CHUNK_DIVERGENCES))
def test_extreme_likelihoods_stay_finite(divergence, temperature):
    nats = torch.tensor([0.0, 1e-9, 1.0, 60.0, 2000.0])
    student = -nats.repeat(5, 1).requires_grad_()
    teacher = -nats.unsqueeze(1).repeat(1, 5)
    found = chunk_likelihood(
        student, teacher, torch.ones(5, 5, dtype=torch.bool), temperature=temperature, divergence=divergence
    )
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


def test_what_is_outside_the_mask_counts_nothing_whatever_it_is():
    student = torch.tensor([[-1.0, float("nan"), -math.inf, 5.0]], requires_grad=True)
    teacher = torch.tensor([[-2.0, float("nan"), 0.0, -math.inf]])
    mask = torch.tensor([[True, False, False, False]])
    found = chunk_likelihood(student, teacher, mask)
    assert torch.equal(found[0, 1:], torch.zeros(3))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.equal(gradient[0, 1:], torch.zeros(3))
    assert gradient[0, 0] > 0


def test_a_student_that_finds_text_too_unlikely_is_pulled_towards_it():
    """At the limit the gradient on the log-probability is a/b - 1: minus one, as cross-entropy's, for a small a."""
    student = one(-2.0).requires_grad_()
    found = chunk_likelihood(student, one(-1.0), YES, floor_nats=0.0)
    assert_close(torch.autograd.grad(found.sum(), student)[0], one(0.5 - 1))


def test_wrong_words():
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        chunk_likelihood(one(-1.0), one(-1.0), YES, divergence="kl")
    with pytest.raises(ValueError, match="temperature must be positive"):
        chunk_likelihood(one(-1.0), one(-1.0), YES, temperature=0.0)


def test_half_precision_is_scored_in_float32():
    value = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    assert chunk_likelihood(value, value, YES).dtype == torch.float32


def test_chunk_log_probs_by_hand():
    tokens = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-1.0, -1.0, -1.0, float("nan")]], requires_grad=True)
    chunks = torch.tensor([[-1, 0, 0, 1], [0, 0, 0, -1]])
    found = chunk_log_probs(tokens, chunks, chunks=3)
    assert_close(found, torch.tensor([[-6.0, -8.0, 0.0], [-3.0, 0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(found.sum(), tokens)
    assert_close(gradient, torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]))


def test_no_chunks():
    chunks = torch.full((2, 3), -1)
    assert chunk_log_probs(torch.zeros(2, 3), chunks, chunks=0).shape == (2, 0)
    nothing = torch.zeros(2, 0)
    assert chunk_likelihood(nothing, nothing, nothing.bool()).shape == (2, 0)


def test_sums_over_parts_make_the_whole():
    student, teacher = -torch.rand(4, 6, dtype=torch.float64), -torch.rand(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) > 0.4
    whole = chunk_likelihood(student, teacher, mask).sum()
    parts = [chunk_likelihood(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]).sum() for i in range(4)]
    assert_close(torch.stack(parts).sum(), whole)


def test_earth_mover_by_hand():
    """Sorted 0.5 0.3 0.2 against 0.7 0.3: |-0.2| + 0 + 0.2."""
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    assert_close(border_earth_mover(logits, teacher), torch.tensor([0.4], dtype=torch.float64))
    longer = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    assert_close(border_earth_mover(logits, longer), torch.tensor([0.1], dtype=torch.float64))


def slow_earth_mover(logits, teacher_probs):
    rows = []
    for row, theirs in zip(logits, teacher_probs, strict=True):
        mine = sorted((row.exp() / row.exp().sum()).unbind(), key=float, reverse=True)
        theirs = sorted(theirs.unbind(), key=float, reverse=True)
        size = max(len(mine), len(theirs))
        zero = torch.zeros((), dtype=row.dtype)
        mine, theirs = mine + [zero] * (size - len(mine)), theirs + [zero] * (size - len(theirs))
        rows.append(sum((a - b).abs() for a, b in zip(mine, theirs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(("mine", "theirs"), [(7, 7), (5, 11), (11, 5)])
def test_earth_mover_against_reference(mine, theirs):
    logits = torch.randn(4, mine, dtype=torch.float64, requires_grad=True)
    probs = torch.randn(4, theirs, dtype=torch.float64).softmax(-1).sort(descending=True).values.requires_grad_()
    fast, slow = border_earth_mover(logits, probs), slow_earth_mover(logits, probs.detach())
    assert_close(fast, slow)
    (fast_gradient,) = torch.autograd.grad(fast.sum(), logits, retain_graph=True)
    (slow_gradient,) = torch.autograd.grad(slow.sum(), logits)
    assert_close(fast_gradient, slow_gradient)
    assert torch.autograd.grad(fast.sum(), probs, allow_unused=True)[0] is None


def test_earth_mover_is_zero_on_equals_in_any_order_and_size():
    logits = torch.randn(3, 9)
    probs = logits.softmax(-1).sort(descending=True).values
    shuffled = logits[:, torch.randperm(9)]
    zero = torch.zeros(3)
    assert_close(border_earth_mover(shuffled, probs), zero, atol=1e-6, rtol=0)
    padded = torch.cat([shuffled, torch.full((3, 4), -math.inf)], dim=1)
    assert_close(border_earth_mover(padded, probs), zero, atol=1e-6, rtol=0)
    assert_close(border_earth_mover(shuffled, torch.nn.functional.pad(probs, (0, 5))), zero, atol=1e-6, rtol=0)
    assert_close(border_earth_mover(shuffled, probs[:, :4]), zero, atol=1e-6, rtol=0)


def test_with_few_of_the_teacher_s_entries_it_is_a_lower_bound():
    logits = torch.randn(20, 12, dtype=torch.float64)
    probs = torch.randn(20, 15, dtype=torch.float64).softmax(-1).sort(descending=True).values
    whole = border_earth_mover(logits, probs)
    previous = torch.zeros(20, dtype=torch.float64)
    for kept in (1, 4, 8, 15):
        some = border_earth_mover(logits, probs[:, :kept])
        assert (some <= whole + 1e-12).all()
        assert (some >= previous - 1e-12).all()
        previous = some
    assert_close(previous, whole)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100, None])
def test_by_rows_is_the_same_as_whole(chunk_rows):
    torch.manual_seed(1)
    head = torch.nn.Linear(6, 13, dtype=torch.float64)
    hidden = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(13, (8,))
    probs = torch.randn(8, 4, dtype=torch.float64).softmax(-1).sort(descending=True).values
    inputs = (hidden, head.weight, head.bias)
    for whole, parts in (
        (head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0], target_log_probs(hidden, head, targets, chunk_rows=chunk_rows)),
        (border_earth_mover(head(hidden), probs), border_earth_movers(hidden, head, probs, chunk_rows=chunk_rows)),
    ):  # fmt: skip
        assert_close(parts, whole)
        for one_gradient, other in zip(
            torch.autograd.grad(parts.square().sum(), inputs), torch.autograd.grad(whole.square().sum(), inputs)
        ):
            assert_close(one_gradient, other)
    assert target_log_probs(hidden[:0], head, targets[:0], chunk_rows=chunk_rows).shape == (0,)
