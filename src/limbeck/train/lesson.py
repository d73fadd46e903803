"""What every stage teaches through: the border between the loop and the losses.

A lesson is a module whose forward takes a batch and returns the *sum* of its loss over scored tokens, with each term's
sum beside it; the trainer divides by the count over the whole global batch, so that micro-batches and processes add up
to exactly one big batch. Teachers are held outside the module tree: they are never trained, saved or synchronised.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from limbeck.core.types import Batch

LossAndTerms = tuple[Tensor, dict[str, Tensor]]


class Lesson(nn.Module):
    """A student, its targets and the loss between them. Subclasses give `forward`; the rest may be left as it is.

    writes_rows: whether `prepare` puts other rows in the place of a batch's, so that tokens are counted after it.
    reaches_all: whether every trained parameter has a part in every loss; where not, processes have to find out which do.
    """

    writes_rows = False
    reaches_all = True

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def forward(self, batch: Batch) -> LossAndTerms:
        """Summed loss (a scalar with gradients) and each term's own sum."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """Tokens that the loss sums over."""
        return batch.target_count

    def begin_update(self, step: int, steps: int) -> None:
        """Called before each update: `step` of `steps` are done. Weights that change over the stage change here."""

    def prepare(self, batch: Batch) -> Batch:
        """The rows to learn from in the place of this process's rows of the batch."""
        return batch

    def end_update(self, step: int) -> None:
        """Called after each update: `step` are done."""

    def helpers(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters trained beside the student's that do not belong to it, by name."""
        return iter(())

    def networks(self) -> Iterator[nn.Module]:
        """All that runs when it is called, for counting operations: itself, and teachers outside the module tree."""
        yield self

    def state_tensors(self) -> dict[str, Tensor]:
        """What must be kept beside the student's weights to continue the stage exactly."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state_tensors` gave."""

    def diagnose(self, batch: Batch) -> dict[str, float]:
        """How the terms stand to each other on a few rows, for the log; nothing is trained."""
        return {}
