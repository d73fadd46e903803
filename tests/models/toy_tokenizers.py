"""Tokenizers of every kind, made on the spot."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.models.tokenizers import END_OF_TEXT, train_tokenizer

TEXT = [
    "Ada met Bo. Bo saw Ada, and Ada saw Bo again.",
    "The caf\u00e9 in K\u00f6ln opened at 9:30; the weather was the weather.",
    "def f(x):\n    return x + 1\n\n\tprint(f(41))",
    "日本語のテキスト と кошка сидела на окне 🙂 🙂",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(vocab_size: int, *, texts: list[str] | None = None) -> Any:
    """A trained byte-level BPE. 257 tokens: single bytes and the end of text."""
    return train_tokenizer(texts or TEXT, vocab_size=vocab_size)


def byte_level_of_merges(merges: list[tuple[str, str]], *, names: list[str] | None = None, split: bool = False) -> Any:
    """A byte-level BPE with these merges (of plain letters), cutting words only if `split`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = names or [END_OF_TEXT, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({name: token for token, name in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)


def sentence_piece(vocab_size: int = 420, *, add_space: bool = True, kind: str = "bpe", begin: bool = True) -> Any:
    """A tokenizer as Llama's and Mistral's: spaces as U+2581, bytes for what is not in the vocabulary, <s> in front."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[*special, *BYTES], show_progress=False, limit_alphabet=60
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=[*special, *BYTES], unk_token="<unk>", show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if add_space else "never")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if add_space else []),
        ]
    )
    tokenizer.train_from_iterator(TEXT[:2] * 3, trainer)
    words = json.loads(tokenizer.to_str())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] in special]
    words["model"]["byte_fallback"] = True
    if begin:
        words["post_processor"] = {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(words)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def word_piece() -> Any:
    """A tokenizer as BERT's: lower-cases, drops white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def changed(tokenizer: Any, change: Any, **special: Any) -> Any:
    """A copy of a fast tokenizer whose description `change` (a function of the dict) has edited."""
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    change(words)
    roles = {role: getattr(tokenizer, role) for role in ("eos_token", "bos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), **roles | special)
