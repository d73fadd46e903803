"""A Hyena layer written as what it is for given inputs: one matrix over tokens for each channel.

Quadratic in the length, so for comparing with attention maps on short windows, never for running a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.nn.hyena import HyenaOperator


def mixing_matrix(
    operator: HyenaOperator,
    hidden_BTD: Tensor,
    *,
    mask_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> Tensor:
    """M [B, C, T, T] with `operator(hidden) = out_proj(M v)`, v the short-convolved value stream; any order.

    Row t, column s: how much the value at s counts at t; zero for s > t, for masked s, and across documents. Gradients
    flow to the gates' projections and the filters. B C T^2 numbers: 604 MB in float32 for one row of 512 tokens and 576
    channels, and as much again for each round of the order beyond the first.
    Source: Poli et al. 2023, arXiv:2302.10866 (the operator as a product of diagonal and Toeplitz matrices).
    """
    length = hidden_BTD.shape[1]
    documents_BT = hidden_BTD.new_zeros(hidden_BTD.shape[:2]) if document_ids_BT is None else document_ids_BT
    streams_BMT = operator._convolve_short_within(operator._project(hidden_BTD, mask_BT), documents_BT)
    *gates, _value = streams_BMT.chunk(operator.order + 1, dim=1)
    same_B1TT = None if document_ids_BT is None else _same_run(document_ids_BT).unsqueeze(1)
    matrix_BCTT: Tensor | None = None
    for gate_BCT, long_filter, skip_C in zip(
        reversed(gates[1:]), operator._long_filters(), operator.skip_bias, strict=True
    ):
        toeplitz_CTT = _toeplitz(long_filter(length), skip_C, length)
        if mask_BT is not None:
            gate_BCT = gate_BCT * mask_BT.unsqueeze(1).to(gate_BCT.dtype)
        round_BCTT = toeplitz_CTT * gate_BCT.unsqueeze(-2)
        if same_B1TT is not None:
            round_BCTT = torch.where(same_B1TT, round_BCTT, 0.0)
        matrix_BCTT = round_BCTT if matrix_BCTT is None else round_BCTT @ matrix_BCTT
    assert matrix_BCTT is not None
    return gates[0].unsqueeze(-1) * matrix_BCTT


def _toeplitz(taps_CK: Tensor, skip_C: Tensor, length: int) -> Tensor:
    """The causal convolution with the taps, and the skip on the diagonal, as a matrix [C, T, T]."""
    kernel_CT = F.pad(taps_CK, (0, length - taps_CK.shape[-1]))
    lag_TT = torch.arange(length, device=kernel_CT.device)
    lag_TT = lag_TT.unsqueeze(-1) - lag_TT
    matrix_CTT = torch.where(lag_TT >= 0, kernel_CT[:, lag_TT.clamp_min(0)], 0.0)
    return matrix_CTT + torch.diag_embed(skip_C.to(kernel_CT.dtype).unsqueeze(-1).expand(-1, length))


def _same_run(document_ids_BT: Tensor) -> Tensor:
    run_BT = F.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0)).cumsum(1)
    return run_BT.unsqueeze(-1) == run_BT.unsqueeze(1)
