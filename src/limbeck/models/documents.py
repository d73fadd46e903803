"""Rows that hold several documents: positions, masks, and any causal LM run so that they do not see each other.

transformers finds packed documents by itself where a family hands `position_ids` to its mask (OPT does not), and only
without a cache. Here the mask is made with the library's own mask functions and passed in, which works for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate


def document_positions(document_ids_BT: Tensor) -> Tensor:
    """Positions [B, T] that count from zero in every document. A document ends where the id changes."""
    index_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return index_T - torch.where(starts_BT, index_T, 0).cummax(dim=1).values


def documents_of_positions(position_ids_BT: Tensor) -> Tensor | None:
    """Document ids [B, T] of positions that restart, or None when no row holds two documents.

    While a graph is traced the ids are always returned, since looking at the values would break it.
    """
    starts_BT = torch.zeros_like(position_ids_BT)
    starts_BT[:, 1:] = (position_ids_BT.diff(dim=1) != 1).to(starts_BT.dtype)
    document_ids_BT = starts_BT.cumsum(dim=1)
    if not torch.compiler.is_compiling() and not bool((document_ids_BT[:, -1] > 0).any()):
        return None
    return document_ids_BT


def separate_padding(document_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
    """Document ids in which padding (mask 0) is a document of its own, so that no text sees it."""
    if attention_mask_BT is None:
        return document_ids_BT
    return torch.where(attention_mask_BT.to(torch.bool), document_ids_BT, document_ids_BT.min() - 1)


def packed_attention_mask(config: PreTrainedConfig, position_ids_BT: Tensor, *, dtype: torch.dtype) -> Any:
    """The attention mask of packed rows in the form the family's forward takes: one mask, or one per kind of layer.

    config: the family's own configuration. position_ids_BT: positions that restart with every document.
    """
    shape_only = torch.empty((*position_ids_BT.shape, 0), dtype=dtype, device=position_ids_BT.device)
    return create_masks_for_generate(
        config=config, inputs_embeds=shape_only, attention_mask=None, past_key_values=None, position_ids=position_ids_BT
    )


def packed_forward_kwargs(model: Any, document_ids_BT: Tensor) -> dict[str, Any]:
    """Keyword arguments that make a model keep packed documents apart.

    model: any causal LM of transformers, Limbeck's own included. document_ids_BT: integers that change where a
    document ends.
    """
    config = model.config
    positions_BT = document_positions(document_ids_BT)
    if getattr(config, "takes_document_ids", False):
        return {"position_ids": positions_BT, "document_ids": document_ids_BT, "use_cache": False}
    mask = packed_attention_mask(config, positions_BT, dtype=model.dtype)
    return {"position_ids": positions_BT, "attention_mask": mask, "use_cache": False}


def forward_packed(model: nn.Module, input_ids_BT: Tensor, document_ids_BT: Tensor | None, **kwargs: Any) -> Any:
    """Run a model without a cache on rows of one or more documents (None: each row is one stretch of text)."""
    if document_ids_BT is None:
        return model(input_ids=input_ids_BT, use_cache=False, **kwargs)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return model(input_ids=input_ids_BT, **packed_forward_kwargs(inner, document_ids_BT), **kwargs)
