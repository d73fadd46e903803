"""The Hyena operator: attention's place taken by gates and long convolutions.

Read `HyenaOperator.forward` for the definition, `HyenaOperator.advance` for generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import RecipeError, unknown_piece
from limbeck.nn import blockwise
from limbeck.nn.fftconv import working_dtype
from limbeck.nn.filters import FILTERS, LongFilter, mark_undecayed
from limbeck.nn.flops import hyena_flops_per_token
from limbeck.nn.online import ModalRecurrence, OnlineConvolution, init_memory
from limbeck.nn.packing import document_buckets, repack_documents, unpack_documents

Convolve = Callable[[int, Tensor], Tensor]


@dataclass
class HyenaState:
    """What one layer remembers of the tokens it has seen. Every tensor is batch-first.

    `context_BKM`: the last short_conv - 1 projections. `memories`: one a long filter, in order of application.
    `length`: tokens taken in, masked ones included.
    """

    context_BKM: Tensor
    memories: list[OnlineConvolution | ModalRecurrence]
    length: int = 0

    def map(self, fn: Callable[[Tensor], Tensor]) -> HyenaState:
        """A new state with `fn` applied to every tensor: reorder rows by `state.map(lambda t: t.index_select(0, rows))`."""
        return HyenaState(fn(self.context_BKM), [memory.map(fn) for memory in self.memories], self.length)

    def clone(self) -> HyenaState:
        """A state that shares no memory with this one."""
        return self.map(torch.clone)


class HyenaOperator(nn.Module):
    """Hyena of order N: N + 1 projections, a short convolution on each, then N - 1 rounds of gate and long convolution.

    With x^0..x^{N-1}, v the short-convolved projections of the input, and for each round the next filter h and skip d:
        v <- h * (v x^n) + d (v x^n)    for n = N-1, ..., 1;    y = W_out (v x^0).

    `width`: D, of input and output. `inner_width`: C, channels of each projection (default D). `order`: N >= 2.
    `short_conv`: taps of the short convolution; 1 makes it a scale. `filter`: a name in `FILTERS`, built with
    `filter_options`. `bias`: whether the two linear maps have one (the short convolution always has).

    Parameters: `in_proj` rows are blocks of C: gate_out (x^0), further gates x^1..x^{N-1} (gate_in when N = 2), value.
    `short_weight` [(N+1) C, short_conv] as in torch's conv1d: the last column weighs the present token. `filters[0]` and
    `skip_bias[0]` are applied first, with gate x^{N-1}.
    Source: Poli et al. 2023, arXiv:2302.10866, definition 3.1; as in its code, N - 1 long convolutions, the last
    being the short one.
    """

    def __init__(
        self,
        width: int,
        *,
        inner_width: int | None = None,
        order: int = 2,
        short_conv: int = 3,
        filter: str = "modal",
        filter_options: dict[str, Any] | None = None,
        bias: bool = True,
    ):
        super().__init__()
        inner_width = width if inner_width is None else inner_width
        if order < 2 or short_conv < 1 or inner_width < 1:
            raise RecipeError(
                f"hyena: order must be at least 2, short_conv and inner_width at least 1; got order {order}, "
                f"short_conv {short_conv}, inner_width {inner_width}"
            )
        if filter not in FILTERS:
            raise RecipeError("hyena.filter: " + unknown_piece("filter", filter, FILTERS))
        self.width, self.inner_width, self.order, self.short_conv = width, inner_width, order, short_conv
        streams = (order + 1) * inner_width
        self.in_proj = nn.Linear(width, streams, bias=bias)
        self.short_weight = nn.Parameter(torch.empty(streams, short_conv))
        self.short_bias = nn.Parameter(torch.empty(streams))
        try:
            self.filters = nn.ModuleList(
                FILTERS[filter](inner_width, **(filter_options or {})) for _ in range(order - 1)
            )
        except TypeError as error:
            raise RecipeError(f'hyena.filter_options for filter "{filter}": {error}') from error
        self.skip_bias = nn.Parameter(torch.empty(order - 1, inner_width))
        self.out_proj = nn.Linear(inner_width, width, bias=bias)
        self.reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; the operator's own parameters (taps and skips, not matrices) get no weight decay."""
        super().register_parameter(name, param)
        mark_undecayed(param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark_undecayed(*self._parameters.values())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh initial parameters in place: torch's Linear and conv1d bounds, no skip, fresh filters."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        bound = 1 / math.sqrt(self.short_conv)
        self.short_weight.uniform_(-bound, bound)
        self.short_bias.zero_()
        self.skip_bias.zero_()
        for long_filter in self._long_filters():
            long_filter.reset_parameters()

    def _long_filters(self) -> list[LongFilter]:
        return cast(list[LongFilter], list(self.filters))

    def forward(
        self, hidden_BTD: Tensor, *, mask_BT: Tensor | None = None, document_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Mix tokens causally: [B, T, D] to [B, T, D].

        `mask_BT`: True (or 1) at real tokens; masked ones contribute nothing, so padding on the left changes nothing.
        `document_ids_BT`: runs of equal ids are documents, each mixed as if it were alone. Gradients flow everywhere.
        """
        if document_ids_BT is not None and bool((document_ids_BT[:, 1:] == document_ids_BT[:, :-1]).all()):
            document_ids_BT = None
        if document_ids_BT is None and blockwise.pays(hidden_BTD):
            context_BKM = hidden_BTD.new_zeros(hidden_BTD.shape[0], self.short_conv - 1, self.short_bias.shape[0])
            return self._mix_long_prompt(hidden_BTD, context_BKM, self._convolve_long, mask_BT)[0]
        streams_BMT = self._project(hidden_BTD, mask_BT)
        if document_ids_BT is None:
            streams_BMT = self._convolve_short(F.pad(streams_BMT, (self.short_conv - 1, 0)))
            return self._finish(self._mix(streams_BMT, self._convolve_long, mask_BT))
        streams_BMT = self._convolve_short_within(streams_BMT, document_ids_BT)
        buckets = document_buckets(document_ids_BT)

        def convolve(index: int, u_BCT: Tensor) -> Tensor:
            rows = [self._convolve_long(index, unpack_documents(u_BCT, index_NP)) for index_NP in buckets]
            return repack_documents(rows, buckets, batch=u_BCT.shape[0], length=u_BCT.shape[-1])

        return self._finish(self._mix(streams_BMT, convolve, mask_BT))

    def init_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> HyenaState:
        """The state before the first token. `dtype`: the model's; sums and modes are kept in float32 at least."""
        context_BKM = torch.zeros(batch_size, self.short_conv - 1, self.short_bias.shape[0], device=device, dtype=dtype)
        memories = [init_memory(f, batch_size, device=device, dtype=dtype) for f in self._long_filters()]
        return HyenaState(context_BKM, memories)

    def advance(
        self, hidden_BTD: Tensor, state: HyenaState, *, mask_BT: Tensor | None = None
    ) -> tuple[Tensor, HyenaState]:
        """Continue after `state` with T more tokens; return their outputs and the state after them.

        Any split of a sequence into calls gives what `forward` gives for the whole. The state given is used up (its
        tensors are changed in place): `clone` it first to branch. Gradients flow through this chunk, not into the past;
        generate under `torch.no_grad()` and in eval mode, where single tokens are fast and filters are evaluated once.
        """
        if hidden_BTD.shape[1] == 1 and not torch.is_grad_enabled():
            return self._advance_token(hidden_BTD, state, mask_BT), state
        filters = self._long_filters()

        def convolve(index: int, u_BCT: Tensor) -> Tensor:
            y_BCT = state.memories[index].extend(u_BCT.to(working_dtype(u_BCT)), filters[index])
            return y_BCT.to(u_BCT.dtype)

        state.length += hidden_BTD.shape[1]
        if blockwise.pays(hidden_BTD):
            out_BTD, state.context_BKM = self._mix_long_prompt(hidden_BTD, state.context_BKM, convolve, mask_BT)
            return out_BTD, state
        streams_BMT = self._project(hidden_BTD, mask_BT)
        streams_BMT = torch.cat((state.context_BKM.to(streams_BMT.dtype).transpose(1, 2), streams_BMT), dim=-1)
        if self.short_conv > 1:
            state.context_BKM = streams_BMT[..., 1 - self.short_conv :].detach().transpose(1, 2).contiguous()
        mixed_BCT = self._mix(self._convolve_short(streams_BMT), convolve, mask_BT)
        return self._finish(mixed_BCT), state

    def flops_per_token(self, context_tokens: float) -> float:
        """Operations of one pass over so many tokens, divided by their number: as in `nn.flops`, both projections included."""
        matrices = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        return matrices + hyena_flops_per_token(
            self.inner_width, order=self.order, short_conv=self.short_conv, context_tokens=context_tokens
        )

    def _advance_token(self, hidden_BTD: Tensor, state: HyenaState, mask_BT: Tensor | None) -> Tensor:
        streams_BM = self.in_proj(hidden_BTD[:, 0])
        if mask_BT is not None:
            streams_BM = streams_BM * mask_BT.to(streams_BM.dtype)
        window_BKM = torch.cat((state.context_BKM.to(streams_BM.dtype), streams_BM.unsqueeze(1)), dim=1)
        state.context_BKM = window_BKM[:, 1:]
        streams_BM = torch.addcmul(self.short_bias, window_BKM[:, 0], self.short_weight[:, 0])
        for tap in range(1, self.short_conv):
            streams_BM = streams_BM.addcmul_(window_BKM[:, tap], self.short_weight[:, tap])

        filters = self._long_filters()

        def convolve(index: int, u_BC: Tensor) -> Tensor:
            y_BC = state.memories[index].step(u_BC.to(working_dtype(u_BC)), filters[index])
            return y_BC.to(u_BC.dtype)

        mixed_BC = self._mix(streams_BM, convolve, mask_BT)
        state.length += 1
        return self.out_proj(mixed_BC).unsqueeze(1)

    def _project(self, hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The projections [B, (N+1) C, T], zero at masked positions: what lies before a text is zeros, not bias."""
        streams_BMT = self._project_channels_first(hidden_BTD)
        if mask_BT is not None:
            streams_BMT = streams_BMT * mask_BT.unsqueeze(1).to(streams_BMT.dtype)
        return streams_BMT

    def _project_channels_first(self, hidden_BTD: Tensor) -> Tensor:
        """W x^T straight into [B, M, T]: transposing the module's own [B, T, M] costs half the projection's time again.

        A module that is more than torch's Linear (quantised, adapted, hooked) is called as it is.
        """
        linear = self.in_proj
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return linear(hidden_BTD).transpose(1, 2)
        weight_BMD = linear.weight.expand(hidden_BTD.shape[0], -1, -1)
        if linear.bias is None:
            return torch.bmm(weight_BMD, hidden_BTD.transpose(1, 2))
        return torch.baddbmm(linear.bias.unsqueeze(-1), weight_BMD, hidden_BTD.transpose(1, 2))

    def _convolve_short(self, streams_BMT: Tensor) -> Tensor:
        """The depthwise short convolution of projections which carry their own left context."""
        weight_MK, bias_M = self.short_weight.to(streams_BMT.dtype), self.short_bias.to(streams_BMT.dtype)
        return F.conv1d(streams_BMT, weight_MK.unsqueeze(1), bias_M, groups=weight_MK.shape[0])

    def _convolve_short_within(self, streams_BMT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """The same, one tap at a time, for taps which stay within the document."""
        weight_MK = self.short_weight.to(streams_BMT.dtype)
        mixed_BMT = streams_BMT * weight_MK[:, -1:] + self.short_bias.to(streams_BMT.dtype).unsqueeze(-1)
        inside_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
        for lag in range(1, min(self.short_conv, streams_BMT.shape[-1])):
            joined_BT = document_ids_BT[:, lag:] == document_ids_BT[:, lag - 1 : -1]
            inside_BT = inside_BT[:, :-1] & joined_BT
            shifted_BMT = F.pad(streams_BMT[..., :-lag] * inside_BT.unsqueeze(1).to(streams_BMT.dtype), (lag, 0))
            mixed_BMT = mixed_BMT + shifted_BMT * weight_MK[:, -1 - lag, None]
        return mixed_BMT

    def _mix(self, streams: Tensor, convolve: Convolve, mask_BT: Tensor | None) -> Tensor:
        """The rounds of gate and long convolution, on [B, (N+1) C, T] or on one token's [B, (N+1) C]."""
        *gates, value = streams.chunk(self.order + 1, dim=1)
        for index, gate in enumerate(reversed(gates[1:])):
            gated = value * gate
            if mask_BT is not None:
                gated = gated * (mask_BT.unsqueeze(1) if gated.dim() == 3 else mask_BT).to(gated.dtype)
            skip = self.skip_bias[index].to(gated.dtype)
            value = torch.addcmul(convolve(index, gated), gated, skip.unsqueeze(-1) if gated.dim() == 3 else skip)
        return value * gates[0]

    def _mix_long_prompt(
        self, hidden_BTD: Tensor, context_BKM: Tensor, convolve: Convolve, mask_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """From input to output without gradients, by blocks of tokens, and the context for the tokens to come."""
        project, dtype = blockwise.projector(self.in_proj, hidden_BTD)
        context_BMK = context_BKM.to(dtype).transpose(1, 2).contiguous()
        *gates, value = blockwise.gated_streams(
            project, context_BMK, self.short_weight.to(dtype), self.short_bias.to(dtype),
            order=self.order, mask_BT=mask_BT, length=hidden_BTD.shape[1],
        )  # fmt: skip
        for index in range(self.order - 1):
            gated = value.mul_(gates.pop()) if index else value
            if mask_BT is not None:
                gated.mul_(mask_BT.unsqueeze(1).to(dtype))
            value = convolve(index, gated).addcmul_(gated, self.skip_bias[index].to(dtype).unsqueeze(-1))
        return blockwise.project_gated(self.out_proj, value, gates[0]), context_BMK.transpose(1, 2).contiguous()

    def _convolve_long(self, index: int, u_BCT: Tensor) -> Tensor:
        return self._long_filters()[index].known_taps().convolve(u_BCT)

    def _finish(self, mixed_BCT: Tensor) -> Tensor:
        return self.out_proj(mixed_BCT.transpose(1, 2))
