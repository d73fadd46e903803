"""The policy gradient against every continuation there is: a toy student whose tokens depend on all tokens before."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from limbeck.core.errors import VocabularyError
from limbeck.objectives.policy import (
    approximate_credit,
    future_rewards,
    policy_gradient,
    prefix_weights,
    sampling_log_probs,
    step_values,
    step_weights,
    unbiased_credit,
)

V, LENGTH, END = 3, 3, 0


def sequences():
    """Every continuation: it ends with token 0 or at the third token."""
    found = []
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(V), repeat=length):
            ended = ids[-1] == END
            if END not in ids[:-1] and (ended or length == LENGTH):
                found.append(ids)
    return found


def table(seed):
    """Logits [V] after every prefix, as one tensor by the prefix's number."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, V, generator=generator, dtype=torch.float64)


def number(prefix):
    return sum((token + 1) * 4**place for place, token in enumerate(prefix)) % 40


def logits_of(weights, ids):
    """[n, V]: the logits at each step of a continuation."""
    return torch.stack([weights[number(ids[:place])] for place in range(len(ids))])


def log_prob(weights, ids):
    return sum(row.log_softmax(-1)[token] for row, token in zip(logits_of(weights, ids), ids, strict=True))


def exact_gradient(student, teacher):
    """Of the reverse KL of the whole continuation: a sum over all there are."""
    total = sum(log_prob(student, ids).exp() * (log_prob(student, ids) - log_prob(teacher, ids)) for ids in sequences())
    return torch.autograd.grad(total, student)[0]


def surrogate(student, teacher, ids, credit, *, share, temperature=1.0, **options):
    """The loss of one written row, padded as in a batch, and how likely it was to be written."""
    n = len(ids)
    own, theirs = logits_of(student, ids), logits_of(teacher, ids)
    values = step_values(
        own, nn.Identity(), theirs, nn.Identity(), torch.tensor(ids), teacher_share=share, temperature=temperature
    )
    mask = torch.zeros(1, LENGTH + 2, dtype=torch.bool)
    mask[0, 1 : 1 + n] = True
    rows = [value.new_full(mask.shape, 7.0).masked_scatter(mask, value) for value in values]
    losses = policy_gradient(rows[0], rows[1], credit(*rows[1:], mask, **options))
    return losses[mask].sum(), values.sampler_N.sum().exp().detach()


def expected_gradient(student, teacher, credit, **options):
    total, chance = 0.0, 0.0
    for ids in sequences():
        loss, likelihood = surrogate(student, teacher, ids, credit, **options)
        total = total + likelihood * torch.autograd.grad(loss, student)[0]
        chance += float(likelihood)
    assert_close(chance, 1.0)
    return total


@pytest.mark.parametrize("baseline", [0.0, -1.7])
@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.9, 1.0), (0.3, 1.6)])
def test_the_estimator_is_the_gradient_of_the_sequence_reverse_kl_in_expectation(share, temperature, baseline):
    student, teacher = table(1).requires_grad_(), table(2)
    found = expected_gradient(
        student, teacher, unbiased_credit, share=share, temperature=temperature, baseline_nats=baseline
    )
    assert_close(found, exact_gradient(student, teacher), rtol=1e-10, atol=1e-12)


def test_the_papers_weights_are_exact_when_the_student_alone_writes():
    student, teacher = table(1).requires_grad_(), table(2)
    found = expected_gradient(
        student, teacher, approximate_credit, share=0.0, normalise_length=False, baseline_nats=0.4
    )
    assert_close(found, exact_gradient(student, teacher), rtol=1e-10, atol=1e-12)


def test_the_papers_weights_are_exact_for_each_token_among_others_of_the_mixture():
    """Token t as the student would write it, those before and after it as the mixture writes them."""
    share, student, teacher = 0.3, table(1).requires_grad_(), table(2)
    wanted = torch.zeros_like(student)
    for ids in sequences():
        own, theirs = logits_of(student, ids).log_softmax(-1), logits_of(teacher, ids).log_softmax(-1)
        picked = torch.tensor(ids)[:, None]
        mixed = ((1 - share) * own.exp() + share * theirs.exp()).gather(1, picked).detach().flatten()
        chance_own = own.exp().gather(1, picked).detach().flatten()
        reward = (theirs.gather(1, picked) - own.gather(1, picked)).detach().flatten()
        loss = mixed.prod() * (own.exp() * (own - theirs)).sum()
        for place in range(len(ids)):
            chance = mixed[:place].prod() * chance_own[place] * mixed[place + 1 :].prod()
            loss = loss - chance * reward[place + 1 :].sum() * own[place, ids[place]]
        wanted += torch.autograd.grad(loss, student)[0]
    found = expected_gradient(
        student, teacher, approximate_credit, share=share, normalise_length=False, baseline_nats=0.4
    )
    assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert (found - exact_gradient(student, teacher)).norm() > 1e-2


def test_length_normalisation_is_the_gradient_with_means_in_the_place_of_sums():
    """Against the definition, written out step by step."""
    student, teacher = table(1).requires_grad_(), table(2)
    wanted = torch.zeros_like(student)
    for ids in sequences():
        own, theirs = logits_of(student, ids).log_softmax(-1), logits_of(teacher, ids).log_softmax(-1)
        chance = log_prob(student, ids).exp().detach()
        picked = torch.tensor(ids)[:, None]
        reward = (theirs.gather(1, picked) - own.gather(1, picked)).detach().flatten()
        loss = (own.exp() * (own - theirs)).sum()
        for place in range(len(ids) - 1):
            loss = loss - reward[place + 1 :].mean() * own[place, ids[place]]
        wanted += chance * torch.autograd.grad(loss, student)[0]
    found = expected_gradient(student, teacher, approximate_credit, share=0.0, normalise_length=True)
    assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_prefix_weights_turn_an_expectation_over_the_mixture_into_one_over_the_student():
    student, teacher = table(3), table(4)
    by_student = by_mixture = 0.0
    for ids in sequences():
        value = torch.tensor([math.sin(1 + sum(ids[: place + 1])) for place in range(len(ids))]).double()
        values = step_values(
            logits_of(student, ids), nn.Identity(), logits_of(teacher, ids), nn.Identity(), torch.tensor(ids), teacher_share=0.4
        )  # fmt: skip
        weight = prefix_weights(
            values.student_N[None], values.sampler_N[None], torch.ones(1, len(ids), dtype=torch.bool)
        )
        by_student += float(values.student_N.sum().exp() * value.sum())
        by_mixture += float(values.sampler_N.sum().exp() * (weight[0] * value).sum())
    assert_close(by_mixture, by_student, rtol=1e-12, atol=0)


def test_weights_by_hand_and_bounded():
    own, drawn = torch.tensor([[0.5, 0.2, 0.9]]).log(), torch.tensor([[0.25, 0.4, 0.9]]).log()
    assert_close(step_weights(own, drawn), torch.tensor([[2.0, 0.5, 1.0]]))
    mask = torch.tensor([[True, True, False]])
    assert_close(
        prefix_weights(own, torch.full_like(drawn, -9.0).where(~mask, drawn), mask), torch.tensor([[2.0, 1, 1]])
    )
    logits = torch.randn(50, 7) * 5, torch.randn(50, 7) * 5
    ids = torch.randint(7, (50,))
    values = step_values(logits[0], nn.Identity(), logits[1], nn.Identity(), ids, teacher_share=0.2)
    assert step_weights(values.student_N, values.sampler_N).max() <= 1 / 0.8 + 1e-5


def test_credit_by_hand():
    """Weights 2, 1/2 and 4; rewards (log2 units) 1, -1 and 2; a baseline of 3."""
    log2 = math.log(2)
    own, theirs = torch.tensor([[-1.0, -1, -2]]) * log2, torch.tensor([[0.0, -2, 0]]) * log2
    drawn, mask = torch.tensor([[-2.0, 0, -4]]) * log2, torch.ones(1, 3, dtype=torch.bool)
    options = {"normalise_length": False, "baseline_nats": 3 * log2}
    credit = approximate_credit(own, theirs, drawn, mask, **options)
    assert_close(credit.step_weight_BT, torch.ones(1, 3))
    assert_close(credit.future_BT / log2, torch.tensor([[1.0, 2, 0]]))
    assert_close(credit.advantage_BT / log2, torch.tensor([[2 * (1.0 - 3), 0.5 * (2 - 3), 4 * (0 - 3)]]))
    credit = unbiased_credit(own, theirs, drawn, mask, **options)
    assert_close(credit.step_weight_BT, torch.tensor([[1.0, 2, 1]]))
    assert_close(credit.future_BT / log2, torch.tensor([[1 * -1.0 + 4 * 2, 4 * 2, 0]]))
    assert_close(credit.advantage_BT / log2, torch.tensor([[7.0 - 2 * 3, 8 - 1 * 3, 0 - 4 * 3]]))


def test_future_rewards_by_hand():
    rewards = torch.tensor([[5.0, 1.0, 2.0, 6.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    sums = future_rewards(rewards, mask, normalise_length=False)
    assert sums[0, 1:].tolist() == [8, 6, 0, 0]
    assert future_rewards(rewards, mask, normalise_length=True)[0, 1:].tolist() == [4, 6, 0, 0]


def test_the_mixture_is_one_of_probabilities():
    student, teacher = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.1, 0.3, 0.6]]).log()
    mixed = sampling_log_probs(student, teacher, teacher_share=0.25).exp()
    assert_close(mixed, torch.tensor([[0.4, 0.45, 0.15]]))
    assert_close(
        sampling_log_probs(student, None, teacher_share=0.0, temperature=0.5).exp(), torch.tensor([[0.5, 0.5, 0]])
    )
    skew = torch.tensor([[0.8, 0.2]]).log()
    assert_close(
        sampling_log_probs(skew, None, teacher_share=0.0, temperature=0.5).exp(), torch.tensor([[16.0, 1]]) / 17
    )
    with pytest.raises(ValueError, match="below 1"):
        sampling_log_probs(student, teacher, teacher_share=1.0)
    with pytest.raises(ValueError, match="needs the teacher"):
        sampling_log_probs(student, None, teacher_share=0.5)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_chunks_do_not_matter_and_the_head_gets_its_gradient(chunk_rows):
    torch.manual_seed(3)
    head, theirs = nn.Linear(4, 6).double(), nn.Linear(5, 6).double()
    hidden, other = torch.randn(9, 4).double().requires_grad_(), torch.randn(9, 5).double()
    ids = torch.randint(6, (9,))

    def run(rows):
        values = step_values(hidden, head, other, theirs, ids, teacher_share=0.3, temperature=1.6, chunk_rows=rows)
        loss = (values.divergence_N * torch.arange(9)).sum() + values.student_N.square().sum()
        return values, torch.autograd.grad(loss, [hidden, *head.parameters()])

    (whole, wanted), (parts, found) = run(None), run(chunk_rows)
    for one, other_one in zip([*whole, *wanted], [*parts, *found], strict=True):
        assert_close(one, other_one, rtol=1e-12, atol=1e-12)
    own, teacher = head(hidden).log_softmax(-1), theirs(other).log_softmax(-1)
    assert_close(whole.divergence_N, (own.exp() * (own - teacher)).sum(-1))
    assert_close(whole.student_N, own[range(9), ids])
    assert_close(whole.teacher_N, teacher[range(9), ids])
    mixed = 0.7 * (head(hidden) / 1.6).softmax(-1) + 0.3 * (theirs(other) / 1.6).softmax(-1)
    assert_close(whole.sampler_N, mixed[range(9), ids].log())
    assert not whole.teacher_N.requires_grad
    assert not whole.sampler_N.requires_grad


def test_no_rows_and_other_vocabularies():
    nothing = torch.zeros(0, 4)
    head = nn.Linear(4, 6)
    values = step_values(nothing, head, nothing, head, torch.zeros(0, dtype=torch.long), chunk_rows=2)
    assert [len(value) for value in values] == [0, 0, 0, 0]
    with pytest.raises(VocabularyError, match="7 logits a position and the student 6"):
        step_values(torch.zeros(2, 4), head, torch.zeros(2, 4), nn.Linear(4, 7), torch.zeros(2, dtype=torch.long))


def test_the_value_is_the_mean_kl_and_not_the_credit():
    divergence, student = torch.tensor([[0.5, 0.25]]), torch.tensor([[-1.0, -2.0]], requires_grad=True)
    credit = approximate_credit(
        student, torch.tensor([[-3.0, -1.0]]), student.detach(), torch.ones(1, 2, dtype=torch.bool), baseline_nats=0.5
    )
    losses = policy_gradient(divergence, student, credit)
    assert_close(losses, divergence)
    losses.sum().backward()
    # The second token's reward is -1 - (-2) = 1: the first token made it possible, less the baseline.
    assert_close(student.grad, torch.tensor([[-(1 - 0.5), 0.5]]))
