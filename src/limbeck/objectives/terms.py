"""The terms of a loss on next-token distributions: what each objective is, and how it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import RecipeError, unknown_name
from limbeck.core.types import SparseTargets
from limbeck.objectives.divergences import log_probs
from limbeck.objectives.sparse import COMPARISONS, MISSING, sparse_divergence


@dataclass(frozen=True)
class LogitObjective:
    """What is known of an objective on next-token distributions.

    is_divergence: zero on equals; such a term is multiplied by temperature**2. needs_targets: it looks at a teacher, not
    at the text alone. options: its own options with their defaults.
    """

    description: str
    source: str
    is_divergence: bool = True
    needs_targets: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def _of(name: str, description: str, source: str, *, is_divergence: bool = True) -> LogitObjective:
    return LogitObjective(description, source, is_divergence, options=COMPARISONS[name].options)


LOGIT_OBJECTIVES: dict[str, LogitObjective] = {
    "cross_entropy": LogitObjective(
        "negative log-likelihood of the text itself", "Shannon 1948", is_divergence=False, needs_targets=False
    ),
    "forward_kl": _of("forward_kl", "KL(teacher || student): cover all that the teacher says", "arXiv:1503.02531"),
    "reverse_kl": _of("reverse_kl", "KL(student || teacher): say nothing that the teacher would not", "arXiv:2306.08543"),
    "symmetric_kl": _of("symmetric_kl", "mean of forward and reverse KL", "Jeffreys 1946"),
    "jensen_shannon": _of("jensen_shannon", "generalised Jensen-Shannon: both to their mixture", "arXiv:2306.13649"),
    "skewed_forward_kl": _of(
        "skewed_forward_kl", "forward KL to a student mixed with some of the teacher", "arXiv:2402.03898"
    ),
    "skewed_reverse_kl": _of(
        "skewed_reverse_kl", "reverse KL to a teacher mixed with some of the student", "arXiv:2402.03898"
    ),
    "adaptive_kl": _of(
        "adaptive_kl", "forward and reverse KL, weighed by whether the student errs in the head or the tail",
        "arXiv:2404.02657",
    ),
    "alpha_beta": _of("alpha_beta", "alpha-beta divergence, with both KLs at its corners", "arXiv:2505.04560"),
    "total_variation": _of("total_variation", "half the sum of absolute differences", "arXiv:2307.15190"),
    "sorted_earth_mover": _of(
        "sorted_earth_mover", "distance of the sorted probabilities, whichever tokens have them", "arXiv:2402.12030"
    ),
    "logit_mse": _of("logit_mse", "mean squared error of centred logits", "arXiv:2105.08919"),
    "hinge": _of(
        "hinge", "the teacher's likeliest tokens keep their order by a margin", "Weston and Watkins 1999",
        is_divergence=False,
    ),
    "logistic_ranking": _of(
        "logistic_ranking", "the teacher's likeliest tokens keep their order, softly", "Burges et al. 2005",
        is_divergence=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LogitTerm:
    """One term: an objective of `LOGIT_OBJECTIVES`, its weight and its settings. `name` is what its sum is called.

    missing: what becomes of the mass that sparse targets leave out (see `sparse`). options: the objective's own.

    Raises: RecipeError for a name, option or value that cannot be.
    """

    name: str
    weight: float
    objective: str
    temperature: float = 1.0
    missing: str = "tail"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.objective not in LOGIT_OBJECTIVES:
            raise RecipeError(unknown_name("objective", self.objective, LOGIT_OBJECTIVES))
        if self.missing not in MISSING:
            raise RecipeError(unknown_name("way to treat missing mass", self.missing, MISSING))
        if not self.temperature > 0:
            raise RecipeError(f"{self.objective}: temperature must be above 0, got {self.temperature}")
        known = self.about.options
        for option in self.options:
            if option not in known:
                raise RecipeError(unknown_name(f"option of {self.objective}", option, known))
        if self.about.needs_targets:
            _try_options(self.objective, self.options)

    @property
    def about(self) -> LogitObjective:
        """What is known of its objective."""
        return LOGIT_OBJECTIVES[self.objective]

    @property
    def factor(self) -> float:
        """What its sum is multiplied by in the total: the weight, and temperature**2 for a divergence.

        The gradient of a softened divergence shrinks with the square of the temperature; this keeps its size.
        Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
        """
        return self.weight * (self.temperature**2 if self.about.is_divergence else 1.0)


def term_values(
    terms: Sequence[LogitTerm],
    student_logits_NV: Tensor,
    *,
    target_ids_N: Tensor,
    teacher: Tensor | SparseTargets | None,
) -> list[Tensor]:
    """Each term's value at every position, [N], without weight or temperature**2.

    teacher: its logits [N, V], or sparse targets [N, K]. Softened distributions that terms have in common are computed
    once. Gradients flow to the student.

    Raises: ValueError when a term needs a teacher and there is none.
    """
    student: dict[float, Tensor] = {}
    dense: dict[float, Tensor] = {}

    def value(term: LogitTerm) -> Tensor:
        heat = term.temperature
        if term.about.needs_targets and teacher is None:
            raise ValueError(
                f"the term {term.name} ({term.objective}) needs what a teacher says, and there is no teacher"
            )
        if isinstance(teacher, SparseTargets) and term.about.needs_targets:
            return sparse_divergence(
                term.objective, student_logits_NV, teacher, temperature=heat, missing=term.missing, options=term.options
            )
        if heat not in student:
            student[heat] = log_probs(student_logits_NV, heat)
        if not term.about.needs_targets:
            return F.nll_loss(student[heat], target_ids_N, reduction="none")
        if heat not in dense:
            assert isinstance(teacher, Tensor)
            dense[heat] = log_probs(teacher.detach(), heat)
        return COMPARISONS[term.objective].of_log_probs(student[heat], dense[heat], **term.options)

    return [value(term) for term in terms]


def _try_options(objective: str, options: Mapping[str, Any]) -> None:
    """Compare two distributions of two tokens, so that a value out of range is found before training."""
    example = torch.tensor([[0.5, 0.5]]).log()
    try:
        COMPARISONS[objective].of_log_probs(example, example, **options)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
