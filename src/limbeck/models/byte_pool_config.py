"""Configuration of the byte model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from limbeck.core.errors import VocabularyError
from limbeck.core.symbols import BOS, EOD, PAD, SYMBOLS
from limbeck.models.trunk_config import TrunkConfigMixin
from limbeck.nn.byte_pool_settings import BytePoolSettings

MODEL_TYPE = "limbeck_bytepool"
CACHE_TYPE = "limbeck_patches"

# A setting that is not given is as usual for its mode; None would mean "none" for some.
_USUAL = "usual"
_SETTINGS = tuple(item.name for item in dataclasses.fields(BytePoolSettings))


@strict
class BytePoolConfig(TrunkConfigMixin, PreTrainedConfig):
    """Configuration of a byte model. Its fields are those of `BytePoolSettings`, `trunk` those of `TrunkSettings`.

    mean_patch_bytes: of the text it is used for, with its segmenter; for counting operations alone.
    max_position_embeddings: symbols it was trained on at a time; longer texts run.

    Raises: RecipeError when settings are unknown or do not fit together, VocabularyError for another vocabulary.
    """

    model_type = MODEL_TYPE
    takes_document_ids: ClassVar[bool] = True
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = SYMBOLS
    mode: str = "bytepool"
    trunk: Any = None
    patch_bytes: Any = _USUAL
    local_width: Any = _USUAL
    encoder_layers: Any = _USUAL
    decoder_layers: Any = _USUAL
    local_heads: Any = _USUAL
    local_feed_forward: Any = _USUAL
    local_activation: Any = _USUAL
    prefix_slots: Any = _USUAL
    pool: Any = _USUAL
    ngram_rows: Any = _USUAL
    logit_softcap: Any = _USUAL
    qk_norm: Any = _USUAL
    zero_init: Any = _USUAL
    dropout: Any = _USUAL
    mean_patch_bytes: float | int = 4.5
    max_position_embeddings: int = 4096
    use_cache: bool = True
    bos_token_id: int | None = BOS
    eos_token_id: Any = EOD
    pad_token_id: int | None = PAD

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vocab_size != SYMBOLS:
            raise VocabularyError(
                f"vocab_size is {self.vocab_size}; a byte model has {SYMBOLS} symbols, no more and no less."
            )
        if self.trunk is not None:
            for name, value in self.settings.as_dict().items():
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def settings(self) -> BytePoolSettings:
        """All settings, checked."""
        given = {name: getattr(self, name) for name in _SETTINGS}
        return BytePoolSettings.read({name: value for name, value in given.items() if value != _USUAL})

    @property
    def layer_types(self) -> list[str]:
        """One cache holds the whole model."""
        return [CACHE_TYPE]


AutoConfig.register(MODEL_TYPE, BytePoolConfig, exist_ok=True)
