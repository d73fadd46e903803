"""Arithmetic of damped complex exponentials lambda_n = exp(-rate_n + i angle_n)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def damped_waves(rate_CN: Tensor, angle_CN: Tensor, *, start: int = 0, step: int = 1, count: int) -> Tensor:
    """lambda^e for e = start, start + step, ...: complex [C, N, count]. Gradients flow to rates and angles.

    Phases are reduced to one turn in float64: at lag 10^4 a float32 phase is wrong by a thousandth of a turn.
    """
    wide = torch.float32 if rate_CN.device.type == "mps" else torch.float64
    exponent_E = torch.arange(start, start + step * count, step, device=rate_CN.device, dtype=wide)
    phase_CNE = torch.remainder(angle_CN.to(wide).unsqueeze(-1) * exponent_E, 2 * math.pi).to(angle_CN.dtype)
    magnitude_CNE = torch.exp(-rate_CN.unsqueeze(-1) * exponent_E.to(rate_CN.dtype))
    return torch.polar(magnitude_CNE, phase_CNE)


def modal_taps(rate_CN: Tensor, angle_CN: Tensor, residue_CN: Tensor, *, length: int) -> Tensor:
    """h_t = Re sum_n R_n lambda_n^t for t < length: [C, length], or [B, C, length] for residues [B, C, N].

    lambda^(aP + b) = lambda^(aP) lambda^b with P near sqrt(length): about 2 C N sqrt(length) exponentials and one real
    matrix product instead of C N length exponentials.
    """
    block = 1 << math.ceil(math.log2(max(1, length)) / 2)
    rows = -(-length // block)
    coarse_CNA = damped_waves(rate_CN, angle_CN, step=block, count=rows)
    fine_CNP = damped_waves(rate_CN, angle_CN, count=block)
    left_CAN = (residue_CN.unsqueeze(-1) * coarse_CNA).transpose(-1, -2)
    right_CNP = fine_CNP.conj()
    product_CAP = real_pairs(left_CAN) @ real_pairs(right_CNP.transpose(-1, -2)).transpose(-1, -2)
    return product_CAP.flatten(-2)[..., :length]


def real_pairs(z_XN: Tensor) -> Tensor:
    """Real and imaginary parts side by side: [..., 2 N]. Re(z w) is then the inner product with the pairs of conj(w)."""
    return torch.view_as_real(z_XN.resolve_conj()).flatten(-2)
