"""The lesson of every logit, hidden-state and cross-tokenizer objective, alone or together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.types import AlignedText, Batch, Targets
from limbeck.models.features import FeatureRecorder, FeatureRecording, features_of, wanted_features
from limbeck.models.heads import SplitModel
from limbeck.models.layer_maps import LayerPair
from limbeck.models.projections import FeatureProjections
from limbeck.objectives.chunked import logit_terms
from limbeck.objectives.combine import scored_ids, scored_rows, scored_targets
from limbeck.objectives.cross_tokenizer import border_earth_movers, chunk_likelihood, chunk_log_probs, target_log_probs
from limbeck.objectives.features import FEATURE_OBJECTIVES, feature_loss, feature_positions
from limbeck.objectives.terms import LOGIT_OBJECTIVES, LogitTerm
from limbeck.teachers.base import TargetSource, Wanted, models_of
from limbeck.train.diagnostics import gradient_shares
from limbeck.train.lesson import Lesson, LossAndTerms

_DIAGNOSED = ("entropy.", "agreement")


@dataclass(frozen=True)
class Term:
    """One objective as a stage uses it. weight: of the share of the stage that is done, 0 to 1."""

    objective: str
    weight: Callable[[float], float] = lambda progress: 1.0
    temperature: float = 1.0
    missing: str = "tail"
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[LayerPair, ...] = ()

    @property
    def looks_at_features(self) -> bool:
        """Whether it compares hidden states and the like, not predictions."""
        return self.objective in FEATURE_OBJECTIVES


class DistilLesson(Lesson):
    """Learn a weighted sum of objectives from any teacher, or from the text alone.

    Everything is summed over scored positions: the logits at t-1, and the features there, where the token at t counts.
    The student's own features are recorded on the pass that gives its predictions.
    source: the teacher; None when every term learns from the text. It is prepared here for what the terms need.
    vocabulary_size: rows of the student's logits that stand for tokens. crosses_tokenizers: the source speaks of the text
    in other tokens than the student's.
    """

    def __init__(
        self, student: nn.Module, source: TargetSource | None, terms: Sequence[Term], *,
        projections: FeatureProjections | None = None, vocabulary_size: int | None = None, crosses_tokenizers: bool = False,
    ):  # fmt: skip
        super().__init__(student)
        self.terms = tuple(terms)
        self.projections = projections
        self._crosses = crosses_tokenizers
        self._source = (source,)
        self._split = (SplitModel(student, vocabulary_size=vocabulary_size),)
        self._progress = 0.0
        self._features = [term for term in self.terms if term.looks_at_features]
        # Hidden states and the like do not depend on the head, nor on the blocks above them.
        self.reaches_all = len(self._features) < len(self.terms)
        student_side, teacher_side = self._needed_features()
        self._recorder = (
            (FeatureRecorder(student, hidden=student_side[0], features=student_side[1]),) if self._features else ()
        )
        if source is not None:
            needs_logits = any(
                term.objective in LOGIT_OBJECTIVES and LOGIT_OBJECTIVES[term.objective].needs_targets and not self._is_crossed(term)
                for term in self.terms
            )  # fmt: skip
            aligned = any(self._is_crossed(term) for term in self.terms)
            source.prepare(Wanted(needs_logits, *teacher_side, aligned))
            self.needs_targets = needs_logits or aligned or bool(self._features)
        else:
            self.needs_targets = False

    def _needed_features(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        sides: list[tuple[Any, Any]] = []
        for side in (0, 1):
            hidden: set[int] = set()
            names: set[str] = set()
            for term in self._features:
                layers = [pair[side] for pair in term.pairs]
                found = wanted_features(FEATURE_OBJECTIVES[term.objective].needs, layers)
                hidden |= set(found[0])
                names |= set(found[1])
            sides.append((tuple(sorted(hidden)), tuple(sorted(names))))
        return sides[0], sides[1]

    def _is_crossed(self, term: Term) -> bool:
        return term.objective == "chunk_likelihood" or (term.objective == "sorted_earth_mover" and self._crosses)

    def begin_update(self, step: int, steps: int) -> None:
        """Set the weights that change over the stage."""
        self._progress = step / max(1, steps - 1)

    def helpers(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The projections between widths."""
        if self.projections is not None:
            yield from ((f"projections.{name}", p) for name, p in self.projections.named_parameters())

    def networks(self) -> Iterator[nn.Module]:
        """Student, projections, and the teacher's models, as far as they are in this process."""
        yield from (*super().networks(), *models_of(self._source[0]))

    def state_tensors(self) -> dict[str, Tensor]:
        """Projections, and whatever the teacher has to remember."""
        kept = {name: p.detach() for name, p in self.helpers()}
        remembered: dict[str, Tensor] = getattr(self._source[0], "state_tensors", dict)()
        return kept | {f"source.{name}": value for name, value in remembered.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up projections and the teacher's memory."""
        with torch.no_grad():
            for name, parameter in self.helpers():
                parameter.copy_(tensors[name])
        remembered = {name[7:]: value for name, value in tensors.items() if name.startswith("source.")}
        if remembered:
            self._source[0].load_state_tensors(remembered)  # type: ignore[union-attr]

    def end_update(self, step: int) -> None:
        """Let a teacher that follows the student move."""
        follow = getattr(self._source[0], "update", None)
        if follow is not None:
            follow(self.student, step)

    def forward(self, batch: Batch) -> LossAndTerms:
        """Sum of the weighted terms over scored positions, and each unweighted term's sum."""
        return self._losses(batch, {term.objective: term.weight(self._progress) for term in self.terms})

    def _losses(self, batch: Batch, weights: Mapping[str, float], *, diagnose: bool = False) -> LossAndTerms:
        source = self._source[0]
        targets = Targets()
        if source is not None and self.needs_targets:
            with torch.no_grad():
                targets = source.targets(batch)
        with self._recorder[0].recording() if self._recorder else nullcontext(FeatureRecording()) as own:
            hidden_BTD = self._split[0].hidden(batch)
        total, found = self._logit_losses(batch, hidden_BTD, targets, weights, diagnose)
        for term in self._features:
            loss = self._feature_loss(term, own, targets, batch)
            found[term.objective] = loss.detach()
            total = total + weights[term.objective] * loss
        return total, found

    def _logit_losses(
        self, batch: Batch, hidden_BTD: Tensor, targets: Targets, weights: Mapping[str, float], diagnose: bool
    ) -> LossAndTerms:
        terms = [
            LogitTerm(
                term.objective, weights[term.objective], term.objective, term.temperature, term.missing, term.options
            )
            for term in self.terms
            if not term.looks_at_features and not self._is_crossed(term)
        ]
        total = hidden_BTD.new_zeros((), dtype=torch.float32)
        found: dict[str, Tensor] = {}
        mask_BT = batch.loss_mask_BT
        if terms:
            total, found = logit_terms(
                scored_rows(hidden_BTD, mask_BT), self._split[0].head, scored_ids(batch.input_ids_BT, mask_BT),
                scored_targets(targets.logits, mask_BT), terms, head_parameters=self._split[0].head_parameters(),
                teacher_weight_N=_row_weights(targets, mask_BT), diagnose=diagnose,
            )  # fmt: skip
        for term in self.terms:
            if self._is_crossed(term):
                loss = self._aligned_loss(term, batch, hidden_BTD, targets.aligned)
                found[term.objective] = loss.detach()
                total = total + weights[term.objective] * loss
        return total, dict(found)

    def _aligned_loss(self, term: Term, batch: Batch, hidden_BTD: Tensor, aligned: AlignedText | None) -> Tensor:
        """Sum over chunks or common borders; like every term it is divided by the count of scored tokens."""
        assert aligned is not None
        head = self._split[0].head
        if term.objective == "sorted_earth_mover":
            assert aligned.student_position_BP is not None
            assert aligned.sorted_probs_BPK is not None
            row_N, place_N = (aligned.student_position_BP >= 0).nonzero(as_tuple=True)
            states_ND = hidden_BTD[row_N, aligned.student_position_BP[row_N, place_N]]
            return border_earth_movers(states_ND, head, aligned.sorted_probs_BPK[row_N, place_N]).sum()
        inside_BT = aligned.student_chunk_BT[:, 1:] >= 0
        token_BT = hidden_BTD.new_zeros(batch.input_ids_BT.shape, dtype=torch.float32)
        picked_N = target_log_probs(hidden_BTD[:, :-1][inside_BT], head, batch.input_ids_BT[:, 1:][inside_BT])
        token_BT = token_BT.index_put(
            (inside_BT.nonzero(as_tuple=True)[0], inside_BT.nonzero(as_tuple=True)[1] + 1), picked_N.float()
        )
        chunk_BC = chunk_log_probs(token_BT, aligned.student_chunk_BT, chunks=aligned.chunk_mask_BC.shape[1])
        temperature = term.options.get("coin_temperature") or math.inf
        return chunk_likelihood(
            chunk_BC, aligned.chunk_log_prob_BC, aligned.chunk_mask_BC, temperature=temperature
        ).sum()

    def _feature_loss(self, term: Term, own: FeatureRecording, targets: Targets, batch: Batch) -> Tensor:
        objective = FEATURE_OBJECTIVES[term.objective]
        mask_BT = feature_positions(batch.loss_mask_BT)
        losses = []
        for pair in term.pairs:
            mine: Any = features_of(own, objective.needs, pair[0])
            theirs: Any = features_of(targets, objective.needs, pair[1])
            if objective.needs_projection and self.projections is not None:
                mine = self.projections(mine, pair)
            losses.append(
                feature_loss(
                    term.objective, mine, theirs, mask_BT=mask_BT, document_ids_BT=batch.document_ids_BT,
                    options=term.options,
                ).sum()
            )  # fmt: skip
        return torch.stack(losses).mean()

    def diagnose(self, batch: Batch) -> dict[str, float]:
        """Gradient norm and share of every term on these rows, entropies, agreement. Costs a pass for each term."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        found: dict[str, float] = {}
        norms: dict[str, float] = {}
        count = max(1, self.count(batch))
        weights = {term.objective: term.weight(self._progress) for term in self.terms}
        was_training = self.student.training
        self.student.eval()
        for term in self.terms if len(self.terms) > 1 else ():
            alone = {name: weight if name == term.objective else 0.0 for name, weight in weights.items()}
            loss, values = self._losses(batch, alone, diagnose=True)
            gradients = torch.autograd.grad(loss / count, parameters, allow_unused=True)
            norms[term.objective] = float(torch.stack([g.float().norm() for g in gradients if g is not None]).norm())
            found |= {
                name: float(value) / count
                for name, value in values.items()
                if name.startswith(("entropy.", "agreement"))
            }
        if len(self.terms) == 1:
            with torch.no_grad():
                _, values = self._losses(batch, weights, diagnose=True)
            found = {name: float(value) / count for name, value in values.items() if name.startswith(_DIAGNOSED)}
        self.student.train(was_training)
        return (
            found
            | {f"gradient.{name}": norm for name, norm in norms.items()}
            | {f"share.{name}": share for name, share in gradient_shares(norms).items()}
        )


def _row_weights(targets: Targets, mask_BT: Tensor) -> Tensor | None:
    """What the teacher counts at each scored position: less where several teach, nothing where it does not know."""
    if targets.weight_B is None and targets.known_BT is None:
        return None
    weight_BT = torch.ones(mask_BT.shape, device=mask_BT.device)
    if targets.weight_B is not None:
        weight_BT = weight_BT * targets.weight_B.unsqueeze(1)
    if targets.known_BT is not None:
        weight_BT = weight_BT * targets.known_BT
    return scored_rows(weight_BT, mask_BT)
