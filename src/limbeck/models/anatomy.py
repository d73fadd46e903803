"""Where things are in a model of any supported family: its blocks, their mixers, and the projections inside those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from limbeck.core.errors import TeacherError
from limbeck.models.hybrid import HyenaMixer
from limbeck.models.surgery import AttentionSite, find_attention, head_shape

PROJECTIONS = ("queries", "keys", "values")
_SEPARATE = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}


@dataclass(frozen=True)
class Layer:
    """One block of a model and what mixes tokens in it; `site` is None for a mixer of Limbeck's own."""

    block: nn.Module
    mixer: nn.Module
    site: AttentionSite | None


def find_layers(model: Any) -> list[Layer]:
    """The blocks of a causal language model, in order; block i of the feature names is the list's item i - 1.

    Raises: TeacherError when the model's blocks cannot be told.
    """
    trunk = getattr(getattr(model, "network", None), "trunk", None)
    if trunk is not None:
        return _trunk_layers(model, trunk)
    sites = {site.name: site for site in find_attention(model)}
    hyenas = {name: module for name, module in model.named_modules() if isinstance(module, HyenaMixer)}
    layers: dict[int, Layer] = {}
    for name in [*sites, *hyenas]:
        site, hyena = sites.get(name), hyenas.get(name)
        parts = name.split(".")
        depth = max((place for place, part in enumerate(parts) if part.isdigit()), default=None)
        if depth is None:
            raise TeacherError(
                f"{type(model).__name__}: {name} is in no numbered block; its hidden states cannot be told."
            )
        block = model.get_submodule(".".join(parts[: depth + 1]))
        if site is not None:
            layers[site.layer_index] = Layer(block, site.module, site)
        elif hyena is not None:
            layers[hyena.layer_idx] = Layer(block, hyena, None)
    if sorted(layers) != list(range(len(layers))) or len({id(layer.block) for layer in layers.values()}) != len(layers):
        raise TeacherError(
            f"{type(model).__name__} does not have one mixer in each block; its hidden states cannot be told."
        )
    return [layers[index] for index in sorted(layers)]


def _trunk_layers(model: Any, trunk: Any) -> list[Layer]:
    if model.config.model_type == "limbeck_bytepool":
        raise TeacherError(
            "a model of bytes has hidden states of patches, not of symbols: there is nothing for another model's to be "
            "compared with. Use objectives on predictions, such as forward_kl or byte_trie."
        )
    if len(trunk.plan) != len(trunk.layers):
        raise TeacherError(
            "blocks that run more than once have no hidden states of their own. Use objectives on predictions."
        )
    return [Layer(block, block.mixer, None) for block in trunk.layers]


def hidden_width(model: Any) -> int:
    """Width D of a model's hidden states."""
    return int(model.config.hidden_size)


def projection_reader(site: AttentionSite, kind: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The projection of an attention that computes "queries", "keys" or "values", and how to cut them out of its output.

    Known layouts are those of `surgery.projections`; adapted and quantised projections are read alike.
    Raises: TeacherError for any other.
    """
    children = dict(site.module.named_children())
    index = PROJECTIONS.index(kind)
    if all(name in children for name in _SEPARATE.values()):
        return children[_SEPARATE[kind]], _whole
    if "query_key_value" in children:
        heads, head_dim = head_shape(site)

        def take_from_heads(out_BTC: Tensor) -> Tensor:
            _require_width(site, out_BTC, 3 * heads * head_dim)
            return out_BTC.unflatten(-1, (heads, 3, head_dim))[..., index, :].flatten(-2)

        return children["query_key_value"], take_from_heads
    if "c_attn" in children:
        return children["c_attn"], lambda out_BTC: out_BTC.chunk(3, dim=-1)[index]
    if "qkv_proj" in children and not type(site.module).__name__.startswith("CodeGen"):
        heads, head_dim = head_shape(site)

        def take_in_turn(out_BTC: Tensor) -> Tensor:
            shared = (out_BTC.shape[-1] - heads * head_dim) // 2
            return out_BTC.split([heads * head_dim, shared, shared], dim=-1)[index]

        return children["qkv_proj"], take_in_turn
    raise TeacherError(
        f"cannot read the {kind} of layer {site.layer_index + 1} ({type(site.module).__name__}): its projections "
        f"({', '.join(children)}) have an unknown layout. Choose an objective on hidden states or attention."
    )


def _require_width(site: AttentionSite, out_BTC: Tensor, width: int) -> None:
    if out_BTC.shape[-1] != width:
        raise TeacherError(
            f"cannot read queries, keys and values of layer {site.layer_index + 1} ({type(site.module).__name__}): "
            f"query_key_value gives {out_BTC.shape[-1]} channels where {width} were expected."
        )


def _whole(out_BTC: Tensor) -> Tensor:
    return out_BTC
