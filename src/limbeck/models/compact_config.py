"""Configuration of the small language model over tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from limbeck.models.trunk_config import TrunkConfigMixin
from limbeck.nn.trunk_settings import TrunkSettings

MODEL_TYPE = "limbeck_compact"
CACHE_TYPE = "limbeck_trunk"


@strict
class CompactConfig(TrunkConfigMixin, PreTrainedConfig):
    """Configuration of a small causal language model over tokens.

    vocab_size: rows of the embedding. trunk: the fields of `TrunkSettings`. tie_embeddings: one matrix for embedding and
    head. logit_softcap: see `CompactNetwork`. max_position_embeddings: the context it was trained for; longer ones run.

    Raises: RecipeError when the trunk's settings are unknown or do not fit together.
    """

    model_type = MODEL_TYPE
    takes_document_ids: ClassVar[bool] = True
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 4096
    trunk: Any = None
    tie_embeddings: bool = True
    logit_softcap: float | int | None = 15.0
    max_position_embeddings: int = 2048
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: Any = 0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.trunk is not None:
            self.trunk = TrunkSettings.read(self.trunk).as_dict()
        self.tie_word_embeddings = self.tie_embeddings
        super().__post_init__(**kwargs)

    @property
    def final_logit_softcapping(self) -> float | None:
        """The soft cap under the name that other families use."""
        return self.logit_softcap

    @property
    def layer_types(self) -> list[str]:
        """One cache holds the whole trunk: its layers may run several times."""
        return [CACHE_TYPE]


AutoConfig.register(MODEL_TYPE, CompactConfig, exist_ok=True)
