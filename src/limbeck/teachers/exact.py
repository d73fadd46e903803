"""A live teacher's predictions in the student's tokens, exactly, where the student's vocabulary allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from limbeck.core.types import Batch, DenseTargets, Targets
from limbeck.models.exact_likelihood import decompose, exact_targets, read_contexts
from limbeck.models.heads import SplitModel
from limbeck.models.token_bytes import read_token_bytes
from limbeck.teachers.base import Wanted, refuse_missing


class ExactTeacher:
    """Whole distributions over the student's tokens from a teacher with other ones, so that any loss on logits may be used.

    It can be done when the student reads single bytes, or its byte-level BPE has the first of the teacher's merges (see
    `models.exact_likelihood`). The teacher reads about one context for every token of the student: slow, and right.
    Positions whose distribution is not known (special tokens, characters cut by the window) are marked in `Targets.known_BT`.

    Raises: VocabularyError with the reason when the vocabularies do not allow it.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, student_tokenizer: Any, *, vocabulary_size: int, name: str = "teacher"
    ):
        self.model, self.name = model.eval(), name
        self.vocabulary_size: int | None = vocabulary_size
        self._rows = vocabulary_size
        self._split = SplitModel(model)
        self._decomposition = decompose(
            student_tokenizer, read_token_bytes(student_tokenizer), tokenizer, read_token_bytes(tokenizer)
        )

    def prepare(self, wanted: Wanted) -> None:
        """Say what will be wanted. Raises: TeacherError for all but logits."""
        refuse_missing(
            wanted, source=self.name, offers=("logits",),
            advice="Its hidden states stand at other tokens than the student's: use objectives on predictions.",
        )  # fmt: skip

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """The distribution over the student's next token at every position where it is known."""
        home = batch.input_ids_BT.device
        found = exact_targets(
            batch.to("cpu"), self._decomposition, lambda contexts: read_contexts(self._split, contexts),
            vocabulary_size=self._rows,
        )  # fmt: skip
        return Targets(DenseTargets.from_logits(found.log_prob_BTV.to(home)), known_BT=found.known_BT.to(home))
