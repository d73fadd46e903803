"""Exact convolution while inputs still arrive: what a Hyena layer remembers during generation.

Both memories take chunks of any length and single tokens in any order, and give what the convolution of the whole
input would. They change in place; `clone` to branch. Gradients flow through the chunk given, never into the past.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.nn.fftconv import convolution_window, without_autocast
from limbeck.nn.filters import LongFilter, ModalFilter
from limbeck.nn.modal import damped_waves, modal_taps, real_pairs
from limbeck.nn.taps import KnownTaps

BLOCK = 64
SHORT_CHUNK = 16
STATE_BLOCK = 128


@dataclass
class OnlineConvolution:
    """Inputs so far, and the sums they will contribute to outputs to come.

    Time is cut into blocks of `BLOCK` tokens. Inside a block each input is pushed straight onto the block's outputs.
    At the end of a block that ends at m tokens, the last P tokens (P the largest power of two dividing m) are
    convolved onto the P tokens to come, by one cyclic FFT of 2 P points; so every pair (input, output) is met exactly
    once, and a token costs O(log^2) on average, with memory O(L). `pending_BCH` reaches a power of two of tokens ahead of
    the last restart; when they are used up, one FFT of the history opens the next, as long as the history or half of it.
    Filters with bounded support bound both.
    Source: van der Hoeven 2002 (relaxed multiplication); Oncescu et al. 2024, arXiv:2410.12982, algorithm 2; the
    restart after a prompt: Agarwal et al. 2024, arXiv:2410.03766.
    """

    history_BCL: Tensor
    pending_BCH: Tensor
    block_inputs_BPC: Tensor
    block_outputs_BPC: Tensor
    filled: int = 0
    time: int = 0

    @staticmethod
    def empty(batch: int, channels: int, *, device: torch.device | str, dtype: torch.dtype) -> OnlineConvolution:
        """The memory before the first token."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        return OnlineConvolution(zeros(channels, 0), zeros(channels, 0), zeros(BLOCK, channels), zeros(BLOCK, channels))

    def map(self, fn: Callable[[Tensor], Tensor]) -> OnlineConvolution:
        """A memory with `fn` applied to every tensor; all are batch-first."""
        return OnlineConvolution(
            fn(self.history_BCL), fn(self.pending_BCH), fn(self.block_inputs_BPC), fn(self.block_outputs_BPC),
            self.filled, self.time,
        )  # fmt: skip

    def extend(self, u_BCT: Tensor, long_filter: LongFilter) -> Tensor:
        """Take in a chunk [B, C, T] and return its outputs [B, C, T]."""
        known = long_filter.known_taps()
        if u_BCT.shape[-1] <= SHORT_CHUNK and not torch.is_grad_enabled():
            return torch.stack([self._step(u_BC, known) for u_BC in u_BCT.unbind(-1)], dim=-1)
        return self._restart(u_BCT, known)

    def step(self, u_BC: Tensor, long_filter: LongFilter) -> Tensor:
        """Take in one token [B, C] and return its output [B, C]. No gradients."""
        return self._step(u_BC, long_filter.known_taps())

    def _step(self, u_BC: Tensor, known: KnownTaps) -> Tensor:
        place = self.time % BLOCK
        if place == 0:
            if self.time == self.pending_BCH.shape[-1]:
                self._restart(u_BC.new_zeros(*u_BC.shape, 0), known)
            ahead_BCP = self.pending_BCH[..., self.time : self.time + BLOCK]
            self.block_outputs_BPC = ahead_BCP.transpose(1, 2).contiguous()
        lags_PC = known.constant("block", lambda: _block_lags(known))
        self.block_inputs_BPC[:, place] = u_BC
        self.block_outputs_BPC[:, place:].addcmul_(u_BC.unsqueeze(1), lags_PC[: BLOCK - place])
        self.time += 1
        if place == BLOCK - 1:
            self._finish_block(known)
        return self.block_outputs_BPC[:, place]

    def _finish_block(self, known: KnownTaps) -> None:
        self.history_BCL[..., self.filled : self.filled + BLOCK] = self.block_inputs_BPC.transpose(1, 2)
        self.filled += BLOCK
        if self.time < self.pending_BCH.shape[-1]:
            tile = self.time & -self.time
            inputs_BCP = self.history_BCL[..., self.filled - tile : self.filled]
            ahead_BCP = convolution_window(
                inputs_BCP,
                known.head(2 * tile),
                start=tile,
                stop=2 * tile,
                spectrum_CF=known.tile_spectrum(2 * tile),
            )
            self.pending_BCH[..., self.time : self.time + tile] += ahead_BCP

    def _restart(self, u_BCT: Tensor, known: KnownTaps) -> Tensor:
        """Take in a chunk of T >= 0 tokens and refill the pending sums, with one FFT of what still counts."""
        place = self.time % BLOCK
        past_BCL = self.history_BCL[..., : self.filled]
        if place:
            past_BCL = torch.cat((past_BCL, self.block_inputs_BPC[:, :place].transpose(1, 2)), dim=-1)
        past_BCL = past_BCL[..., past_BCL.shape[-1] - known.reach(past_BCL.shape[-1] + 1) + 1 :]
        past, total = past_BCL.shape[-1], past_BCL.shape[-1] + u_BCT.shape[-1]
        horizon = _next_horizon(total, known.support)
        all_BCL = torch.cat((past_BCL, u_BCT), dim=-1) if past else u_BCT
        if total:
            outputs_BCX = convolution_window(all_BCL, known.head(total + horizon), start=past, stop=total + horizon)
        else:
            outputs_BCX = u_BCT.new_zeros(*u_BCT.shape[:2], horizon)
        self.pending_BCH = outputs_BCX[..., u_BCT.shape[-1] :].detach().clone()
        self.filled = known.reach(total + 1) - 1
        history_BCL = all_BCL.new_zeros(*all_BCL.shape[:2], self.filled + horizon)
        history_BCL[..., : self.filled] = all_BCL[..., total - self.filled :].detach()
        self.history_BCL, self.time = history_BCL, 0
        return outputs_BCX[..., : u_BCT.shape[-1]]


def _next_horizon(total: int, support: int | None) -> int:
    """How many tokens ahead to sum: a power of two, more than half of the history, no more than the support needs."""
    wanted = max(BLOCK, 1 << (total // 2).bit_length())
    return wanted if support is None else min(wanted, max(BLOCK, 1 << (support - 1).bit_length()))


def _block_lags(known: KnownTaps) -> Tensor:
    head_CK = known.head(BLOCK)
    lags_PC = head_CK.new_zeros(BLOCK, head_CK.shape[0])
    lags_PC[: head_CK.shape[-1]] = head_CK.T
    return lags_PC


@dataclass
class ModalRecurrence:
    """The state S [B, N, C] of a modal filter: S <- lambda S + u, y = Re sum_n R_n S_n. Constant memory, constant time.

    Complex64 at least: half-precision states drift.
    Source: Massaroli et al. 2023, arXiv:2310.18780, section 3.3; here h_0 is part of the modes.
    """

    state_BNC: Tensor
    is_fresh: bool = True

    @staticmethod
    def empty(
        batch: int, channels: int, modes: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> ModalRecurrence:
        """The state before the first token. `dtype`: real."""
        return ModalRecurrence(torch.zeros(batch, modes, channels, device=device, dtype=dtype.to_complex()))

    def map(self, fn: Callable[[Tensor], Tensor]) -> ModalRecurrence:
        """A state with `fn` applied to its tensor, which is batch-first."""
        return ModalRecurrence(fn(self.state_BNC), self.is_fresh)

    def extend(self, u_BCT: Tensor, long_filter: LongFilter) -> Tensor:
        """Take in a chunk [B, C, T] and return its outputs [B, C, T]."""
        assert isinstance(long_filter, ModalFilter)
        length = u_BCT.shape[-1]
        known, rate_CN, angle_CN = long_filter.known_taps(), long_filter.rates_CN(), long_filter.angles_CN()
        past_BCN = self.state_BNC.transpose(1, 2)
        with without_autocast(u_BCT):
            y_BCT = known.convolve(u_BCT)
            if not self.is_fresh:
                carried_BCN = long_filter.residues_CN() * long_filter.poles_CN() * past_BCN
                y_BCT = y_BCT + modal_taps(rate_CN, angle_CN, carried_BCN, length=length)
            with torch.no_grad():
                decay_CN = damped_waves(rate_CN, angle_CN, start=length, count=1)[..., 0]
                state_BCN = decay_CN * past_BCN + _summed_state(u_BCT, rate_CN, angle_CN, known)
        self.state_BNC, self.is_fresh = state_BCN.transpose(1, 2).contiguous(), False
        return y_BCT

    def step(self, u_BC: Tensor, long_filter: LongFilter) -> Tensor:
        """Take in one token [B, C] and return its output [B, C]. No gradients."""
        assert isinstance(long_filter, ModalFilter)
        known = long_filter.known_taps()
        poles_NC = known.constant("poles", lambda: long_filter.poles_CN().detach().T.contiguous())
        residues_NC = known.constant("residues", lambda: long_filter.residues_CN().detach().T.contiguous())
        self.is_fresh = False
        self.state_BNC.mul_(poles_NC).add_(u_BC.unsqueeze(1))
        return (self.state_BNC * residues_NC).sum(1).real


def _summed_state(u_BCT: Tensor, rate_CN: Tensor, angle_CN: Tensor, known: KnownTaps) -> Tensor:
    """sum_s lambda^(T-1-s) u_s: [B, C, N], by blocks: nothing larger than T N / 128 complex numbers is made."""
    if u_BCT.shape[-1] % STATE_BLOCK:
        u_BCT = torch.nn.functional.pad(u_BCT, (-u_BCT.shape[-1] % STATE_BLOCK, 0))
    u_BCRP = u_BCT.unflatten(-1, (-1, STATE_BLOCK))

    def within_block() -> Tensor:
        return real_pairs(damped_waves(rate_CN, angle_CN, count=STATE_BLOCK).flip(-1).transpose(-1, -2))

    coarse_CNR = damped_waves(rate_CN, angle_CN, step=STATE_BLOCK, count=u_BCRP.shape[-2]).flip(-1)
    sums_BCRX = u_BCRP @ known.constant("within_block", within_block)
    sums_BCRN = torch.view_as_complex(sums_BCRX.unflatten(-1, (-1, 2)))
    return (sums_BCRN * coarse_CNR.transpose(-1, -2)).sum(-2)


def init_memory(
    long_filter: LongFilter, batch: int, *, device: torch.device | str, dtype: torch.dtype
) -> OnlineConvolution | ModalRecurrence:
    """The memory that suits a filter, before the first token, in float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    if isinstance(long_filter, ModalFilter):
        return ModalRecurrence.empty(batch, long_filter.channels, long_filter.modes, device=device, dtype=dtype)
    return OnlineConvolution.empty(batch, long_filter.channels, device=device, dtype=dtype)
