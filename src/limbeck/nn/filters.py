"""Long filters: three ways to say how much which past token counts.

A filter gives its taps h [C, K]: tap t of channel c weighs the input of t tokens ago. The skip term at lag zero is not
in here; the operator owns it. Parameters stay in float32 at least, whatever the model is cast to: poles close to the
unit circle and positional features are ruined by half precision, and evaluating a filter is a small part of the work.
They get no weight decay (`_no_weight_decay`), and they are plain parameters rather than Linear modules, so that a
model-wide initialiser, a quantiser or an adapter that looks for Linear layers leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.nn.fftconv import without_autocast
from limbeck.nn.fitting import fit_implicit, fit_modal, relative_error
from limbeck.nn.modal import damped_waves, modal_taps
from limbeck.nn.taps import KnownTaps


def mark_undecayed(*parameters: nn.Parameter | None) -> None:
    """Mark parameters that must get no weight decay (and no matrix-wise optimiser): `_no_weight_decay = True`."""
    for parameter in parameters:
        if parameter is not None:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


def full_precision_dtype(dtype: torch.dtype | None = None) -> torch.dtype:
    """The given dtype (default: torch's default), or float32 when it is narrower than that."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(full_precision_dtype(tensor.dtype))


class LongFilter(nn.Module):
    """What the three filters share: precision, marks, and the memory of taps while the weights stand still.

    `channels`: C. `support`: the number of taps that can differ from zero; None when there is no end to them.
    """

    channels: int
    support: int | None
    fit_steps = 0

    LINEAR_PARAMETERS: tuple[str, ...] = ()

    def __init__(self, channels: int, *, support: int | None):
        super().__init__()
        if channels < 1 or (support is not None and support < 1):
            raise RecipeError(
                f"a filter needs at least 1 channel and 1 tap, got {channels} channels and {support} taps"
            )
        self.channels, self.support = channels, support
        self._known: tuple[Any, KnownTaps] | None = None

    def forward(self, length: int) -> Tensor:
        """Taps [C, K] for lags 0..K-1, K = min(length, support), in float32 at least. Gradients flow to the parameters."""
        with without_autocast(next(self.parameters())):
            return self.evaluate(length)

    def evaluate(self, length: int) -> Tensor:
        """What `forward` returns; each filter's own."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw fresh initial parameters in place."""
        raise NotImplementedError

    def fit(self, target_CK: Tensor, *, weights: Tensor | None = None, steps: int | None = None) -> float:
        """Move the parameters towards target taps; return the relative error that is left.

        `weights`: importance of each squared deviation, broadcastable to the target. `steps`: of refinement
        (default `fit_steps`), 0 for the closed-form start alone. The error is measured on the taps the filter gives
        afterwards, over *all* of the target, lags beyond `support` included: sqrt(sum w (h - target)^2 / sum w target^2).

        Raises: ValueError when the target is not [C, K].
        """
        if target_CK.dim() != 2 or target_CK.shape[0] != self.channels or target_CK.shape[1] < 1:
            raise ValueError(f"expected target taps [{self.channels}, K >= 1], got {tuple(target_CK.shape)}")
        target_CK = target_CK.detach().to(next(self.parameters()))
        weights_CK = torch.ones_like(target_CK) if weights is None else weights.to(target_CK).expand_as(target_CK)
        self.fit_closely(target_CK, weights_CK, steps=self.fit_steps if steps is None else steps)
        with torch.no_grad():
            return relative_error(self(target_CK.shape[-1]), target_CK, weights_CK)

    def fit_closely(self, target_CK: Tensor, weights_CK: Tensor, *, steps: int) -> None:
        """What `fit` does to the parameters; each filter's own."""
        raise NotImplementedError

    @torch.no_grad()
    def scale(self, factor_C: Tensor) -> None:
        """Multiply each channel's taps by a factor, in place: the taps are linear in `LINEAR_PARAMETERS`."""
        for name in self.LINEAR_PARAMETERS:
            parameter = getattr(self, name)
            parameter.mul_(factor_C.to(parameter).unsqueeze(-1))

    def known_taps(self) -> KnownTaps:
        """The taps as they are now, kept from call to call while no gradient is asked for and no weight changes.

        In training mode nothing is kept. A change is seen by the parameters' version counters and addresses; edits
        through `.data` that keep the address are not seen before the next `train()` or `eval()`.
        """
        if self.training or torch.compiler.is_compiling() or not self._may_keep():
            return KnownTaps(self, support=self.support, lasting=False)
        key = tuple((p.data_ptr(), p._version) for p in self._parameters.values() if p is not None)
        if self._known is None or self._known[0] != key:
            self._known = (key, KnownTaps(self._evaluate_plainly, support=self.support))
        return self._known[1]

    def _may_keep(self) -> bool:
        grad = torch.is_grad_enabled()
        return not any(
            p.is_inference() or (grad and p.requires_grad) for p in self._parameters.values() if p is not None
        )

    def _evaluate_plainly(self, length: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self(length).detach().clone()

    def train(self, mode: bool = True) -> LongFilter:
        """As in torch; forgets the taps kept."""
        self._known = None
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; marks the parameter as one without weight decay, however it came here."""
        super().register_parameter(name, param)
        mark_undecayed(param)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark_undecayed(*self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LongFilter:
        """Moves and casts come through here: those to half precision move only."""
        self._known = None

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(device=moved.device) if moved.device != tensor.device else tensor
            return moved

        super()._apply(move, recurse)
        mark_undecayed(*self.parameters())
        return self


class ImplicitFilter(LongFilter):
    """Taps as a function of position: a sine network on positional features, under an exponentially decaying window.

    Position t of `filter_length` = L gives the features t / (L - 1), cos and -sin of (embedding_size - 1) / 2 frequencies.
    Three sine layers of `hidden_width` with one trainable frequency vector between them, then a linear map to channels.
    Channel c decays to 1 % at a share of L between 0.3 and 1.5. Lags >= `filter_length` weigh exactly zero: the filter
    has bounded support, and inputs of any length are allowed.

    `frequency` 3 with torch's default Linear initialisation gives smooth filters; the often quoted 14 gives nearly
    white noise unless the layers are drawn from N(0, 0.02).
    Source: Poli et al. 2023, arXiv:2302.10866, section 3.3. Deviations: frequency 3, shift 0, features not trained.
    """

    fit_steps = 60

    LINEAR_PARAMETERS = ("output_weight",)

    def __init__(
        self,
        channels: int,
        *,
        filter_length: int = 1024,
        embedding_size: int = 33,
        hidden_width: int = 64,
        frequency: float = 3.0,
        shift: float = 0.0,
    ):
        super().__init__(channels, support=filter_length)
        self.filter_length = filter_length
        if embedding_size < 3 or embedding_size % 2 == 0:
            raise RecipeError(f"filter_options.embedding_size must be odd and at least 3, got {embedding_size}")
        self.embedding_size, self.frequency_start, self.shift = embedding_size, frequency, shift
        dtype = full_precision_dtype()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype))

        self.frequency = empty(hidden_width)
        self.input_weight, self.input_bias = empty(hidden_width, embedding_size), empty(hidden_width)
        self.hidden_weight, self.hidden_bias = empty(2, hidden_width, hidden_width), empty(2, hidden_width)
        self.output_weight = empty(channels, hidden_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh initial parameters in place: the bounds of torch's Linear."""
        self.frequency.fill_(self.frequency_start)
        for weight, bias in ((self.input_weight, self.input_bias), (self.hidden_weight, self.hidden_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            weight.uniform_(-bound, bound)
            bias.uniform_(-bound, bound)
        bound = 1 / math.sqrt(self.output_weight.shape[-1])
        self.output_weight.uniform_(-bound, bound)

    def evaluate(self, length: int) -> Tensor:
        """Taps [C, K], K = min(length, filter_length)."""
        position_K = self._positions(length)
        taps_KC = self.features(length) @ full_precision(self.output_weight).T
        return (taps_KC * self._window(position_K)).T.contiguous()

    def fit_closely(self, target_CK: Tensor, weights_CK: Tensor, *, steps: int) -> None:
        """Adam on the inner layers, least squares for the output layer."""
        fit_implicit(self, target_CK, weights_CK, steps=steps)

    def features(self, length: int) -> Tensor:
        """What the sine layers make of each position: [K, hidden_width]."""
        frequency, input_weight, input_bias, hidden_weight, hidden_bias = map(
            full_precision, (self.frequency, self.input_weight, self.input_bias, self.hidden_weight, self.hidden_bias)
        )
        hidden_KE = self._embedding(self._positions(length))
        hidden_KE = torch.sin(frequency * F.linear(hidden_KE, input_weight, input_bias))
        for weight, bias in zip(hidden_weight, hidden_bias):
            hidden_KE = torch.sin(frequency * F.linear(hidden_KE, weight, bias))
        return hidden_KE

    def window(self, length: int) -> Tensor:
        """The decaying factor of each tap: [K, C]."""
        return self._window(self._positions(length))

    def _positions(self, length: int) -> Tensor:
        weight = full_precision(self.output_weight)
        return torch.arange(min(length, self.filter_length), device=weight.device, dtype=weight.dtype)

    def _embedding(self, position_K: Tensor) -> Tensor:
        bands = (self.embedding_size - 1) // 2
        band_E = torch.linspace(1e-4, bands - 1, bands, device=position_K.device, dtype=position_K.dtype)
        phase_KE = position_K[:, None] * (2 * math.pi / self.filter_length) * band_E
        share_K1 = position_K[:, None] / max(1, self.filter_length - 1)
        return torch.cat((share_K1, torch.cos(phase_KE), -torch.sin(phase_KE)), dim=1)

    def _window(self, position_K: Tensor) -> Tensor:
        slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
        rate_C = torch.linspace(slow, fast, self.channels, device=position_K.device, dtype=position_K.dtype).abs()
        return torch.exp(-position_K[:, None] / max(1, self.filter_length - 1) * rate_C) + self.shift


class ExplicitFilter(LongFilter):
    """One free parameter a tap. Lags >= `filter_length` weigh exactly zero.

    Starts as white noise under a decay whose time constant runs, over the channels, from 1 token to a quarter of
    `filter_length` in equal ratios, scaled so that the squared taps of each channel sum to about one.
    Source: after the medium filters of StripedHyena 2 (Ku et al. 2025, arXiv:2503.01868), with the taps themselves trained.
    """

    LINEAR_PARAMETERS = ("taps_CK",)

    def __init__(self, channels: int, *, filter_length: int = 1024):
        super().__init__(channels, support=filter_length)
        self.filter_length = filter_length
        self.taps_CK = nn.Parameter(torch.empty(channels, filter_length, dtype=full_precision_dtype()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh initial taps in place."""
        length = self.taps_CK.shape[-1]
        constant_C = torch.logspace(0, math.log10(max(1.0, length / 4)), self.channels, dtype=torch.float64)
        envelope_CK = torch.exp(-torch.arange(length, dtype=torch.float64) / constant_C[:, None])
        envelope_CK = envelope_CK / envelope_CK.square().sum(-1, keepdim=True).sqrt()
        self.taps_CK.normal_().mul_(envelope_CK.to(self.taps_CK))

    def evaluate(self, length: int) -> Tensor:
        """Taps [C, K], K = min(length, filter_length)."""
        return full_precision(self.taps_CK)[:, :length]

    @torch.no_grad()
    def fit_closely(self, target_CK: Tensor, weights_CK: Tensor, *, steps: int) -> None:
        """Take the target as it is; lags the target does not speak of become zero."""
        reach = min(target_CK.shape[-1], self.filter_length)
        self.taps_CK.zero_()
        self.taps_CK[:, :reach] = target_CK[:, :reach]


class ModalFilter(LongFilter):
    """A sum of `modes` damped complex exponentials a channel: h_t = Re sum_n R_n lambda_n^t.

    lambda = exp(-softplus(decay) + i angle), so |lambda| < 1 always. An exact recurrence with `modes` complex numbers of
    state a channel (`poles_CN`, `residues_CN`) gives the same outputs token by token, and memory has no end (`support`
    is None). Starts with time constants from 1 to `longest_memory` tokens in equal ratios, each mode turning at most
    half a cycle in its time constant, and residues which give taps whose squares sum to about one.
    Source: Massaroli et al. 2023, arXiv:2310.18780, section 3; StripedHyena uses the same form.
    """

    fit_steps = 30

    LINEAR_PARAMETERS = ("residue_real_CN", "residue_imag_CN")

    def __init__(self, channels: int, *, modes: int = 8, longest_memory: float = 1024.0):
        super().__init__(channels, support=None)
        if modes < 1 or longest_memory < 1:
            raise RecipeError(
                f"filter_options: modes and longest_memory must be at least 1, got {modes} and {longest_memory}"
            )
        self.modes, self.longest_memory = modes, longest_memory
        dtype = full_precision_dtype()
        self.decay_CN, self.angle_CN, self.residue_real_CN, self.residue_imag_CN = (
            nn.Parameter(torch.empty(channels, modes, dtype=dtype)) for _ in range(4)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh initial poles and residues in place."""
        constant_N = torch.logspace(0, math.log10(self.longest_memory), self.modes, dtype=torch.float64)
        spread_CN = torch.rand_like(self.decay_CN) - 0.5
        rate_CN = (1 / constant_N).to(self.decay_CN) * torch.exp(spread_CN)
        self.set_poles(rate_CN, torch.rand_like(rate_CN) * math.pi * rate_CN.clamp(max=1.0))
        scale_CN = (rate_CN / self.modes).sqrt()
        self.residue_real_CN.normal_().mul_(scale_CN)
        self.residue_imag_CN.normal_().mul_(scale_CN)

    def evaluate(self, length: int) -> Tensor:
        """Taps [C, length]."""
        return modal_taps(self.rates_CN(), self.angles_CN(), self.residues_CN(), length=length)

    def fit_closely(self, target_CK: Tensor, weights_CK: Tensor, *, steps: int) -> None:
        """Poles picked from a grid, least squares for the residues, then Gauss-Newton on all."""
        fit_modal(self, target_CK, weights_CK, steps=steps)

    @torch.no_grad()
    def set_poles(self, rate_CN: Tensor, angle_CN: Tensor) -> None:
        """Put the poles exp(-rate + i angle) in place, rate > 0."""
        self.decay_CN.copy_(inverse_softplus(rate_CN.double()))
        self.angle_CN.copy_(angle_CN)

    def poles_CN(self) -> Tensor:
        """lambda [C, N], complex64 or complex128."""
        return damped_waves(self.rates_CN(), self.angles_CN(), start=1, count=1)[..., 0]

    def residues_CN(self) -> Tensor:
        """R [C, N], complex64 or complex128."""
        return torch.complex(full_precision(self.residue_real_CN), full_precision(self.residue_imag_CN))

    def rates_CN(self) -> Tensor:
        """-log |lambda| [C, N], positive."""
        return F.softplus(full_precision(self.decay_CN))

    def angles_CN(self) -> Tensor:
        """arg lambda [C, N], radians a token."""
        return full_precision(self.angle_CN)


def inverse_softplus(value: Tensor) -> Tensor:
    """The x with log(1 + e^x) = value > 0."""
    return value + torch.log(-torch.expm1(-value))


FILTERS: dict[str, Callable[..., LongFilter]] = {
    "implicit": ImplicitFilter,
    "explicit": ExplicitFilter,
    "modal": ModalFilter,
}
