"""Causal long convolution, four ways which give the same numbers.

All take inputs u [B, C, T] and taps h [C, K] and return y [B, C, T] with y_t = sum over s <= t, t - s < K of
h_{t-s} u_s. Half-precision inputs are computed in float32 and the result is cast back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from limbeck.core.errors import RecipeError, unknown_name

LARGEST_FFT = 2**30
CHANNEL_BLOCK = 32


def _friendly_sizes() -> tuple[int, ...]:
    sizes = [2]
    for prime in (2, 3, 5):
        for size in list(sizes):
            while (size := size * prime) <= LARGEST_FFT:
                sizes.append(size)
    return tuple(sorted(sizes))


# Every even number 2^a 3^b 5^c up to LARGEST_FFT, in order.
_SIZES = _friendly_sizes()


def fft_size(minimum: int) -> int:
    """Smallest even size >= minimum whose only prime factors are 2, 3 and 5: other sizes are 3 to 8 times slower.

    Raises: ValueError above 2^30.
    """
    if minimum > LARGEST_FFT:
        raise ValueError(f"a convolution of {minimum} points is larger than the largest supported, {LARGEST_FFT}")
    low, high = 0, len(_SIZES) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _SIZES[middle] < minimum else (low, middle)
    return _SIZES[low]


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of the tensors' and float32 (there is no half-precision FFT on CPU)."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which matrix products keep the precision of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def convolution_window(
    u_BCL: Tensor, h_CK: Tensor, *, start: int, stop: int, spectrum_CF: Tensor | None = None
) -> Tensor:
    """Outputs start..stop-1 of the full linear convolution of u and h, by one FFT; they may lie beyond the input's end.

    The circular product may wrap onto outputs before `start`, so the transform has only max(stop, L + K - 1 - start)
    points or slightly more. `spectrum_CF` is the taps' spectrum at `window_size(...)`, when known. Differentiable.
    Returns [B, C, stop - start].
    """
    size = window_size(u_BCL.shape[-1], h_CK.shape[-1], start=start, stop=stop)
    if torch.is_grad_enabled() and (u_BCL.requires_grad or h_CK.requires_grad):
        product_BCF = torch.fft.rfft(u_BCL, n=size) * torch.fft.rfft(h_CK, n=size)
        return torch.fft.irfft(product_BCF, n=size)[..., start:stop]
    y_BCX = u_BCL.new_empty(*u_BCL.shape[:-1], stop - start)
    channels = u_BCL.shape[1]
    block = CHANNEL_BLOCK if u_BCL.device.type == "cpu" and u_BCL.shape[0] * size >= 2048 else channels
    for first in range(0, channels, block):
        part = slice(first, first + block)
        h_CF = torch.fft.rfft(h_CK[part], n=size) if spectrum_CF is None else spectrum_CF[part]
        product_BCF = torch.fft.rfft(u_BCL[:, part], n=size).mul_(h_CF)
        y_BCX[:, part] = torch.fft.irfft(product_BCF, n=size)[..., start:stop]
    return y_BCX


def window_size(length: int, taps: int, *, start: int, stop: int) -> int:
    """The FFT size that `convolution_window` uses."""
    return fft_size(max(stop, length + taps - 1 - start))


def direct_convolution(u_BCT: Tensor, h_CK: Tensor) -> Tensor:
    """One multiply-add per tap and token: best when there are few taps."""
    taps = h_CK.shape[-1]
    padded_BCT = F.pad(u_BCT, (taps - 1, 0))
    return F.conv1d(padded_BCT, h_CK.flip(-1).unsqueeze(1), groups=h_CK.shape[0])


def toeplitz_convolution(u_BCT: Tensor, h_CK: Tensor) -> Tensor:
    """Batched product with the lower triangular Toeplitz matrices: best when tokens are few and rows are many."""
    return torch.matmul(toeplitz_matrix(h_CK, u_BCT.shape[-1]), u_BCT.unsqueeze(-1)).squeeze(-1)


def toeplitz_matrix(h_CK: Tensor, length: int) -> Tensor:
    """Lower triangular Toeplitz matrices [C, T, T] with entry (i, j) = h_{i-j}."""
    padded_CK = F.pad(h_CK[:, :length], (length - 1, max(0, length - h_CK.shape[-1])))
    return padded_CK.flip(-1).unfold(-1, length, 1).flip(-2)


class _FFTConvolution(torch.autograd.Function):
    """Zero-padded FFT convolution, a block of channels at a time, which keeps both spectra for the backward pass.

    Plain autograd pads and transforms complex tensors of full size in the backward pass: about 1.5 times slower.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, u_BCT: Tensor, h_CK: Tensor, block: int) -> Tensor:  # type: ignore[override]
        length, taps = u_BCT.shape[-1], h_CK.shape[-1]
        size = fft_size(length + taps - 1)
        y_BCT = torch.empty_like(u_BCT)
        spectra: list[Tensor] = []
        needs_grad = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        for first in range(0, u_BCT.shape[1], block):
            channels = slice(first, first + block)
            u_BCF, h_CF = torch.fft.rfft(u_BCT[:, channels], n=size), torch.fft.rfft(h_CK[channels], n=size)
            if needs_grad:
                spectra += [u_BCF, h_CF]
            product_BCF = u_BCF * h_CF if needs_grad else u_BCF.mul_(h_CF)
            y_BCT[:, channels] = torch.fft.irfft(product_BCF, n=size)[..., :length]
        ctx.save_for_backward(*spectra)
        ctx.sizes = (size, length, taps, block)  # type: ignore[attr-defined]
        return y_BCT

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BCT: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        size, length, taps, block = ctx.sizes  # type: ignore[attr-defined]
        spectra: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_u, needs_h = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_u_BCT = torch.empty_like(grad_BCT) if needs_u else None
        grad_h_CK = grad_BCT.new_empty(grad_BCT.shape[1], taps) if needs_h else None
        for index in range(len(spectra) // 2):
            channels = slice(index * block, (index + 1) * block)
            u_BCF, h_CF = spectra[2 * index], spectra[2 * index + 1]
            grad_BCF = torch.fft.rfft(grad_BCT[:, channels], n=size)
            if grad_h_CK is not None:
                product_CF = (grad_BCF * u_BCF.conj()).sum(0)
                grad_h_CK[channels] = torch.fft.irfft(product_CF, n=size)[..., :taps]
            if grad_u_BCT is not None:
                grad_u_BCT[:, channels] = torch.fft.irfft(grad_BCF.mul_(h_CF.conj()), n=size)[..., :length]
        return grad_u_BCT, grad_h_CK, None


def fft_convolution(u_BCT: Tensor, h_CK: Tensor) -> Tensor:
    """All channels in one zero-padded FFT."""
    return _FFTConvolution.apply(u_BCT, h_CK, max(1, u_BCT.shape[1]))


def chunked_fft_convolution(u_BCT: Tensor, h_CK: Tensor) -> Tensor:
    """`CHANNEL_BLOCK` channels at a time: large fresh buffers cost a CPU more in page faults than the FFT itself."""
    return _FFTConvolution.apply(u_BCT, h_CK, CHANNEL_BLOCK)


def choose_algorithm(*, rows: int, length: int, taps: int, device_type: str, needs_grad: bool) -> str:
    """The fastest algorithm for B rows of T tokens and K taps.

    Measured with 512 channels on one thread of an AVX-512 CPU, ms forward (forward + backward):
    K = T = 64, B = 1: direct 0.15 (1.9), fft 0.21 (0.57); K = 64, T = 2048: direct 2.2 (47), chunked 5.2 (12); K = 128,
    T = 1024: direct 1.9 (46), fft 2.2 (5.3). So direct pays for few taps, and never where gradients are needed.
    T = K = 512, B = 1: fft 1.5, chunked 1.8; 2048: fft 10, chunked 8; 8192: fft 140, chunked 40. B = 8: 64: fft 1.0,
    chunked 1.2; 512: fft 16, chunked 12. So chunks pay from about a thousand tokens in all rows together.
    Toeplitz matrices never won (T = 32: 0.5 against 0.1).
    """
    if device_type != "cpu":
        return "fft"
    if taps <= 64 and not needs_grad:
        return "direct"
    return "chunked_fft" if rows * length >= 1024 else "fft"


def causal_convolution(u_BCT: Tensor, h_CK: Tensor, *, algorithm: str = "auto") -> Tensor:
    """y_t = sum of h_{t-s} u_s over s <= t with t - s < K, per channel.

    `u_BCT`: [B, C, T]; `h_CK`: [C, K], any K >= 1; taps beyond T are not used. Gradients flow to both.
    `algorithm`: a name in `CONVOLUTIONS`, or "auto" for the fastest at this length on this device.
    Returns [B, C, T] in the dtype of `u_BCT`.

    Raises: RecipeError for an unknown algorithm; ValueError when the shapes do not fit.
    """
    if u_BCT.dim() != 3 or h_CK.dim() != 2 or u_BCT.shape[1] != h_CK.shape[0] or h_CK.shape[1] < 1:
        raise ValueError(
            f"expected inputs [B, C, T] and taps [C, K >= 1], got {tuple(u_BCT.shape)} and {tuple(h_CK.shape)}"
        )
    length = u_BCT.shape[-1]
    if u_BCT.numel() == 0:
        return u_BCT
    h_CK = h_CK[:, :length]
    if algorithm == "auto":
        needs_grad = torch.is_grad_enabled() and (u_BCT.requires_grad or h_CK.requires_grad)
        algorithm = choose_algorithm(
            rows=u_BCT.shape[0],
            length=length,
            taps=h_CK.shape[-1],
            device_type=u_BCT.device.type,
            needs_grad=needs_grad,
        )
    if algorithm not in CONVOLUTIONS:
        raise RecipeError(unknown_name("convolution algorithm", algorithm, [*CONVOLUTIONS, "auto"]))
    dtype = working_dtype(u_BCT, h_CK)
    with without_autocast(u_BCT):
        return CONVOLUTIONS[algorithm](u_BCT.to(dtype), h_CK.to(dtype)).to(u_BCT.dtype)


CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "direct": direct_convolution,
    "toeplitz": toeplitz_convolution,
    "fft": fft_convolution,
    "chunked_fft": chunked_fft_convolution,
}
