"""The byte model as a model of transformers: config, model, generation cache."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from limbeck.core.errors import VocabularyError
from limbeck.core.symbols import SYMBOLS
from limbeck.models.byte_pool_config import CACHE_TYPE, BytePoolConfig
from limbeck.models.documents import documents_of_positions
from limbeck.nn.byte_pool import BytePoolNetwork, BytePoolState


class PatchCacheLayer(CacheLayerMixin):
    """What a byte model remembers, as the one layer of a cache of transformers."""

    _layer_type = CACHE_TYPE
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **_options: Any) -> None:
        super().__init__()
        self.state: BytePoolState | None = None
        self._length = 0

    def advance(self, network: BytePoolNetwork, ids_BT: Tensor, mask_BT: Tensor | None, keep: int | None) -> Tensor:
        """The network's logits of the next symbols, which are then part of the past."""
        if self.state is None:
            self.state = network.start(len(ids_BT), device=ids_BT.device)
            self.is_initialized = True
        if len(self.state.begun_B) != len(ids_BT):
            raise ValueError(f"past_key_values holds {len(self.state.begun_B)} rows, but {len(ids_BT)} are given")
        self._length += ids_BT.shape[1]
        return network.advance(ids_BT, self.state, mask_BT=mask_BT, keep=keep)

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: patches that are closed have been summed up. Raises: ValueError, but for nothing to remove."""
        if tokens_to_remove:
            raise ValueError("a byte model cannot take symbols back; select rows of a copy of the cache instead.")

    def get_seq_length(self) -> int:
        """Symbols seen so far, padding included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over past and new symbols."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything seen."""
        self.state, self._length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at these indices, in their order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, by index or by mask."""
        if self.state is not None:
            rows = torch.arange(len(self.state.begun_B), device=indices.device)[indices]
            self.state = self.state.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(len(self.state.begun_B)).repeat_interleave(repeats))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the state is made at the first symbol."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called by a model of ours."""
        raise NotImplementedError("a byte model keeps its own state.")


class _NoStaticLayer:
    """In the place of a static layer: a row's patches end when their text says so, not when others' do."""

    def __init__(self, **_options: Any) -> None:
        raise ValueError("a static cache is not possible here. Leave cache_implementation unset: the cache grows.")


STATIC_LAYER_TYPE_MAPPING[CACHE_TYPE] = _NoStaticLayer


def _patch_layer(cache: Any, config: PreTrainedConfig) -> tuple[Cache, PatchCacheLayer]:
    if cache is None:
        cache = DynamicCache(config=config)
    elif not getattr(cache, "layers", None):
        cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
    if len(cache.layers) != 1 or not isinstance(cache.layers[0], PatchCacheLayer):
        raise ValueError(
            "past_key_values was not made for this model. Pass DynamicCache(config=model.config), or nothing."
        )
    return cache, cache.layers[0]


class BytePoolForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of bytes, all of it in `network`. Works with generate() and the Auto classes.

    Its ids are the symbols of `core/symbols.py`, as `ByteTokenizer` writes them.
    """

    config_class = BytePoolConfig
    config: BytePoolConfig
    # No such attribute: there is no part without head that is called like a model.
    base_model_prefix = "body"
    main_input_name = "input_ids"
    _supports_sdpa = True
    # Its cache cannot be cut, which keeps assisted decoding away.
    _is_stateful = True

    def __init__(self, config: BytePoolConfig):
        super().__init__(config)
        self.network = BytePoolNetwork(config.settings)
        # Drawn above; the library's own initialisation must not draw again.
        for module in self.network.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, 260]; those at t speak of the symbol at t + 1.

        attention_mask: [B, past + T], 0 for padding, which may stand anywhere; PAD is padding in any case. document_ids
        [B, T]: integers that change where a packed document ends; documents do not see each other. position_ids that
        restart, without a mask and a cache, mean the same; else they are not looked at. labels are shifted inside, as
        everywhere in transformers. use_cache: by default only where no gradients are recorded.

        Raises: ValueError for documents with a cache, a mask that is not [batch, symbols], or `inputs_embeds`: where
        patches lie must be read from the symbols.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("a byte model needs input_ids: where patches lie is read from the symbols.")
        if document_ids is None and position_ids is not None and attention_mask is None and past_key_values is None:
            document_ids = documents_of_positions(position_ids)
        if use_cache is None:
            use_cache = document_ids is None and not torch.is_grad_enabled() and self.config.use_cache
        mask_BT = _new_part(attention_mask, input_ids.shape[1])
        keep = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep and labels is None else None
        if use_cache or past_key_values is not None:
            if document_ids is not None:
                raise ValueError(
                    "document_ids and a cache exclude each other: run packed documents with use_cache=False."
                )
            past_key_values, layer = _patch_layer(past_key_values, self.config)
            logits_BTV = layer.advance(self.network, input_ids, mask_BT, keep)
        else:
            logits_BTV = self.network(input_ids, document_ids_BT=document_ids, mask_BT=mask_BT, keep=keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=SYMBOLS, **kwargs)
        if isinstance(logits_to_keep, Tensor):
            logits_BTV = logits_BTV[:, logits_to_keep]
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def forward_flops_per_token(self, context_tokens: int) -> float:
        """Operations of one forward pass over a context, divided by its symbols; shared blocks count each time they run."""
        return self.network.flops_per_symbol(context_tokens, mean_patch_bytes=self.config.mean_patch_bytes)

    def get_input_embeddings(self) -> nn.Module:
        """The vectors of symbols, which are the output matrix too (but in the original's mode)."""
        return self.network.embedding.symbols

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: symbols are fixed. Raises: VocabularyError."""
        raise VocabularyError(f"a byte model has {SYMBOLS} symbols, whose embedding is not exchanged.")

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix. What it gives is soft-capped, and what the grammar forbids is taken out."""
        return self.network.output

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """The embedding as it is. Raises: VocabularyError when asked for another size than it has."""
        if new_num_tokens not in (None, SYMBOLS):
            raise VocabularyError(f"a byte model has {SYMBOLS} symbols; it cannot have {new_num_tokens}.")
        return cast(nn.Embedding, self.get_input_embeddings())


def _new_part(attention_mask: Any, length: int) -> Tensor | None:
    """True at real ones of the last `length` symbols; None when all are."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] < length:
        raise ValueError(
            "attention_mask must have shape [batch, past and new symbols]. For packed documents pass document_ids, or "
            "position_ids that restart."
        )
    mask_BT = attention_mask[:, -length:].to(torch.bool)
    return None if bool(mask_BT.all()) else mask_BT


def register_model() -> None:
    """Make the Auto classes know the model. Safe to call again."""
    AutoModelForCausalLM.register(BytePoolConfig, BytePoolForCausalLM, exist_ok=True)


register_model()
