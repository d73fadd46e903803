"""A causal language model in two parts: a body that gives hidden states, and a head that turns them into logits.

With a vocabulary of 150,000, logits of every position are the largest tensor of a training step. Split, the head can be
run on a few positions at a time, and only where tokens are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.types import Batch
from limbeck.models.packing import forward_batch

# Several times what rounding differs by between one order of summation and another, as a share of the largest logit.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_PROBE_TOKENS = 3


class SplitModel:
    """A model of which body and head can be run apart. Not a module: it owns nothing and is saved nowhere.

    model: any causal LM of transformers, a hybrid or a PEFT model included. vocabulary_size: rows of the logits that
    stand for tokens; those after them (padding of the embedding) are left out. None keeps all.

    The split is tried on three tokens. `is_split` is False for a model whose logits cannot be had from the hidden
    states in a known way: then "hidden states" are the logits themselves and the head changes nothing, which is right
    but needs the memory of whole logits.

    Raises: ValueError when there are fewer rows than `vocabulary_size`.
    """

    def __init__(self, model: nn.Module, *, vocabulary_size: int | None = None):
        self.model = model
        self._inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._cap = getattr(_text_config(self._inner), "final_logit_softcapping", None)
        self._scale, rows = self._probe()
        if vocabulary_size is not None and not 0 < vocabulary_size <= rows:
            raise ValueError(f"vocabulary_size is {vocabulary_size}, but the model's logits have {rows} rows")
        self._rows = vocabulary_size if vocabulary_size is not None and vocabulary_size < rows else None
        self.vocabulary_size: int = vocabulary_size or rows

    @property
    def is_split(self) -> bool:
        """Whether body and head really run apart."""
        return self._scale is not None

    @property
    def input_device(self) -> torch.device:
        """Where a batch has to lie; with a model on several devices, where its first layers do."""
        return _input_device(self._inner)

    def hidden(self, batch: Batch) -> Tensor:
        """What the head is fed at every position, [B, T, D]; packed documents do not see each other.

        Gradients flow to the body. The head runs on one position only, whatever the size of the batch.
        """
        if not self.is_split:
            return forward_batch(self.model, batch).logits[..., : self._rows]
        with _fed(self._embedding(), keep=1) as fed:
            forward_batch(self.model, batch)
        return fed[0]

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states, scaled and soft-capped as the model does it. Gradients flow to both."""
        return hidden_ND if self._scale is None else self._logits(hidden_ND, self._scale)[..., : self._rows]

    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the head; a tied embedding is one of the body's too."""
        if not self.is_split:
            return []
        return [parameter for parameter in self._embedding().parameters() if parameter.requires_grad]

    def _embedding(self) -> nn.Module:
        return self._inner.get_output_embeddings()  # type: ignore[operator, return-value]

    def _logits(self, hidden: Tensor, scale: float) -> Tensor:
        logits = self._embedding()(hidden)
        if scale != 1:
            logits = logits * scale
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def _probe(self) -> tuple[float | None, int]:
        """The scale with which the head's logits are the model's own (None: with none), and how many logits there are."""
        ids_BT = _ordinary_ids(self._inner)
        probe = Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
        embedding = getattr(self._inner, "get_output_embeddings", lambda: None)()
        # Dropout of a model in training must not draw from the run's random numbers.
        with torch.no_grad(), torch.random.fork_rng():
            if not isinstance(embedding, nn.Module):
                return None, forward_batch(self.model, probe).logits.shape[-1]
            with _fed(embedding) as fed:
                whole_BTV = forward_batch(self.model, probe).logits
            rows = whole_BTV.shape[-1]
            if len(fed) != 1:
                return None, rows
            scales = _scales(_text_config(self._inner))
            return next((scale for scale in scales if _same(self._logits(fed[0], scale), whole_BTV)), None), rows


@contextmanager
def _fed(head: nn.Module, *, keep: int | None = None) -> Iterator[list[Tensor]]:
    """Collect what a head is fed, and let it work on the first row's last `keep` positions alone (None: on all)."""
    fed: list[Tensor] = []

    def before(_module: nn.Module, args: tuple) -> tuple | None:
        if not args:
            return None
        fed.append(args[0])
        return None if keep is None else (args[0][:1, -keep:], *args[1:])

    handle = head.register_forward_pre_hook(before)
    try:
        yield fed
    finally:
        handle.remove()


def _scales(config: Any) -> Iterator[float]:
    """What families multiply their logits by."""
    yield 1.0
    multipliers: dict[str, Callable[[float], float]] = {
        "logit_scale": float, "lm_head_multiplier": float, "logits_scaling": lambda scaling: 1.0 / scaling,
    }  # fmt: skip
    for name, multiplier in multipliers.items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value:
            yield multiplier(value)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    largest = theirs.double().abs().max().item()
    # A head of zeros would agree whatever the scale.
    return largest > 0 and bool((ours.double() - theirs.double()).abs().max() <= largest * _ROUNDING[ours.dtype])


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _ordinary_ids(model: Any) -> Tensor:
    """A row of tokens none of which is padding, since transformers warns of that."""
    rows = model.get_input_embeddings().weight.shape[0]
    first = (_text_config(model).pad_token_id or 0) + 1
    return (first + torch.arange(_PROBE_TOKENS, device=_input_device(model))).remainder(rows).unsqueeze(0)


def _input_device(model: Any) -> torch.device:
    """Where token ids go: where the input embeddings lie, or are brought to when they are offloaded."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or embedding.weight.device)
