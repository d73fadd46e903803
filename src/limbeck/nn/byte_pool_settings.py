"""The shape of a byte model: its local parts, and the trunk between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.core.errors import RecipeError, unknown_name
from limbeck.nn.blocks import ACTIVATIONS
from limbeck.nn.byte_local import POOLS
from limbeck.nn.trunk_settings import TrunkSettings

MODES = ("bytepool", "stlm_parallel")

PARALLEL_DEFAULTS: Mapping[str, Any] = {
    "patch_bytes": 12, "local_width": 128, "encoder_layers": 4, "decoder_layers": 7, "local_heads": 8,
    "local_activation": "gelu", "logit_softcap": None, "qk_norm": False,
}  # fmt: skip
"""The local parts of the original's byte-level model (arXiv:2405.14159, as its code had them)."""


@dataclass(frozen=True)
class BytePoolSettings:
    """What a `BytePoolNetwork` is made of.

    trunk: of patches (a mapping is read). patch_bytes: P, most symbols in a patch, the closing one included. local_width,
    local_heads, local_feed_forward (default four times the width), local_activation: of encoder and decoder.
    prefix_slots: K, slots of the decoder that a state becomes. pool: "mean", "max", "last" or "attention". ngram_rows:
    of a table of hashed pairs and triples of symbols; 0 for none. logit_softcap: c tanh(logits / c); None for none.
    qk_norm, zero_init, dropout: as in `TrunkSettings`, for encoder and decoder. mode: "bytepool", or "stlm_parallel" (see
    `nn/stlm_parallel.py`), which has neither prefix nor zero_init.

    Raises: RecipeError for what does not fit together.
    """

    trunk: TrunkSettings
    patch_bytes: int = 16
    local_width: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 3
    local_heads: int = 4
    local_feed_forward: int | None = None
    local_activation: str = "relu2"
    prefix_slots: int = 2
    pool: str = "mean"
    ngram_rows: int = 0
    logit_softcap: float | None = 15.0
    qk_norm: bool = True
    zero_init: bool = True
    dropout: float = 0.0
    mode: str = "bytepool"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trunk", TrunkSettings.read(self.trunk))
        if self.local_feed_forward is None:
            object.__setattr__(self, "local_feed_forward", 4 * self.local_width)
        if self.patch_bytes < 2:
            raise RecipeError(
                f"patch_bytes: must be at least 2 (one byte and the end of the patch), not {self.patch_bytes}"
            )
        for name in ("local_width", "encoder_layers", "decoder_layers", "local_heads", "prefix_slots"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if self.ngram_rows < 0:
            raise RecipeError(f"ngram_rows: must be at least 0, not {self.ngram_rows}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise RecipeError(f"logit_softcap: must be more than 0, or null for none; not {self.logit_softcap}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout: must be at least 0 and less than 1, not {self.dropout}")
        for name, kind, known in (
            ("mode", "mode", MODES), ("pool", "pool", POOLS), ("local_activation", "activation", ACTIVATIONS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise RecipeError(f"{name}: " + unknown_name(kind, getattr(self, name), known))

    @classmethod
    def read(cls, values: Mapping[str, Any] | BytePoolSettings) -> BytePoolSettings:
        """Settings of a plain mapping, as JSON gives it. What it leaves out is as usual for its mode.

        Raises: RecipeError for keys that are unknown or missing.
        """
        if isinstance(values, BytePoolSettings):
            return values
        if values.get("mode") == "stlm_parallel":
            values = {**PARALLEL_DEFAULTS, **values}
        known = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise RecipeError(unknown_name("setting of a byte model", name, known))
        if "trunk" not in values:
            raise RecipeError("trunk: the settings of the trunk must be given")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"trunk": self.trunk.as_dict()}
