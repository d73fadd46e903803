"""Tiny random models of every family that is promised to work."""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
WIDTH = 32
LAYERS = 2

_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_PLAIN = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}

FAMILIES = {
    "gpt_neox": {**_PLAIN, "hidden_dropout": 0.0, "attention_dropout": 0.0, "rotary_pct": 0.5},
    "gpt2": {
        "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "opt": {
        "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH, "dropout": 0.0,
    },
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "sliding_window": 6},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 12, "tie_word_embeddings": False},
    "gemma2": {**_LLAMA, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 12},
    "gemma3_text": {
        **_LLAMA, "head_dim": 12, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12,
    },
    "phi": {**_PLAIN, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
    "phi3": {**_LLAMA, "sliding_window": 6, "pad_token_id": 0, "resid_pdrop": 0.0},
}  # fmt: skip


@cache
def _weights(family: str, layers: int) -> PreTrainedModel:
    options = dict(FAMILIES[family])
    options["n_layer" if family == "gpt2" else "num_hidden_layers"] = layers
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **options)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if "embed" in name or "wte" in name else 0.2)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    return model


def tiny_teacher(family: str, *, layers: int = LAYERS) -> PreTrainedModel:
    """A random teacher in evaluation mode; the same weights at every call. Do not change it."""
    return _weights(family, layers)


def token_ids(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random ordinary tokens [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
