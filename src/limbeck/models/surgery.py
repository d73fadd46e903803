"""Finding a transformer's attention modules, and reading their projections in one common form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import TeacherError

OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj")


@dataclass(frozen=True)
class AttentionSite:
    """Where one layer's self-attention sits: `getattr(parent, attribute) is module`, `name` from the model's root."""

    layer_index: int
    name: str
    module: nn.Module
    parent: nn.Module
    attribute: str


@dataclass(frozen=True)
class AttentionProjections:
    """An attention's projections as float32 copies, keys and values repeated for every query head.

    q, k, v: weights [H * head_dim, D]; o: weight [D, H * head_dim]; biases [H * head_dim] and [D], None where there is
    none. Rotary embeddings, query/key norms and score scaling are not part of them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    num_heads: int
    head_dim: int


def find_attention(model: Any) -> list[AttentionSite]:
    """Every layer's causal self-attention, in layer order. In a hybrid student, those that were kept (perhaps none).

    Raises: TeacherError when the model is no decoder with self-attention in every layer, saying what is in the way.
    """
    _refuse_other_architectures(model)
    sites = sorted(_recorded_sites(model) or _structural_sites(model), key=lambda site: site.layer_index)
    if getattr(model.config, "mixers", None) is not None:
        return sites
    family = type(model).__name__
    layers = model.config.num_hidden_layers
    if not sites:
        raise TeacherError(
            f"{family} has no attention modules that could be replaced. Limbeck turns attention into Hyena: choose a "
            "decoder transformer as teacher (GPT-NeoX/Pythia, GPT-2, OPT, Llama, Mistral, Qwen, Gemma, Phi, ...)."
        )
    found = [site.layer_index for site in sites]
    if found != list(range(layers)):
        missing = sorted(set(range(layers)) - set(found))
        what = f"layers without it: {_some(missing)}" if missing else f"found in layers {_some(found)}"
        raise TeacherError(
            f"{family} does not have exactly one self-attention module in each of its {layers} layers ({what})."
        )
    for site in sites:
        if getattr(site.module, "is_causal", True) is False:
            raise TeacherError(f"{family}: attention of layer {site.layer_index} is not causal; a decoder is needed.")
    return sites


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _refuse_other_architectures(model: Any) -> None:
    config = getattr(model, "config", None)
    family = type(model).__name__
    if config is None:
        raise TeacherError(f"{family} is not a transformers model: it has no config.")
    if config.is_encoder_decoder:
        raise TeacherError(f"{family} is an encoder-decoder; only decoder-only language models can be teachers.")
    if config.get_text_config(decoder=True) is not config:
        raise TeacherError(f"{family} is multimodal; load its text model alone (the class that ends in ForCausalLM).")
    if getattr(config, "add_cross_attention", False):
        raise TeacherError(
            f"{family} has cross-attention (add_cross_attention is set); only plain decoders can be teachers."
        )


def _recorded_sites(model: nn.Module) -> list[AttentionSite]:
    """Sites by the library's own word: the classes a model names as the source of its attention maps."""
    targets = [
        target
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for target in _as_list((module._can_record_outputs or {}).get("attentions"))
    ]

    def is_attention(name: str, module: nn.Module) -> bool:
        return any(_is_target(target, name, module) for target in targets)

    return list(_sites(model, is_attention)) if targets else []


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_target(target: Any, name: str, module: nn.Module) -> bool:
    """Whether a module is what an entry of `_can_record_outputs` means: a class, its name, or an OutputRecorder."""
    place = getattr(target, "layer_name", None)
    if place is not None and place not in f".{name}.":
        return False
    class_name = target if isinstance(target, str) else getattr(target, "class_name", None)
    if class_name is not None:
        return type(module).__name__.endswith(class_name)
    kind = getattr(target, "target_class", target)
    return isinstance(kind, type) and isinstance(module, kind)


def _structural_sites(model: nn.Module) -> list[AttentionSite]:
    """Sites by their looks, for models that name no class: query, key, value and output projections."""

    def is_attention(_name: str, module: nn.Module) -> bool:
        return _input_layout(module) is not None and _output_projection(module) is not None

    return list(_sites(model, is_attention))


def _sites(model: nn.Module, is_attention: Callable[[str, nn.Module], bool]) -> Iterator[AttentionSite]:
    for name, module in model.named_modules():
        if not is_attention(name, module) or getattr(module, "is_cross_attention", False):
            continue
        index = getattr(module, "layer_idx", None)
        if index is None:
            numbers = re.findall(r"\.(\d+)\.", f".{name}.")
            index = int(numbers[-1]) if numbers else None
        if index is not None:
            parent_name, _, attribute = name.rpartition(".")
            yield AttentionSite(int(index), name, module, model.get_submodule(parent_name), attribute)


def head_shape(site: AttentionSite) -> tuple[int, int]:
    """Number of query heads and width of each, from the shapes of the projections (works on the meta device)."""
    module = site.module
    output = _output_projection(module)
    if output is None:
        raise _unreadable(site, f"none of {', '.join(OUTPUT_NAMES)} is among its parts")
    width = _weight_shape(output)[1]
    config = getattr(module, "config", None)
    heads = _first_number(module, ("num_heads", "num_attention_heads")) or _first_number(
        config, ("num_attention_heads",)
    )
    head_dim = _first_number(module, ("head_dim", "head_size")) or (width // heads if heads else None)
    if not head_dim or width % head_dim or (heads and heads * head_dim != width):
        raise _unreadable(site, f"its {width} output channels are not {heads} heads of {head_dim}")
    return width // head_dim, head_dim


def _first_number(holder: Any, names: tuple[str, ...]) -> int | None:
    values = [getattr(holder, name, None) for name in names]
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def projections(site: AttentionSite) -> AttentionProjections:
    """A site's query, key, value and output projections in one form, whatever the family's own layout.

    Known layouts: separate q/k/v (grouped or not), GPT-NeoX's `query_key_value` (head by head), GPT-2's `c_attn`
    (transposed), Phi-3's `qkv_proj` (one after another). Raises: TeacherError for any other.
    """
    heads, head_dim = head_shape(site)
    layout = _input_layout(site.module)
    if layout is None:
        raise _unreadable(site, "its query, key and value projections have an unknown layout")
    blocks = {
        part: _repeat_heads(_split(site, layout, part, heads, head_dim), heads, head_dim, site)
        for part in ("weight", "bias")
    }
    output = _output_projection(site.module)
    assert output is not None
    q, k, v = blocks["weight"]
    q_bias, k_bias, v_bias = blocks["bias"]
    assert q is not None
    assert k is not None
    assert v is not None
    o = _float(_weight(output))
    return AttentionProjections(q, k, v, o, q_bias, k_bias, v_bias, _float(output.bias), heads, head_dim)


def _split(site: AttentionSite, layout: str, part: str, heads: int, head_dim: int) -> list[Tensor | None]:
    module = site.module
    if layout == "separate":
        return [_part(getattr(module, name), part) for name in ("q_proj", "k_proj", "v_proj")]
    whole = _part(getattr(module, layout), part)
    if whole is None:
        return [None, None, None]
    rows, own = whole.shape[0], heads * head_dim
    if layout == "query_key_value":
        if rows != 3 * own:
            raise _unreadable(site, f"query_key_value has {rows} rows where {3 * own} were expected")
        grouped = whole.reshape(heads, 3, head_dim, *whole.shape[1:])
        return [grouped[:, i].reshape(own, *whole.shape[1:]) for i in range(3)]
    shared = (rows - own) // 2
    if (rows - own) % 2 or shared % head_dim or not shared:
        raise _unreadable(
            site, f"{layout} has {rows} rows, which is not queries for {heads} heads plus keys and values"
        )
    return list(whole.split([own, shared, shared]))


def _repeat_heads(parts: list[Tensor | None], heads: int, head_dim: int, site: AttentionSite) -> list[Tensor | None]:
    """Repeat the key and value heads so that each query head has its own."""
    repeated = []
    for part in parts:
        if part is not None and part.shape[0] != heads * head_dim:
            own = part.shape[0] // head_dim
            if part.shape[0] % head_dim or heads % own:
                raise _unreadable(site, f"a projection has {part.shape[0]} rows, for {heads} heads of {head_dim}")
            part = part.reshape(own, head_dim, *part.shape[1:]).repeat_interleave(heads // own, dim=0).flatten(0, 1)
        repeated.append(_float(part))
    return repeated


def _input_layout(module: nn.Module) -> str | None:
    children = dict(module.named_children())
    if all(isinstance(children.get(name), nn.Linear) for name in ("q_proj", "k_proj", "v_proj")):
        return "separate"
    if isinstance(children.get("query_key_value"), nn.Linear):
        return "query_key_value"
    if isinstance(children.get("c_attn"), Conv1D):
        return "c_attn"
    # CodeGen's qkv_proj shuffles heads between its four tensor-parallel groups.
    if isinstance(children.get("qkv_proj"), nn.Linear) and not type(module).__name__.startswith("CodeGen"):
        return "qkv_proj"
    return None


def _output_projection(module: nn.Module) -> Any:
    children = dict(module.named_children())
    return next((children[name] for name in OUTPUT_NAMES if isinstance(children.get(name), (nn.Linear, Conv1D))), None)


def _weight(projection: Any) -> Tensor:
    """The weight as [out, in]; GPT-2's Conv1D keeps it the other way round."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def _weight_shape(projection: Any) -> tuple[int, int]:
    return tuple(_weight(projection).shape)  # type: ignore[return-value]


def _part(projection: Any, part: str) -> Tensor | None:
    return _weight(projection) if part == "weight" else projection.bias


def _float(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().to(torch.float32, copy=True).contiguous()


def _unreadable(site: AttentionSite, why: str) -> TeacherError:
    parts = ", ".join(name for name, _ in site.module.named_children()) or "none"
    return TeacherError(
        f"cannot read the attention of layer {site.layer_index} ({type(site.module).__name__}): {why}. Its parts: "
        f"{parts}. Choose a teacher of a family that Limbeck knows, or start the mixers at random with no copied "
        "projections."
    )
