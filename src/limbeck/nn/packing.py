"""Rows that hold several documents: every document taken to a row of its own, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def document_buckets(document_ids_BT: Tensor) -> list[Tensor]:
    """Where the documents of packed rows lie, grouped by length.

    A document is a run of equal ids within a row. Each bucket holds the documents whose lengths round up to the same power of
    two, one a row, as positions b T + t of the flattened batch, padded on the right with B T; so at most half of a
    bucket is padding, however uneven the documents are. Every position is in exactly one bucket.
    """
    batch, length = document_ids_BT.shape
    total = batch * length
    begins_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first_N = begins_BT.flatten().nonzero().squeeze(-1)
    size_N = torch.diff(first_N, append=first_N.new_tensor([total]))
    level_N = torch.ceil(torch.log2(size_N.double())).long()
    buckets = []
    for level in level_N.unique().tolist():
        chosen_N = level_N == level
        longest = int(size_N[chosen_N].max())
        offset_P = torch.arange(longest, device=first_N.device)
        index_NP = first_N[chosen_N, None] + offset_P
        buckets.append(index_NP.masked_fill(offset_P >= size_N[chosen_N, None], total))
    return buckets


def each_document(mix: Callable[[Tensor], Tensor], hidden_BTD: Tensor, document_ids_BT: Tensor) -> Tensor:
    """What a causal `mix` of rows [N, P, D] makes of every document by itself, [B, T, D]. Gradients flow."""
    buckets = document_buckets(document_ids_BT)
    hidden_BDT = hidden_BTD.transpose(1, 2)
    rows = [mix(unpack_documents(hidden_BDT, index_NP).transpose(1, 2)).transpose(1, 2) for index_NP in buckets]
    batch, length = document_ids_BT.shape
    return repack_documents(rows, buckets, batch=batch, length=length).transpose(1, 2)


def unpack_documents(u_BCT: Tensor, index_NP: Tensor) -> Tensor:
    """The documents of one bucket as right-padded rows [N, C, P]; padding is zero. Gradients flow."""
    flat_CX = torch.nn.functional.pad(u_BCT.transpose(0, 1).flatten(1), (0, 1))
    return flat_CX[:, index_NP].transpose(0, 1)


def repack_documents(rows: list[Tensor], buckets: list[Tensor], *, batch: int, length: int) -> Tensor:
    """The inverse: put right-padded rows [N, C, P] of all buckets back in place, [B, C, T]. Gradients flow."""
    channels = rows[0].shape[1]
    values_CX = torch.cat([row_NCP.transpose(0, 1).flatten(1) for row_NCP in rows], dim=1)
    places_X = torch.cat([index_NP.flatten() for index_NP in buckets])
    flat_CX = values_CX.new_zeros(channels, batch * length + 1).index_copy(1, places_X, values_CX)
    return flat_CX[:, :-1].unflatten(1, (batch, length)).transpose(0, 1)
