"""Running any causal LM on a batch of the data room."""

from __future__ import annotations

from typing import Any

from torch import nn

from limbeck.core.types import Batch
from limbeck.models.config import HybridConfig
from limbeck.models.documents import forward_packed


def forward_batch(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch without a cache. Packed documents do not see each other."""
    return forward_packed(model, batch.input_ids_BT, batch.document_ids_BT)


def without_head(model: Any) -> nn.Module:
    """The model less its language-model head where that can be run alone: alignment needs no logits."""
    if isinstance(model.config, HybridConfig):
        return model
    return getattr(model, "base_model", model)
