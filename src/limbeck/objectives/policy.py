"""The reverse KL of whole continuations, by policy gradient.

A student q that writes y_1 .. y_n after a prompt is n steps away from a teacher p: KL(q || p) of the continuation is the
sum over steps of r_t = log q(y_t) - log p(y_t), in expectation over what the student writes. Its gradient has two parts:
the gradient of each step's own KL, which is exact because the expectation over y_t is a sum over the vocabulary, and for
each y_t that was written, how much the steps after it cost. Here the values are [B, T] over the tokens of the rows, and
`written_BT` says which of them the student wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from limbeck.core.errors import VocabularyError
from limbeck.objectives.divergences import log_probs, reverse_kl

Head = Callable[[Tensor], Tensor]

# Logits of one model that `step_values` computes at a time.
_LOGITS_BYTES = 64 * 2**20


def sampling_log_probs(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor | None, *, teacher_share: float, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities [N, V] of what tokens are drawn from: the student, with some of the teacher mixed in.

    With the share alpha, alpha p + (1 - alpha) q, each softened by the temperature. No teacher is needed when the share is 0.
    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, section 2.2, teacher-mixed sampling. It keeps the student from
    finding strings that it and the teacher rate high although they are degenerate.

    Raises: ValueError unless 0 <= teacher_share < 1.
    """
    if not 0 <= teacher_share < 1:
        raise ValueError(f"teacher_share is {teacher_share}; it must be from 0 to below 1")
    student_NV = log_probs(student_logits_NV, temperature)
    if teacher_share == 0:
        return student_NV
    if teacher_logits_NV is None:
        raise ValueError("a share of the teacher's distribution needs the teacher's logits")
    teacher_NV = log_probs(teacher_logits_NV, temperature).to(student_NV)
    return torch.logaddexp(student_NV + math.log1p(-teacher_share), teacher_NV + math.log(teacher_share))


class StepValues(NamedTuple):
    """Of each written token: the KL of its step, and its log-probability to student, teacher and sampling distribution.

    Gradients flow to the student through the first two only.
    """

    divergence_N: Tensor
    student_N: Tensor
    teacher_N: Tensor
    sampler_N: Tensor


def step_values(
    student_hidden_ND: Tensor,
    student_head: Head,
    teacher_hidden_ND: Tensor,
    teacher_head: Head,
    written_ids_N: Tensor,
    *,
    teacher_share: float = 0.0,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> StepValues:
    """What the policy gradient needs of N written tokens, without the logits of all of them at once.

    The logits of `chunk_rows` rows at a time (None: about 64 MiB of each model's) are computed, used and computed again
    in the backward pass. teacher_share, temperature: as the tokens were drawn. Gradients flow to the student's hidden
    states and head.

    Raises: VocabularyError when the models do not give equally many logits.
    """

    def values(student_nD: Tensor, teacher_nD: Tensor, ids_n: Tensor) -> tuple[Tensor, ...]:
        student_nV = student_head(student_nD)
        with torch.no_grad():
            teacher_nV = teacher_head(teacher_nD).to(student_nV)
        _require_same_vocabulary(student_nV, teacher_nV)
        own_nV, theirs_nV = log_probs(student_nV), log_probs(teacher_nV)
        drawn_nV = sampling_log_probs(
            student_nV.detach(), teacher_nV, teacher_share=teacher_share, temperature=temperature
        )
        at = ids_n.unsqueeze(-1)
        picked = (logp_nV.gather(-1, at).squeeze(-1) for logp_nV in (own_nV, theirs_nV, drawn_nV))
        return reverse_kl.of_log_probs(own_nV, theirs_nV), *picked

    rows = student_hidden_ND.shape[0]
    if chunk_rows is None:
        with torch.no_grad():
            one_1V = student_head(student_hidden_ND[:1])
        chunk_rows = max(1, _LOGITS_BYTES // (one_1V.shape[-1] * one_1V.element_size()))
    parts = []
    for low in range(0, max(1, rows), chunk_rows):
        part = (tensor[low : low + chunk_rows] for tensor in (student_hidden_ND, teacher_hidden_ND, written_ids_N))
        parts.append(checkpoint(values, *part, use_reentrant=False, preserve_rng_state=False))
    return StepValues(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _require_same_vocabulary(student_nV: Tensor, teacher_nV: Tensor) -> None:
    if student_nV.shape[-1] != teacher_nV.shape[-1]:
        raise VocabularyError(
            f"the teacher gives {teacher_nV.shape[-1]} logits a position and the student {student_nV.shape[-1]}. The policy "
            "gradient compares them token by token: use the tokens that both have"
        )


def step_weights(student_BT: Tensor, sampler_BT: Tensor) -> Tensor:
    """How much likelier each written token is to the student than to what it was drawn from, [B, T]; no gradient.

    For a share alpha of the teacher, and temperature 1, at most 1 / (1 - alpha).
    """
    return (student_BT - sampler_BT).detach().exp()


def prefix_weights(student_BT: Tensor, sampler_BT: Tensor, written_BT: Tensor) -> Tensor:
    """The product of `step_weights` up to and with each written token, [B, T]; no gradient.

    A value that depends on the tokens up to t, times the weight at t, has the expectation that it would have if the
    student alone had written them.
    """
    ratio_BT = torch.where(written_BT, (student_BT - sampler_BT).detach(), 0.0)
    return ratio_BT.cumsum(1).exp()


def future_rewards(reward_BT: Tensor, written_BT: Tensor, *, normalise_length: bool) -> Tensor:
    """Sum [B, T] of the rewards of the written tokens after each one; 0 after the last.

    normalise_length: their mean instead, so that a long continuation does not count more than a short one.
    Source: arXiv:2306.08543, section 2.2, length normalisation (there the division by the number of steps left).
    """
    sums_BT = _after(torch.where(written_BT, reward_BT, 0.0))
    if not normalise_length:
        return sums_BT
    return sums_BT / _after(written_BT.to(sums_BT.dtype)).clamp_min(1)


def _after(values_BT: Tensor) -> Tensor:
    """Sum of all values to the right of each place."""
    return F.pad(values_BT.flip(1).cumsum(1).flip(1)[:, 1:], (0, 1))


class Credit(NamedTuple):
    """What the policy gradient multiplies at each written token, [B, T] and without gradients.

    step_weight_BT: the gradient of the step's own KL. advantage_BT: the gradient of the token's log-probability, whose
    sign says whether it becomes likelier. future_BT: what `advantage_BT` was before the baseline was taken off it.
    """

    step_weight_BT: Tensor
    advantage_BT: Tensor
    future_BT: Tensor


def approximate_credit(
    student_BT: Tensor,
    teacher_BT: Tensor,
    sampler_BT: Tensor,
    written_BT: Tensor,
    *,
    normalise_length: bool = True,
    baseline_nats: float = 0.0,
) -> Credit:
    """Credit with the importance weight of the token itself only, as in the paper.

    Exact when the student alone wrote. With a share of the teacher the gradient is that of tokens among others which the
    mixture wrote: of three tokens and a share of 0.2 it was about a fifth off the true one in the median of 20 random pairs
    of models, not much less than without weights, while the weights stay below 1 / (1 - share) at any length. A
    baseline that does not depend on the rows changes the variance and nothing else.
    Source: arXiv:2306.08543, section 2.2. Deviation: the step's own KL has weight 1 where the paper has the
    weight of y_t. That KL does not depend on y_t, and the weight is 1 in expectation, so only noise is left out; the
    published code does the same.
    """
    reward_BT = (teacher_BT - student_BT).detach()
    future_BT = future_rewards(reward_BT, written_BT, normalise_length=normalise_length)
    advantage_BT = step_weights(student_BT, sampler_BT) * (future_BT - baseline_nats)
    return Credit(torch.ones_like(reward_BT), advantage_BT, future_BT)


def unbiased_credit(
    student_BT: Tensor,
    teacher_BT: Tensor,
    sampler_BT: Tensor,
    written_BT: Tensor,
    *,
    normalise_length: bool = False,
    baseline_nats: float = 0.0,
) -> Credit:
    """Credit with the weights of all tokens before, whatever the share of the teacher.

    Without length normalisation the gradient of `policy_gradient` is, in expectation, that of the reverse KL of the
    whole continuation. The weights are products, so their variance grows with its length.
    Source: arXiv:2306.08543, section 2.2, importance weights before their approximation.
    """
    weight_BT = prefix_weights(student_BT, sampler_BT, written_BT)
    reward_BT = weight_BT * (teacher_BT - student_BT).detach()
    future_BT = future_rewards(reward_BT, written_BT, normalise_length=normalise_length)
    before_BT = F.pad(weight_BT[:, :-1], (1, 0), value=1.0)
    return Credit(before_BT, future_BT - weight_BT * baseline_nats, future_BT)


def policy_gradient(divergence_BT: Tensor, student_BT: Tensor, credit: Credit) -> Tensor:
    """Per written token, the step's KL as value [B, T] nats, and as gradient that of the reverse KL of all that follows.

    divergence_BT, student_BT: the KL of each step and the written token's log-probability; gradients flow through both.
    The part that credits tokens for what comes after them has the value 0, so that sums of the loss stay reverse KLs.
    Source: arXiv:2306.08543, section 2.2, single-step decomposition.
    """
    credited_BT = credit.advantage_BT * student_BT
    return credit.step_weight_BT * divergence_BT - (credited_BT - credited_BT.detach())
