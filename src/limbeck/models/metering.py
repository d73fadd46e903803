"""Counting operations while networks run: what was really read, written and propagated back, whatever the objective.

A meter listens to the modules that do the work. What a call costs follows from the shapes it was given; the backward
pass is counted when it comes by, so that frozen layers, detached inputs and layers above the last one that a loss looks at
cost what they cost. Blocks that are worked out again (gradient checkpointing) count again. Nothing waits for the device.

Counted as in `models.flops`: matrices, the mixing of tokens, learned maps between widths. Attention counts the tokens
that a token may see in its row, half of the square; documents packed into a row count as one. A Hyena layer that goes on
from a cache counts as if it had read the new tokens with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from limbeck.models.flops import MATRICES, attention_sites, expert_flops
from limbeck.models.hybrid import HyenaMixer
from limbeck.models.projections import FeatureProjections
from limbeck.models.surgery import head_shape
from limbeck.nn.blocks import SelfAttention
from limbeck.nn.byte_local import LocalBlock, PackedSlots
from limbeck.nn.compact import TiedHead
from limbeck.nn.flops import attended_tokens, hyena_flops
from limbeck.nn.hyena import HyenaOperator
from limbeck.nn.mixers import StatefulMixer
from limbeck.nn.stlm_parallel import WideningBlock
from limbeck.nn.trunk import Trunk

Count = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class FlopMeter:
    """The operations of some networks, from when it is made until `close`. `flops` is a whole number, so sums are exact.

    networks: modules that are called; parts that they share are counted once a call. Make it when nothing will be copied
    any more: a copy of a network would take the listening with it.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        self.flops = 0
        self._is_paused = False
        self._uncounted: dict[str, str] = {}
        self._handles: list[Any] = []
        self._watched: set[int] = set()
        for network in networks:
            self._watch(network)

    def close(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def warnings(self) -> list[str]:
        """What could not be counted, and is missing in `flops`."""
        told = (f"{name} ({reason})" for name, reason in self._uncounted.items())
        return [f"the operations of {one} could not be counted: the FLOPs are without them" for one in told]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what is done meanwhile: it serves looking, not learning."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def _watch(self, network: nn.Module) -> None:
        # A Hyena operator is counted as a whole (its filter's own matrices are evaluated once for all rows), and so is a
        # trunk's mixer of one's own, by its own word.
        operators = [module for module in network.modules() if isinstance(module, HyenaOperator)]
        inside = {id(part) for operator in operators for part in operator.modules() if part is not operator}
        inside |= {id(part) for mixer in _own_mixers(network) for part in mixer.modules()}
        for module in network.modules():
            if id(module) not in inside and (count := self._counter(module)) is not None:
                self._listen(module, count)
        for model in [module for module in network.modules() if isinstance(module, PreTrainedModel)]:
            for site in attention_sites(model):
                heads, head_width = head_shape(site)
                self._listen(site.module, self._attention(heads * head_width, site.layer_index))

    def _counter(self, module: nn.Module) -> Count | None:
        if isinstance(module, (*MATRICES, TiedHead, FeatureProjections)):
            return self._matrix
        if expert_flops(module) is not None:
            return self._experts
        return next((count for kind, count in self._kinds().items() if isinstance(module, kind)), None)

    def _kinds(self) -> dict[type | tuple[type, ...], Count]:
        return {
            HyenaOperator: self._operator,
            HyenaMixer: self._continued_mixer,
            Trunk: self._trunk,
            (LocalBlock, WideningBlock): self._local_block,
        }

    def _listen(self, module: nn.Module, count: Count) -> None:
        if id(module) in self._watched:
            return
        self._watched.add(id(module))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._is_paused:
                return
            try:
                count(module, args, kwargs, output)
            except Exception as error:  # a figure for the books is no reason to lose a run, whatever a model is made of
                self._uncounted.setdefault(type(module).__name__, f"{type(error).__name__}: {error}")

        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _add(self, flops: float, output: Any, backward: float) -> None:
        """Count a call, and its backward pass if there ever is one."""
        self.flops += round(flops)
        out = _first(output)
        if backward and torch.is_grad_enabled() and isinstance(out, Tensor) and out.requires_grad:
            amount = round(backward)

            def reached(_grad: Tensor) -> None:
                if not self._is_paused:
                    self.flops += amount

            out.register_hook(reached)

    def _matrix(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = _input(args, kwargs)
        if isinstance(module, FeatureProjections) and not module.weights_ED:
            return
        flops = 2 * _first(output).numel() * x.shape[-1]
        weight = getattr(module, "weight", None)
        self._add(flops, output, flops * (x.requires_grad + (weight is None or weight.requires_grad)))

    def _experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Every row in each of the experts that it is sent to; without word of these each row is one for one of them."""
        x = _input(args, kwargs)
        sent = [
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and not value.dtype.is_floating_point
        ]
        rows = sent[0].numel() if sent else x.shape[:-1].numel()
        flops = rows * (expert_flops(module) or 0.0)
        learns = any(matrix.requires_grad for matrix in module.parameters(recurse=False))
        self._add(flops, output, flops * (x.requires_grad + learns))

    def _attention(self, width: int, layer: int) -> Count:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rows, new = _input(args, kwargs).shape[:2]
            cache = _cache(args, kwargs)
            past = 0 if cache is None else max(0, int(cache.get_seq_length(layer)) - new)
            window = getattr(module, "sliding_window", None)
            flops = 4 * width * rows * attended_tokens(past, new, window=window)
            self._add(flops, output, 2 * flops)

        return count

    def _operator(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = _input(args, kwargs)
        matrices, mixing = _operator_flops(module, rows=x.shape[0], past=0, new=x.shape[1])
        into = 2 * x.shape[0] * x.shape[1] * module.in_proj.weight.numel()
        learns = module.in_proj.weight.requires_grad
        backward = 2 * mixing + (matrices - into) * (1 + learns) + into * (x.requires_grad + learns)
        self._add(matrices + mixing, output, backward)

    def _continued_mixer(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A mixer that goes on from a cache; without one it calls its operator, which is counted by itself."""
        cache = _cache(args, kwargs)
        if cache is None:
            return
        x = _input(args, kwargs)
        past = max(0, int(cache.layers[module.layer_idx].get_seq_length()) - x.shape[1])
        self._add(sum(_operator_flops(module.operator, rows=x.shape[0], past=past, new=x.shape[1])), output, 0)

    def _trunk(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The mixing of all runs of the plan; matrices, and operators in one pass, are counted by themselves."""
        x = args[0]
        news, pasts = [x.shape[1]] * x.shape[0], [0] * x.shape[0]
        cache, mask = kwargs.get("cache"), kwargs.get("mask_BS")
        if cache is not None:
            news = news if mask is None else mask.sum(dim=1).tolist()
            rows = kwargs.get("rows_N")
            rows = range(cache.batch_rows) if rows is None else [int(row) for row in rows]
            pasts = [cache.lengths[row] - new for row, new in zip(rows, news, strict=True)]
        flops = 0.0
        for mixer in module.mixers_in_order():
            for past, new in zip(pasts, news, strict=True):
                if isinstance(mixer, SelfAttention):
                    flops += 4 * mixer.heads * mixer.head_width * attended_tokens(past, new)
                elif not isinstance(mixer, HyenaOperator):
                    flops += _whole_flops(mixer, past + new) - _whole_flops(mixer, past)
                elif cache is not None:
                    flops += sum(_operator_flops(mixer, rows=1, past=past, new=new))
        self._add(flops, output, 0 if cache is not None else 2 * flops)

    def _local_block(self, module: Any, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        attention = module.attention
        packed: PackedSlots = args[1]
        seen = sum(
            sequences * (attended_tokens(0, length) if attention.causal else length**2)
            for sequences, length in packed.groups
        )
        flops = 4 * attention.heads * attention.head_width * seen
        self._add(flops, output, 2 * flops)


def _own_mixers(network: nn.Module) -> Iterator[nn.Module]:
    """The mixers of trunks that are neither attention nor Hyena."""
    trunks = (module for module in network.modules() if isinstance(module, Trunk))
    mixers = (mixer for trunk in trunks for mixer in trunk.mixers_in_order())
    yield from (cast(nn.Module, mixer) for mixer in mixers if not isinstance(mixer, (SelfAttention, HyenaOperator)))


def _whole_flops(mixer: StatefulMixer, tokens: int) -> float:
    return tokens * mixer.flops_per_token(tokens) if tokens else 0.0


def _operator_flops(operator: HyenaOperator, *, rows: int, past: int, new: int) -> tuple[float, float]:
    """Of the projections of a Hyena operator, and of its mixing."""
    matrices = 2 * (operator.in_proj.weight.numel() + operator.out_proj.weight.numel()) * new
    mixing = hyena_flops(operator.inner_width, order=operator.order, short_conv=operator.short_conv, past=past, new=new)
    return rows * matrices, rows * mixing


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was given, whatever it calls it: [B, T, D]."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _first(output: Any) -> Any:
    """What a module gives, without what it gives beside it (a router that is a linear map gives its scores twice)."""
    return output[0] if isinstance(output, tuple) else output


def _cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
