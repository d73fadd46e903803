"""A byte-level tokenizer and models small enough to be checked token by token."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SENTENCES = ["the cat sat on the mat", "a dog ran to the cat and sat", "on the mat the dog ran and ran"]
VOCABULARY = 290


def build_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": "<s>"} if bos else {}))


def build_model(family: str = "gpt_neox", *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


class FixedLogits(nn.Module):
    """A model whose prediction is the same everywhere, but spoiled after one token when that is given."""

    def __init__(self, logits_V: torch.Tensor, *, spoiled: int | None = None, value: float = torch.nan) -> None:
        super().__init__()
        self.logits_V = logits_V
        self.spoiled = spoiled
        self.value = value

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        logits_BTV = self.logits_V.expand(*input_ids.shape, -1).clone()
        if self.spoiled is not None:
            logits_BTV[input_ids == self.spoiled, 3] = self.value
        return SimpleNamespace(logits=logits_BTV)
