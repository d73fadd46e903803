"""Filters moved to given taps.

Weights are the importance of each squared deviation, [C, K]. Everything here changes the filter's parameters in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.nn.modal import damped_waves

if TYPE_CHECKING:
    from limbeck.nn.filters import ImplicitFilter, ModalFilter

RIDGE = 1e-5


def relative_error(h_CK: Tensor, target_CK: Tensor, weights_CK: Tensor) -> float:
    """sqrt(sum w (h - target)^2 / sum w target^2); lags that `h_CK` lacks count as zero taps."""
    h_CK = F.pad(h_CK, (0, target_CK.shape[-1] - h_CK.shape[-1])).double()
    target_CK, weights_CK = target_CK.double(), weights_CK.double()
    wrong = (weights_CK * (h_CK - target_CK).square()).sum()
    return float((wrong / (weights_CK * target_CK.square()).sum().clamp(min=1e-300)).sqrt())


def ridge_solve(atoms_CKM: Tensor, target_CK: Tensor, weights_CK: Tensor) -> Tensor:
    """Coefficients [C, M] with the least weighted squares per channel, in float64, with a ridge of `RIDGE`."""
    atoms_CKM = atoms_CKM.double()
    weighted_CMK = (atoms_CKM * weights_CK.double().unsqueeze(-1)).transpose(1, 2)
    return solve_normal(weighted_CMK @ atoms_CKM, (weighted_CMK @ target_CK.double().unsqueeze(-1)).squeeze(-1))


def solve_normal(gram_CMM: Tensor, right_CM: Tensor) -> Tensor:
    """Solve normal equations [C, M] with a ridge relative to the mean of the diagonal."""
    diagonal_CM = gram_CMM.diagonal(dim1=-2, dim2=-1)
    ridge_C1 = RIDGE * diagonal_CM.mean(-1, keepdim=True) + 1e-30
    system_CMM = gram_CMM + torch.diag_embed(ridge_C1.expand_as(diagonal_CM))
    return torch.linalg.solve(system_CMM, right_CM.unsqueeze(-1)).squeeze(-1)


def fit_implicit(long_filter: ImplicitFilter, target_CK: Tensor, weights_CK: Tensor, *, steps: int) -> None:
    """Adam on the inner layers, with the output layer solved for at every step; the best step is kept.

    Source: variable projection, Golub and Pereyra 1973. Adam on all layers at once ends 2 to 4 times further away.
    """
    reach = min(target_CK.shape[-1], long_filter.filter_length)
    target_CK, weights_CK = target_CK[:, :reach], weights_CK[:, :reach]
    energy = (weights_CK * target_CK.square()).sum().clamp(min=1e-30)
    with _trainable(long_filter) as parameters:
        inner = [parameter for parameter in parameters if parameter is not long_filter.output_weight]
        optimizer = torch.optim.Adam(inner, lr=1e-2)
        least, best = math.inf, [parameter.detach().clone() for parameter in parameters]
        for step in range(steps + 1):
            _solve_output_layer(long_filter, target_CK, weights_CK)
            loss = (weights_CK * (long_filter(reach) - target_CK).square()).sum() / energy
            if loss.item() < least:
                least, best = loss.item(), [parameter.detach().clone() for parameter in parameters]
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for kept, parameter in zip(best, parameters):
                parameter.copy_(kept)


def _solve_output_layer(long_filter: ImplicitFilter, target_CK: Tensor, weights_CK: Tensor) -> None:
    with torch.no_grad():
        features_KE = long_filter.features(target_CK.shape[-1]).double()
        window_CK = long_filter.window(target_CK.shape[-1]).T.double()
        outer_KX = (features_KE.unsqueeze(-1) * features_KE.unsqueeze(-2)).flatten(1)
        gram_CEE = ((weights_CK * window_CK.square()) @ outer_KX).unflatten(-1, (features_KE.shape[-1], -1))
        right_CE = (weights_CK * window_CK * target_CK) @ features_KE
        long_filter.output_weight.copy_(solve_normal(gram_CEE, right_CE))


@torch.no_grad()
def fit_modal(long_filter: ModalFilter, target_CK: Tensor, weights_CK: Tensor, *, steps: int) -> None:
    """Pick poles from a fixed grid one by one, solve for residues, refine all by damped Gauss-Newton steps.

    Sums of exponentials are ill-conditioned: Adam with fifteen times the steps ends up to ten times further away.
    """
    target_CK, weights_CK = target_CK.double(), weights_CK.double()
    rate_CN, angle_CN, residue_CNX = _pick_poles(target_CK, weights_CK, modes=long_filter.modes)
    start_CXN = torch.stack((rate_CN.log(), angle_CN, residue_CNX[..., 0], residue_CNX[..., 1]), dim=1)
    log_rate_CN, angle_CN, real_CN, imag_CN = _refine_modes(
        start_CXN, target_CK, weights_CK.sqrt(), steps=steps
    ).unbind(1)
    long_filter.set_poles(log_rate_CN.exp(), angle_CN)
    long_filter.residue_real_CN.copy_(real_CN)
    long_filter.residue_imag_CN.copy_(imag_CN)


def _refine_modes(modes_CXN: Tensor, target_CK: Tensor, root_CK: Tensor, *, steps: int) -> Tensor:
    """Levenberg-Marquardt on log rate, angle and residue (X = 4), every channel with a damping of its own."""
    residual_CK, waves_CNK = _modal_residual(modes_CXN, target_CK, root_CK)
    loss_C = residual_CK.square().sum(-1)
    damping_C = torch.full_like(loss_C, 1e-2)
    for _ in range(steps):
        jacobian_CMK = _modal_jacobian(modes_CXN, waves_CNK, root_CK)
        gram_CMM = jacobian_CMK @ jacobian_CMK.transpose(1, 2)
        diagonal_CM = gram_CMM.diagonal(dim1=-2, dim2=-1)
        damped_CM = damping_C.unsqueeze(-1) * (diagonal_CM + 1e-6 * diagonal_CM.mean(-1, keepdim=True)) + 1e-30
        slope_CM1 = jacobian_CMK @ residual_CK.unsqueeze(-1)
        move_CXN = torch.linalg.solve(gram_CMM + torch.diag_embed(damped_CM), slope_CM1).view_as(modes_CXN)
        tried_CXN = modes_CXN - move_CXN
        tried_CXN[:, 0].clamp_(min=-14.0, max=4.0)
        tried_residual_CK, tried_waves_CNK = _modal_residual(tried_CXN, target_CK, root_CK)
        tried_loss_C = tried_residual_CK.square().sum(-1)
        better_C = tried_loss_C < loss_C
        better_C1, better_C11 = better_C.unsqueeze(-1), better_C[:, None, None]
        modes_CXN, waves_CNK = (
            torch.where(better_C11, tried_CXN, modes_CXN),
            torch.where(better_C11, tried_waves_CNK, waves_CNK),
        )
        residual_CK, loss_C = (
            torch.where(better_C1, tried_residual_CK, residual_CK),
            torch.where(better_C, tried_loss_C, loss_C),
        )
        damping_C = torch.where(better_C, damping_C / 4, damping_C * 3).clamp(1e-9, 1e6)
    return modes_CXN


def _modal_residual(modes_CXN: Tensor, target_CK: Tensor, root_CK: Tensor) -> tuple[Tensor, Tensor]:
    waves_CNK = damped_waves(modes_CXN[:, 0].exp(), modes_CXN[:, 1], count=target_CK.shape[-1])
    h_CK = (torch.complex(modes_CXN[:, 2], modes_CXN[:, 3]).unsqueeze(-1) * waves_CNK).real.sum(1)
    return root_CK * (h_CK - target_CK), waves_CNK


def _modal_jacobian(modes_CXN: Tensor, waves_CNK: Tensor, root_CK: Tensor) -> Tensor:
    lag_K = torch.arange(root_CK.shape[-1], device=root_CK.device, dtype=root_CK.dtype)
    slopes_CNK = torch.complex(modes_CXN[:, 2], modes_CXN[:, 3]).unsqueeze(-1) * waves_CNK * lag_K
    by_rate_CNK = -modes_CXN[:, 0].exp().unsqueeze(-1) * slopes_CNK.real
    columns = (by_rate_CNK, -slopes_CNK.imag, waves_CNK.real, -waves_CNK.imag)
    return torch.cat(columns, dim=1) * root_CK.unsqueeze(1)


def _grid(length: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rates and angles [G]: 14 time constants from half a token to 4 K by 13 angles, 0 and from pi / K to pi, in equal ratios."""
    constant = torch.logspace(math.log10(0.5), math.log10(4 * length), 14, dtype=torch.float64, device=device)
    angle = torch.logspace(math.log10(math.pi / length), math.log10(math.pi), 12, dtype=torch.float64, device=device)
    angle = torch.cat((angle.new_zeros(1), angle))
    return (1 / constant).repeat_interleave(len(angle)), angle.repeat(len(constant))


def _atoms(rate: Tensor, angle: Tensor, *, length: int) -> Tensor:
    """Real and imaginary part of lambda^t as columns: [..., K, 2] for rates [...]."""
    waves = damped_waves(rate.unsqueeze(-1), angle.unsqueeze(-1), count=length)[..., 0, :]
    return torch.stack((waves.real, -waves.imag), dim=-1)


def _pick_poles(target_CK: Tensor, weights_CK: Tensor, *, modes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonal matching pursuit over the grid, all channels at once: rates, angles [C, N] and residues [C, N, 2]."""
    channels, length = target_CK.shape
    rate_G, angle_G = _grid(length, device=target_CK.device)
    atoms_GKX = _atoms(rate_G, angle_G, length=length)
    importance_K = weights_CK.mean(0)
    basis_GKX = _orthonormal_pairs(atoms_GKX * importance_K.sqrt().unsqueeze(-1))
    basis_KX = basis_GKX.transpose(0, 1).flatten(1)
    chosen_CN = torch.zeros(channels, 0, dtype=torch.long, device=target_CK.device)
    residual_CK = target_CK
    for _ in range(modes):
        score_CG = ((residual_CK * importance_K.sqrt()) @ basis_KX).square().unflatten(-1, (-1, 2)).sum(-1)
        score_CG = score_CG.scatter(1, chosen_CN, -1.0)
        chosen_CN = torch.cat((chosen_CN, score_CG.argmax(-1, keepdim=True)), dim=1)
        atoms_CKM = atoms_GKX[chosen_CN].transpose(1, 2).flatten(2)
        solution_CM = ridge_solve(atoms_CKM, target_CK, weights_CK)
        residual_CK = target_CK - (atoms_CKM @ solution_CM.unsqueeze(-1)).squeeze(-1)
    return rate_G[chosen_CN], angle_G[chosen_CN], solution_CM.unflatten(-1, (-1, 2))


def _orthonormal_pairs(pair_GKX: Tensor) -> Tensor:
    first = F.normalize(pair_GKX[..., 0], dim=-1)
    second = pair_GKX[..., 1] - (pair_GKX[..., 1] * first).sum(-1, keepdim=True) * first
    size = second.norm(dim=-1, keepdim=True)
    second = torch.where(size > 1e-6 * pair_GKX[..., 0].norm(dim=-1, keepdim=True), second / size.clamp(min=1e-30), 0.0)
    return torch.stack((first, second), dim=-1)


@contextmanager
def _trainable(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters with gradients on, whatever they were; gradients held before are put back."""
    parameters = list(module.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield parameters
    for parameter, (requires_grad, grad) in zip(parameters, before):
        parameter.grad = grad
        parameter.requires_grad_(requires_grad)
