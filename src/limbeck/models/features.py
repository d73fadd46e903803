"""What lies inside a model while it reads a batch: hidden states, attention maps, mixing matrices, queries, keys, values.

For any family that `surgery` can read, and for hybrids. Layers are counted as in `layer_maps`: 0 is the embeddings, i
belongs to block i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.core.errors import RecipeError, TeacherError, unknown_name
from limbeck.core.types import Batch
from limbeck.models.anatomy import PROJECTIONS, find_layers, projection_reader
from limbeck.models.hybrid import DOCUMENTS_KEY, MASK_KEY
from limbeck.models.packing import forward_batch
from limbeck.nn.mixing_matrix import mixing_matrix

FEATURE_KINDS = {
    "attention": "attention weights [B, H, T, T] of an attention layer",
    "mixer": "mixing matrix: attention weights [B, H, T, T], or [B, C, T, T] of a Hyena layer, one a channel",
    "queries": "[B, T, C], all heads side by side, before rotary embeddings and norms; Hyena: the outer gate's projection",
    "keys": "[B, T, C'], as queries, C' narrower with grouped heads; Hyena: the inner gate's projection",
    "values": "[B, T, C'], as keys; Hyena: the value's projection",
}


def feature_name(kind: str, layer: int) -> str:
    """The name of a feature of a layer, as in `Targets.features`: "values.3"."""
    return f"{kind}.{layer}"


def wanted_features(kinds: Iterable[str], layers: Iterable[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Hidden layers and feature names to record, for an objective that needs these kinds at these layers."""
    kinds, layers = list(kinds), sorted(set(layers))
    hidden = tuple(layers) if "hidden" in kinds else ()
    return hidden, tuple(feature_name(kind, layer) for kind in kinds if kind != "hidden" for layer in layers)


class HoldsFeatures(Protocol):
    """What has hidden states and features: a `FeatureRecording`, or a teacher's `Targets`."""

    @property
    def hidden(self) -> Mapping[int, Tensor]:
        """Hidden states [B, T, D] by layer."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """Other tensors by name."""


def features_of(source: HoldsFeatures, kinds: Sequence[str], layer: int) -> Tensor | tuple[Tensor, ...]:
    """What an objective that needs these kinds is given for a layer: one tensor, or one for each kind."""
    found = tuple(
        source.hidden[layer] if kind == "hidden" else source.features[feature_name(kind, layer)] for kind in kinds
    )
    return found[0] if len(found) == 1 else found


@dataclass
class FeatureRecording:
    """Hidden states [B, T, D] by layer and other features by name; filled when recording ends."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Run a model with the attention that keeps its weights, and put back what it had.

    Raises: TeacherError when the model cannot be switched.
    """
    # Outer models first, since setting theirs sets the inner ones' too. A hybrid's can differ from its backbone's.
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation("eager")
    try:
        if any(config._attn_implementation != "eager" for config in configs):
            raise TeacherError(
                f'{type(model).__name__} cannot switch to eager attention. Load it with attn_implementation="eager", or '
                "choose an objective that needs no attention maps."
            )
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@dataclass(frozen=True)
class _Probe:
    """How one tensor is got: what to keep of a module's call while the model runs, and what to make of it afterwards.

    Keeping stores references and computes nothing, so that a backward pass which runs the block again finds it as it was.
    """

    what: str
    module: nn.Module
    keep: Callable[[tuple, dict, Any], Any]
    finish: Callable[[Any], Tensor]


class FeatureRecorder:
    """Records chosen features of a model whenever it runs inside `recording()`.

    hidden: layers whose hidden states are wanted: the residual stream after block i, before the final norm also at the
    last layer (where transformers' own `hidden_states` are after it); 0 is what the first block is given. features: names
    such as "values.3", kinds as in `FEATURE_KINDS`. Everything is checked here, before anything is trained; build it
    when the model is in its final form (adapters added). Gradients flow to the model when it runs with them.

    Attention weights come from the family's eager attention, switched to for that run alone; its dropout, if any, is in
    them. Raises: RecipeError for layers or features that the model does not have, TeacherError for one that cannot be read.
    """

    def __init__(self, model: nn.Module, *, hidden: Sequence[int] = (), features: Sequence[str] = ()):
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._model: Any = inner
        self._layers = find_layers(inner)
        self._map_configs: list[Any] = []
        self._hidden = {layer: self._hidden_probe(layer) for layer in hidden}
        self._features = {name: self._feature_probe(name) for name in features}

    def _hidden_probe(self, layer: int) -> _Probe:
        self._require_layer(layer, lowest=0, what="hidden states")
        block = self._layers[max(layer - 1, 0)].block
        return _Probe(f"hidden states of layer {layer}", block, _output if layer else _input, _whole)

    def _feature_probe(self, name: str) -> _Probe:
        kind, _, number = name.partition(".")
        if kind not in FEATURE_KINDS:
            raise RecipeError(unknown_name("feature", kind, FEATURE_KINDS))
        if not number.isdecimal():
            raise RecipeError(f'feature "{name}": write a kind and the number of a layer, such as "{kind}.1".')
        self._require_layer(int(number), lowest=1, what=kind)
        layer, what = self._layers[int(number) - 1], f"{kind} of layer {number}"
        if layer.site is None and not hasattr(layer.mixer, "operator"):
            raise RecipeError(
                f"{what} cannot be read from {type(self._model).__name__}. Use objectives on hidden states or on predictions."
            )
        if layer.site is None:
            _refuse_hyena(layer.mixer, kind, where=f"layer {number} is a Hyena layer", config=self._model.config)
            return _Probe(what, layer.mixer, _hyena_call, _hyena_feature(layer.mixer, kind))
        if kind in PROJECTIONS:
            module, take = projection_reader(layer.site, kind)
            return _Probe(what, module, _output, take)
        self._map_configs.append(getattr(layer.mixer, "config", self._model.config))
        return _Probe(what, layer.mixer, _weights, _present(what))

    def _require_layer(self, layer: int, *, lowest: int, what: str) -> None:
        if not lowest <= layer <= len(self._layers):
            raise RecipeError(
                f"{type(self._model).__name__} has no {what} of layer {layer}; its layers are {lowest} to {len(self._layers)}."
            )

    @contextmanager
    def recording(self) -> Iterator[FeatureRecording]:
        """Record the model's run inside the block; the yielded recording is filled when the block ends.

        Run the model once inside, or any part of it that reaches the layers. What is computed from a call (a Hyena layer's
        matrix and projections) is computed at the end, under the gradient mode outside the block.
        Raises: RecipeError when gradient checkpointing stands in the way of what is recorded.
        """
        recomputes = self._recomputes()
        switches = any(config._attn_implementation != "eager" for config in self._map_configs)
        if switches and recomputes:
            raise RecipeError(
                "attention maps of a model that trains with gradient checkpointing: the backward pass would recompute with "
                'another attention. Load it with attn_implementation="eager", or turn gradient checkpointing off.'
            )
        kept: dict[_Probe, Any] = {}
        recorded = FeatureRecording()
        probes = [*self._hidden.values(), *self._features.values()]
        handles = [
            probe.module.register_forward_hook(_hook(probe, kept, needs_grad=recomputes), with_kwargs=True)
            for probe in probes
        ]
        try:
            with eager_attention(self._model) if switches else nullcontext():
                yield recorded
        finally:
            for handle in handles:
                handle.remove()
        for probe in probes:
            if probe not in kept:
                raise RuntimeError(f"{probe.what} were not computed: run the model once inside `recording()`")
        recorded.hidden.update({layer: probe.finish(kept[probe]) for layer, probe in self._hidden.items()})
        recorded.features.update({name: probe.finish(kept[probe]) for name, probe in self._features.items()})

    def _recomputes(self) -> bool:
        """Whether the backward pass of the run to come will compute blocks a second time."""
        modules = self._model.modules()
        asked = self._model.training and torch.is_grad_enabled()
        return asked and any(getattr(module, "gradient_checkpointing", False) for module in modules)


def record_features(
    model: nn.Module, batch: Batch, *, hidden: Sequence[int] = (), features: Sequence[str] = ()
) -> FeatureRecording:
    """Run a model on a batch, packed documents apart, and return what was asked for. See `FeatureRecorder`."""
    recorder = FeatureRecorder(model, hidden=hidden, features=features)
    with recorder.recording() as recorded:
        forward_batch(model, batch)
    return recorded


def _hook(probe: _Probe, kept: dict[_Probe, Any], *, needs_grad: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if needs_grad and not torch.is_grad_enabled():
            raise RecipeError(
                f"{probe.what} cannot be learned from under reentrant gradient checkpointing, which hides the gradient. Enable "
                'it with gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        kept[probe] = probe.keep(args, kwargs, output)

    return hook


def _input(args: tuple, kwargs: dict, _output: Any) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _output(_args: tuple, _kwargs: dict, output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _weights(_args: tuple, _kwargs: dict, output: Any) -> Tensor | None:
    return output[1]


def _hyena_call(args: tuple, kwargs: dict, output: Any) -> dict[str, Tensor | None]:
    mask_BT = kwargs.get(MASK_KEY)
    return {
        "hidden_BTD": _input(args, kwargs, output),
        "mask_BT": None if mask_BT is None else mask_BT.to(torch.bool),
        "document_ids_BT": kwargs.get(DOCUMENTS_KEY),
    }


def _hyena_feature(mixer: Any, kind: str) -> Callable[[dict[str, Any]], Tensor]:
    """What to compute from a Hyena mixer's call. A hook on its projection would make it take another path."""
    operator = mixer.operator
    if kind == "mixer":
        return lambda call: mixing_matrix(operator, **call)
    stream = {"queries": 0, "keys": 1, "values": operator.order}[kind]
    return lambda call: operator.in_proj(call["hidden_BTD"]).chunk(operator.order + 1, dim=-1)[stream]


def _refuse_hyena(mixer: Any, kind: str, *, where: str, config: Any) -> None:
    """Refuse what a Hyena layer does not have."""
    if kind == "attention":
        raise RecipeError(
            f"{where} and has no attention weights. Take the objective mixing_matrix_distance, which compares what any mixer "
            "does, or value_relation; or choose layers that kept attention."
        )
    if kind in ("queries", "keys") and mixer.operator.order != 2:
        raise RecipeError(
            f"{where} of order {mixer.operator.order}: only order 2 has one gate in the place of queries and one in that of "
            "keys. Take value_relation instead of qkv_relation."
        )
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    if kind == "mixer" and mixer.operator.inner_width != width:
        raise RecipeError(
            f"{where} with {mixer.operator.inner_width} channels where the attention had {width}: its matrices cannot be "
            "matched to attention heads. Leave hyena.inner_width and hyena.expand at their defaults."
        )


def _present(what: str) -> Callable[[Tensor | None], Tensor]:
    def finish(weights_BHTT: Tensor | None) -> Tensor:
        if weights_BHTT is None:
            raise TeacherError(
                f"{what} are not handed out by the model, even with eager attention. Choose an objective on hidden states or "
                "values."
            )
        return weights_BHTT

    return finish


def _whole(tensor: Tensor) -> Tensor:
    return tensor
