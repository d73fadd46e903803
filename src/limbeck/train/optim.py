"""Optimisers and schedules: torch's own AdamW and Muon, over groups with their own learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["cosine", "wsd", "constant"]


class OptimizerSet:
    """One or two optimisers stepped as one, with a common learning-rate scale."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def step(self, *, scale: float) -> None:
        """One update with every group's learning rate multiplied by `scale`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as named tensors, for safetensors."""
        tensors: dict[str, Tensor] = {}
        for number, optimizer in enumerate(self.optimizers):
            for place, parameter in enumerate(_parameters(optimizer)):
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{number}.{place}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        for name, value in tensors.items():
            number, place, key = name.split(".", 2)
            optimizer = self.optimizers[int(number)]
            parameter = _parameters(optimizer)[int(place)]
            keep_on_cpu = key == "step" and not optimizer.defaults.get("capturable", False)
            optimizer.state[parameter][key] = value.clone() if keep_on_cpu else value.to(parameter.device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: str,
    learning_rate: float,
    mixer_learning_rate: float | None,
    mixer_names: frozenset[str],
    weight_decay: float,
    betas: tuple[float, float],
) -> OptimizerSet:
    """Group trainable parameters and build their optimiser.

    Parameters named in `mixer_names` use `mixer_learning_rate`. Weight decay falls on matrices alone: not on vectors,
    and not on filter parameters (marked `_no_weight_decay`), as in the Hyena paper's settings. `muon` updates the
    matrices of the blocks with torch's Muon (update size matched to AdamW's) and all else with AdamW.
    Source: Muon: Jordan et al. 2024; learning-rate matching: arXiv:2502.16982, section 2.2.
    """
    adamw: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    muon: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        is_mixer = name in mixer_names
        is_plain_matrix = parameter.ndim == 2 and not getattr(parameter, "_no_weight_decay", False)
        if kind == "muon" and is_plain_matrix and not _is_vocabulary(name):
            muon.setdefault(is_mixer, []).append(parameter)
        else:
            adamw.setdefault((is_mixer, is_plain_matrix), []).append(parameter)

    def rate(is_mixer: bool) -> float:
        return mixer_learning_rate if is_mixer and mixer_learning_rate is not None else learning_rate

    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        groups = [
            {"params": parameters, "lr": rate(is_mixer), "weight_decay": weight_decay if decays else 0.0}
            for (is_mixer, decays), parameters in sorted(adamw.items())
        ]
        optimizers.append(torch.optim.AdamW(groups, betas=betas, foreach=True))
    if muon:
        groups = [{"params": parameters, "lr": rate(is_mixer)} for is_mixer, parameters in sorted(muon.items())]
        optimizers.append(torch.optim.Muon(groups, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return OptimizerSet(optimizers)


def _is_vocabulary(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "wpe", "lm_head"))


def learning_rate_scale(
    step: int, steps: int, *, schedule: Schedule, warmup_share: float, decay_share: float, final_share: float
) -> float:
    """Factor on the learning rate for update number `step` (from 0) of `steps`.

    Linear warm-up over `warmup_share` of the updates; then `cosine` falls to `final_share`, `wsd` stays and falls
    linearly over the last `decay_share`, `constant` stays.
    Source: cosine: arXiv:1608.03983; warm-up/stable/decay: arXiv:2404.06395, section 4.
    """
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = max(1, round(decay_share * steps))
    remaining = (steps - step) / decay
    return 1.0 if remaining >= 1 else final_share + (1 - final_share) * remaining
