"""A teacher with awkward tokens and a byte tokenizer that cuts where they end, all made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from tests.models.toy_tokenizers import byte_level_of_merges, sentence_piece
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.symbols import EOD, PAD
from limbeck.core.types import Batch
from limbeck.models.byte_tokenizer import ByteTokenizer

PATCH_BYTES = 5
_MERGES = [("a", "b"), ("ab", "c"), ("a", "a"), ("aa", "aa"), ("aaaa", "aa"), ("b", "c"), ("ab", "ab")]
_MERGES += [("b", "b"), ("bb", "bb"), ("bbbb", "b")]
DOCUMENTS = ["abcaab bc abc", "aaaaaa b caabc abab", "é ab ☃ bcab", "a"]


def nested() -> Any:
    """Byte-level BPE: tokens in tokens, two longer than a patch, and one (added) with the bytes of another."""
    tokenizer = byte_level_of_merges(_MERGES)
    tokenizer.add_tokens([" "])
    return tokenizer


def with_spaces() -> Any:
    """As Llama's: a space before a text, <s> in front, single bytes as tokens beside characters."""
    return sentence_piece(340)


def make_teacher(tokenizer: Any, *, seed: int = 0) -> Any:
    """A small GPT-NeoX in float64 that is sure enough of itself to have unlikely tokens."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=len(tokenizer) + 3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


def byte_tokenizer(tokenizer: Any) -> ByteTokenizer:
    return ByteTokenizer.from_tokenizer(tokenizer, patch_bytes=PATCH_BYTES)


def symbol_rows(tokenizer: ByteTokenizer, documents: list[str], width: int, *, packed: bool = True) -> Batch:
    """Documents one after the other, each closed by EOD, cut into rows of a width; the last is padded."""
    stream: list[int] = []
    numbers: list[int] = []
    for number, document in enumerate(documents):
        ids = [*tokenizer(document, add_special_tokens=False)["input_ids"], EOD]
        stream += ids
        numbers += [number] * len(ids)
    rows = -(-len(stream) // width)
    ids_BT = torch.full((rows, width), PAD)
    documents_BT = torch.full((rows, width), len(documents))
    ids_BT.view(-1)[: len(stream)] = torch.tensor(stream)
    documents_BT.view(-1)[: len(stream)] = torch.tensor(numbers)
    mask_BT = ids_BT != PAD
    mask_BT[:, 0] = False
    if not packed:
        return Batch(ids_BT, mask_BT)
    mask_BT[:, 1:] &= documents_BT[:, 1:] == documents_BT[:, :-1]
    return Batch(ids_BT, mask_BT, documents_BT)
