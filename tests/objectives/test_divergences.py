"""Losses by hand, against float64 references, and their invariants."""

import math

import pytest
import torch
from torch.testing import assert_close

from limbeck.objectives.combine import logit_loss, normalised_squared_error
from limbeck.objectives.divergences import cross_entropy, forward_kl


def slow_forward_kl(student, teacher, temperature):
    rows = []
    for s, t in zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True):
        p, q = (t / temperature).exp(), (s / temperature).exp()
        p, q = p / p.sum(), q / q.sum()
        rows.append((p * (p / q).log()).sum())
    return torch.stack(rows).view(student.shape[:-1])


def test_forward_kl_by_hand():
    teacher = torch.tensor([[[math.log(0.5), math.log(0.5)]]], dtype=torch.float64)
    student = torch.tensor([[[math.log(0.25), math.log(0.75)]]], dtype=torch.float64)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert_close(forward_kl(student, teacher), torch.tensor([[expected]], dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_forward_kl_against_reference(temperature):
    student = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    fast = forward_kl(student, teacher, temperature=temperature)
    slow = slow_forward_kl(student, teacher.detach(), temperature)
    assert_close(fast, slow)
    (fast_gradient,) = torch.autograd.grad(fast.sum(), student)
    (slow_gradient,) = torch.autograd.grad(slow.sum(), student)
    assert_close(fast_gradient, slow_gradient)


def test_forward_kl_is_zero_on_equals_and_does_not_train_the_teacher():
    teacher = torch.randn(2, 3, 11, requires_grad=True)
    student = teacher.detach().clone().requires_grad_()
    divergence = forward_kl(student, teacher)
    assert_close(divergence, torch.zeros(2, 3), atol=1e-6, rtol=0)
    divergence.sum().backward()
    assert teacher.grad is None


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)]]], dtype=torch.float64)
    assert_close(cross_entropy(logits, torch.tensor([[0]])), torch.tensor([[math.log(4.0)]], dtype=torch.float64))


def test_half_precision_is_scored_in_float32():
    logits = torch.randn(1, 4, 9, dtype=torch.bfloat16)
    assert forward_kl(logits, logits + 1).dtype == torch.float32
    assert cross_entropy(logits, torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float32


def test_the_mask_is_shifted():
    """Logits at t-1 pay for the token at t; changing logits at unscored places changes nothing."""
    ids = torch.tensor([[3, 1, 2, 0]])
    mask = torch.tensor([[False, True, False, True]])
    logits = torch.randn(1, 4, 5, dtype=torch.float64)
    total, terms = logit_loss(logits, None, ids, mask, kl=0.0, ce=1.0)
    by_hand = -logits.log_softmax(-1)[0, 0, 1] - logits.log_softmax(-1)[0, 2, 0]
    assert_close(total, by_hand)
    assert_close(terms["ce"], by_hand)
    changed = logits.clone()
    changed[0, 1] += 5
    changed[0, 3] -= 7
    assert_close(logit_loss(changed, None, ids, mask, kl=0.0, ce=1.0)[0], total)


def test_weights_and_temperature_factor():
    ids, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
    student, teacher = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    total, terms = logit_loss(student, teacher, ids, mask, kl=0.7, ce=0.3, temperature=2.0)
    kl = slow_forward_kl(student[:, :2], teacher[:, :2], 2.0).sum()
    ce = -(student.log_softmax(-1)[0, 0, 1] + student.log_softmax(-1)[0, 1, 2])
    assert_close(total, 0.7 * 4 * kl + 0.3 * ce)
    assert_close(terms["kl"], kl)


def test_sums_over_parts_make_the_whole():
    ids, mask = torch.randint(6, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
    student, teacher = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    whole, _ = logit_loss(student, teacher, ids, mask, kl=1.0, ce=1.0)
    parts = [
        logit_loss(student[i : i + 1], teacher[i : i + 1], ids[i : i + 1], mask[i : i + 1], kl=1.0, ce=1.0)[0]
        for i in range(4)
    ]
    assert_close(torch.stack(parts).sum(), whole)


def test_kl_without_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher"):
        logit_loss(
            torch.zeros(1, 2, 3),
            None,
            torch.zeros(1, 2, dtype=torch.long),
            torch.ones(1, 2, dtype=torch.bool),
            kl=1.0,
            ce=0.0,
        )


def test_normalised_squared_error():
    target = torch.randn(2, 3, 4, dtype=torch.float64)
    power = float(target.square().mean())
    zero = normalised_squared_error(torch.zeros_like(target), target, power=power, mask_BT=None)
    assert_close(float(zero) / 6, 1.0, atol=1e-6, rtol=0)
    assert float(normalised_squared_error(target, target, power=power, mask_BT=None)) == 0.0
    mask = torch.tensor([[True, False, False], [False, False, False]])
    one = normalised_squared_error(torch.zeros_like(target), target, power=1.0, mask_BT=mask)
    assert_close(float(one), float(target[0, 0].square().mean()), atol=1e-6, rtol=0)
