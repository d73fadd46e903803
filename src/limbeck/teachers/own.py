"""The student as its own teacher: an average of its past weights, or the generation before."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from limbeck.core.errors import CheckpointError
from limbeck.core.types import Batch, Targets
from limbeck.teachers.base import Wanted
from limbeck.teachers.entries import Dense, Entries
from limbeck.teachers.live import LiveTeacher

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class _Copy:
    """A live teacher around a copy of the student, and the copy's state."""

    def __init__(self, student: nn.Module, *, name: str, entries: Entries, vocabulary_size: int | None):
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.name = name
        self._live = LiveTeacher(self.model, name=name, entries=entries, vocabulary_size=vocabulary_size)
        self.vocabulary_size: int = self._live.vocabulary_size

    def prepare(self, wanted: Wanted) -> None:
        """Say once what will be wanted; as `LiveTeacher.prepare`."""
        self._live.prepare(wanted)

    def targets(self, batch: Batch) -> Targets:
        """What the copy says about a batch; dense targets must be used before the next update."""
        return self._live.targets(batch)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold to continue, by name; not copies."""
        return dict(_state_of(self.model))

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a saved state. Raises: CheckpointError when it belongs to another model."""
        own = self.state_tensors()
        different = sorted(set(own) ^ set(tensors)) or [name for name in own if own[name].shape != tensors[name].shape]
        if different:
            raise CheckpointError(
                f"the checkpoint of {self.name} belongs to another student: it differs in {', '.join(different[:4])}."
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class EmaTeacher(_Copy):
    """An exponential moving average of the student's weights, in evaluation mode (mean teacher).

    decay: share of the average that an update keeps. Early updates keep less, min(decay, (1 + step) / (10 + step)), so that
    the start is soon forgotten. Weights of 16 bits are averaged in float32, where small steps are not lost to rounding.
    Source: arXiv:1703.01780, section 2; the rule for early steps is TensorFlow's ExponentialMovingAverage.

    Raises: ValueError unless 0 <= decay <= 1.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        decay: float,
        name: str = "the student's average",
        entries: Entries = Dense(),  # noqa: B008 (frozen)
        vocabulary_size: int | None = None,
    ):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it must be from 0 to 1")
        super().__init__(student, name=name, entries=entries, vocabulary_size=vocabulary_size)
        self.decay = decay
        self._precise = {
            name: parameter.float()
            for name, parameter in self.model.named_parameters()
            if parameter.dtype in _LOW_PRECISION
        }

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Take in the student as it is after update number `step`, counted from 1."""
        keep = min(self.decay, (1 + step) / (10 + step))
        theirs = dict(_state_of(student))
        for name, average in _state_of(self.model):
            new = theirs[name]
            if not average.is_floating_point():
                average.copy_(new)
            elif name in self._precise:
                average.copy_(self._precise[name].lerp_(new.float(), 1 - keep))
            else:
                average.lerp_(new.to(average), 1 - keep)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold to continue, by name; averages of 16-bit weights in float32. Not copies."""
        return super().state_tensors() | self._precise

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a saved state. Raises: CheckpointError when it belongs to another model."""
        super().load_state_tensors(tensors)
        for name, parameter in self.model.named_parameters():
            if name in self._precise:
                parameter.copy_(self._precise[name])


class PreviousGeneration(_Copy):
    """The student as it was: frozen when built, and again at every `advance` (born-again training).

    every: make a new generation each so many updates; None never does of itself.
    Source: arXiv:1805.04770; there a generation starts from fresh weights, which is up to the caller here.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        every: int | None = None,
        name: str = "the previous generation",
        entries: Entries = Dense(),  # noqa: B008 (frozen)
        vocabulary_size: int | None = None,
    ):
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; a generation is at least one update")
        super().__init__(student, name=name, entries=entries, vocabulary_size=vocabulary_size)
        self.every = every

    def update(self, student: nn.Module, step: int) -> None:
        """Told after each update, counted from 1; takes the student over when a generation has ended."""
        if self.every is not None and step % self.every == 0:
            self.advance(student)

    @torch.no_grad()
    def advance(self, student: nn.Module) -> None:
        """Begin a new generation: the student as it is now teaches from here on."""
        theirs = dict(_state_of(student))
        for name, tensor in _state_of(self.model):
            tensor.copy_(theirs[name])


def _state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once (tied ones under their first name) and every buffer that is saved."""
    saved = model.state_dict()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
