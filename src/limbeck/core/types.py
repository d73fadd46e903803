"""The types that cross borders between rooms, and the shape legend.

Shape suffixes, here and in every numerical file:
B batch, T tokens, P symbols of a patch, S patches, D model width, C inner channels, V vocabulary, H heads, K taps or
kept entries, N state, L layers; in the objectives N is the number of scored positions of a batch, flattened (or of one chunk of them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token rows ready for a model.

    input_ids_BT: token ids. loss_mask_BT: True where the token is a target that counts (position 0 and padding never
    do), so that logits at t-1 are scored against the token at t. document_ids_BT: which packed document a position
    belongs to, or None when a row is one stretch of text. position_ids_BT: positions which restart with each document,
    or None when `document_ids_BT` is. keys: the name in a target store of each row, when the rows come from one.
    sources: which of the recipe's texts each row was taken from.
    """

    input_ids_BT: Tensor
    loss_mask_BT: Tensor
    document_ids_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    keys: tuple[str, ...] | None = None
    sources: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.input_ids_BT.to(device),
            self.loss_mask_BT.to(device),
            move(self.document_ids_BT),
            move(self.position_ids_BT),
            self.keys,
            self.sources,
        )

    @property
    def target_count(self) -> int:
        """How many tokens are scored."""
        return int(self.loss_mask_BT[:, 1:].sum())


@dataclass(frozen=True)
class DenseTargets:
    """A teacher's whole distribution at every position, computed when it is asked for.

    hidden_BTD: what the head is fed. head: [N, D] to logits [N, V]; logits may carry any additive constant. Position t
    speaks of the token at t+1, as the student's own logits do.
    """

    hidden_BTD: Tensor
    head: Callable[[Tensor], Tensor]

    @classmethod
    def from_logits(cls, logits_BTV: Tensor) -> DenseTargets:
        """Targets whose logits exist already."""
        return cls(logits_BTV, _unchanged)


@dataclass(frozen=True)
class SparseTargets:
    """Some entries of a teacher's distribution at every position; position t speaks of the token at t+1.

    ids_BTK: token ids (int64), -1 in unused places. log_probs_BTK: the teacher's log-probabilities of them in nats at
    temperature 1 (float32), -inf in unused places. tail_log_prob_BT: log of the mass of all other tokens, -inf for
    none. weights_BTK: for *sampled* targets (arXiv:2503.16870), how much each id weighs in an unbiased estimate of a sum
    over the teacher's distribution, 0 in unused places; None for top-k targets.
    """

    ids_BTK: Tensor
    log_probs_BTK: Tensor
    tail_log_prob_BT: Tensor
    weights_BTK: Tensor | None = None


@dataclass(frozen=True)
class AlignedText:
    """What a teacher with another tokenizer says about the same text: the likelihood of stretches of it.

    A chunk is a stretch of text that begins and ends at a token border of both models. student_chunk_BT: number of the
    chunk that each student token belongs to, -1 for none (special tokens, padding, what the teacher did not see).
    chunk_log_prob_BC: the teacher's log-probability of each chunk given all text before it in its document, in nats;
    -inf never occurs. chunk_mask_BC: True where a chunk exists.
    student_position_BP, sorted_probs_BPK: positions t of the student at whose *end* the teacher has a token border too,
    and there the teacher's K largest next-token probabilities, descending (for ULD); -1 in unused places.
    """

    student_chunk_BT: Tensor
    chunk_log_prob_BC: Tensor
    chunk_mask_BC: Tensor
    student_position_BP: Tensor | None = None
    sorted_probs_BPK: Tensor | None = None

    def to(self, device: torch.device | str) -> AlignedText:
        """The same on another device."""
        parts = (
            self.student_chunk_BT, self.chunk_log_prob_BC, self.chunk_mask_BC, self.student_position_BP, self.sorted_probs_BPK,
        )  # fmt: skip
        return AlignedText(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Targets:
    """All that a teacher says about one batch; a live teacher, a served one and a store hand over the same.

    hidden: hidden states [B, T, D] by layer: 0 after the embeddings, i after block i (so L is the last). features: other
    tensors by name, such as attention maps [B, H, T, T]. weight_B: how much each row's teacher counts, when several teach.
    known_BT: True where the logits say something; None: everywhere. patch_tokens: for a student that reads bytes, the
    teacher's most probable patch contents where a patch begins (rows of `ByteTrie.paths_CP`); ids are -1 elsewhere.
    """

    logits: DenseTargets | SparseTargets | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)
    aligned: AlignedText | None = None
    weight_B: Tensor | None = None
    known_BT: Tensor | None = None
    patch_tokens: SparseTargets | None = None


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
