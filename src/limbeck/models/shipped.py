"""What a model costs to ship and to run, and what each way of sharing weights changes about it.

Sharing wins bytes and loses operations for each of them, so both stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from limbeck.models.flops import forward_flops_per_token
from limbeck.nn.trunk import Trunk

# An 8-bit matrix carries one half-precision scale a row; vectors stay in half precision.
_SCALE_BYTES = 2
# What loading a model needs beside its weights: settings, tokenizer, chat template, code of its own.
_BESIDE_WEIGHTS = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")


def model_costs(model: Any, *, context_tokens: int, bytes_per_token: float | None = None) -> dict[str, Any]:
    """Parameters, operations, and the size of the file, of any causal language model. Works on the meta device.

    parameters: distinct ones, as they are saved. parameters_run: what the same computation would hold with nothing tied,
    so shared blocks as often as they run, and embedding and head apart. forward_flops_per_token: of a pass over
    `context_tokens`; forward_flops_per_byte: the same for a byte of text. bytes_per_token: of the text; a byte-level model
    knows its own (every patch is closed by a symbol that stands for no byte); None otherwise gives None.
    shipped_bytes: weights in "float32", "float16" and "int8", in the last with a half-precision scale for every row of
    a matrix and vectors in half precision.
    """
    parameters = list(model.parameters())
    distinct = sum(parameter.numel() for parameter in parameters)
    shared = sum(module.parameters_run() - _size(module) for module in model.modules() if isinstance(module, Trunk))
    flops = forward_flops_per_token(model, context_tokens)
    if bytes_per_token is None:
        bytes_per_token = _bytes_per_symbol(model.config)
    return {
        "parameters": distinct,
        "parameters_run": distinct + shared + _tied_head_size(model),
        "forward_flops_per_token": flops,
        "forward_flops_per_byte": None if bytes_per_token is None else flops / bytes_per_token,
        "shipped_bytes": {
            "float32": 4 * distinct,
            "float16": 2 * distinct,
            "int8": sum(_int8_bytes(parameter) for parameter in parameters),
        },
    }


def folder_bytes(place: Path) -> int | None:
    """What is shipped as it stands on the disk: weights and whatever else loading them needs.

    place: a model folder, or one file that holds all (GGUF). Of weights that a folder holds in several formats only
    safetensors count. None when it is neither.
    """
    if place.is_file():
        return place.stat().st_size
    if not (place / "config.json").is_file():
        return None
    files = [file for file in place.iterdir() if file.is_file() and not file.name.startswith(".")]
    weights = [file for file in files if file.suffix == ".safetensors"] or [
        file for file in files if file.suffix == ".bin"
    ]
    return sum(file.stat().st_size for file in [*weights, *(one for one in files if one.suffix in _BESIDE_WEIGHTS)])


def tying_table(
    base: PreTrainedConfig | Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    context_tokens: int,
    bytes_per_token: float | None = None,
) -> list[dict[str, Any]]:
    """Costs of variants of one model, a row each, beside the first: `model_costs` with "name" and three ratios.

    base: a configuration with a trunk, or its plain values (model_type and keys). variants: a name, and the keys that
    differ, those of the trunk under "trunk"; default: `tying_menu`. The ratios ("parameters_ratio", "flops_ratio",
    "int8_ratio") are to the base as it is, which comes first as "base". Nothing is allocated.
    """
    values = base.to_dict() if isinstance(base, PreTrainedConfig) else dict(base)
    if variants is None:
        variants = tying_menu(values["trunk"]["layers"])
    rows: list[dict[str, Any]] = []
    for name, changes in [("base", {}), *variants.items()]:
        model = _empty_model({**values, **changes, "trunk": {**values["trunk"], **changes.get("trunk", {})}})
        costs = model_costs(model, context_tokens=context_tokens, bytes_per_token=bytes_per_token)
        first = rows[0] if rows else costs
        rows.append(
            {
                "name": name,
                **costs,
                "parameters_ratio": costs["parameters"] / first["parameters"],
                "flops_ratio": costs["forward_flops_per_token"] / first["forward_flops_per_token"],
                "int8_ratio": costs["shipped_bytes"]["int8"] / first["shipped_bytes"]["int8"],
            }
        )
    return rows


def tying_menu(layers: int, *, delta_rank: int = 16) -> dict[str, dict[str, Any]]:
    """One variant for each way of sharing weights, for a trunk of so many layers (four at least)."""
    middle = (layers - 1) // 2
    trunks: dict[str, dict[str, Any]] = {
        "feed-forward, interior": {"share_feed_forward": "interior"},
        "feed-forward, all layers": {"share_feed_forward": "all"},
        "attention output, interior": {"share_mixers": "output"},
        "attention, interior": {"share_mixers": "all"},
        "whole interior": {"share_feed_forward": "interior", "share_mixers": "all"},
        f"whole interior, deltas of rank {delta_rank}": {
            "share_feed_forward": "interior", "share_mixers": "all", "delta_rank": delta_rank,
        },
        "every block twice": {"repeat": 2},
        "every block twice, half the layers": {"repeat": 2, "layers": layers // 2},
        "two middle layers twice": {"loop": [middle, middle + 1, 2]},
    }  # fmt: skip
    return {name: {"trunk": changes} for name, changes in trunks.items()}


def _empty_model(values: Mapping[str, Any]) -> Any:
    options = {key: value for key, value in values.items() if key != "transformers_version"}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tied_head_size(model: Any) -> int:
    """Size of the embedding where the head uses the very same matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return weight.numel() if weight is not None and embedding is not None and weight is embedding.weight else 0


def _bytes_per_symbol(config: Any) -> float | None:
    patch_bytes = getattr(config, "mean_patch_bytes", None)
    return None if patch_bytes is None else patch_bytes / (patch_bytes + 1)


def _int8_bytes(parameter: torch.Tensor) -> int:
    if parameter.dim() < 2:
        return 2 * parameter.numel()
    return parameter.numel() + _SCALE_BYTES * parameter.shape[0]
