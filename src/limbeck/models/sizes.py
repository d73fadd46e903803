"""Configurations of the models that ship, by name: byte-level ones, and rivals over tokens with as many parameters.

Plain values, so that a recipe can be checked without loading a model.
"""

from __future__ import annotations

from typing import Any


def _compact(*, vocab_size: int, trunk: dict[str, Any], context: int) -> dict[str, Any]:
    return {
        "model_type": "limbeck_compact", "vocab_size": vocab_size, "trunk": trunk, "max_position_embeddings": context,
    }  # fmt: skip


def _byte_pool(*, local_width: int, decoder_layers: int, trunk: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "limbeck_bytepool", "local_width": local_width, "encoder_layers": 2,
        "decoder_layers": decoder_layers, "local_heads": 4, "local_feed_forward": 4 * local_width,
        "trunk": trunk,
    }  # fmt: skip


def _trunk(
    width: int, layers: int, *, heads: int, kv_heads: int | None = None, feed_forward: int, **options: Any
) -> dict[str, Any]:
    kv_heads = heads if kv_heads is None else kv_heads
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "feed_forward": feed_forward, **options,
    }  # fmt: skip


def _parallel(trunk: dict[str, Any]) -> dict[str, Any]:
    """The byte-level model of Super Tiny Language Models (arXiv:2405.14159) as its code had it, later additions left out.

    Its patches have twelve symbols, the last of which now closes the patch.
    """
    plain = {"qk_norm": False, "zero_init": False}
    return {
        "model_type": "limbeck_bytepool", "mode": "stlm_parallel", "patch_bytes": 12, "local_width": 128,
        "local_heads": 8, "local_feed_forward": 512, "local_activation": "gelu", "encoder_layers": 4,
        "decoder_layers": 7, "logit_softcap": None, **plain,
        "trunk": {**trunk, "activation": "swiglu", "residual_scalars": False, **plain},
    }  # fmt: skip


SIZES: dict[str, dict[str, Any]] = {
    "bytepool-10m": _byte_pool(local_width=128, decoder_layers=3, trunk=_trunk(320, 7, heads=5, feed_forward=1280)),
    "bytepool-50m": _byte_pool(
        local_width=192, decoder_layers=4, trunk=_trunk(576, 13, heads=9, kv_heads=3, feed_forward=2304)
    ),
    "bytepool-100m": _byte_pool(
        local_width=256, decoder_layers=4, trunk=_trunk(768, 15, heads=12, kv_heads=4, feed_forward=3072)
    ),
    "bpe-10m": _compact(vocab_size=4096, context=512, trunk=_trunk(320, 8, heads=5, feed_forward=1024)),
    "bpe-50m": _compact(vocab_size=8192, context=1024, trunk=_trunk(512, 19, heads=8, kv_heads=4, feed_forward=1536)),
    "bpe-100m": _compact(
        vocab_size=16384, context=1024, trunk=_trunk(640, 23, heads=10, kv_heads=5, feed_forward=2048)
    ),
    # The variant has one feed-forward for all its layers.
    "stlm-parallel": _parallel(_trunk(768, 10, heads=16, kv_heads=4, feed_forward=1536)),
    "stlm-parallel-shared": _parallel(
        _trunk(512, 16, heads=16, kv_heads=4, feed_forward=1536, share_feed_forward="all")
    ),
}
"""A name, and the configuration (for transformers) of a new model. Parameters: 9.75M, 49.1M, 99.8M of the byte-level
ones, 9.84M, 49.0M, 99.1M of their rivals, 55.9M and 18.0M of the original's shapes."""
