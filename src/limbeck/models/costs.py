"""Estimates of memory, disk and time from counts. Rules of thumb, each with its origin; `planning` applies them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from limbeck.models.hybrid import HyenaMixer

FLOAT_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_STATES = {"adamw": 2, "muon": 2}

# Features held for the backward pass, for each input and output feature of a matrix: the norms, activations, gates and
# transforms beside the matrices are in the factor. And how many arrays the size of the logits a loss holds at once.
# Measured: GPT-NeoX shapes of width 192 and 512, vocabularies 300 to 50,304, float32 on a CPU, to within 15 %.
ACTIVATION_FACTOR = 1.5
MIXER_ACTIVATION_FACTOR = 3.3
LOGIT_COPIES = {"tune": 3.5, "distil": 10, "align": 0}

# Python with torch and transformers loaded, before any model.
RUNTIME_BYTES = 600_000_000

# Rows of the batches that calibration reads, with all their attention maps.
CALIBRATION_ROWS = 8

# Share of a large matrix product's speed that training reaches; on a CPU 0.4 to 0.8 was measured.
EFFICIENCY = {"cpu": 0.5, "cuda": 0.3, "mps": 0.3}


@dataclass(frozen=True)
class Phase:
    """One stretch of training of one arm. `trains_through`: gradients pass through the whole model, not only mixers."""

    arm: str
    stage: str
    kind: str
    tokens: int
    steps: int
    flops: float
    trained_parameters: int
    micro_batch_tokens: int
    optimizer: str = "adamw"
    keeps_average: bool = False
    trains_through: bool = True

    @property
    def state_bytes(self) -> int:
        """What the optimiser and the moving average hold."""
        return self.trained_parameters * FLOAT_BYTES * (OPTIMIZER_STATES[self.optimizer] + self.keeps_average)


def activation_bytes_per_token(model: Any) -> float:
    """Bytes that a training pass keeps for each token until the backward pass; logits are counted apart."""
    in_mixers = {id(part) for mixer in model.modules() if isinstance(mixer, HyenaMixer) for part in mixer.modules()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    features = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            factor = MIXER_ACTIVATION_FACTOR if id(module) in in_mixers else ACTIVATION_FACTOR
            features += factor * sum(module.weight.shape)
    return features * FLOAT_BYTES


def training_bytes(phase: Phase, *, activations_per_token: float, vocabulary: int) -> dict[str, float]:
    """What a phase holds beside the weights, by part."""
    return {
        "gradients_bytes": phase.trained_parameters * FLOAT_BYTES,
        "optimizer_bytes": phase.state_bytes,
        "activations_bytes": phase.micro_batch_tokens * activations_per_token,
        "logits_bytes": phase.micro_batch_tokens * vocabulary * FLOAT_BYTES * LOGIT_COPIES[phase.kind],
    }


def calibration_bytes(*, tokens: int, context_tokens: int, width: int, heads: int, layers: int) -> int:
    """What the calibrated start holds: each layer's input and output for all tokens, and one window's attention maps."""
    captured = max(tokens, CALIBRATION_ROWS * context_tokens) * 2 * width * layers
    maps = heads * context_tokens**2 * layers
    return (captured + maps) * FLOAT_BYTES


def disk_bytes(phases: Iterable[Phase], *, parameters: int, keep_checkpoints: int, token_files: int) -> dict[str, Any]:
    """Bytes on the disk at the fullest moment: every arm's weights, one arm's checkpoints, the text as token ids."""
    own = parameters * FLOAT_BYTES
    checkpoints: dict[str, int] = {}
    for phase in phases:
        checkpoints[phase.arm] = checkpoints.get(phase.arm, 0) + keep_checkpoints * (own + phase.state_bytes)
    parts = {
        "models_bytes": own * (len(checkpoints) + 2),
        "checkpoints_bytes": max(checkpoints.values()),
        "token_files_bytes": token_files,
    }
    return parts | {"total_bytes": sum(parts.values())}


def seconds(flops: float, *, matmul_flops_per_second: float, device: str) -> float:
    """Time for some operations on a device whose matrix product has a known speed."""
    return flops / (matmul_flops_per_second * EFFICIENCY.get(device, 0.3))
