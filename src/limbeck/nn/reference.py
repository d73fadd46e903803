"""The definitions, as slow loops in float64 that are obviously right. Tests compare everything else with these."""

from __future__ import annotations

import cmath
import math
from typing import cast

import torch
from torch import Tensor

from limbeck.nn.filters import ExplicitFilter, ImplicitFilter, LongFilter, ModalFilter
from limbeck.nn.hyena import HyenaOperator


def convolve_slowly(u_BCT: Tensor, h_CK: Tensor) -> Tensor:
    """y_t = sum over s <= t with t - s < K of h_{t-s} u_s, one product at a time."""
    u_BCT, h_CK = u_BCT.double(), h_CK.double()
    outputs = []
    for t in range(u_BCT.shape[-1]):
        total_BC = torch.zeros_like(u_BCT[..., 0])
        for s in range(t + 1):
            if t - s < h_CK.shape[-1]:
                total_BC = total_BC + h_CK[:, t - s] * u_BCT[..., s]
        outputs.append(total_BC)
    return torch.stack(outputs, dim=-1)


def taps_slowly(long_filter: LongFilter, length: int) -> Tensor:
    """The taps [C, K] of a filter, number by number. No gradients."""
    if isinstance(long_filter, ModalFilter):
        return _modal_taps(long_filter, length)
    if isinstance(long_filter, ImplicitFilter):
        return _implicit_taps(long_filter, min(length, long_filter.filter_length))
    assert isinstance(long_filter, ExplicitFilter)
    return long_filter.taps_CK.detach().double()[:, :length]


def _modal_taps(long_filter: ModalFilter, length: int) -> Tensor:
    h_CK = torch.zeros(long_filter.channels, length, dtype=torch.float64)
    for c in range(long_filter.channels):
        for n in range(long_filter.modes):
            rate = math.log1p(math.exp(long_filter.decay_CN[c, n].item()))
            pole = cmath.exp(complex(-rate, long_filter.angle_CN[c, n].item()))
            value = complex(long_filter.residue_real_CN[c, n].item(), long_filter.residue_imag_CN[c, n].item())
            for t in range(length):
                h_CK[c, t] += value.real
                value *= pole
    return h_CK


def _implicit_taps(long_filter: ImplicitFilter, length: int) -> Tensor:
    total, bands = long_filter.filter_length, (long_filter.embedding_size - 1) // 2
    weights = {name: parameter.detach().double() for name, parameter in long_filter.named_parameters()}
    taps = []
    for t in range(length):
        bandwidth = [1e-4 + (bands - 1 - 1e-4) * b / max(1, bands - 1) for b in range(bands)]
        phases = [2 * math.pi * t / total * f for f in bandwidth]
        place = t / max(1, total - 1)
        hidden_E = torch.tensor([place, *map(math.cos, phases), *(-math.sin(p) for p in phases)], dtype=torch.float64)
        hidden_E = torch.sin(weights["frequency"] * (weights["input_weight"] @ hidden_E + weights["input_bias"]))
        for layer in range(2):
            linear_E = weights["hidden_weight"][layer] @ hidden_E + weights["hidden_bias"][layer]
            hidden_E = torch.sin(weights["frequency"] * linear_E)
        taps.append((weights["output_weight"] @ hidden_E) * _decay(long_filter, place))
    return torch.stack(taps, dim=-1)


def _decay(long_filter: ImplicitFilter, place: float) -> Tensor:
    slow, fast, channels = math.log(100) / 1.5, math.log(100) / 0.3, long_filter.channels
    rates = [slow + (fast - slow) * c / max(1, channels - 1) for c in range(channels)]
    return torch.tensor([math.exp(-place * rate) + long_filter.shift for rate in rates], dtype=torch.float64)


def operate_slowly(operator: HyenaOperator, hidden_BTD: Tensor) -> Tensor:
    """The whole operator on [B, T, D], token by token from the definition, in float64. No gradients."""
    weights = {name: parameter.detach().double() for name, parameter in operator.named_parameters()}
    length = hidden_BTD.shape[1]
    projected = [_affine(weights, "in_proj", hidden_BTD[:, t].double()) for t in range(length)]
    streams = []
    for t in range(length):
        stream_BM = weights["short_bias"].expand_as(projected[0])
        for lag in range(min(t + 1, operator.short_conv)):
            stream_BM = stream_BM + weights["short_weight"][:, operator.short_conv - 1 - lag] * projected[t - lag]
        streams.append(stream_BM.split(operator.inner_width, dim=-1))
    values = [stream[operator.order] for stream in streams]
    for round_ in range(operator.order - 1):
        gate = operator.order - 1 - round_
        gated = [values[t] * streams[t][gate] for t in range(length)]
        h_CK = taps_slowly(cast(LongFilter, operator.filters[round_]), length)
        summed_BCT = convolve_slowly(torch.stack(gated, dim=-1), h_CK)
        values = [summed_BCT[..., t] + weights["skip_bias"][round_] * gated[t] for t in range(length)]
    outputs = [_affine(weights, "out_proj", values[t] * streams[t][0]) for t in range(length)]
    return torch.stack(outputs, dim=1)


def _affine(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y
