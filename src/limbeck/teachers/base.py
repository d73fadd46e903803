"""The one interface of all teachers: say once what is wanted, then ask batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from limbeck.core.errors import TeacherError
from limbeck.core.types import Batch, Targets


@dataclass(frozen=True)
class Wanted:
    """What a lesson asks of its teacher.

    logits: the distribution over the next token. hidden: layers whose hidden states are wanted (0 after the embeddings,
    i after block i). features: names of other tensors, as `Targets.features` has them. aligned: likelihoods of
    stretches of text, for a teacher with another tokenizer.
    """

    logits: bool = True
    hidden: tuple[int, ...] = ()
    features: tuple[str, ...] = ()
    aligned: bool = False

    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are wanted: of "logits", "hidden", "features" and "aligned"."""
        return tuple(name for name in ("logits", "hidden", "features", "aligned") if getattr(self, name))


@runtime_checkable
class TargetSource(Protocol):
    """Anything that teaches: a live model, several, a served one, a store, the student's own past.

    name: for messages and reports. vocabulary_size: token ids of its logits are below it; None when it gives none.
    A source is never part of the student's module tree: it is neither trained nor saved nor synchronised with it.
    """

    @property
    def name(self) -> str:
        """What messages and reports call this teacher."""
        ...

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids of the logits are below this; None when the source gives no logits."""
        ...

    def prepare(self, wanted: Wanted) -> None:
        """Say once, before the first batch, what will be wanted.

        Raises: TeacherError when the source cannot give it.
        """
        ...

    def targets(self, batch: Batch) -> Targets:
        """What the teacher says about a batch, on the batch's device and without gradients."""
        ...


def models_of(source: TargetSource | None) -> Iterator[nn.Module]:
    """The models that a source asks in this process; none of a store, or of an endpoint."""
    model = getattr(source, "model", None)
    if isinstance(model, nn.Module):
        yield model
    for member in getattr(source, "teachers", ()):
        yield from models_of(member)


def refuse_missing(wanted: Wanted, *, source: str, offers: Collection[str], advice: str) -> None:
    """Refuse what a source does not offer.

    offers: of the names in `Wanted.parts`. advice: what to do instead, a sentence. Raises: TeacherError.
    """
    missing = [part for part in wanted.parts() if part not in offers]
    if missing:
        raise TeacherError(
            f"the teacher {source} gives {', '.join(sorted(offers)) or 'nothing'}, but the objectives also ask for "
            f"{', '.join(missing)}. {advice}"
        )
