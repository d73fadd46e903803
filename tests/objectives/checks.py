"""What must hold of a loss. Each check takes the function to judge, so that `test_planted_faults` can hand it a wrong one."""

import torch
from tests.objectives.references import BY_HAND, STUDENT_BY_HAND, TEACHER_BY_HAND, TOLERANCE, slow
from torch.testing import assert_close

from limbeck.core.types import SparseTargets


def random_logits(rows=4, vocabulary=7, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, dtype=torch.float64, generator=made) * 1.5


def keep_top(teacher_logits, k, *, unused=0):
    """Top-k targets of a teacher, with `unused` more places that hold nothing."""
    logp = teacher_logits.log_softmax(-1)
    kept, ids = logp.topk(k, dim=-1)
    tail = torch.stack([row[[i for i in range(row.numel()) if i not in set(chosen.tolist())]].logsumexp(0)
                        for row, chosen in zip(logp, ids, strict=True)])  # fmt: skip
    ids = torch.nn.functional.pad(ids, (0, unused), value=-1)
    return SparseTargets(ids, torch.nn.functional.pad(kept, (0, unused), value=-torch.inf), tail)


def check_by_hand(name, function):
    """The value of one example worked out on paper."""
    student, teacher = (
        torch.tensor([[values]], dtype=torch.float64).log() for values in (STUDENT_BY_HAND, TEACHER_BY_HAND)
    )
    assert_close(function(student, teacher), torch.tensor([[BY_HAND[name]]], dtype=torch.float64))


def check_reference(name, function, *, temperature=1.0, **options):
    """Value and gradient against slow loops in float64."""
    student, teacher = random_logits().requires_grad_(), random_logits(seed=1)
    fast = function(student, teacher, temperature=temperature, **options)
    expected = slow(name, student, teacher, temperature, **options)
    assert_close(fast, expected, **TOLERANCE)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (found,) = torch.autograd.grad((fast * weights).sum(), student)
    (right,) = torch.autograd.grad((expected * weights).sum(), student)
    assert_close(found, right, **TOLERANCE)


def check_zero_on_equals(function):
    """A divergence is zero on equals, and on logits that differ by a constant."""
    logits = random_logits(rows=3, vocabulary=11)
    zeros = torch.zeros(3, dtype=torch.float64)
    assert_close(function(logits, logits), zeros, rtol=0, atol=1e-12)
    assert_close(function(logits + 3, logits), zeros, rtol=0, atol=1e-12)


def check_full_top_k_is_dense(sparse, dense):
    """Keeping every token is the same as the whole distribution; value and gradient."""
    student, teacher = random_logits().requires_grad_(), random_logits(seed=1)
    found, right = sparse(student, keep_top(teacher, 7, unused=2)), dense(student, teacher)
    assert_close(found, right, **TOLERANCE)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (found, right)]
    assert_close(*gradients, **TOLERANCE)


def check_tail_is_a_bucket(name, sparse):
    """Top-k with a tail is the dense definition on k + 1 buckets."""
    student, teacher = random_logits(), random_logits(seed=1)
    expected = []
    for s, t in zip(student.softmax(-1), teacher.softmax(-1), strict=True):
        kept = t.topk(3).indices.tolist()
        others = [i for i in range(7) if i not in kept]
        buckets = [torch.stack([*(row[i] for i in kept), row[others].sum()]) for row in (s, t)]
        expected.append(slow(name, buckets[0].log()[None], buckets[1].log()[None])[0])
    assert_close(sparse(student, keep_top(teacher, 3, unused=1)), torch.stack(expected), **TOLERANCE)


def check_mask_is_shifted(loss):
    """loss(logits [1, 4, 5], ids, mask): logits at t-1 pay for the token at t, and no other logits count."""
    ids, mask = torch.tensor([[3, 1, 2, 0]]), torch.tensor([[False, True, False, True]])
    logits = torch.randn(1, 4, 5, dtype=torch.float64)
    logp = logits.log_softmax(-1)
    assert_close(loss(logits, ids, mask), -logp[0, 0, 1] - logp[0, 2, 0])
    changed = logits.clone()
    changed[0, 1] += torch.arange(5)
    changed[0, 3] -= torch.arange(5) ** 2
    assert_close(loss(changed, ids, mask), loss(logits, ids, mask))


def check_temperature_factor(total):
    """total(student, teacher, temperature): the gradient keeps its size when the temperature is high."""
    student, teacher = random_logits().requires_grad_(), random_logits(seed=1)
    grads = [torch.autograd.grad(total(student, teacher, heat), student)[0] for heat in (1e3, 2e3)]
    assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-4)
    centred = (student - teacher) - (student - teacher).mean(-1, keepdim=True)
    assert_close(grads[1], (centred / 7).detach(), rtol=1e-2, atol=1e-3)
