"""A lesson is what one stage teaches: a student, its targets, and the loss between them.

A lesson is a module whose forward takes a batch and returns the *sum* of its loss over scored tokens, with each term's
sum beside it; the trainer divides by the count over the whole global batch, so that micro-batches and processes add up
to exactly one big batch. Teachers are held outside the module tree: they are never trained, saved or synchronised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from limbeck.core.types import Batch
from limbeck.models.packing import forward_batch, without_head
from limbeck.models.recording import recording
from limbeck.objectives.combine import logit_loss, normalised_squared_error

LossAndTerms = tuple[Tensor, dict[str, Tensor]]


class LogitLesson(nn.Module):
    """Learn from the teacher's distribution (`kl`), from the text (`ce`), or both. Without a teacher: plain training."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, *, kl: float, ce: float, temperature: float = 1.0
    ):
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self.kl, self.ce, self.temperature = kl, ce, temperature

    def count(self, batch: Batch) -> int:
        """Scored tokens in a batch."""
        return batch.target_count

    def forward(self, batch: Batch) -> LossAndTerms:
        """Sum of the weighted loss over scored tokens, and the sums of its terms."""
        teacher_logits_BTV = None
        if self.kl and self._teacher[0] is not None:
            with torch.no_grad():
                teacher_logits_BTV = forward_batch(self._teacher[0], batch).logits
        student_logits_BTV = forward_batch(self.student, batch).logits
        return logit_loss(
            student_logits_BTV, teacher_logits_BTV, batch.input_ids_BT, batch.loss_mask_BT,
            kl=self.kl, ce=self.ce, temperature=self.temperature,
        )  # fmt: skip


class AlignLesson(nn.Module):
    """Each replaced mixer learns to give what the teacher's attention gave: normalised squared error, layer by layer.

    inputs `teacher`: each mixer is fed the input that the teacher's attention had; layers are independent and one
    teacher pass trains all. inputs `student`: the student runs its own stream, so a mixer sees the errors of those
    before it; its loss still reaches its own parameters only.
    Source: arXiv:2401.17574 (transfer layer by layer); arXiv:2505.03005, step 1 (all layers at once). The error is
    divided by the target's mean square, so that late layers with large outputs do not drown the rest (our deviation).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_mixers: Mapping[int, nn.Module],
        teacher_mixers: Mapping[int, nn.Module],
        operators: Mapping[int, nn.Module],
        power: Mapping[int, float],
        layers: Sequence[int],
        inputs: str,
    ):
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self._student_mixers, self._teacher_mixers, self._operators = (
            dict(student_mixers),
            dict(teacher_mixers),
            dict(operators),
        )
        self.power, self.layers, self.inputs = dict(power), list(layers), inputs

    def count(self, batch: Batch) -> int:
        """All positions count: there is no padding in packed windows."""
        return batch.input_ids_BT.numel()

    def forward(self, batch: Batch) -> LossAndTerms:
        """Sum over layers and tokens of the normalised squared error, divided by the number of layers."""
        watched = {layer: self._teacher_mixers[layer] for layer in self.layers}
        with torch.no_grad(), recording(watched) as seen:
            forward_batch(without_head(self._teacher[0]), batch)
        if self.inputs == "teacher":
            outputs = {
                layer: self._operators[layer](seen.inputs[layer], document_ids_BT=batch.document_ids_BT)
                for layer in self.layers
            }
        else:
            own = {layer: self._student_mixers[layer] for layer in self.layers}
            with recording(own, detach_inputs=True) as answers:
                forward_batch(self.student, batch)
            outputs = answers.outputs
        errors = {
            layer: normalised_squared_error(outputs[layer], seen.outputs[layer], power=self.power[layer], mask_BT=None)
            for layer in self.layers
        }
        total = torch.stack(list(errors.values())).mean()
        return total, {f"nmse.{layer}": error.detach() for layer, error in errors.items()}


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model: its Dropout modules and the attention modules' own rates."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability  # type: ignore[assignment]
