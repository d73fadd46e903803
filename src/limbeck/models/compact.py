"""The small language model over tokens as a model of transformers: config, model, generation cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from limbeck.core.errors import CheckpointError
from limbeck.models.compact_config import CACHE_TYPE, CompactConfig
from limbeck.models.documents import documents_of_positions
from limbeck.nn.compact import CompactNetwork
from limbeck.nn.trunk import Trunk, TrunkCache


class TrunkCacheLayer(CacheLayerMixin):
    """A trunk's cache as the one layer of a cache of transformers: generate(), beams and assisted decoding work on it."""

    _layer_type = CACHE_TYPE
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, **_options: Any) -> None:
        super().__init__()
        self.rows: TrunkCache | None = None
        self._real_BT: Tensor | None = None

    def opened(self, trunk: Trunk, embedded_BTD: Tensor, mask_BT: Tensor | None) -> TrunkCache:
        """The rows to append these tokens to, which count as seen from now on."""
        batch, length = embedded_BTD.shape[:2]
        if self.rows is None:
            self.rows = TrunkCache.empty(trunk, batch, embedded_BTD.device, embedded_BTD.dtype)
            self.is_initialized = True
        if self.rows.batch_rows != batch:
            raise ValueError(f"past_key_values holds {self.rows.batch_rows} rows, but {batch} are given")
        if mask_BT is None:
            mask_BT = torch.ones(batch, length, dtype=torch.bool, device=embedded_BTD.device)
        self._real_BT = mask_BT if self._real_BT is None else torch.cat((self._real_BT, mask_BT), dim=1)
        return self.rows

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens. Raises: ValueError with Hyena mixers, which cannot."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number, as in crop(-2)."
            )
        if tokens_to_remove == 0 or self.rows is None or self._real_BT is None:
            return
        kept_BT = self._real_BT[:, :tokens_to_remove]
        self.rows = self.rows.crop(kept_BT.sum(dim=1))
        self._real_BT = kept_BT

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return 0 if self._real_BT is None else self._real_BT.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over past and new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything seen."""
        self.rows, self._real_BT, self.is_initialized = None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at these indices, in their order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, by index or by mask."""
        if self.rows is None or self._real_BT is None:
            return
        rows = torch.arange(self.rows.batch_rows, device=indices.device)[indices]
        self.rows = self.rows.select(rows)
        self._real_BT = self._real_BT[rows.to(self._real_BT.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.rows is not None:
            self.batch_select_indices(torch.arange(self.rows.batch_rows).repeat_interleave(repeats))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the rows are made at the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called by a model of ours."""
        raise NotImplementedError("a trunk appends to its cache itself.")


class _NoStaticLayer:
    """In the place of a static layer: rows of a trunk's cache grow as they are read."""

    def __init__(self, **_options: Any) -> None:
        raise ValueError("a static cache is not possible here. Leave cache_implementation unset: the cache grows.")


STATIC_LAYER_TYPE_MAPPING[CACHE_TYPE] = _NoStaticLayer


def trunk_layer(cache: Any, config: PreTrainedConfig) -> tuple[Cache, TrunkCacheLayer]:
    """A cache of transformers and the trunk's layer in it: a new one for None, an empty `DynamicCache()` is filled.

    Raises: ValueError when the cache was built for another model.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    elif not getattr(cache, "layers", None):
        cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
    if len(cache.layers) != 1 or not isinstance(cache.layers[0], TrunkCacheLayer):
        raise ValueError(
            "past_key_values was not made for this model. Pass DynamicCache(config=model.config), or nothing."
        )
    return cache, cache.layers[0]


class CompactForCausalLM(PreTrainedModel, GenerationMixin):
    """A small causal language model over tokens, all of it in `network`. Works with generate() and the Auto classes."""

    config_class = CompactConfig
    config: CompactConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: CompactConfig):
        super().__init__(config)
        self.network = CompactNetwork(
            vocab_size=config.vocab_size,
            trunk=config.trunk_settings,
            tie_embeddings=config.tie_embeddings,
            logit_softcap=config.logit_softcap,
        )
        # Drawn above; the library's own initialisation must not draw again.
        for module in self.network.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a folder that lacks weights is refused: there is nothing to fill them with.

        Raises: CheckpointError naming what is missing or of another shape.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        refuse_missing(info, where=str(args[0]) if args else "the folder")
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, V]; those at t speak of the token at t + 1.

        attention_mask: [B, past + T], 0 for padding, which may stand anywhere. document_ids [B, T]: integers that change
        where a packed document ends; documents do not see each other. position_ids that restart, without a mask and a
        cache, mean the same; otherwise positions are counted here. labels are shifted inside, as everywhere in
        transformers. use_cache: by default only where no gradients are recorded.

        Raises: ValueError for documents with a cache, or a mask that is not [batch, tokens].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded_BTD = self.network.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if document_ids is None and position_ids is not None and attention_mask is None and past_key_values is None:
            document_ids = documents_of_positions(position_ids)
        if use_cache is None:
            use_cache = document_ids is None and not torch.is_grad_enabled() and self.config.use_cache
        mask_BT = _padding_mask(attention_mask, embedded_BTD.shape[1])
        rows = None
        if use_cache or past_key_values is not None:
            if document_ids is not None:
                raise ValueError(
                    "document_ids and a cache exclude each other: run packed documents with use_cache=False."
                )
            past_key_values, layer = trunk_layer(past_key_values, self.config)
            rows = layer.opened(self.network.trunk, embedded_BTD, mask_BT)
        hidden_BTD = self.network.hidden(embedded_BTD, document_ids_BT=document_ids, mask_BT=mask_BT, cache=rows)
        if isinstance(logits_to_keep, Tensor):
            hidden_BTD = hidden_BTD[:, logits_to_keep]
        elif logits_to_keep:
            hidden_BTD = hidden_BTD[:, -logits_to_keep:]
        logits_BTV = self.network.logits(hidden_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def forward_flops_per_token(self, context_tokens: int) -> float:
        """Operations of one forward pass over a context, divided by its tokens; shared blocks count each time they run."""
        return self.network.flops_per_token(context_tokens)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, whose matrix a tied head uses too."""
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, and with it a tied head's matrix."""
        self.network.set_embedding(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head. A tied one has no tensor of its own."""
        return self.network.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.network.head = new_embeddings


def refuse_missing(info: Any, *, where: str) -> None:
    """Raise CheckpointError when transformers' account of a loading says that weights were missing or misshapen."""
    absent = sorted(info["missing_keys"])
    misshapen = sorted(str(entry[0] if isinstance(entry, tuple | list) else entry) for entry in info["mismatched_keys"])
    for names, fault in ((absent, "missing"), (misshapen, "of another shape than config.json says")):
        if names:
            more = ", ..." if len(names) > 3 else ""
            raise CheckpointError(
                f"{where}: weights are {fault}: {', '.join(names[:3])}{more}. The file is not whole, or not of this "
                "configuration; save the model again, or fetch the folder anew."
            )


def _padding_mask(attention_mask: Any, length: int) -> Tensor | None:
    """True at real ones of the last `length` tokens; None when all are."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] < length:
        raise ValueError(
            "attention_mask must have shape [batch, past and new tokens]. For packed documents pass document_ids, or "
            "position_ids that restart."
        )
    mask_BT = attention_mask[:, -length:].to(torch.bool)
    return None if bool(mask_BT.all()) else mask_BT


def register_model() -> None:
    """Make the Auto classes know the model. Safe to call again."""
    AutoModelForCausalLM.register(CompactConfig, CompactForCausalLM, exist_ok=True)


register_model()
