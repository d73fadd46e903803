"""Watching mixers at work: what each was given and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class Recording:
    """What hooked mixers were given and gave, by layer."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}


@contextmanager
def recording(mixers: Mapping[int, nn.Module], *, detach_inputs: bool = False) -> Iterator[Recording]:
    """Record the input and output [B, T, D] of mixers while the block runs.

    detach_inputs cuts the graph at each mixer's input, so that a loss on its output trains that mixer alone.
    """
    seen = Recording()

    def before(layer: int) -> Callable[..., tuple[tuple, dict]]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            hidden = hidden.detach() if detach_inputs else hidden
            seen.inputs[layer] = hidden
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": hidden}
            return (hidden, *args[1:]), kwargs

        return hook

    def after(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            seen.outputs[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module.register_forward_pre_hook(before(layer), with_kwargs=True) for layer, module in mixers.items()]
    handles += [module.register_forward_hook(after(layer)) for layer, module in mixers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
