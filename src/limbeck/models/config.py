"""The student's configuration: the teacher's own, plus which mixer each layer has."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from limbeck.core.errors import TeacherError

MODEL_TYPE = "limbeck_hybrid"
MIXERS = ("attention", "hyena")
AUTO_MAP = {
    "AutoConfig": "modeling_limbeck.HybridConfig",
    "AutoModelForCausalLM": "modeling_limbeck.HybridForCausalLM",
}
# The library checks and rewrites these against `layer_types`, which here holds "hyena".
_BACKBONE_ONLY = frozenset({"rope_parameters"})


@strict
class HybridConfig(PreTrainedConfig):
    """Configuration of a causal language model some of whose attention modules are Hyena operators.

    backbone: the configuration of the family the model belongs to, as its own object (a dict with `model_type` is
    accepted). mixers: "attention" or "hyena" for each layer. hyena: options of `HyenaOperator`.
    What this class does not know itself (vocab_size, hidden_size, eos_token_id, ...) is read from and written to the
    backbone's configuration, so code written for the family finds what it looks for.

    Raises: TeacherError when the mixers do not fit the backbone's layers.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}
    has_no_defaults_at_init: ClassVar[bool] = True
    takes_document_ids: ClassVar[bool] = True

    backbone: Any = None
    mixers: Any = None
    hyena: Any = None
    auto_map: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone is not None:
            self.backbone = _family_config(self.backbone)
            self.mixers = _checked_mixers(self.mixers, layers=self.backbone.num_hidden_layers)
        self.hyena = dict(self.hyena or {})
        self.auto_map = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        backbone = self.__dict__.get("backbone")
        if isinstance(backbone, PreTrainedConfig) and not name.startswith("_") and name not in _BACKBONE_ONLY:
            return getattr(backbone, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        backbone = self.__dict__.get("backbone")
        is_own = name.startswith("_") or hasattr(type(self), name) or name in self.__dict__
        if isinstance(backbone, PreTrainedConfig) and not is_own and hasattr(backbone, name):
            setattr(backbone, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def layer_types(self) -> list[str] | None:
        """The kind of cache that each layer needs: "hyena", or the family's own kind where attention was kept."""
        if not isinstance(self.backbone, PreTrainedConfig):
            return None
        own = _cache_layer_types(self.backbone)
        return ["hyena" if mixer == "hyena" else kind for mixer, kind in zip(self.mixers, own, strict=True)]

    def _get_generation_parameters(self) -> dict[str, Any]:
        """None are set here: what looks like one is a field of the family's own configuration."""
        return {}

    def validate_layer_type(self) -> None:
        """Replaces the library's check, whose closed list of layer types cannot know "hyena"."""
        if isinstance(self.backbone, PreTrainedConfig):
            _checked_mixers(self.mixers, layers=self.backbone.num_hidden_layers)


def _family_config(backbone: dict | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(backbone, dict):
        options = {key: value for key, value in backbone.items() if key != "transformers_version"}
        family = options.pop("model_type", None)
        try:
            backbone = AutoConfig.for_model(family, **options)
        except ValueError as error:
            raise TeacherError(
                f"the student's config names a backbone of model_type {family!r}, which the installed transformers "
                "does not know. Install the version the student was made with, or a newer one."
            ) from error
    backbone = copy.deepcopy(backbone)
    backbone.name_or_path = ""
    return backbone


def _checked_mixers(mixers: list | None, *, layers: int) -> list[str]:
    mixers = ["attention"] * layers if mixers is None else list(mixers)
    unknown = sorted({str(mixer) for mixer in mixers if mixer not in MIXERS})
    if unknown:
        raise TeacherError(f"mixers: unknown kind {', '.join(unknown)}; each layer is one of {', '.join(MIXERS)}.")
    if len(mixers) != layers:
        raise TeacherError(f"mixers: {len(mixers)} are given but the model has {layers} layers; give one per layer.")
    return mixers


def _cache_layer_types(config: PreTrainedConfig) -> list[str]:
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds = list(get_layer_types_and_kwargs(config)[0])
    if len(kinds) != config.num_hidden_layers:
        raise TeacherError(
            f"{config.model_type} shares key-value caches between layers ({len(kinds)} caches for "
            f"{config.num_hidden_layers} layers); such a model cannot be turned into a hybrid. Choose a teacher "
            "whose layers each have their own cache."
        )
    return kinds


def register_config() -> None:
    """Make `AutoConfig` know the student's configuration. Safe to call again."""
    AutoConfig.register(MODEL_TYPE, HybridConfig, exist_ok=True)


register_config()
