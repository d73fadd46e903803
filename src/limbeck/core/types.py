"""The types that cross borders between rooms, and the shape legend.

Shape suffixes, here and in every numerical file:
B batch, T tokens, D model width, C inner channels, V vocabulary, H heads, K taps or kept entries, N state, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token rows ready for a model.

    input_ids_BT: token ids. loss_mask_BT: True where the token is a target that counts (position 0 and padding never
    do), so that logits at t-1 are scored against the token at t. document_ids_BT: which packed document a position
    belongs to, or None when a row is one stretch of text. position_ids_BT: positions which restart with each document,
    or None when `document_ids_BT` is.
    """

    input_ids_BT: Tensor
    loss_mask_BT: Tensor
    document_ids_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.input_ids_BT.to(device),
            self.loss_mask_BT.to(device),
            move(self.document_ids_BT),
            move(self.position_ids_BT),
        )

    @property
    def target_count(self) -> int:
        """How many tokens are scored."""
        return int(self.loss_mask_BT[:, 1:].sum())
