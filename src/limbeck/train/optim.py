"""Optimisers and schedules: torch's own AdamW and Muon, over groups with their own learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["cosine", "wsd", "constant"]
DecaySchedule = Literal["constant", "linear"]


class OptimizerSet:
    """One or two optimisers stepped as one, with a common learning-rate scale.

    cautious_decay: weight decay falls on a weight only where the step itself moves it towards zero, or not at all.
    Source: Chen et al. 2025 (cautious weight decay), arXiv:2510.12402; the sign of the step is that of the weight's own
    change, so it is right for any optimiser, and where it is rounded away the weight decays.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], *, cautious_decay: bool = False):
        self.optimizers, self.cautious_decay = optimizers, cautious_decay
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["base_lr"], group["base_decay"] = group["lr"], group["weight_decay"]

    def step(self, *, scale: float, decay_scale: float = 1.0) -> None:
        """One update with every group's learning rate multiplied by `scale`, and its weight decay by `decay_scale`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                group["weight_decay"] = group["base_decay"] * decay_scale
            if self.cautious_decay:
                _step_cautiously(optimizer)
            else:
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


@torch.no_grad()
def _step_cautiously(optimizer: torch.optim.Optimizer) -> None:
    decaying = [
        (parameter, parameter.detach().clone(), group["lr"] * group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"] > 0 and parameter.grad is not None
    ]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    for parameter, before, strength in decaying:
        agrees = torch.sign(before - parameter) * torch.sign(before) >= 0
        parameter.sub_(strength * before * agrees)


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: str,
    learning_rate: float,
    mixer_learning_rate: float | None,
    mixer_names: frozenset[str],
    weight_decay: float,
    betas: tuple[float, float],
    embedding_learning_rate: float | None = None,
    scalar_learning_rate: float | None = None,
    cautious_decay: bool = False,
) -> OptimizerSet:
    """Group trainable parameters and build their optimiser.

    Parameters named in `mixer_names` use `mixer_learning_rate` when there is one. Weight decay falls on matrices alone:
    not on vectors, and not on filter parameters (marked `_no_weight_decay`), as in the Hyena paper's settings. `muon`
    updates the matrices of the blocks with torch's Muon (update size matched to AdamW's) and all else with AdamW.
    embedding_learning_rate: a rate of their own for embeddings and heads, which then do not decay: that rate is tens of
    times the others', and decay is in proportion to it. scalar_learning_rate: one for vectors and scalars (norms, biases,
    residual scales), filter parameters excepted; what suits a shift may be far too much for a factor. None: as all others.
    Source: Muon: Jordan et al. 2024; learning-rate matching: arXiv:2502.16982, section 2.2; rates by kind of parameter:
    modded-nanogpt and nanochat.
    """
    rates = {"": learning_rate, "embedding": embedding_learning_rate, "scalar": scalar_learning_rate}
    adamw: dict[tuple[bool, str, bool], list[nn.Parameter]] = {}
    muon: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        is_mixer = name in mixer_names
        is_plain_matrix = parameter.ndim == 2 and not getattr(parameter, "_no_weight_decay", False)
        if kind == "muon" and is_plain_matrix and not _is_vocabulary(name):
            muon.setdefault(is_mixer, []).append(parameter)
        else:
            has_mixer_rate = is_mixer and mixer_learning_rate is not None
            own = "" if has_mixer_rate else _kind_of(name, parameter)
            own = own if rates[own] is not None else ""
            adamw.setdefault((is_mixer, own, is_plain_matrix and own == ""), []).append(parameter)

    def rate(is_mixer: bool, own: str = "") -> float | None:
        return mixer_learning_rate if is_mixer and own == "" and mixer_learning_rate is not None else rates[own]

    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        groups = [
            {"params": parameters, "lr": rate(is_mixer, own), "weight_decay": weight_decay if decays else 0.0}
            for (is_mixer, own, decays), parameters in sorted(adamw.items())
        ]
        optimizers.append(torch.optim.AdamW(groups, betas=betas, foreach=True))
    if muon:
        groups = [{"params": parameters, "lr": rate(is_mixer)} for is_mixer, parameters in sorted(muon.items())]
        optimizers.append(torch.optim.Muon(groups, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return OptimizerSet(optimizers, cautious_decay=cautious_decay)


def _kind_of(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim == 2 and _is_vocabulary(name):
        return "embedding"
    return "scalar" if parameter.ndim < 2 and not getattr(parameter, "_no_weight_decay", False) else ""


def _is_vocabulary(name: str) -> bool:
    """Whether a matrix is a table with a row for each token or position, or the head that gives the logits."""
    if any(word in name for word in ("embed", "wte", "wpe", "lm_head")):
        return True
    return name.removesuffix(".weight").rpartition(".")[2] in ("head", "output", "positions")


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


def weight_decay_scale(step: int, steps: int, *, schedule: DecaySchedule) -> float:
    """Factor on the weight decay for update number `step` (from 0) of `steps`: 1, or (`linear`) falling from 1 to 0.

    It comes on top of the learning rate's own schedule, which decay follows in any case.
    Source: nanochat's log (decay falling linearly to zero helps beside cautious decay).
    """
    return 1.0 if schedule == "constant" else 1 - step / steps
