"""Lessons in imitation of layers, and plain settings of a model in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from limbeck.core.errors import RecipeError, unknown_name
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

    def networks(self) -> Iterator[nn.Module]:
        """Student and teacher."""
        yield from (*super().networks(), *self._teacher)

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


Course = Literal["constant", "linear", "triangular"]


@dataclass(frozen=True)
class DropoutSchedule:
    """How dropout goes over a stage.

    constant: `start` all the time. linear: from `start` at the first update to `end` at the last. triangular: from `start`
    to `end` and back, `cycles` times. Rates lie in 0 <= rate < 1.
    Source: arXiv:2409.05423 (early dropout, and dropout for repeated data, in small language models). Deviation: the
    course is counted over the stage, not between given iterations.

    Raises: RecipeError when there is no such kind, or no such rate or number of cycles.
    """

    kind: Course = "linear"
    start: float = 0.0
    end: float = 0.0
    cycles: int = 4

    def __post_init__(self) -> None:
        if self.kind not in get_args(Course):
            raise RecipeError(f"dropout: {unknown_name('kind', self.kind, get_args(Course))}")
        if not (0 <= self.start < 1 and 0 <= self.end < 1 and self.cycles >= 1):
            raise RecipeError(
                f"dropout goes from {self.start} to {self.end} in {self.cycles} cycles: expected rates of at least 0 and "
                "below 1, and a cycle at least."
            )

    def rate(self, step: int, steps: int) -> float:
        """Dropout for update number `step` (from 0) of `steps`."""
        if self.kind == "constant":
            return self.start
        way = step / max(1, steps - 1)
        if self.kind == "triangular":
            way = 1 - abs(2 * (way * self.cycles % 1) - 1)
        return self.start + (self.end - self.start) * way


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model: its Dropout modules and the attention modules' own rates."""
    for module, name in _dropouts(model):
        setattr(module, name, probability)


@contextmanager
def dropout_put_back(model: nn.Module) -> Iterator[None]:
    """Give every dropout of a model its own rate again on leaving, whatever it was set to meanwhile."""
    own = [(module, name, getattr(module, name)) for module, name in _dropouts(model)]
    try:
        yield
    finally:
        for module, name, rate in own:
            setattr(module, name, rate)


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        elif isinstance(getattr(module, "attention_dropout", None), float):
            yield module, "attention_dropout"
