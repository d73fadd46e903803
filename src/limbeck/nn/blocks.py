"""The parts of a transformer block: rotary positions, self-attention, feed-forward, low-rank deltas.

Tokens come before heads everywhere ([B, T, H, d]), and linear maps take any leading dimensions, so that a caller may
run them on packed rows and only the attention on padded ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import RecipeError, unknown_name

NORM_EPS = 1e-6


def rms_norm(width: int) -> nn.RMSNorm:
    """Root-mean-square normalisation with one learned factor a channel. Source: arXiv:1910.07467."""
    return nn.RMSNorm(width, eps=NORM_EPS)


def linear(width_in: int, width_out: int, *, bias: bool = False, scale: float = 1.0) -> nn.Linear:
    """A linear map with normal weights of standard deviation scale / sqrt(width_in) and no bias at the start."""
    layer = nn.Linear(width_in, width_out, bias=bias)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(width_in))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Name: the function, and whether it acts on a gate that multiplies a second map of the input.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu2": (_relu2, False),
    "gelu": (F.gelu, False),
    "swiglu": (F.silu, True),
}


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines [B, T, 1, d/2] of the angles by which each position turns its queries and keys."""

    cosine: Tensor
    sine: Tensor

    @staticmethod
    def at(positions_BT: Tensor, *, head_width: int, theta: float, dtype: torch.dtype) -> Rotary:
        """The rotation of integer positions; angles are worked out in float32 at least.

        Source: Su et al. 2021, arXiv:2104.09864; channel i is paired with i + d/2, as in the LLaMA family.
        """
        exact = torch.promote_types(dtype, torch.float32)
        half = head_width // 2
        frequencies = theta ** (-torch.arange(half, device=positions_BT.device, dtype=exact) / half)
        angles = (positions_BT.to(exact).unsqueeze(-1) * frequencies).unsqueeze(-2)
        return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))

    def turn(self, x_BTHd: Tensor) -> Tensor:
        """Queries or keys, each pair of channels turned by its angle. Gradients flow."""
        cosine, sine = self.cosine.to(x_BTHd.dtype), self.sine.to(x_BTHd.dtype)
        first, second = x_BTHd.chunk(2, dim=-1)
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat(turned, dim=-1)


def apply_rotary(x_BHTd: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Queries or keys with heads before tokens, turned by their positions (see `Rotary`)."""
    rotary = Rotary.at(positions_BT, head_width=x_BHTd.shape[-1], theta=theta, dtype=x_BHTd.dtype)
    return rotary.turn(x_BHTd.transpose(1, 2)).transpose(1, 2)


class LowRank(nn.Module):
    """A change of rank r to a linear map that several layers share: x -> second(first(x)), zero at the start.

    Source: Hu et al. 2021, arXiv:2106.09685; as what tells shared layers apart: Bae et al. 2024, arXiv:2410.20672.
    Without a scale factor and without biases.
    """

    def __init__(self, width_in: int, width_out: int, rank: int):
        super().__init__()
        self.first = linear(width_in, rank)
        self.second = linear(rank, width_out, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the shared map's output. Gradients flow."""
        return self.second(self.first(x))


Deltas = Mapping[str, LowRank] | nn.ModuleDict | None


def _mapped(layer: nn.Module, x: Tensor, deltas: Deltas, name: str) -> Tensor:
    y = layer(x)
    return y + deltas[name](x) if deltas is not None and name in deltas else y


class SelfAttention(nn.Module):
    """Softmax attention with grouped key-value heads.

    width: of input and output. kv_heads: divides heads. head_width: d (default width / heads). causal: what `attend`
    does without a mask. rope_theta: None for no rotary positions. qk_norm: normalise queries and keys a head.
    output_scale: of the output projection's start; 0 lets a residual branch begin as nothing. own_output: False for a
    module that uses another one's output projection.
    Source: grouped heads: arXiv:2305.13245; normalised queries and keys: arXiv:2010.04245, here with a learned RMSNorm
    (arXiv:2302.05442).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_width: int | None = None,
        causal: bool = True,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = True,
        bias: bool = False,
        output_scale: float = 1.0,
        own_output: bool = True,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise RecipeError(f"attention: {heads} heads cannot be shared out over {kv_heads} key-value heads")
        if head_width is None:
            if width % heads:
                raise RecipeError(f"attention: width {width} is not a multiple of {heads} heads; give head_width")
            head_width = width // heads
        if rope_theta is not None and head_width % 2:
            raise RecipeError(f"attention: rotary positions need an even head width, not {head_width}")
        self.width, self.heads, self.kv_heads, self.head_width = width, heads, kv_heads, head_width
        self.causal, self.rope_theta = causal, rope_theta
        self.query = linear(width, heads * head_width, bias=bias)
        self.key = linear(width, kv_heads * head_width, bias=bias)
        self.value = linear(width, kv_heads * head_width, bias=bias)
        self.query_norm = rms_norm(head_width) if qk_norm else None
        self.key_norm = rms_norm(head_width) if qk_norm else None
        self.out = linear(heads * head_width, width, bias=bias, scale=output_scale) if own_output else None

    def forward(self, x_BTD: Tensor, *, mask_BQK: Tensor | None = None, positions_BT: Tensor | None = None) -> Tensor:
        """Mix tokens: [B, T, D] to [B, T, D]. Gradients flow everywhere.

        mask_BQK: True where a query may look at a key; it takes the place of `causal`, which the caller puts into it.
        positions_BT: for the rotary positions (default: 0, 1, ...).
        """
        rotary = None
        if self.rope_theta is not None:
            if positions_BT is None:
                positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device).unsqueeze(0)
            rotary = self.rotary(positions_BT, dtype=x_BTD.dtype)
        q, k, v = self.project(x_BTD, rotary=rotary)
        return self.output(self.attend(q, k, v, mask_BQK))

    def rotary(self, positions_BT: Tensor, *, dtype: torch.dtype) -> Rotary | None:
        """The rotation for these positions, or None for a module without rotary positions."""
        if self.rope_theta is None:
            return None
        return Rotary.at(positions_BT, head_width=self.head_width, theta=self.rope_theta, dtype=dtype)

    def project(
        self, x: Tensor, *, rotary: Rotary | None = None, deltas: Deltas = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H, d], keys and values [..., Hkv, d] of [..., D], normalised, and turned when `rotary` is given."""
        shape = (*x.shape[:-1], -1, self.head_width)
        q = _mapped(self.query, x, deltas, "query").view(shape)
        k = _mapped(self.key, x, deltas, "key").view(shape)
        v = _mapped(self.value, x, deltas, "value").view(shape)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotary is not None:
            q, k = rotary.turn(q), rotary.turn(k)
        return q, k, v

    def attend(self, q_BQHd: Tensor, k_BKGd: Tensor, v_BKGd: Tensor, mask_BQK: Tensor | None = None) -> Tensor:
        """The weighted sums of values, heads joined: [B, Q, H d]. Every query must be allowed a key at least.

        Without a mask a causal module takes query i to stand beside key i, and a single query to come last.
        """
        y_BHQd = F.scaled_dot_product_attention(
            q_BQHd.transpose(1, 2),
            k_BKGd.transpose(1, 2),
            v_BKGd.transpose(1, 2),
            attn_mask=None if mask_BQK is None else mask_BQK.unsqueeze(1),
            is_causal=self.causal and mask_BQK is None and q_BQHd.shape[1] > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        return y_BHQd.transpose(1, 2).flatten(2)

    def output(self, y: Tensor, *, deltas: Deltas = None) -> Tensor:
        """The output projection of joined heads, [..., H d] to [..., D]."""
        assert self.out is not None
        return _mapped(self.out, y, deltas, "out")


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) for "swiglu".

    output_scale: of the start of `down`; 0 lets a residual branch begin as nothing. width_out: default width.
    Source: squared ReLU: arXiv:2109.08668; SwiGLU: arXiv:2002.05202.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "relu2",
        bias: bool = False,
        width_out: int | None = None,
        output_scale: float = 1.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise RecipeError("activation: " + unknown_name("activation", activation, ACTIVATIONS))
        self.activation, gated = ACTIVATIONS[activation]
        self.up = linear(width, hidden, bias=bias)
        self.gate = linear(width, hidden, bias=bias) if gated else None
        self.down = linear(hidden, width if width_out is None else width_out, bias=bias, scale=output_scale)

    def forward(self, x: Tensor, *, deltas: Deltas = None) -> Tensor:
        """[..., width] to [..., width_out]. Gradients flow everywhere."""
        y = _mapped(self.up, x, deltas, "up")
        if self.gate is None:
            y = self.activation(y)
        else:
            y = self.activation(_mapped(self.gate, x, deltas, "gate")) * y
        return _mapped(self.down, y, deltas, "down")
