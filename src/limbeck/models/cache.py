"""The generation cache of a Hyena layer.

transformers builds a cache from the config's `layer_types`, one object per layer. Registering ours under "hyena" makes
generate(), beams, assisted decoding, prompt lookup and chunked prefill work as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, DynamicCache

from limbeck.nn.hyena import HyenaOperator, HyenaState


class HyenaCacheLayer(CacheLayerMixin):
    """What one Hyena layer remembers of the tokens it has seen: the operator's state, and how to go back.

    Going back (`crop`) is needed by assisted decoding. A state cannot be cut, so after `activate_past_recording` the
    layer keeps the state it had then and the inputs it got since; `crop` starts again from that state with the inputs
    that stay.
    """

    _layer_type = "hyena"
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, **_options: Any) -> None:
        super().__init__()
        self.record_past = False
        self.state: HyenaState | None = None
        self._start: HyenaState | None = None
        self._inputs_BTD: Tensor | None = None
        self._mask_BT: Tensor | None = None
        self._operator: weakref.ref[HyenaOperator] | None = None

    def advance(self, operator: HyenaOperator, hidden_BTD: Tensor, *, mask_BT: Tensor | None = None) -> Tensor:
        """The operator's output for the next tokens [B, T, D], which are then part of the past.

        mask_BT: True for real tokens, False for padding; None when all are real.
        """
        if self.record_past:
            self._record(operator, hidden_BTD, mask_BT)
        else:
            self._forget_record()
        return self._step(operator, hidden_BTD, mask_BT)

    def _step(self, operator: HyenaOperator, hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        if self.state is None:
            self.device = hidden_BTD.device
            self.state = operator.init_state(hidden_BTD.shape[0], device=hidden_BTD.device, dtype=hidden_BTD.dtype)
            self.is_initialized = True
        out_BTD, self.state = operator.advance(hidden_BTD, self.state, mask_BT=mask_BT)
        return out_BTD

    def _record(self, operator: HyenaOperator, hidden_BTD: Tensor, mask_BT: Tensor | None) -> None:
        self._operator = weakref.ref(operator)
        if mask_BT is None:
            mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
        if self._inputs_BTD is None or self._mask_BT is None:
            self._inputs_BTD, self._mask_BT = hidden_BTD, mask_BT
        else:
            self._inputs_BTD = torch.cat([self._inputs_BTD, hidden_BTD], dim=1)
            self._mask_BT = torch.cat([self._mask_BT, mask_BT], dim=1)

    def _forget_record(self) -> None:
        self._start = self._inputs_BTD = self._mask_BT = None

    def activate_past_recording(self) -> None:
        """From now on keep what is needed to take tokens back."""
        if not self.record_past:
            self.record_past = True
            self._mark()

    def _mark(self) -> None:
        self._forget_record()
        self._start = None if self.state is None else self.state.clone()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens. What stays can no longer be taken back."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number, as in crop(-2)."
            )
        if not self.record_past:
            if tokens_to_remove < 0:
                raise RuntimeError(
                    "a Hyena layer cannot take tokens back unless activate_past_recording() was called before."
                )
            return
        recorded = 0 if self._inputs_BTD is None else self._inputs_BTD.shape[1]
        kept = recorded + tokens_to_remove
        if kept < 0:
            raise RuntimeError(f"cannot take back {-tokens_to_remove} tokens: only the last {recorded} were recorded.")
        if tokens_to_remove:
            self._replay(kept)
        self._mark()

    def _replay(self, kept: int) -> None:
        operator = None if self._operator is None else self._operator()
        assert operator is not None
        assert self._inputs_BTD is not None
        assert self._mask_BT is not None
        self.state = self._start
        if kept:
            self._step(operator, self._inputs_BTD[:, :kept], self._mask_BT[:, :kept])

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.state is None else int(self.state.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over past and new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything seen."""
        self.state = None
        self.is_initialized = False
        self._forget_record()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at these indices, in their order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, by index or by mask."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move what is remembered to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move what is remembered back to the layer's device."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = None if self.state is None else self.state.map(change)
        self._start = None if self._start is None else self._start.map(change)
        self._inputs_BTD = None if self._inputs_BTD is None else change(self._inputs_BTD)
        self._mask_BT = None if self._mask_BT is None else change(self._mask_BT)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the state is made by the operator at the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called by a model of ours: keys and values are attention's."""
        raise NotImplementedError("a Hyena layer keeps no keys and values; its mixer calls advance().")


class _NoStaticLayer:
    """In the place of a static layer: those exist for compiled attention, and a Hyena state cannot be compiled."""

    def __init__(self, **_options: Any) -> None:
        raise ValueError(
            "a static cache is not possible for a model with Hyena layers. Leave cache_implementation unset: "
            "the cache grows as needed."
        )


STATIC_LAYER_TYPE_MAPPING[HyenaCacheLayer._layer_type] = _NoStaticLayer


def prepare_cache(cache: Any, config: PreTrainedConfig) -> Cache:
    """A cache with the layers this model needs: a new one for None, an empty `DynamicCache()` filled in place.

    Raises: ValueError when the cache was built for another model.
    """
    if cache is None:
        return DynamicCache(config=config)
    layers = getattr(cache, "layers", None)
    if layers is not None and len(layers) == 0:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
        return cache
    for index, kind in enumerate(config.layer_types):
        if kind == "hyena" and (
            layers is None or index >= len(layers) or not isinstance(layers[index], HyenaCacheLayer)
        ):
            raise ValueError(
                f"past_key_values was not made for this model: layer {index} is a Hyena layer, and the cache holds "
                "something else there. Pass DynamicCache(config=model.config), or nothing."
            )
    return cache
