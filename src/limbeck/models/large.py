"""Teachers larger than their device: weights in few bits, or kept in main memory and brought over block by block."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import EnvironmentFault, RecipeError, unknown_name
from limbeck.models.anatomy import find_layers

QUANTISATIONS = ("int8", "int4")


def quantised_options(quantise: str, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained that hold the weights of linear layers in 8 or 4 bits.

    int8: torchao (weights alone, activations keep their format) where it is installed, else bitsandbytes (LLM.int8,
    arXiv:2208.07339). int4: bitsandbytes (NF4, arXiv:2305.14314, computing in `dtype`); torchao's needs a kernel package
    that few have.

    Raises: RecipeError for an unknown word, EnvironmentFault when neither is installed.
    """
    if quantise not in QUANTISATIONS:
        raise RecipeError("teacher.quantise: " + unknown_name("quantisation", quantise, QUANTISATIONS))
    if quantise == "int8" and find_spec("torchao") is not None:
        return {"device_map": {"": device}, "quantization_config": _torchao()}
    if find_spec("bitsandbytes") is not None:
        return {"device_map": {"": device}, "quantization_config": _bitsandbytes(quantise, dtype)}
    needed, package = ("torchao or bitsandbytes", "torchao") if quantise == "int8" else ("bitsandbytes",) * 2
    raise EnvironmentFault(
        f"teacher.quantise: {quantise} needs {needed}, which is not installed. Install it (pip install {package}), or "
        "leave quantise out; teacher.dtype: bfloat16 halves the memory of float32, and teacher.offload keeps the weights "
        "in main memory."
    )


def offload_blocks(model: nn.Module, device: torch.device) -> None:
    """Leave a model's blocks in main memory and bring each to the device while it runs; all else moves there for good.

    Embeddings and head stay on the device because the head is run many times for one run of the body.
    """
    from accelerate import cpu_offload

    blocks = [layer.block for layer in find_layers(model)]
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            # As `Module.to`, for this module's own tensors alone; tied ones stay tied.
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for block in blocks:
        cpu_offload(block, execution_device=device)


def _bitsandbytes(quantise: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantise == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
