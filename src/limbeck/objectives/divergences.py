"""How far a student's next-token distribution is from a teacher's, and from the text.

Each objective is defined once, on log-probabilities over the last dimension, where -inf says "never". Called with
logits it is the dense form; `of_log_probs` is the definition itself, which the sparse form shares. All give nats per
token (where the name says so), without mask and without reduction; the customary temperature**2 is left to `terms`.
Gradients flow to the student only.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# A student's log-probability of -inf counts as this in a mixture, where the gradient of log(0 + 0) would be undefined.
_LEAST_LOG_PROB = -1e30


class Comparison:
    """An objective between two distributions: on logits when called, on log-probabilities as `of_log_probs`."""

    def __init__(self, definition: Callable[..., Tensor]):
        functools.update_wrapper(self, definition)
        self.of_log_probs = definition

    def __call__(
        self, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, *, temperature: float = 1.0, **options: Any
    ) -> Tensor:
        """Compare the distributions of two logits [..., V], each softened by `temperature`. Returns [...]."""
        student_BTV = log_probs(student_logits_BTV, temperature)
        return self.of_log_probs(student_BTV, log_probs(teacher_logits_BTV.detach(), temperature), **options)

    @property
    def options(self) -> dict[str, Any]:
        """The objective's own options and their defaults."""
        parameters = inspect.signature(self.of_log_probs).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


def log_probs(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of softened logits, in float32 or wider."""
    logits_BTV = at_least_float32(logits_BTV)
    return F.log_softmax(logits_BTV if temperature == 1 else logits_BTV / temperature, dim=-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened to float32; anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def cross_entropy(student_logits_BTV: Tensor, target_ids_BT: Tensor) -> Tensor:
    """Negative log-likelihood of the given tokens under the student.

    Gradients flow to the student. Returns [B, T] nats, >= 0.
    """
    nats = F.cross_entropy(
        at_least_float32(student_logits_BTV).flatten(0, -2), target_ids_BT.flatten(), reduction="none"
    )
    return nats.view(target_ids_BT.shape)


@Comparison
def forward_kl(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """KL(teacher || student): the student pays where the teacher puts mass and it does not.

    Returns [B, T] nats, >= 0, zero exactly on equals; infinite where the student never says what the teacher may.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    return _kl(teacher_BTV, student_BTV)


@Comparison
def reverse_kl(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """KL(student || teacher): the student pays where it puts mass and the teacher does not, so it seeks modes.

    Returns [B, T] nats, >= 0, zero exactly on equals; infinite where the student may say what the teacher never does.
    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, section 2.1.
    """
    return _kl(student_BTV, teacher_BTV)


@Comparison
def symmetric_kl(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """The mean of forward and reverse KL.

    Returns [B, T] nats, >= 0, zero exactly on equals.
    Source: Jeffreys 1946 (there the sum; the mean here, so that its size is that of either).
    """
    return (_kl(teacher_BTV, student_BTV) + _kl(student_BTV, teacher_BTV)) / 2


@Comparison
def jensen_shannon(student_BTV: Tensor, teacher_BTV: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), where m = beta teacher + (1 - beta) student.

    Small beta behaves as beta times forward KL, beta near 1 as (1 - beta) times reverse KL. Returns [B, T] nats, from 0
    (exactly on equals) to at most log 2.
    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, section 2.

    Raises: ValueError unless 0 < beta < 1.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"jensen_shannon: beta must lie between 0 and 1, got {beta}; its ends are forward and reverse KL"
        )
    mixture_BTV = _mix(teacher_BTV, student_BTV, share=beta)
    return beta * _kl(teacher_BTV, mixture_BTV) + (1 - beta) * _kl(student_BTV, mixture_BTV)


@Comparison
def skewed_forward_kl(student_BTV: Tensor, teacher_BTV: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student): forward KL whose gradients stay bounded.

    Returns [B, T] nats, from 0 (exactly on equals) to at most -log alpha. alpha 0 is forward KL.
    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.

    Raises: ValueError unless 0 <= alpha < 1.
    """
    _require_skew("skewed_forward_kl", alpha)
    return _kl(teacher_BTV, _mix(teacher_BTV, student_BTV, share=alpha) if alpha else student_BTV)


@Comparison
def skewed_reverse_kl(student_BTV: Tensor, teacher_BTV: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(student || (1 - alpha) teacher + alpha student): reverse KL that is finite where the teacher says never.

    Returns [B, T] nats, from 0 (exactly on equals) to at most -log alpha. alpha 0 is reverse KL.
    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.

    Raises: ValueError unless 0 <= alpha < 1.
    """
    _require_skew("skewed_reverse_kl", alpha)
    return _kl(student_BTV, _mix(teacher_BTV, student_BTV, share=1 - alpha) if alpha else teacher_BTV)


@Comparison
def adaptive_kl(student_BTV: Tensor, teacher_BTV: Tensor, *, head_share: float = 0.5) -> Tensor:
    """Forward and reverse KL, weighed by where the student errs: in the teacher's head or in its tail.

    The head is the fewest tokens that together have `head_share` of the teacher's mass. Forward KL is weighed by the
    share of sum |teacher - student| that lies in the head, reverse KL by the rest; no gradient flows through the
    weights. Returns [B, T] nats, >= 0, zero exactly on equals. Sorts the vocabulary, so it is slow.
    Source: Wu et al. 2025, arXiv:2404.02657, section 4. Its published code ends the head one token earlier.

    Raises: ValueError unless 0 < head_share < 1.
    """
    if not 0 < head_share < 1:
        raise ValueError(f"adaptive_kl: head_share must lie between 0 and 1, got {head_share}")
    sorted_BTV, order_BTV = teacher_BTV.exp().sort(dim=-1, descending=True)
    gap_BTV = (sorted_BTV - student_BTV.detach().exp().gather(-1, order_BTV)).abs()
    is_head_BTV = sorted_BTV.cumsum(-1) - sorted_BTV < head_share
    head_gap_BT, gap_BT = (gap_BTV * is_head_BTV).sum(-1), gap_BTV.sum(-1)
    forward_share_BT = head_gap_BT / gap_BT.clamp_min(torch.finfo(gap_BT.dtype).tiny)
    forward_BT, reverse_BT = _kl(teacher_BTV, student_BTV), _kl(student_BTV, teacher_BTV)
    return forward_share_BT * forward_BT + (1 - forward_share_BT) * reverse_BT


@Comparison
def alpha_beta(student_BTV: Tensor, teacher_BTV: Tensor, *, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """The alpha-beta divergence: sum of p^(a+b) / (b (a+b)) + q^(a+b) / (a (a+b)) - p^a q^b / (a b), p the teacher's.

    alpha 1, beta 0 is forward KL; alpha 0, beta 1 is reverse KL (both as limits). Larger alpha cares more for where
    the teacher is sure, larger beta for where the student is. Returns [B, T], >= 0, zero on equals up to rounding.
    Source: Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki et al. 2011, Entropy 13, 134-170.

    Raises: ValueError when alpha or beta is negative or both are 0.
    """
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise ValueError(f"alpha_beta: alpha and beta must be >= 0 and not both 0, got alpha {alpha}, beta {beta}")
    if alpha == 0:
        return _alpha_beta_limit(student_BTV, teacher_BTV, beta)
    if beta == 0:
        return _alpha_beta_limit(teacher_BTV, student_BTV, alpha)
    both = alpha + beta
    teacher_term_BTV = (both * teacher_BTV).exp() / (beta * both)
    student_term_BTV = (both * student_BTV).exp() / (alpha * both)
    product_BTV = (alpha * teacher_BTV + beta * student_BTV).exp() / (alpha * beta)
    return (teacher_term_BTV + student_term_BTV - product_BTV).sum(-1)


@Comparison
def total_variation(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Half the sum of |teacher - student|: the most by which any event's probability differs.

    Returns [B, T] from 0 (exactly on equals) to 1; not nats.
    Source: Wen et al. 2023, arXiv:2307.15190, section 3.2.
    """
    return (teacher_BTV.exp() - student_BTV.exp()).abs().sum(-1) / 2


@Comparison
def sorted_earth_mover(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Sum of |p_(i) - q_(i)| over ranks i, each side sorted by itself: the shapes match, which token is which does not count.

    Returns [B, T] from 0 (on equals, and on permutations of them) to 2; not nats. Sorts both vocabularies.
    Source: Boizard et al. 2024 (Universal Logit Distillation), arXiv:2402.12030, section 3.
    """
    teacher_BTV = teacher_BTV.exp().sort(dim=-1, descending=True).values
    return (teacher_BTV - student_BTV.exp().sort(dim=-1, descending=True).values).abs().sum(-1)


@Comparison
def logit_mse(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Squared difference of the logits, averaged over the tokens that both can say.

    Both sides are centred first, since a constant added to logits says nothing. For temperatures T towards infinity,
    T^2 KL is half of it. Returns [B, T] in squared nats, >= 0, zero exactly on equals.
    Source: Ba and Caruana 2014, arXiv:1312.6184, section 2.1; Kim et al. 2021, arXiv:2105.08919. Centred: ours.
    """
    is_possible_BTV = torch.isfinite(student_BTV) & torch.isfinite(teacher_BTV)
    count_BT1 = is_possible_BTV.sum(-1, keepdim=True).clamp_min(1)
    gap_BTV = torch.where(is_possible_BTV, student_BTV - teacher_BTV, 0.0)
    centred_BTV = torch.where(is_possible_BTV, gap_BTV - gap_BTV.sum(-1, keepdim=True) / count_BT1, 0.0)
    return (centred_BTV.square().sum(-1, keepdim=True) / count_BT1).squeeze(-1)


def _kl(p_BTV: Tensor, q_BTV: Tensor) -> Tensor:
    """KL(p || q). What p never says costs nothing, whatever q says."""
    surplus_BTV = torch.where(p_BTV == -math.inf, 0.0, p_BTV - q_BTV)
    return (p_BTV.exp() * surplus_BTV).sum(-1)


def _mix(teacher_BTV: Tensor, student_BTV: Tensor, *, share: float) -> Tensor:
    """Log of share * teacher + (1 - share) * student."""
    student_BTV = student_BTV.clamp_min(_LEAST_LOG_PROB)
    return torch.logaddexp(teacher_BTV + math.log(share), student_BTV + math.log1p(-share))


def _alpha_beta_limit(p_BTV: Tensor, q_BTV: Tensor, power: float) -> Tensor:
    """Sum of p^a log(p^a / q^a) - p^a + q^a, over a^2: the alpha-beta divergence when the other exponent is 0."""
    scaled_p_BTV, scaled_q_BTV = power * p_BTV, power * q_BTV
    masses_BT = (scaled_q_BTV.exp() - scaled_p_BTV.exp()).sum(-1)
    return (_kl(scaled_p_BTV, scaled_q_BTV) + masses_BT) / power**2


def _require_skew(name: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"{name}: alpha must be at least 0 and below 1, got {alpha}")
