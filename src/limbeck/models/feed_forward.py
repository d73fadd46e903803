"""The feed-forward of each block of a model: how many neurons it has, and the linear layers into and out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import TeacherError
from limbeck.models.anatomy import Layer, hidden_width

# Where families write how many neurons a feed-forward has; empty means four times the model's width.
_INTERMEDIATE_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class FeedForward:
    """One block's feed-forward: linear layers into its neurons (gate and up, apart or fused), and the one out of them.

    Names are from the model's root. width: number of neurons I.
    """

    down_name: str
    down: nn.Module
    inputs: dict[str, nn.Module]
    width: int

    def cut(self, name: str, neurons: Sequence[int]) -> tuple[int, Tensor] | None:
        """Along which dimension a tensor of the model has neurons, and the places of these; None when it has none.

        Where gate and up are fused, each neuron has two places.
        """
        module_name, _, part = name.rpartition(".")
        places = torch.tensor(neurons)
        if module_name == self.down_name and part == "weight":
            return (0 if isinstance(self.down, Conv1D) else 1), places
        module = self.inputs.get(module_name)
        if module is None:
            return None
        if _out_in(module)[0] == 2 * self.width:
            places = torch.cat([places, places + self.width])
        return (1 if isinstance(module, Conv1D) and part == "weight" else 0), places


def find_feed_forwards(model: Any, blocks: Sequence[Layer]) -> list[FeedForward]:
    """The feed-forward of every block: the linear layers outside its attention, which must be that and nothing else.

    Raises: TeacherError for a mixture of experts, and for any block of another shape, naming what it has.
    """
    width = feed_forward_width(model.config)
    names = {module: name for name, module in model.named_modules()}
    return [_feed_forward(block, names, hidden_width(model), width) for block in blocks]


def _feed_forward(layer: Layer, names: Mapping[nn.Module, str], hidden: int, width: int) -> FeedForward:
    in_mixer = set(layer.mixer.modules())
    outside = [module for module in layer.block.modules() if module not in in_mixer]
    linears = [module for module in outside if isinstance(module, (nn.Linear, Conv1D))]
    others = [
        f"{names[module]}.{name} {tuple(parameter.shape)}"
        for module in outside
        if module not in linears
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    ]
    shapes = [_out_in(module) for module in linears]
    into, out_of = shapes[:-1], shapes[-1:]
    # Families register the projections in the order they are used; the last one leads back to the model's width.
    right = out_of == [(hidden, width)] and all(inputs == hidden for _, inputs in into)
    if others or not right or sorted(outputs for outputs, _ in into) not in ([width], [width, width], [2 * width]):
        found = [f"{names[module]} {shape}" for module, shape in zip(linears, shapes, strict=True)] + others
        raise TeacherError(
            f"the feed-forward of block {names[layer.block]} cannot be told: outside its attention there should be one or "
            f"two linear layers from {hidden} channels to {width} neurons (or fused), then one back; found "
            f"{', '.join(found[:6]) or 'none'}{', ...' if len(found) > 6 else ''}. Leave out "
            "student.shrink.intermediate and shrink layers alone."
        )
    return FeedForward(names[linears[-1]], linears[-1], {names[module]: module for module in linears[:-1]}, width)


def _out_in(linear: nn.Module) -> tuple[int, int]:
    rows, columns = linear.weight.shape  # type: ignore[union-attr, misc]
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)  # type: ignore[return-value]


def intermediate_name(config: Any) -> str:
    """Under which name a configuration has its number of feed-forward neurons. Raises: TeacherError when it has none."""
    name = next((name for name in _INTERMEDIATE_NAMES if hasattr(config, name)), None)
    if name is None:
        raise TeacherError(
            f"{family(config)}: its configuration has none of {', '.join(_INTERMEDIATE_NAMES)}, so the width of its "
            "feed-forwards cannot be changed. Leave out student.shrink.intermediate and shrink layers alone."
        )
    return name


def feed_forward_width(config: Any) -> int:
    """Number of neurons of each feed-forward, by a model's configuration.

    Raises: TeacherError when there is no such number, or there are experts.
    """
    experts = [getattr(config, name, None) for name in _EXPERT_NAMES]
    if any(isinstance(count, int) and count > 1 for count in experts):
        raise TeacherError(
            f"{family(config)} is a mixture of experts; only plain feed-forwards can be "
            "narrowed. Leave out student.shrink.intermediate and shrink layers alone."
        )
    name = intermediate_name(config)
    width = getattr(config, name)
    width = 4 * config.hidden_size if width is None else width
    if not isinstance(width, int):
        raise TeacherError(
            f"{family(config)}: {name} is {width!r}, not one number for all layers. Leave out "
            "student.shrink.intermediate and shrink layers alone."
        )
    return width


def family(config: Any) -> str:
    """What transformers calls a model's family."""
    return getattr(config, "model_type", "") or type(config).__name__
