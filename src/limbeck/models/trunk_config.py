"""What the configurations of models with a trunk have in common: the usual names for the trunk's shape."""

from __future__ import annotations

from typing import Any

from limbeck.nn.trunk_settings import TrunkSettings


class TrunkConfigMixin:
    """Reads `trunk`, a dict of the fields of `TrunkSettings`, under the names that other families' configurations use."""

    trunk: Any

    @property
    def trunk_settings(self) -> TrunkSettings:
        """The trunk's settings, checked."""
        return TrunkSettings.read(self.trunk or {})

    @property
    def hidden_size(self) -> int:
        """Width of the trunk."""
        return self.trunk_settings.width

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the trunk; repeats and loops run them more than once."""
        return self.trunk_settings.layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of an attention layer of the trunk."""
        return self.trunk_settings.heads

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of an attention layer of the trunk."""
        return self.trunk_settings.kv_heads or self.trunk_settings.heads

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the trunk."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Hidden width of the trunk's feed-forward."""
        return self.trunk_settings.feed_forward

    def _get_generation_parameters(self) -> dict[str, Any]:
        """None are set here; the library would look for them in a configuration without a trunk."""
        return {}

    def validate_layer_type(self) -> None:
        """Nothing to check: the library's closed list of layer types cannot know ours."""
