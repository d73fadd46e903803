"""A filter whose weights stand still: its taps and spectra, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from limbeck.nn.fftconv import causal_convolution, choose_algorithm, convolution_window, window_size, working_dtype


class KnownTaps:
    """Taps of a filter for any length asked, and the spectra in use.

    `support`: the number of taps that can differ from zero, or None when there is no end to them. `lasting`: whether
    the object will serve many calls, so that spectra are worth keeping.
    """

    def __init__(self, evaluate: Callable[[int], Tensor], *, support: int | None, lasting: bool = True):
        self.support, self.lasting = support, lasting
        self._evaluate = evaluate
        self._taps_CK: Tensor | None = None
        self._whole: tuple[tuple[int, int], Tensor] | None = None
        self._constants: dict[Hashable, Tensor] = {}

    def reach(self, length: int) -> int:
        """How many of the first `length` taps exist."""
        return length if self.support is None else min(length, self.support)

    def head(self, length: int) -> Tensor:
        """The first `length` taps [C, K], K = min(length, support)."""
        length = self.reach(length)
        known = 0 if self._taps_CK is None else self._taps_CK.shape[-1]
        if self._taps_CK is None or known < length:
            self._taps_CK = self._evaluate(self.reach(max(length, 2 * known)))
        return self._taps_CK[:, :length]

    def tile_spectrum(self, size: int) -> Tensor:
        """Real FFT [C, size / 2 + 1] of the first `size` taps."""
        return self.constant(("tile", size), lambda: torch.fft.rfft(self.head(size), n=size))

    def _whole_spectrum(self, taps: int, size: int) -> Tensor:
        """The spectrum for a whole sequence. Only the last one is kept: they are as large as the sequence."""
        if self._whole is None or self._whole[0] != (taps, size):
            self._whole = ((taps, size), torch.fft.rfft(self.head(taps), n=size))
        return self._whole[1]

    def convolve(self, u_BCT: Tensor) -> Tensor:
        """Causal convolution of [B, C, T] with the taps, in the dtype of the input."""
        length = u_BCT.shape[-1]
        if not self.lasting or u_BCT.requires_grad or length == 0:
            return causal_convolution(u_BCT, self.head(length))
        taps, rows = self.reach(length), u_BCT.shape[0]
        algorithm = choose_algorithm(
            rows=rows, length=length, taps=taps, device_type=u_BCT.device.type, needs_grad=False
        )
        if "fft" not in algorithm:
            return causal_convolution(u_BCT, self.head(length), algorithm=algorithm)
        spectrum_CF = self._whole_spectrum(taps, window_size(length, taps, start=0, stop=length))
        wide_BCT = u_BCT.to(working_dtype(u_BCT, spectrum_CF.real))
        return convolution_window(wide_BCT, self.head(length), start=0, stop=length, spectrum_CF=spectrum_CF).to(
            u_BCT.dtype
        )

    def constant(self, name: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on the filter's weights alone, computed once."""
        if name not in self._constants:
            self._constants[name] = compute()
        return self._constants[name]
