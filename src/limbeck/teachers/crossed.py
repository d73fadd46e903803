"""A live teacher for students with another tokenizer: it reads the same text and tells how likely stretches of it are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.types import Batch, Targets
from limbeck.models.alignment import Alignment, align_batch
from limbeck.models.heads import SplitModel
from limbeck.models.token_bytes import read_token_bytes
from limbeck.objectives.cross_tokenizer import target_log_probs
from limbeck.teachers.base import Wanted, refuse_missing

_BORDER_ROWS = 512


class CrossTokenizerTeacher:
    """Likelihoods of chunks (for ALM), and sorted probabilities at common borders (for ULD).

    model, tokenizer: the teacher's. student_tokenizer: that of the batches. sorted_probs: how many of the largest
    probabilities are handed over at each common border; 0 for none.

    Raises: VocabularyError when either tokenizer hides the bytes of its tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        student_tokenizer: Any,
        *,
        name: str = "teacher",
        sorted_probs: int = 128,
    ):
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self._student, self._teacher = read_token_bytes(student_tokenizer), read_token_bytes(tokenizer)
        self._split = SplitModel(model)
        self._sorted_probs = min(sorted_probs, self._split.vocabulary_size)
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]

    @property
    def vocabulary_size(self) -> int | None:
        """None: its token ids are not the student's."""
        return None

    def prepare(self, wanted: Wanted) -> None:
        """Say what will be wanted. Raises: TeacherError for all but likelihoods of stretches of text."""
        refuse_missing(
            wanted, source=self.name, offers=("aligned",),
            advice="Its tokens are others than the student's: use chunk_likelihood or sorted_earth_mover.",
        )  # fmt: skip

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """What the teacher makes of the batch's text."""
        home = batch.input_ids_BT.device
        alignment = align_batch(batch.to("cpu"), self._student, self.tokenizer, self._teacher, limit_tokens=self._limit)
        rows = alignment.teacher_batch.to(self._split.input_device)
        hidden_BUD = self._split.hidden(rows)
        log_probs_BU = self._token_log_probs(hidden_BUD, rows).to("cpu")
        aligned = alignment.finish(log_probs_BU, self._border_probs(hidden_BUD, alignment))
        return Targets(aligned=aligned.to(home))

    def _token_log_probs(self, hidden_BUD: Tensor, rows: Batch) -> Tensor:
        wanted_BU = rows.loss_mask_BT[:, 1:]
        found_BU = hidden_BUD.new_zeros(rows.input_ids_BT.shape, dtype=torch.float32)
        found_BU[:, 1:][wanted_BU] = target_log_probs(
            hidden_BUD[:, :-1][wanted_BU], self._split.head, rows.input_ids_BT[:, 1:][wanted_BU]
        ).float()
        return found_BU

    def _border_probs(self, hidden_BUD: Tensor, alignment: Alignment) -> Tensor | None:
        if not self._sorted_probs:
            return None
        position_BP = alignment.teacher_position_BP
        used_BP = position_BP >= 0
        found_BPK = torch.zeros(*position_BP.shape, self._sorted_probs)
        row_N, place_N = used_BP.nonzero(as_tuple=True)
        states_ND = hidden_BUD[row_N.to(hidden_BUD.device), position_BP[row_N, place_N].to(hidden_BUD.device)]
        parts = [
            self._split.head(part).float().softmax(-1).topk(self._sorted_probs, dim=-1).values.cpu()
            for part in states_ND.split(_BORDER_ROWS)
        ]
        if parts:
            found_BPK[row_N, place_N] = torch.cat(parts)
        return found_BPK
