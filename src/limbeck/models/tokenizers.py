"""Training a tokenizer, and the facts of one that other rooms need. The tokenizers themselves are the library's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer (lossless on any text) and wrap it for transformers.

    The end-of-text token doubles as beginning and padding token, as in GPT-NeoX.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to token ids, without special tokens and without length warnings.

    Of a tokenizer of bytes: streams of symbols in which every patch is closed.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return encode


def pipeline_json(tokenizer: Any) -> str | None:
    """The pipeline of a fast tokenizer as `tokenizers` writes it; None when there is none.

    Padding and truncation, which calls leave behind in it, are no part of what it does to a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    if backend.padding is not None or backend.truncation is not None:
        backend = type(backend).from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
    return backend.to_str()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what the tokenizer does: where it cuts bytes, its serialised pipeline, or else its vocabulary."""
    facts = getattr(tokenizer, "facts", None)
    if facts is not None:
        content = json.dumps(facts(), sort_keys=True)
    else:
        content = pipeline_json(tokenizer) or json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
