"""Dense objectives by hand, against float64 loops, and their invariants."""

import math

import pytest
import torch
from tests.objectives import checks
from tests.objectives.references import BY_HAND, CASES, DIVERGENCES, REFERENCES, slow
from torch.testing import assert_close

from limbeck.core.types import DenseTargets
from limbeck.objectives import divergences
from limbeck.objectives.chunked import logit_terms
from limbeck.objectives.combine import normalised_squared_error, scored_ids, scored_rows, scored_targets
from limbeck.objectives.divergences import cross_entropy, forward_kl
from limbeck.objectives.sparse import COMPARISONS
from limbeck.objectives.terms import LogitTerm


def logit_loss(student_BTV, teacher_BTV, ids_BT, mask_BT, *, kl, ce, temperature=1.0):
    """KL and cross entropy as a lesson puts them together: masked, weighted, summed."""
    terms = [LogitTerm("kl", kl, "forward_kl", temperature)] if kl else []
    terms += [LogitTerm("ce", ce, "cross_entropy")] if ce else []
    targets = None if teacher_BTV is None else scored_targets(DenseTargets.from_logits(teacher_BTV), mask_BT)
    return logit_terms(
        scored_rows(student_BTV, mask_BT), lambda logits: logits, scored_ids(ids_BT, mask_BT), targets, terms
    )


def test_every_objective_is_tested():
    assert set(COMPARISONS) == set(REFERENCES) == set(BY_HAND)


@pytest.mark.parametrize("name", COMPARISONS)
def test_by_hand(name):
    checks.check_by_hand(name, COMPARISONS[name])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_against_reference(name, options, temperature):
    checks.check_reference(name, COMPARISONS[name], temperature=temperature, **options)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_on_equals(name):
    checks.check_zero_on_equals(COMPARISONS[name])


def test_hinge_with_the_teachers_own_lead_is_zero_on_equals():
    checks.check_zero_on_equals(COMPARISONS["hinge"])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_near_zero_on_equals_in_float32_over_a_large_vocabulary(name):
    logits = 3 * torch.randn(2, 30_000)
    assert_close(COMPARISONS[name](logits, logits + 1), torch.zeros(2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", COMPARISONS)
def test_never_negative_and_never_trains_the_teacher(name):
    student, teacher = torch.randn(50, 9, requires_grad=True), torch.randn(50, 9, requires_grad=True)
    value = COMPARISONS[name](student, teacher)
    assert value.min() >= -1e-6
    value.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_constant_added_to_the_logits_says_nothing(name):
    student, teacher = checks.random_logits(), checks.random_logits(seed=1)
    assert_close(COMPARISONS[name](student - 5, teacher + 7), COMPARISONS[name](student, teacher))


@pytest.mark.parametrize("name", COMPARISONS)
def test_leading_shapes_do_not_matter(name):
    student, teacher = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    whole = COMPARISONS[name](student, teacher)
    assert whole.shape == (2, 3)
    assert_close(whole.flatten(), COMPARISONS[name](student.flatten(0, 1), teacher.flatten(0, 1)))


@pytest.mark.parametrize("name", COMPARISONS)
def test_tokens_that_neither_can_say_change_nothing(name):
    """-inf in both: the same value, and gradients that are numbers."""
    student, teacher = checks.random_logits().requires_grad_(), checks.random_logits(seed=1)
    padding = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    padded = torch.cat((student, padding), dim=-1)
    value = COMPARISONS[name](padded, torch.cat((teacher, padding), dim=-1))
    plain = COMPARISONS[name](student, teacher)
    assert_close(value, plain)
    gradients = [torch.autograd.grad(one.sum(), student)[0] for one in (value, plain)]
    assert_close(*gradients)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl",
                                  "total_variation", "sorted_earth_mover", "logit_mse", "hinge"])  # fmt: skip
def test_a_teacher_that_says_never_leaves_numbers(name):
    student, teacher = checks.random_logits().requires_grad_(), checks.random_logits(seed=1)
    teacher[:, 2] = -torch.inf
    value = COMPARISONS[name](student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_reverse_kl_is_infinite_where_the_teacher_says_never():
    teacher = checks.random_logits(seed=1)
    teacher[:, 2] = -torch.inf
    assert COMPARISONS["reverse_kl"](checks.random_logits(), teacher).isinf().all()


def test_bounds():
    """Disjoint distributions give the largest values there are."""
    student, teacher = torch.tensor([[0.0, -100.0]]), torch.tensor([[-100.0, 0.0]])
    largest = {"jensen_shannon": math.log(2), "total_variation": 1.0, "skewed_forward_kl": math.log(10)}
    for name, bound in largest.items():
        assert_close(COMPARISONS[name](student, teacher), torch.tensor([bound]))
    assert_close(COMPARISONS["skewed_reverse_kl"](student, teacher), torch.tensor([math.log(10)]))


def test_alpha_beta_has_both_kls_at_its_corners():
    student, teacher = checks.random_logits().requires_grad_(), checks.random_logits(seed=1)
    for options, name in [((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")]:
        corner = divergences.alpha_beta(student, teacher, alpha=options[0], beta=options[1])
        near = divergences.alpha_beta(student, teacher, alpha=options[0] or 1e-6, beta=options[1] or 1e-6)
        right = COMPARISONS[name](student, teacher)
        assert_close(corner, right)
        assert_close(near, right, rtol=1e-4, atol=1e-5)
        assert_close(torch.autograd.grad(corner.sum(), student)[0], torch.autograd.grad(right.sum(), student)[0])


@pytest.mark.parametrize("one", [0.5, 2.0])
def test_alpha_beta_is_continuous_where_an_exponent_is_zero(one):
    student, teacher = checks.random_logits(), checks.random_logits(seed=1)
    for alpha, beta in [(one, 0.0), (0.0, one)]:
        at = divergences.alpha_beta(student, teacher, alpha=alpha, beta=beta)
        near = divergences.alpha_beta(student, teacher, alpha=alpha or 1e-6, beta=beta or 1e-6)
        assert_close(at, near, rtol=1e-4, atol=1e-5)


def test_skew_zero_is_the_plain_kl():
    student, teacher = checks.random_logits(), checks.random_logits(seed=1)
    assert_close(divergences.skewed_forward_kl(student, teacher, alpha=0), forward_kl(student, teacher))
    assert_close(divergences.skewed_reverse_kl(student, teacher, alpha=0), divergences.reverse_kl(student, teacher))


def test_logit_mse_is_twice_the_limit_of_softened_kl():
    student, teacher = checks.random_logits(), checks.random_logits(seed=1)
    hot = 1e6 * forward_kl(student, teacher, temperature=1e3)
    assert_close(hot, divergences.logit_mse(student, teacher) / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("name", "options"), [
    ("jensen_shannon", {"beta": 0.0}), ("jensen_shannon", {"beta": 1.0}), ("skewed_forward_kl", {"alpha": 1.0}),
    ("skewed_reverse_kl", {"alpha": -0.1}), ("adaptive_kl", {"head_share": 1.0}), ("alpha_beta", {"alpha": -1.0}),
    ("alpha_beta", {"alpha": 0, "beta": 0}), ("hinge", {"margin": -1.0}), ("hinge", {"top_k": 1}),
    ("logistic_ranking", {"top_k": 0}),
])  # fmt: skip
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=rf"{name}|{next(iter(options))}"):
        COMPARISONS[name](torch.randn(1, 4), torch.randn(1, 4), **options)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)]]], dtype=torch.float64)
    assert_close(cross_entropy(logits, torch.tensor([[0]])), torch.tensor([[math.log(4.0)]], dtype=torch.float64))


def test_cross_entropy_against_reference():
    logits, ids = checks.random_logits().requires_grad_(), torch.tensor([0, 3, 6, 3])
    fast = cross_entropy(logits, ids)
    expected = torch.stack([-(row[i].exp() / row.exp().sum()).log() for row, i in zip(logits, ids, strict=True)])
    assert_close(fast, expected)
    assert_close(torch.autograd.grad(fast.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0])


def test_half_precision_is_scored_in_float32():
    logits = torch.randn(1, 4, 9, dtype=torch.bfloat16)
    assert forward_kl(logits, logits + 1).dtype == torch.float32
    assert cross_entropy(logits, torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float32


def test_the_mask_is_shifted():
    checks.check_mask_is_shifted(lambda logits, ids, mask: logit_loss(logits, None, ids, mask, kl=0.0, ce=1.0)[0])


def test_weights_and_temperature_factor():
    ids, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
    student, teacher = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    total, terms = logit_loss(student, teacher, ids, mask, kl=0.7, ce=0.3, temperature=2.0)
    kl = slow("forward_kl", student[0, :2], teacher[0, :2], 2.0).sum()
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
