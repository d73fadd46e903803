"""Lessons on what the student itself writes, so that it learns to go on from its own mistakes.

Text that the student wrote is no example to imitate: on such rows only the terms that ask a teacher count, and a
cross entropy among the terms is that of the rows of text. Each term is a mean over the tokens that it speaks of, so its
weight means the same whatever the share of written rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.core.runtime import world_size
from limbeck.core.types import Batch, DenseTargets
from limbeck.data.order import concatenate
from limbeck.models.heads import SplitModel
from limbeck.models.projections import FeatureProjections
from limbeck.objectives.chunked import logit_terms
from limbeck.objectives.combine import scored_ids, scored_rows
from limbeck.objectives.policy import approximate_credit, policy_gradient, step_values, unbiased_credit
from limbeck.objectives.terms import LogitTerm
from limbeck.teachers.base import TargetSource
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.lesson import LossAndTerms
from limbeck.train.rollouts import ReuseBuffer, RowWriter, Writing, replace_rows, select_rows, written_rows

_TEXT = "cross_entropy"
_POLICY = "reverse_kl"
HELDOUT_CHECKS = 20
"""How often in a stage an adaptive lesson looks at held-out text."""
_CREDITS = {"step": approximate_credit, "prefix": unbiased_credit}


class OnPolicyLesson(DistilLesson):
    """Any objectives, partly on rows that the student writes: generalised knowledge distillation.

    share: how likely each row is to be written anew by the student before an update; 0 never, 1 always. writing: how.
    The rows that are written and all that is drawn follow from torch's seed at `prepare`, so a resumed stage is the same.
    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, algorithm 1. Deviation: rows, not whole batches, are chosen.

    Raises: RecipeError when no term asks a teacher.
    """

    writes_rows = True

    def __init__(
        self,
        student: nn.Module,
        source: TargetSource | None,
        terms: Sequence[Term],
        *,
        writing: Writing,
        share: float,
        projections: FeatureProjections | None = None,
        vocabulary_size: int | None = None,
        crosses_tokenizers: bool = False,
    ):
        if source is None or all(term.objective == _TEXT for term in terms):
            raise RecipeError(
                "on_policy: the student learns nothing from its own writing unless a teacher speaks of it. Add an objective "
                "that compares with the teacher, such as jensen_shannon, or remove on_policy."
            )
        super().__init__(
            student, source, terms, projections=projections, vocabulary_size=vocabulary_size,
            crosses_tokenizers=crosses_tokenizers,
        )  # fmt: skip
        self.share = share
        self.writer = RowWriter(student, writing, vocabulary_size=self._split[0].vocabulary_size)
        self._has_text_term = any(term.objective == _TEXT for term in self.terms)
        self._all_by_text = self._all_by_written = 1.0

    def prepare(self, batch: Batch) -> Batch:
        """Let the student write some of the rows."""
        return self._counted(self.writer.write(batch, torch.rand(len(batch.input_ids_BT)) < self.share))

    def _counted(self, batch: Batch) -> Batch:
        """The batch as it is; how many of all processes' scored tokens are text and how many are written is kept."""
        is_written_B = written_rows(batch)
        tokens_B = batch.loss_mask_BT[:, 1:].sum(1)
        text, written = sum_over_processes(
            torch.stack([tokens_B[~is_written_B].sum(), tokens_B[is_written_B].sum()])
        ).tolist()
        self._all_by_text = (text + written) / text if text else 0.0
        self._all_by_written = (text + written) / written if written else 0.0
        return batch

    def _losses(self, batch: Batch, weights: Mapping[str, float], *, diagnose: bool = False) -> LossAndTerms:
        if not self._has_text_term:
            return super()._losses(batch, weights, diagnose=diagnose)
        is_written_B = written_rows(batch)
        parts = []
        for rows_B, scale in ((is_written_B, 0.0), (~is_written_B, self._all_by_text)):
            if bool(rows_B.any()):
                rows = batch if bool(rows_B.all()) else select_rows(batch, rows_B)
                loss, found = super()._losses(rows, {**weights, _TEXT: weights[_TEXT] * scale}, diagnose=diagnose)
                parts.append((loss, found | {_TEXT: found[_TEXT] * scale}))
        return _add(parts)


class AdaptiveLesson(OnPolicyLesson):
    """Rows of the student's own writing, some of them used again, and more of them only when they are needed.

    The share of such rows starts low and grows by `growth` whenever the held-out loss has risen by `tolerance_nats` above its
    lowest since it last grew: then the text alone no longer helps. Of the share, a part that falls from all to none over
    the stage is written anew, and the rest comes from the buffer of the last `buffer_rows` rows; until that is full all are
    written anew. heldout: text that is never trained on, the same for every process; its cross entropy is looked at
    `checks` times in the stage.
    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.2. Deviations: rows, not whole batches, are chosen, and
    the loss is compared with its lowest; the published code compares it with that at which the share last grew.
    """

    def __init__(
        self,
        student: nn.Module,
        source: TargetSource | None,
        terms: Sequence[Term],
        *,
        writing: Writing,
        heldout: Batch,
        buffer_rows: int = 1000,
        first_share: float = 0.0,
        growth: float = 0.1,
        tolerance_nats: float = 0.1,
        checks: int = HELDOUT_CHECKS,
        projections: FeatureProjections | None = None,
        vocabulary_size: int | None = None,
        crosses_tokenizers: bool = False,
    ):
        super().__init__(
            student, source, terms, writing=writing, share=first_share, projections=projections,
            vocabulary_size=vocabulary_size, crosses_tokenizers=crosses_tokenizers,
        )  # fmt: skip
        self.heldout, self.growth, self.tolerance_nats, self.checks = heldout, growth, tolerance_nats, checks
        self.buffer = ReuseBuffer(buffer_rows)
        self.lowest_nats = float("inf")

    def begin_update(self, step: int, steps: int) -> None:
        """Set what changes over the stage, and now and then look at the held-out loss."""
        super().begin_update(step, steps)
        if step % max(1, steps // self.checks) == 0:
            self.notice(self.heldout_loss())

    def notice(self, loss_nats: float) -> None:
        """Take in a held-out loss in nats a token: the share grows when it has risen."""
        if loss_nats >= self.lowest_nats + self.tolerance_nats:
            self.share = min(1.0, self.share + self.growth)
            self.lowest_nats = loss_nats
        self.lowest_nats = min(self.lowest_nats, loss_nats)

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Cross entropy of the held-out text, nats a token; the mean over processes, so that all decide alike."""
        was_training = self.student.training
        self.student.eval()
        loss = text_loss(self._split[0], self.heldout.to(self._split[0].input_device))
        self.student.train(was_training)
        return float(sum_over_processes(loss)) / world_size() / max(1, self.heldout.target_count)

    def prepare(self, batch: Batch) -> Batch:
        """Let the student write some of the rows, and take others that it wrote before."""
        draw_B = torch.rand(len(batch.input_ids_BT))
        fresh_below = self.share * (1 - self._progress) if self.buffer.is_full else self.share
        fresh_B = draw_B < fresh_below
        old_B = (draw_B < self.share) & ~fresh_B
        prepared = self.writer.write(batch, fresh_B)
        if bool(old_B.any()):
            prepared = replace_rows(prepared, old_B, *self.buffer.draw(int(old_B.sum())))
        self.buffer.add(prepared.input_ids_BT, prepared.loss_mask_BT, fresh_B)
        return self._counted(prepared)

    def state_tensors(self) -> dict[str, Tensor]:
        """What the terms remember, the buffer and the schedule."""
        schedule = torch.tensor([self.share, self.lowest_nats], dtype=torch.float64)
        return super().state_tensors() | self.buffer.state_tensors() | {"schedule": schedule}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take it up again."""
        super().load_state_tensors(tensors)
        if "schedule" in tensors:
            self.buffer.load_state_tensors(tensors)
            self.share, self.lowest_nats = tensors["schedule"].tolist()


class MiniLLMLesson(OnPolicyLesson):
    """Lower the reverse KL of what the student writes, as a whole, by policy gradient.

    terms: `reverse_kl`, and `cross_entropy` if the text is to be learned as well; both are means over tokens. Every row
    is written anew by the student with `teacher_share` of the teacher's distribution mixed in; the rows of text follow
    them where there is a cross entropy. weights: how importance weights make up for the mixing: "step" as in the paper,
    or "prefix", which is unbiased (see `approximate_credit` and `unbiased_credit` of `objectives.policy`).
    normalise_length: what comes after a token counts by its mean, as in the paper; no more the gradient of a divergence.
    baseline_decay: take off it a moving mean, with this decay, of what comes after tokens; None takes nothing off.
    The value of the loss is the mean reverse KL of a step; its gradient is the policy gradient.
    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, section 2 and algorithm 1. Deviations: rows are used for one update,
    so there is nothing to clip; the baseline is a moving mean, which leaves the gradient unbiased, where the published
    code whitens the rewards of a batch.

    Raises: RecipeError for other terms, a temperature of a term, a cut of the sampling distribution, or a teacher that
    cannot be sampled with.
    """

    def __init__(
        self,
        student: nn.Module,
        source: TargetSource | None,
        terms: Sequence[Term],
        *,
        writing: Writing,
        teacher_share: float = 0.2,
        weights: Literal["step", "prefix"] = "step",
        normalise_length: bool = True,
        baseline_decay: float | None = None,
        vocabulary_size: int | None = None,
    ):
        _check_policy_terms(terms)
        if writing.top_p < 1:
            raise RecipeError(
                f"on_policy.top_p: minillm weighs each token by how likely it was to be drawn, so none may be cut off; got "
                f"{writing.top_p}. Set it to 1, or lower the temperature."
            )
        teacher: Any = getattr(source, "model", None)
        if teacher_share and teacher is None:
            raise RecipeError(
                f"on_policy.teacher_share: the teacher {getattr(source, 'name', None)} is not one model in this process, so its "
                "distribution cannot be mixed in while the student writes. Set teacher_share to 0."
            )
        super().__init__(student, source, terms, writing=writing, share=1.0, vocabulary_size=vocabulary_size)
        self.writer.teacher, self.writer.teacher_share = teacher, teacher_share
        self.credit, self.normalise_length = _CREDITS[weights], normalise_length
        self.baseline_decay = baseline_decay
        self._baseline: float | None = None
        self._futures = torch.zeros(2, dtype=torch.float64)

    def prepare(self, batch: Batch) -> Batch:
        """Let the student write every row; the text comes after what is written if it is to be learned too."""
        written = self.writer.write(batch, torch.ones(len(batch.input_ids_BT), dtype=torch.bool))
        if not self._has_text_term:
            return self._counted(written)
        text = replace(batch, keys=batch.keys or ("",) * len(batch.input_ids_BT))
        both = concatenate([written, text])
        return self._counted(replace(both, sources=None if batch.sources is None else batch.sources * 2))

    def end_update(self, step: int) -> None:
        """Move the teacher, and the baseline by what this update has seen."""
        super().end_update(step)
        if self.baseline_decay is None:
            return
        total, count = sum_over_processes(self._futures, device=self._split[0].input_device).tolist()
        self._futures = torch.zeros_like(self._futures)
        mean = total / max(1, count)
        kept = self.baseline_decay if self._baseline is not None else 0.0
        self._baseline = kept * (self._baseline or 0.0) + (1 - kept) * mean

    def state_tensors(self) -> dict[str, Tensor]:
        """What the teacher remembers, and the baseline."""
        if self._baseline is None:
            return super().state_tensors()
        return super().state_tensors() | {"baseline": torch.tensor(self._baseline, dtype=torch.float64)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take it up again."""
        super().load_state_tensors(tensors)
        if "baseline" in tensors:
            self._baseline = float(tensors["baseline"])

    def _losses(self, batch: Batch, weights: Mapping[str, float], *, diagnose: bool = False) -> LossAndTerms:
        is_written_B = written_rows(batch)
        parts = []
        if bool(is_written_B.any()):
            loss, found = self._policy_loss(select_rows(batch, is_written_B), diagnose)
            found = {name: value * self._all_by_written for name, value in found.items()}
            parts.append((weights[_POLICY] * self._all_by_written * loss, found))
        if self._has_text_term and not bool(is_written_B.all()):
            loss = text_loss(self._split[0], select_rows(batch, ~is_written_B)) * self._all_by_text
            parts.append((weights[_TEXT] * loss, {_TEXT: loss.detach()}))
        nothing = {term.objective: batch.input_ids_BT.new_zeros((), dtype=torch.float32) for term in self.terms}
        total, found = _add(parts)
        return total, nothing | found

    def _policy_loss(self, batch: Batch, diagnose: bool) -> LossAndTerms:
        """Sum over written tokens of the loss whose gradient is the policy gradient."""
        split, mask_BT = self._split[0], batch.loss_mask_BT
        source = self._source[0]
        assert source is not None
        with torch.no_grad():
            teacher = source.targets(batch).logits
        if not isinstance(teacher, DenseTargets):
            raise RecipeError(
                "on_policy: minillm needs the teacher's whole distribution. Set teacher.targets to dense."
            )
        hidden_ND, ids_N = scored_rows(split.hidden(batch), mask_BT), scored_ids(batch.input_ids_BT, mask_BT)
        theirs = DenseTargets(scored_rows(teacher.hidden_BTD, mask_BT), teacher.head)
        values = step_values(
            hidden_ND, split.head, theirs.hidden_BTD, theirs.head, ids_N,
            teacher_share=self.writer.teacher_share, temperature=self.writer.writing.temperature,
        )  # fmt: skip
        written_BT = mask_BT[:, 1:]
        divergence_BT, student_BT, teacher_BT, sampler_BT = (_spread(value_N, written_BT) for value_N in values)
        credit = self.credit(
            student_BT, teacher_BT, sampler_BT, written_BT,
            normalise_length=self.normalise_length, baseline_nats=self._baseline or 0.0,
        )  # fmt: skip
        loss = policy_gradient(divergence_BT, student_BT, credit)[written_BT].sum()
        found = {_POLICY: loss.detach()}
        if diagnose:
            found |= _diagnosis(split, hidden_ND.detach(), ids_N, theirs)
        else:
            future_N = credit.future_BT[written_BT].cpu().double()
            self._futures += torch.stack([future_N.sum(), torch.tensor(float(len(future_N)), dtype=torch.float64)])
        return loss, found


def _check_policy_terms(terms: Sequence[Term]) -> None:
    names = [term.objective for term in terms]
    others = sorted(set(names) - {_POLICY, _TEXT})
    if others or _POLICY not in names:
        raise RecipeError(
            f"on_policy: minillm lowers the reverse KL of what the student writes. Its objectives are {_POLICY} and, if the text "
            f"is to be learned too, {_TEXT}; got {', '.join(names)}."
        )
    for term in terms:
        if term.temperature != 1 or term.options:
            raise RecipeError(
                f"on_policy: with minillm, {term.objective} has neither temperature nor options; on_policy.temperature is "
                "that of the sampling. Remove them."
            )


def _spread(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values of the True places of a mask, in their places; 0 elsewhere."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


@torch.no_grad()
def _diagnosis(split: SplitModel, hidden_ND: Tensor, ids_N: Tensor, targets: DenseTargets) -> dict[str, Tensor]:
    """Entropies and agreement on the written tokens."""
    terms = [LogitTerm(_POLICY, 0.0, _POLICY)]
    _, found = logit_terms(hidden_ND, split.head, ids_N, targets, terms, diagnose=True)
    return {name: value for name, value in found.items() if name != _POLICY}


def text_loss(split: SplitModel, batch: Batch) -> Tensor:
    """Summed cross entropy of the scored tokens of rows of text."""
    mask_BT = batch.loss_mask_BT
    total, _ = logit_terms(
        scored_rows(split.hidden(batch), mask_BT), split.head, scored_ids(batch.input_ids_BT, mask_BT), None,
        [LogitTerm(_TEXT, 1.0, _TEXT)], head_parameters=split.head_parameters(),
    )  # fmt: skip
    return total


def sum_over_processes(values: Tensor, *, device: torch.device | None = None) -> Tensor:
    """The sum of all processes' values. device: where they can be sent from, if not where they are."""
    if world_size() > 1:
        values = values.detach().to(device or values.device, copy=True)
        torch.distributed.all_reduce(values)
    return values


def _add(parts: Sequence[LossAndTerms]) -> LossAndTerms:
    """Losses and their terms summed."""
    found: dict[str, Tensor] = {}
    for _, terms in parts:
        for name, value in terms.items():
            found[name] = found[name] + value if name in found else value
    return torch.stack([loss for loss, _ in parts]).sum(), found
