"""Lessons in imitation of layers, and plain settings of a model in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from limbeck.core.types import Batch
from limbeck.models.packing import forward_batch, without_head
from limbeck.models.recording import recording
from limbeck.objectives.combine import normalised_squared_error
from limbeck.train.lesson import Lesson, LossAndTerms


class AlignLesson(Lesson):
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
        super().__init__(student)
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
