"""What surrounds the long convolutions of a Hyena operator, a block of tokens at a time, for long prompts on a processor.

A block's projections stay in the cache until they are convolved and gated, and what must be kept is written once. No
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

# Prompts from LONG_PROMPT tokens on go by blocks. Width 192, two threads of an AVX-512 CPU, ms a layer, whole (by
# blocks): 512 tokens 2.7 (2.7), 1024 7 (4.4), 4096 21 (14), 16,384 96 (54). Of the blocks' own part at 16,384 tokens:
# blocks of 768 tokens 26, of 2048 24.5; with rows that begin at a cache line (16 floats) 23.7.
LONG_PROMPT, TOKEN_BLOCK, CACHE_LINE = 1024, 2048, 16

# Writes the projections of a row's tokens into [M, P].
Project = Callable[[int, slice, Tensor], object]


def pays(hidden_BTD: Tensor) -> bool:
    """Whether to go by blocks."""
    is_plain_call = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return is_plain_call and hidden_BTD.device.type == "cpu" and hidden_BTD.shape[1] >= LONG_PROMPT


def projector(linear: nn.Module, hidden_BTD: Tensor) -> tuple[Project, torch.dtype]:
    """How to get a linear map's outputs for some tokens with channels first, and their dtype.

    A module that is more than torch's Linear (quantised, adapted, hooked) is called once, on the whole.
    """
    if is_bare(linear, hidden_BTD):
        return lambda row, tokens, out_MP: _affine(linear, hidden_BTD[row, tokens], out_MP), hidden_BTD.dtype
    whole_BTM = linear(hidden_BTD)
    return lambda row, tokens, out_MP: out_MP.copy_(whole_BTM[row, tokens].T), whole_BTM.dtype


def is_bare(linear: nn.Module, input: Tensor) -> TypeGuard[nn.Linear]:
    """Whether a module called on this input does what its weight and bias say and nothing else."""
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    return linear.weight.dtype == input.dtype and not torch.is_autocast_enabled(input.device.type)


def _affine(linear: nn.Linear, hidden_PD: Tensor, out_MP: Tensor) -> Tensor:
    if linear.bias is None:
        return torch.mm(linear.weight, hidden_PD.T, out=out_MP)
    return torch.addmm(linear.bias.unsqueeze(-1), linear.weight, hidden_PD.T, out=out_MP)


def _blocks(batch: int, length: int) -> Iterator[tuple[int, slice]]:
    for row in range(batch):
        for low in range(0, length, TOKEN_BLOCK):
            yield row, slice(low, min(low + TOKEN_BLOCK, length))


def gated_streams(
    project: Project, context_BMK: Tensor, weight_MK: Tensor, bias_M: Tensor, *, order: int, mask_BT: Tensor | None,
    length: int,
) -> list[Tensor]:  # fmt: skip
    """Project and convolve with short taps: the gates x^0..x^{N-2}, then v x^{N-1}, all [B, C, T].

    `context_BMK`: the K - 1 projections before these; overwritten with the last K - 1.
    """
    batch, streams, reach = context_BMK.shape
    channels = streams // (order + 1)
    # One buffer rather than `order`: the allocator gives its memory to the next layer instead of back to the system.
    kept = list(context_BMK.new_empty(order, batch, channels, length))
    lead = -(-reach // CACHE_LINE) * CACHE_LINE
    window_MX = context_BMK.new_empty(streams, lead + TOKEN_BLOCK)[:, lead - reach :]
    gate_CP = context_BMK.new_empty(channels, TOKEN_BLOCK)
    for row, tokens in _blocks(batch, length):
        count = tokens.stop - tokens.start
        fresh_MP = window_MX[:, reach : reach + count]
        window_MX[:, :reach] = context_BMK[row]
        project(row, tokens, fresh_MP)
        if mask_BT is not None:
            fresh_MP.mul_(mask_BT[row, tokens].to(fresh_MP.dtype))
        outputs = [whole_BCT[row, :, tokens] for whole_BCT in kept]
        for index, out_CP in enumerate((*outputs[:-1], gate_CP[:, :count], outputs[-1])):
            own = slice(index * channels, (index + 1) * channels)
            _convolve_short(window_MX[own, : reach + count], weight_MK[own], bias_M[own], out_CP)
        outputs[-1].mul_(gate_CP[:, :count])
        context_BMK[row] = window_MX[:, count : count + reach]
    return kept


def _convolve_short(window_CX: Tensor, weight_CK: Tensor, bias_C: Tensor, out_CP: Tensor) -> None:
    count = out_CP.shape[1]
    torch.addcmul(bias_C.unsqueeze(-1), window_CX[:, :count], weight_CK[:, :1], out=out_CP)
    for tap in range(1, weight_CK.shape[1]):
        out_CP.addcmul_(window_CX[:, tap : tap + count], weight_CK[:, tap, None])


def project_gated(linear: nn.Module, value_BCT: Tensor, gate_BCT: Tensor) -> Tensor:
    """The linear map of v x^0: [B, T, D]. `value_BCT` is used up."""
    batch, channels, length = value_BCT.shape
    if not is_bare(linear, value_BCT):
        return linear(value_BCT.mul_(gate_BCT).transpose(1, 2))
    out_BTD = value_BCT.new_empty(batch, length, linear.out_features)
    gated_CP = value_BCT.new_empty(channels, TOKEN_BLOCK)
    for row, tokens in _blocks(batch, length):
        block_CP = gated_CP[:, : tokens.stop - tokens.start]
        torch.mul(value_BCT[row, :, tokens], gate_BCT[row, :, tokens], out=block_CP)
        if linear.bias is None:
            torch.mm(block_CP.T, linear.weight.T, out=out_BTD[row, tokens])
        else:
            torch.addmm(linear.bias, block_CP.T, linear.weight.T, out=out_BTD[row, tokens])
    return out_BTD
