"""Running any causal LM on a batch, packed documents kept apart."""

from __future__ import annotations

from typing import Any

from torch import nn

from limbeck.core.types import Batch


def forward_batch(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch without a cache. Packed documents do not see each other."""
    if batch.document_ids_BT is None:
        return model(input_ids=batch.input_ids_BT, use_cache=False)
    return model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
