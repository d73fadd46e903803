"""Estimates of memory, disk and time from counts. Rules of thumb, each with its origin; `planning` applies them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from limbeck.models.hybrid import HyenaMixer
from limbeck.objectives.chunked import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE

FLOAT_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED_BYTES = {"int8": 1.0, "int4": 0.5}
OPTIMIZER_STATES = {"adamw": 2, "muon": 2}

# Features held for the backward pass, for each input and output feature of a matrix: the norms, activations, gates and
# transforms beside the matrices are in the factor.
# Measured: GPT-NeoX shapes of width 192 and 512, vocabularies 300 to 50,304, float32 on a CPU, to within 15 %.
ACTIVATION_FACTOR = 1.5
MIXER_ACTIVATION_FACTOR = 3.3

# Logits exist a chunk of positions at a time. How many arrays of a chunk's size a loss holds at once: measured on a CPU
# (vocabularies 300 to 151,936: 2.3 to 2.5 for cross entropy, 3.9 to 6.4 with a dense teacher), where terms are worked out
# a small block of rows at a time; elsewhere on the whole chunk, counted in the code and not measured. Beside them the
# head's gradient is held twice, its sum so far and one chunk's part.
CHUNK_COPIES = {"tune": 2.5, "distil": 6.5, "align": 0.0}
CHUNK_COPIES_ELSEWHERE = {"tune": 5.0, "distil": 10.0, "align": 0.0}
HEAD_COPIES = 2

# Bytes of a store for each kept entry and each token, compressed. Measured with SmolLM2-135M on WikiText-2: 66.3 bytes a
# token at k = 32, 99.2 at 50 and 232.8 at 128 with 8-bit values, 83.6 and 135.9 at 32 with 16 and 32 bits. A row's own ids,
# text and likelihoods take about eight more.
ENTRY_BYTES = {"uint8": 1.78, "float16": 2.35, "float32": 3.97}
POSITION_BYTES = 9
ROW_TOKEN_BYTES = 8
WEIGHT_BYTES = 4

# What an endpoint answers is kept as JSON until the store is whole: a number and an id for every log-probability told.
ANSWER_ENTRY_BYTES = 27
ANSWER_TOKEN_BYTES = 30

# Characters of a token of text, roughly.
TOKEN_CHARACTERS = 4

# Python with torch and transformers loaded, before any model.
RUNTIME_BYTES = 600_000_000

# Rows of the batches that calibration reads, with all their attention maps.
CALIBRATION_ROWS = 8

# Share of a large matrix product's speed that training reaches; on a CPU 0.4 to 0.8 was measured.
EFFICIENCY = {"cpu": 0.5, "cuda": 0.3, "mps": 0.3}


@dataclass(frozen=True)
class Phase:
    """One stretch of training of one arm.

    trains_through: gradients pass through the whole model, not only mixers. trains_head: and reach the matrix that gives
    the logits. target_bytes_per_token: what the teacher hands over, beside logits, while a batch is worked on.
    """

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
    trains_head: bool = True
    target_bytes_per_token: float = 0.0

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


def training_bytes(
    phase: Phase, *, activations_per_token: float, vocabulary: int, width: int, device: str = "cpu"
) -> dict[str, float]:
    """What a phase holds beside the weights, by part. width: of the model, what its head is fed."""
    return {
        "gradients_bytes": phase.trained_parameters * FLOAT_BYTES,
        "optimizer_bytes": phase.state_bytes,
        "activations_bytes": phase.micro_batch_tokens * activations_per_token,
        "targets_bytes": phase.micro_batch_tokens * phase.target_bytes_per_token,
        "logits_bytes": logit_bytes(phase, vocabulary=vocabulary, width=width, device=device),
    }


def logit_bytes(phase: Phase, *, vocabulary: int, width: int, device: str) -> float:
    """What the chunked loss holds: some arrays of a chunk's logits, and the head's gradient on its way."""
    if phase.kind == "align":
        return 0.0
    copies = CHUNK_COPIES if device == "cpu" else CHUNK_COPIES_ELSEWHERE
    chunk = min(CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE), phase.micro_batch_tokens * vocabulary * FLOAT_BYTES)
    head = HEAD_COPIES * vocabulary * width * FLOAT_BYTES if phase.trains_head else 0
    return copies[phase.kind] * chunk + head


def model_bytes(model: Any, *, dtype: str, quantise: str | None = None) -> float:
    """Weights of a model that only teaches. quantise: its linear layers, the head left out, in so many bits."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    if quantise is None:
        return whole * DTYPE_BYTES[dtype]
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    small = sum(module.weight.numel() for module in linear)
    return (whole - small) * DTYPE_BYTES[dtype] + small * QUANTISED_BYTES[quantise]


def store_bytes_per_token(*, k: int, values: str, sampled: bool = False, hidden_features: int = 0) -> float:
    """Bytes a token of a target store, when all k entries are kept. hidden_features: of all captured layers together."""
    entry = ENTRY_BYTES[values] + WEIGHT_BYTES * sampled
    return k * entry + POSITION_BYTES + ROW_TOKEN_BYTES + 2 * hidden_features


def calibration_bytes(*, tokens: int, context_tokens: int, width: int, heads: int, layers: int) -> int:
    """What the calibrated start holds: each layer's input and output for all tokens, and one window's attention maps."""
    captured = max(tokens, CALIBRATION_ROWS * context_tokens) * 2 * width * layers
    maps = heads * context_tokens**2 * layers
    return (captured + maps) * FLOAT_BYTES


def disk_bytes(
    phases: Iterable[Phase],
    *,
    parameters: int,
    keep_checkpoints: int,
    token_files: int,
    further: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Bytes on the disk at the fullest moment: every arm's weights, one arm's checkpoints, the text as token ids.

    further: what is written besides, by name.
    """
    own = parameters * FLOAT_BYTES
    checkpoints: dict[str, int] = {}
    for phase in phases:
        checkpoints[phase.arm] = checkpoints.get(phase.arm, 0) + keep_checkpoints * (own + phase.state_bytes)
    parts = {
        "models_bytes": own * (len(checkpoints) + 2),
        "checkpoints_bytes": max(checkpoints.values()),
        "token_files_bytes": token_files,
        **(further or {}),
    }
    return parts | {"total_bytes": sum(parts.values())}


def seconds(flops: float, *, matmul_flops_per_second: float, device: str) -> float:
    """Time for some operations on a device whose matrix product has a known speed."""
    return flops / (matmul_flops_per_second * EFFICIENCY.get(device, 0.3))
