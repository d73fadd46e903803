"""Objectives on sparse targets: each way to treat missing mass, temperature, sampled targets."""

import functools
import itertools
import math

import pytest
import torch
from tests.objectives import checks
from tests.objectives.references import CASES, DIVERGENCES, TOLERANCE, slow
from torch.testing import assert_close

from limbeck.core.types import SparseTargets
from limbeck.objectives.divergences import forward_kl
from limbeck.objectives.sparse import COMPARISONS, MISSING, sparse_divergence

RANKING = ["hinge", "logistic_ranking"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        (*case, missing)
        for case in CASES
        for missing in MISSING
        if missing != "renormalise" or case[0] not in ("reverse_kl", "symmetric_kl", "adaptive_kl")
    ],
)
def test_keeping_every_token_is_dense(name, options, temperature, missing):
    settings = {"temperature": temperature, "missing": missing, "options": options}
    checks.check_full_top_k_is_dense(
        functools.partial(sparse_divergence, name, **settings),
        functools.partial(COMPARISONS[name], temperature=temperature, **options),
    )


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "sorted_earth_mover"])
def test_the_tail_is_one_bucket_in_both_models(name):
    checks.check_tail_is_a_bucket(name, functools.partial(sparse_divergence, name))


def test_forward_kl_by_hand():
    """Teacher 1/2, 1/4, 1/8, 1/8 of which two are kept; the student is uniform."""
    targets = SparseTargets(
        torch.tensor([[2, 0, -1]]), torch.tensor([[0.5, 0.25, 0.0]]).log(), torch.tensor([0.25]).log()
    )
    student = torch.zeros(1, 4)
    expected = {
        "tail": 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5),
        "renormalise": 2 / 3 * math.log(2 / 3 / 0.25) + 1 / 3 * math.log(1 / 3 / 0.25),
        "uniform": 0.5 * math.log(2) + 0.25 * math.log(0.125 / 0.25),
    }
    for missing, value in expected.items():
        assert_close(sparse_divergence("forward_kl", student, targets, missing=missing), torch.tensor([value]))


def test_temperature_by_hand():
    """At T = 2 masses become square roots, rescaled: 1/2, 1/4, tail 1/4 to 0.7071, 0.5, 0.5 over 1.7071."""
    targets = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log())
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert_close(sparse_divergence("forward_kl", student, targets, temperature=2.0), torch.zeros(1), atol=1e-6, rtol=0)
    uniform = torch.zeros(1, 4)
    teacher = torch.tensor([0.5, 0.25, 0.25]).sqrt() / torch.tensor([0.5, 0.25, 0.25]).sqrt().sum()
    softened = torch.tensor([0.25, 0.25, 0.5]).sqrt() / torch.tensor([0.25, 0.25, 0.5]).sqrt().sum()
    by_hand = (teacher * (teacher / softened).log()).sum()[None]
    assert_close(sparse_divergence("forward_kl", uniform, targets, temperature=2.0), by_hand)
    kept = torch.tensor([0.5, 0.25]).sqrt() / torch.tensor([0.5, 0.25]).sqrt().sum()
    found = sparse_divergence("forward_kl", uniform, targets, temperature=2.0, missing="renormalise")
    assert_close(found, (kept * (kept / 0.25).log()).sum()[None])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", [*DIVERGENCES, "hinge"])
def test_zero_on_equals(name, temperature):
    """The student is the teacher, of whom k entries and the tail are known."""
    checks.check_zero_on_equals(
        lambda student, teacher: sparse_divergence(
            name, student, checks.keep_top(teacher, 4, unused=1), temperature=temperature
        )
    )


@pytest.mark.parametrize(
    "name",
    ["forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl",
     "total_variation", "sorted_earth_mover"],
)  # fmt: skip
def test_the_tail_never_overstates(name):
    """Putting tokens together loses differences (data processing), the fewer the more tokens are kept."""
    student, teacher = checks.random_logits(rows=50, vocabulary=12), checks.random_logits(50, 12, seed=1)
    values = [sparse_divergence(name, student, checks.keep_top(teacher, k)) for k in (2, 5, 9, 12)]
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + 1e-12).all()
    assert (values[0] < values[-1] - 1e-6).any()


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("missing", MISSING)
def test_ranking_looks_at_the_kept_entries_alone(name, missing):
    student, teacher = checks.random_logits().requires_grad_(), checks.random_logits(seed=1)
    found = sparse_divergence(name, student, checks.keep_top(teacher, 4, unused=2), missing=missing)
    assert_close(found, slow(name, student, teacher, top_k=4), **TOLERANCE)
    assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in RANKING])
def test_uniform_is_the_dense_objective_on_the_filled_distribution(name, options):
    student, teacher = checks.random_logits(), checks.random_logits(seed=1)
    targets = checks.keep_top(teacher, 3, unused=1)
    filled = teacher.log_softmax(-1)
    for row in range(4):
        kept = set(targets.ids_BTK[row].tolist())
        for token in set(range(7)) - kept:
            filled[row, token] = targets.tail_log_prob_BT[row] - math.log(4)
    expected = slow(name, student, filled, 2.0, **options)
    found = sparse_divergence(name, student, targets, missing="uniform", temperature=2.0, options=options)
    assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl",
                                  "total_variation", "sorted_earth_mover", "alpha_beta"])  # fmt: skip
def test_renormalised_is_the_dense_objective_with_zeros_elsewhere(name):
    student, teacher = checks.random_logits().requires_grad_(), checks.random_logits(seed=1)
    targets = checks.keep_top(teacher, 3, unused=1)
    zeros = torch.full_like(teacher, -torch.inf)
    zeros.scatter_(-1, targets.ids_BTK[:, :3], targets.log_probs_BTK[:, :3])
    found = sparse_divergence(name, student, targets, missing="renormalise")
    assert_close(found, slow(name, student, zeros), **TOLERANCE)
    assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def test_sorted_earth_mover_compares_ranks_then_rests():
    student = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).log()
    targets = SparseTargets(torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.3]]).log(), torch.tensor([0.2]).log())
    assert_close(sparse_divergence("sorted_earth_mover", student, targets), torch.tensor([0.1 + 0.1 + 0.0]))
    fewer = SparseTargets(torch.tensor([[0, -1]]), torch.tensor([[0.5, 0.0]]).log(), torch.tensor([0.5]).log())
    assert_close(sparse_divergence("sorted_earth_mover", student, fewer), torch.tensor([0.1 + 0.1]))


def test_a_tail_too_small_for_one_minus_the_rest():
    """In float32, 1 - sum of the kept is 0 or negative here; the tail's own sum is right."""
    student = torch.tensor([[0.0, -30.0, -31.0]], requires_grad=True)
    targets = checks.keep_top(torch.tensor([[0.0, -29.0, -33.0]]), 1)
    value = sparse_divergence("reverse_kl", student, targets)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def draw(teacher, draws, *, heat=1.0):
    """Tokens drawn from the softened teacher, each row one sample: weight p / (draws * proposal)."""
    p = teacher.softmax(-1)
    proposal = (teacher / heat).softmax(-1)
    ids = torch.multinomial(proposal, draws, replacement=True)
    weights = (p / proposal).gather(-1, ids) / draws
    return SparseTargets(ids, p.log().gather(-1, ids), torch.full(ids.shape[:1], -torch.inf).double(), weights)


@pytest.mark.parametrize("heat", [1.0, 0.7])
def test_sampled_targets_estimate_the_dense_value_and_gradient_without_bias(heat):
    student, teacher = checks.random_logits(1, 6).requires_grad_(), checks.random_logits(1, 6, seed=1)
    many = 40_000
    estimates = sparse_divergence("forward_kl", student.expand(many, 6), draw(teacher.expand(many, 6), 5, heat=heat))
    error = estimates.std() / many**0.5
    assert abs(estimates.mean() - forward_kl(student, teacher)) < 4 * error
    (found,) = torch.autograd.grad(estimates.mean(), student)
    (right,) = torch.autograd.grad(forward_kl(student, teacher).sum(), student)
    assert_close(found, right, atol=0.01, rtol=0)


def test_sampled_targets_by_hand():
    targets = SparseTargets(
        torch.tensor([[2, 0, -1]]), torch.tensor([[0.5, 0.25, 0.0]]).log(), torch.tensor([-torch.inf]),
        torch.tensor([[0.75, 0.25, 0.0]]),
    )  # fmt: skip
    by_hand = 0.75 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.25)
    assert_close(sparse_divergence("forward_kl", torch.zeros(1, 4), targets), torch.tensor([by_hand]))


def test_sampled_targets_are_zero_on_equals():
    logits = checks.random_logits()
    assert_close(sparse_divergence("forward_kl", logits, draw(logits, 3)), torch.zeros(4).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "forward_kl"])
def test_other_objectives_refuse_sampled_targets(name):
    logits = checks.random_logits()
    with pytest.raises(ValueError, match=f"{name} has no unbiased estimate"):
        sparse_divergence(name, logits, draw(logits, 3))


def test_sampled_targets_refuse_a_temperature():
    logits = checks.random_logits()
    with pytest.raises(ValueError, match="temperature 1"):
        sparse_divergence("forward_kl", logits, draw(logits, 3), temperature=2.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("reverse_kl", {}), ("symmetric_kl", {}), ("adaptive_kl", {}), ("alpha_beta", {"alpha": 0, "beta": 1})],
)
def test_what_renormalising_makes_infinite_is_refused(name, options):
    logits = checks.random_logits()
    with pytest.raises(ValueError, match="infinite"):
        sparse_divergence(name, logits, checks.keep_top(logits, 3), missing="renormalise", options=options)


def test_unknown_names_are_refused():
    logits = checks.random_logits()
    with pytest.raises(ValueError, match='Did you mean "forward_kl"'):
        sparse_divergence("forwrad_kl", logits, checks.keep_top(logits, 3))
    with pytest.raises(ValueError, match='Did you mean "tail"'):
        sparse_divergence("forward_kl", logits, checks.keep_top(logits, 3), missing="tial")
