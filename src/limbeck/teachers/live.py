"""A teacher that is a model in this process: asked anew for every batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import TeacherError
from limbeck.core.types import Batch, DenseTargets, SparseTargets, Targets
from limbeck.models.heads import SplitModel
from limbeck.models.large import offload_blocks
from limbeck.models.packing import forward_batch, without_head
from limbeck.models.teacher import LoadedTeacher, load_teacher
from limbeck.teachers.base import Wanted, refuse_missing
from limbeck.teachers.entries import (
    Dense,
    Entries,
    TopK,
    chunk_tokens_for,
    sampled_targets,
    top_k_targets,
    uniforms_of,
)


class LiveTeacher:
    """Any causal LM as a teacher, on its own device, of whatever number format.

    entries: how much of the distribution it hands over. vocabulary_size: how many rows of its logits stand for tokens
    (see `SplitModel`). Batches may lie on any device; targets come back to it. Dense targets keep hidden states only: the
    head runs on the teacher's device when a loss asks for a few positions, so targets of an `EmaTeacher` must be used
    before its next update.

    The model is set to evaluation mode. Raises: ValueError when `vocabulary_size` is above the model's, or k above the vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "teacher",
        entries: Entries = Dense(),  # noqa: B008 (frozen)
        vocabulary_size: int | None = None,
        chunk_tokens: int | None = None,
    ):
        self.model = model.eval()
        self.name = name
        self.entries = entries
        self._split = SplitModel(model, vocabulary_size=vocabulary_size)
        self.vocabulary_size: int = self._split.vocabulary_size
        if isinstance(entries, TopK) and entries.k > self.vocabulary_size:
            raise ValueError(f"{name}: k is {entries.k}, but the vocabulary has {self.vocabulary_size} tokens")
        self._chunk_tokens = chunk_tokens or chunk_tokens_for(self.vocabulary_size, self._split.input_device)
        self._wanted = Wanted()
        self._recorder: Any = None

    def prepare(self, wanted: Wanted) -> None:
        """Say once what will be wanted. Raises: TeacherError, RecipeError when the model has no such layer or feature."""
        refuse_missing(
            wanted, source=self.name, offers=("logits", "hidden", "features"),
            advice="Likelihoods of stretches of text come from a teacher with another tokenizer.",
        )  # fmt: skip
        self._wanted = wanted
        self._recorder = None
        if wanted.hidden or wanted.features:
            from limbeck.models.features import FeatureRecorder

            self._recorder = FeatureRecorder(self.model, hidden=wanted.hidden, features=wanted.features)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """What the model says about a batch. Raises: TrainingError when its logits are not numbers."""
        home = batch.input_ids_BT.device
        here = batch.to(self._split.input_device)
        logits = None
        with nullcontext() if self._recorder is None else self._recorder.recording() as recorded:
            if self._wanted.logits:
                hidden_BTD = self._split.hidden(here)
            else:
                forward_batch(without_head(self.model), here)
        if self._wanted.logits:
            logits = self._select(hidden_BTD, here, home)
        if recorded is None:
            return Targets(logits)
        return Targets(
            logits,
            hidden={layer: tensor.to(home) for layer, tensor in recorded.hidden.items()},
            features={name: tensor.to(home) for name, tensor in recorded.features.items()},
        )

    def _select(self, hidden_BTD: Tensor, batch: Batch, home: torch.device) -> DenseTargets | SparseTargets:
        if isinstance(self.entries, Dense):
            return DenseTargets(hidden_BTD.to(home), self._head_from(hidden_BTD.device))
        if isinstance(self.entries, TopK):
            kept = top_k_targets(hidden_BTD, self._split.head, k=self.entries.k, chunk_tokens=self._chunk_tokens)
            return _moved(kept, home)
        uniforms_BTN = uniforms_of(batch, draws=self.entries.draws, seed=self.entries.seed)
        kept = sampled_targets(
            hidden_BTD, self._split.head, uniforms_BTN,
            temperature=self.entries.temperature, chunk_tokens=self._chunk_tokens,
        )  # fmt: skip
        return _moved(kept, home)

    def _head_from(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The head on the device where it lies, for hidden states from anywhere; without gradients."""

        @torch.no_grad()
        def head(hidden_ND: Tensor) -> Tensor:
            return self._split.head(hidden_ND.to(device)).to(hidden_ND.device)

        return head


def _moved(targets: SparseTargets, device: torch.device) -> SparseTargets:
    weights = targets.weights_BTK
    return SparseTargets(
        targets.ids_BTK.to(device),
        targets.log_probs_BTK.to(device),
        targets.tail_log_prob_BT.to(device),
        None if weights is None else weights.to(device),
    )


def load_live_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    quantise: str | None = None,
    offload: bool = False,
    trust_remote_code: bool = False,
) -> LoadedTeacher:
    """Load a teacher that is too big to lie on the device as it is, or simply load it; see `load_teacher`.

    quantise: "int8" or "int4" holds the weights of its linear layers in so many bits. offload: its blocks stay in main
    memory and are brought to the device one by one while they are needed; embeddings and head stay on the device.

    Raises: TeacherError as `load_teacher`, and for both at once; EnvironmentFault when a package is missing.
    """
    if quantise and offload:
        raise TeacherError(
            "teacher: quantise and offload exclude each other, since quantised weights cannot be moved block by block. "
            "Choose one of them."
        )
    loaded = load_teacher(
        source, revision=revision, dtype=dtype, device="cpu" if offload else device, quantise=quantise,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if offload:
        offload_blocks(loaded.model, torch.device(device))
    return loaded
