"""What may mix the positions of a trunk beside attention: anything causal that can read on from a state. By name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.nn.hyena import HyenaOperator

ATTENTION = "attention"


class StatefulMixer(Protocol):
    """A module that mixes the positions of rows causally: in one pass, or reading on from a state.

    It is made as `cls(width, **options)`. out_proj: the linear map that it ends with, which a trunk makes smaller, or
    zero, at the start (`TrunkSettings.zero_init`). A trunk may run one mixer several times over, each run with states of
    its own: what is remembered of a text belongs into the state, never into the module.
    """

    out_proj: nn.Linear

    def __call__(self, hidden_BTD: Tensor, *, document_ids_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]; position t sees 0..t of its row. Gradients flow.

        document_ids_BT: runs of equal ids are documents, each mixed as if it were alone (`nn.packing.each_document`).
        """
        ...

    def init_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The state of so many rows that have read nothing. Its `clone()` shares no memory with it; a tensor will do."""
        ...

    def advance(self, hidden_BTD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read T more positions after `state`, which may be used up: their outputs, and the state after them.

        Any split of a row into calls gives what one pass gives. Gradients flow through these positions, not into the past.
        """
        ...

    def flops_per_token(self, context_tokens: float) -> float:
        """Operations of one pass over so many positions, divided by their number: as in `nn.flops`, matrices included."""
        ...


MIXERS: dict[str, Callable[..., StatefulMixer]] = {
    "hyena": HyenaOperator,
}
