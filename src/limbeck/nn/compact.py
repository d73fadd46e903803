"""A small causal language model over tokens: embedding, trunk, head. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.nn.trunk import Trunk, TrunkCache, TrunkSettings

# Embeddings start small (see `CompactNetwork`), so their norm must not drown in the epsilon.
_EMBEDDING_EPS = 1e-12


class TiedHead(nn.Module):
    """The output projection whose matrix is an embedding's. It holds no tensor: the embedding's name is the only one."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        # Past torch's registration of submodules, which would give the matrix a second name.
        object.__setattr__(self, "embedding", embedding)

    @property
    def weight(self) -> Tensor:
        """The embedding's matrix [V, D]."""
        return cast(nn.Embedding, self.embedding).weight

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The tied matrix, for who asks what the head is made of; the whole model counts it at the embedding alone."""
        if isinstance(self.weight, nn.Parameter):
            yield (f"{prefix}.weight" if prefix else "weight"), self.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of [..., D]. Gradients flow to both."""
        return F.linear(hidden, self.weight)


class CompactNetwork(nn.Module):
    """Embedding, trunk, and a head with a soft cap: ids [B, T] to logits [B, T, V].

    tie_embeddings: one matrix for both ends. logit_softcap: logits are cap * tanh(logits / cap) (arXiv:2408.00118,
    section 2); None for none. The trunk's input is the embedding at root mean square 1, without a learned factor
    (modded-nanogpt, nanochat). Embedding and head start with standard deviation 1 / width: a tied token's own logit is then
    1 at the start and all others near 0, whatever the width, so that training starts at log V nats.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        trunk: TrunkSettings | Mapping[str, Any],
        tie_embeddings: bool = True,
        logit_softcap: float | None = 15.0,
    ):
        super().__init__()
        if vocab_size < 1:
            raise RecipeError(f"vocab_size must be at least 1, not {vocab_size}")
        if logit_softcap is not None and logit_softcap <= 0:
            raise RecipeError(f"logit_softcap must be positive, or null for none; got {logit_softcap}")
        settings = TrunkSettings.read(trunk)
        self.logit_softcap = logit_softcap
        self.embedding = nn.Embedding(vocab_size, settings.width)
        nn.init.normal_(self.embedding.weight, std=1 / settings.width)
        self.trunk = Trunk(settings)
        self.head: nn.Module
        if tie_embeddings:
            self.head = TiedHead(self.embedding)
        else:
            self.head = nn.Linear(settings.width, vocab_size, bias=False)
            nn.init.normal_(self.head.weight, std=1 / settings.width)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        cache: TrunkCache | None = None,
        rows_N: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V]; those at t speak of the token at t + 1. Arguments as of `Trunk.forward`."""
        hidden_BTD = self.hidden(
            self.embedding(ids_BT), document_ids_BT=document_ids_BT, mask_BT=mask_BT, cache=cache, rows_N=rows_N
        )
        return self.logits(hidden_BTD)

    def hidden(
        self,
        embedded_BTD: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        cache: TrunkCache | None = None,
        rows_N: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """What the head is fed, [B, T, D], of embedded tokens. Gradients flow."""
        input_BTD = F.rms_norm(embedded_BTD, embedded_BTD.shape[-1:], eps=_EMBEDDING_EPS)
        return self.trunk(input_BTD, document_ids_BS=document_ids_BT, mask_BS=mask_BT, cache=cache, rows_N=rows_N)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits [..., V] of what the head is fed. Gradients flow."""
        logits = self.head(hidden)
        if self.logit_softcap is None:
            return logits
        return torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    def set_embedding(self, embedding: nn.Module) -> None:
        """Put another embedding in place; a tied head follows it."""
        self.embedding = embedding  # type: ignore[assignment]
        if isinstance(self.head, TiedHead):
            self.head = TiedHead(embedding)

    def flops_per_token(self, context_tokens: float) -> float:
        """Operations of one forward pass over a context, divided by its tokens: the trunk's, and 2 a weight of the head."""
        return self.trunk.flops_per_position(context_tokens) + 2 * self.embedding.weight.numel()
