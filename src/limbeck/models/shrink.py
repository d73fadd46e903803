"""A smaller copy of a model, with its least used layers and feed-forward neurons left out.

Source: Minitron, arXiv:2407.14679 (structured pruning by activations, then distillation); layers by block influence,
ShortGPT, arXiv:2403.03853. Our deviations: importance is measured once, of layers and neurons together, on the whole
model; embeddings and attention keep their widths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import DataError, RecipeError, TeacherError, unknown_name
from limbeck.core.types import Batch
from limbeck.models.anatomy import Layer, find_layers
from limbeck.models.feed_forward import FeedForward, family, feed_forward_width, find_feed_forwards, intermediate_name
from limbeck.models.packing import forward_batch, without_head

LayerRule = Literal["importance", "even", "first"]
LAYER_RULES = get_args(LayerRule)

_PER_LAYER_NAMES = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "attention_layers")

_PROBE_TOKENS = 5
# Far above what another order of summation does to a deep model's logits, far below what a wrong slice does.
_COPY_ERROR = {torch.float64: 1e-3, torch.float32: 1e-2}
_COPY_ERROR_HALF = 0.1


@dataclass(frozen=True)
class ShrinkPlan:
    """What a smaller copy keeps.

    layers: the kept layers of the original, ascending, counted from 0. neurons: for each of them, in that order, the kept
    feed-forward neurons, ascending; None when all are kept. block_influence: 1 - cosine(input, output) of every layer of
    the original; empty when it was not asked for.
    """

    layers: tuple[int, ...]
    neurons: tuple[tuple[int, ...], ...] | None = None
    block_influence: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The plan as lists and numbers."""
        neurons = None if self.neurons is None else [list(kept) for kept in self.neurons]
        return {"layers": list(self.layers), "neurons": neurons, "block_influence": list(self.block_influence)}

    @classmethod
    def from_json(cls, words: Mapping[str, Any]) -> ShrinkPlan:
        """The plan that `to_json` wrote."""
        neurons = None if words["neurons"] is None else tuple(tuple(kept) for kept in words["neurons"])
        return cls(tuple(words["layers"]), neurons, tuple(words["block_influence"]))


def plan_shrinking(
    model: Any,
    batches: Sequence[Batch],
    *,
    layers: int | float | None,
    intermediate: int | float | None,
    layer_rule: LayerRule = "importance",
) -> ShrinkPlan:
    """Choose what a smaller copy of a model keeps. No gradients; the same text gives the same plan.

    batches: text on which importance is measured, at the positions that predict a scored token. layers, intermediate: how
    many layers, and neurons of each feed-forward, are kept: a number, or a share (a float of at most 1) of the model's;
    None keeps all. layer_rule: "importance" keeps the layers of largest block influence, 1 - mean cosine(input, output) of
    the residual stream; "even" keeps evenly spaced ones, the first and last among them; "first" the first. Of neurons those
    with the largest mean absolute activation, as fed to the down projection, are kept. Ties go to the earlier.

    Raises: RecipeError for a size or rule that cannot be, TeacherError for a model whose feed-forward cannot be told,
    DataError when no token is scored but importance is asked for.
    """
    if layer_rule not in LAYER_RULES:
        raise RecipeError("student.shrink.layer_rule: " + unknown_name("rule", layer_rule, LAYER_RULES))
    _refuse_model(model)
    blocks = find_layers(model)
    kept_layers = _layer_count(layers, len(blocks))
    kept_neurons = _neuron_count(model.config, intermediate)
    rank_layers = layer_rule == "importance" and kept_layers < len(blocks)
    rank_neurons = kept_neurons is not None
    influence_L, activity_LI = _measure(
        model, batches, blocks if rank_layers else [], find_feed_forwards(model, blocks) if rank_neurons else []
    )
    if rank_layers:
        chosen = _largest(influence_L, kept_layers)
    else:
        chosen = tuple(range(kept_layers)) if layer_rule == "first" else _evenly(kept_layers, len(blocks))
    neurons = None if kept_neurons is None else tuple(_largest(activity_LI[layer], kept_neurons) for layer in chosen)
    return ShrinkPlan(chosen, neurons, tuple(influence_L.tolist()))


def shrink_model(model: Any, plan: ShrinkPlan) -> Any:
    """A new model of the same class with only what the plan keeps: every weight copied, nothing shared, all trainable.

    It computes what the original does with the other layers bypassed and the other neurons' activations zeroed; that is
    tried on a few tokens. It has the original's dtype, device and mode, and is saved and loaded as any other.

    Raises: TeacherError when the plan is of another model, or the model's weights do not allow such a copy.
    """
    _refuse_model(model)
    blocks = find_layers(model)
    feed_forwards = find_feed_forwards(model, blocks) if plan.neurons is not None else []
    _check_plan(model, plan, len(blocks), feed_forwards)
    config = _smaller_config(model.config, plan.layers, len(plan.neurons[0]) if plan.neurons is not None else None)
    # What is drawn here is overwritten, and must not move the run's random numbers.
    with torch.random.fork_rng():
        student = type(model)._from_config(config, dtype=model.dtype).to(model.device)
    _copy_weights(model, student, plan, feed_forwards)
    student.generation_config = copy.deepcopy(model.generation_config)
    student.train(model.training)
    _check_copy(model, student, plan, blocks, feed_forwards)
    return student


def shrunk_config(config: Any, *, layers: int | float | None, intermediate: int | float | None) -> Any:
    """The configuration of a smaller copy, as far as sizes go. Where layers differ in kind, those of the first are taken.

    layers, intermediate: as for `plan_shrinking`. Raises: RecipeError for a size that cannot be, TeacherError for a family
    that has no such setting, or that has experts when `intermediate` is given.
    """
    _refuse_config(config)
    kept_layers = _layer_count(layers, config.num_hidden_layers)
    return _smaller_config(config, range(kept_layers), _neuron_count(config, intermediate))


def _layer_count(wanted: int | float | None, layers: int) -> int:
    return layers if wanted is None else _count(wanted, layers, "layers", "layers")


def _neuron_count(config: Any, wanted: int | float | None) -> int | None:
    """How many neurons of each feed-forward stay; None when all do."""
    if wanted is None:
        return None
    neurons = feed_forward_width(config)
    count = _count(wanted, neurons, "intermediate", "feed-forward neurons")
    return None if count == neurons else count


def _count(wanted: int | float, whole: int, word: str, things: str) -> int:
    whole_number = isinstance(wanted, int) and not isinstance(wanted, bool) and 1 <= wanted <= whole
    share = isinstance(wanted, float) and 0 < wanted <= 1
    if not (whole_number or share):
        raise RecipeError(
            f"student.shrink.{word}: {wanted!r} does not fit the teacher, which has {whole} {things}. Give a whole number "
            f"from 1 to {whole}, or a share of them above 0 and below 1."
        )
    return max(1, round(wanted * whole)) if share else int(wanted)


def _refuse_model(model: Any) -> None:
    _refuse_config(model.config)
    if getattr(model.config, "quantization_config", None) is not None:
        raise TeacherError(f"{type(model).__name__} is quantised, and cannot be shrunk. Load it unquantised.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TeacherError(
            f"{type(model).__name__} has weights that are offloaded, and cannot be shrunk. Load it whole."
        )


def _refuse_config(config: Any) -> None:
    if getattr(config, "mixers", None) is not None:
        raise TeacherError("the teacher is a Limbeck hybrid, which cannot be shrunk; shrink the original transformer.")


def _smaller_config(config: Any, layers: Sequence[int], intermediate: int | None) -> Any:
    """A configuration with these layers of the original and so many neurons, proven to be readable again."""
    smaller = copy.deepcopy(config)
    before = config.num_hidden_layers
    smaller.num_hidden_layers = len(layers)
    for name in _PER_LAYER_NAMES:
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) == before:
            setattr(smaller, name, [values[layer] for layer in layers])
    if intermediate is not None:
        setattr(smaller, intermediate_name(config), intermediate)
    try:
        type(config).from_dict(smaller.to_dict())
    except Exception as error:
        raise TeacherError(
            f"{family(config)}: its configuration cannot be written for {len(layers)} of {before} layers: {error}"
        ) from error
    return smaller


def _measure(
    model: Any, batches: Sequence[Batch], blocks: Sequence[Layer], feed_forwards: Sequence[FeedForward]
) -> tuple[Tensor, Tensor]:
    """Block influence [L] and mean absolute activation [L, I] over the scored positions; empty for what is not asked."""
    cosines: list[Any] = [0.0] * len(blocks)
    activity: list[Any] = [0.0] * len(feed_forwards)
    if not blocks and not feed_forwards:
        return torch.empty(0), torch.empty(0)
    scored_BT = torch.empty(0)

    def read_block(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before_ND, after_ND = (_scored(tensor, scored_BT) for tensor in (_input(args, kwargs), _output(output)))
            cosines[index] += F.cosine_similarity(before_ND, after_ND, dim=-1).double().sum().cpu()

        return hook

    def read_neurons(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple) -> None:
            activity[index] += _scored(args[0], scored_BT).abs().sum(0).double().cpu()

        return hook

    with ExitStack() as hooks, torch.no_grad(), _evaluating(model):
        for index, layer in enumerate(blocks):
            hooks.callback(layer.block.register_forward_hook(read_block(index), with_kwargs=True).remove)
        for index, feed_forward in enumerate(feed_forwards):
            hooks.callback(feed_forward.down.register_forward_pre_hook(read_neurons(index)).remove)
        for batch in batches:
            scored_BT = F.pad(batch.loss_mask_BT[:, 1:], (0, 1))
            forward_batch(without_head(model), batch)
    count = sum(batch.target_count for batch in batches)
    if not count:
        raise DataError(
            "importance for student.shrink cannot be measured: no token of the calibration text is scored. Raise "
            "student.calibration_tokens, or give more data."
        )
    influence_L = 1 - torch.stack(cosines) / count if blocks else torch.empty(0)
    return influence_L, torch.stack(activity) / count if feed_forwards else torch.empty(0)


def _scored(tensor: Tensor, scored_BT: Tensor) -> Tensor:
    # OPT's feed-forward sees positions of all rows in one line.
    rows = tensor.flatten(0, -2)[scored_BT.flatten().to(tensor.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _input(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Places of the largest scores, ascending; of equal ones the earlier."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _evenly(count: int, layers: int) -> tuple[int, ...]:
    """So many layers spread over the depth, the first and the last among them (one alone: the first)."""
    steps = max(count - 1, 1)
    return tuple((2 * place * (layers - 1) + steps) // (2 * steps) for place in range(count))


def _check_plan(model: Any, plan: ShrinkPlan, layers: int, feed_forwards: Sequence[FeedForward]) -> None:
    neurons = plan.neurons or ()
    fits = _ascending(plan.layers, layers) and (plan.neurons is None or len(neurons) == len(plan.layers))
    if fits and neurons:
        fits = len({len(kept) for kept in neurons}) == 1 and all(
            _ascending(kept, feed_forwards[0].width) for kept in neurons
        )
    if not fits:
        raise TeacherError(
            f"the plan of what to keep is not one for this {type(model).__name__} of {layers} layers: it names layers or "
            "neurons that the model does not have. Was it made with another teacher? Start a new run folder."
        )


def _ascending(places: Sequence[int], end: int) -> bool:
    return bool(places) and list(places) == sorted(set(places)) and places[0] >= 0 and places[-1] < end


def _copy_weights(model: Any, student: Any, plan: ShrinkPlan, feed_forwards: Sequence[FeedForward]) -> None:
    """Copy every tensor of what is kept, cut where neurons are left out, and see that none is missing."""
    theirs, ours = _tensors(model), _tensors(student)
    their_blocks, our_blocks = _block_prefixes(model), _block_prefixes(student)
    kept = dict(zip(our_blocks, plan.layers, strict=True))
    dropped = tuple(prefix for layer, prefix in enumerate(their_blocks) if layer not in plan.layers)
    # What is not saved comes from the configuration: it is copied if it can be, since a changed dtype is in it.
    saved = set(model.state_dict()) | set(student.state_dict())
    unread = {name for name in theirs if name in saved and not name.startswith(dropped or "\0")}
    with torch.no_grad():
        for name, tensor in ours.items():
            prefix = next((prefix for prefix in our_blocks if name.startswith(prefix)), None)
            source = name if prefix is None else their_blocks[kept[prefix]] + name.removeprefix(prefix)
            value = theirs.get(source)
            unread.discard(source)
            if value is not None and prefix is not None and plan.neurons is not None:
                cut = feed_forwards[kept[prefix]].cut(source, plan.neurons[our_blocks.index(prefix)])
                value = value if cut is None or value is None else value.index_select(cut[0], cut[1].to(value.device))
            if value is None or value.shape != tensor.shape:
                if name not in saved:
                    continue
                raise _no_copy(model, f"its {source} {_shape(value)} does not fit {name} {_shape(tensor)}")
            tensor.copy_(value)
    if unread:
        raise _no_copy(model, f"{', '.join(sorted(unread)[:4])} would be left out")


def _shape(tensor: Tensor | None) -> str:
    return "(missing)" if tensor is None else str(tuple(tensor.shape))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; a tied one under its first name alone."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _block_prefixes(model: Any) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [f"{names[layer.block]}." for layer in find_layers(model)]


def _no_copy(model: Any, why: str) -> TeacherError:
    return TeacherError(
        f"no smaller copy of this {type(model).__name__} can be made: {why}. Choose a teacher of another family, or a "
        "student of its own (student.source, student.architecture)."
    )


def _check_copy(
    model: Any, student: Any, plan: ShrinkPlan, blocks: Sequence[Layer], feed_forwards: Sequence[FeedForward]
) -> None:
    """Compare the copy, on a few tokens, with the original whose other layers and neurons do nothing."""
    rows = model.get_input_embeddings().weight.shape[0]
    # None of the tokens is padding, since transformers warns of that.
    first = (getattr(model.config, "pad_token_id", None) or 0) + 1
    ids_BT = (first + torch.arange(_PROBE_TOKENS)).remainder(rows).unsqueeze(0)
    probe = Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)).to(model.device)
    with torch.no_grad(), _evaluating(model), _evaluating(student):
        ours_BTV = forward_batch(student, probe).logits.double().cpu()
        with _reduced(plan, blocks, feed_forwards):
            theirs_BTV = forward_batch(model, probe).logits.double().cpu()
    error = float((ours_BTV - theirs_BTV).norm() / theirs_BTV.norm().clamp_min(1e-12))
    if not error <= _COPY_ERROR.get(model.dtype, _COPY_ERROR_HALF):
        raise _no_copy(
            model,
            "its layers depend on their depth, or its feed-forward is laid out in an unknown way (logits of the copy "
            f"differ by {error:.1%} from those of the original with the same parts switched off)",
        )


@contextmanager
def _reduced(plan: ShrinkPlan, blocks: Sequence[Layer], feed_forwards: Sequence[FeedForward]) -> Iterator[None]:
    """The original, while the block runs, with the layers that are left out bypassed and the neurons zeroed."""

    def bypass(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = _input(args, kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def silence(neurons: Sequence[int]) -> Callable[..., tuple]:
        def hook(_module: nn.Module, args: tuple) -> tuple:
            mask_I = torch.zeros(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
            mask_I[list(neurons)] = 1
            return (args[0] * mask_I, *args[1:])

        return hook

    with ExitStack() as hooks:
        for layer, block in enumerate(blocks):
            if layer not in plan.layers:
                hooks.callback(block.block.register_forward_hook(bypass, with_kwargs=True).remove)
        for layer, neurons in zip(plan.layers, plan.neurons or (), strict=False):
            hooks.callback(feed_forwards[layer].down.register_forward_pre_hook(silence(neurons)).remove)
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
