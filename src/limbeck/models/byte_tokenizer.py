"""A tokenizer for models that read bytes in patches: a transformers tokenizer of 260 symbols, nothing to learn.

Any bytes and any string go through it and come back. Importing this module registers it with `AutoTokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig, PreTrainedTokenizer

from limbeck.core.errors import RecipeError, VocabularyError
from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS
from limbeck.models.bare_folder import SEGMENTER_FILE
from limbeck.models.bpe_segmenter import BORDERS_FILE, BpeSegmenter
from limbeck.models.entropy_segmenter import EntropySegmenter
from limbeck.models.segmenters import (
    Segmenter,
    check_fit,
    open_segmenter,
    read_segmenter,
    save_segmenter,
)
from limbeck.models.symbol_streams import decode_symbols, encode_document, open_prompt, text_to_bytes

_SPECIALS = {PAD: "<pad>", BOS: "<bos>", EOD: "<eod>", EOP: "<eop>"}
_NAMES = [_SPECIALS.get(symbol, chr(symbol)) for symbol in range(SYMBOLS)]
_SYMBOL_OF = {name: symbol for symbol, name in enumerate(_NAMES)}


class ByteTokenizer(PreTrainedTokenizer):
    """Text as a stream of symbols: bytes, each patch closed by EOP.

    Called with `add_special_tokens=False` it gives the plain stream of a document, which training and scoring use (its
    EOD is theirs to add). Otherwise it gives a *prompt*: BOS in front, and the last patch left open, so that a model
    goes on in the midst of it. An empty text has no symbol. The names of symbols in a text are text.

    In a stream `bos_token_id` is BOS, `eos_token_id` EOD, `pad_token_id` PAD; padding is on the left. EOP stands for text
    of no length. Truncation may end a stream within a patch.
    """

    model_input_names = ["input_ids", "attention_mask"]
    vocab_files_names = {"segmenter_file": SEGMENTER_FILE, "borders_file": BORDERS_FILE}
    padding_side = "left"

    def __init__(
        self,
        segmenter: str | Segmenter | None = None,
        patch_bytes: int | None = None,
        segmenter_file: str | None = None,
        borders_file: str | None = None,
        **options: Any,
    ):
        """segmenter: where patches begin: `space`, `fixed:4`, `bpe:` and a hub id or folder, or a segmenter; by default
        `space`. patch_bytes: most symbols in a patch, EOP included; 16 by default. segmenter_file, borders_file: where
        `from_pretrained` has found what was saved, side by side. options: of every tokenizer of transformers.

        Raises: RecipeError for an unknown segmenter or a length that cannot be; VocabularyError for a tokenizer whose
        borders cannot be known; CheckpointError for a damaged file.
        """
        if segmenter_file is not None:
            saved, saved_bytes = read_segmenter(Path(segmenter_file).parent)
            segmenter, patch_bytes = segmenter or saved, patch_bytes or saved_bytes
        self.patch_bytes = 16 if patch_bytes is None else patch_bytes
        segmenter = segmenter or "space"
        if isinstance(segmenter, str):
            segmenter = open_segmenter(segmenter, patch_bytes=self.patch_bytes)
        check_fit(segmenter, self.patch_bytes)
        self.segmenter: Segmenter = segmenter
        roles = {"bos_token": _NAMES[BOS], "eos_token": _NAMES[EOD], "pad_token": _NAMES[PAD]}
        super().__init__(**{**roles, **options})

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, patch_bytes: int = 16, name: str | None = None) -> ByteTokenizer:
        """Patches that end where another tokenizer's tokens do: what exact distillation from its model needs.

        name: what to call it; by default as it is loaded.

        Raises: VocabularyError when its tokens do not show their bytes.
        """
        if isinstance(tokenizer, ByteTokenizer):
            return cls(tokenizer.segmenter, patch_bytes)
        return cls(BpeSegmenter.from_tokenizer(tokenizer, name=name), patch_bytes)

    @classmethod
    def fit_entropy(cls, texts: Iterable[str], *, bytes_per_patch: float = 4.5, patch_bytes: int = 16) -> ByteTokenizer:
        """Patches that begin where the next byte is hard to guess, by 4-gram counts of these texts.

        bytes_per_patch: the mean length to aim at, before pieces of more than `patch_bytes` - 1 bytes are split.

        Raises: DataError when there is no text; RecipeError for a mean that does not fit into a patch.
        """
        if not 1 <= bytes_per_patch <= patch_bytes - 1:
            raise RecipeError(
                f"bytes_per_patch is {bytes_per_patch}, but patches of {patch_bytes} symbols hold 1 to {patch_bytes - 1} "
                "bytes. Change either."
            )
        data = (text_to_bytes(text) for text in texts)
        return cls(EntropySegmenter.fit(data, mean_patch_bytes=bytes_per_patch), patch_bytes)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The symbols of a document given as bytes: all patches closed, no EOD."""
        return encode_document(data, self.segmenter, patch_bytes=self.patch_bytes)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of a stream or of any stretch of one; symbols that are no bytes give none."""
        return decode_symbols(ids)

    def facts(self) -> dict[str, Any]:
        """All that decides what a text becomes, as JSON."""
        return {"patch_bytes": self.patch_bytes, "segmenter": self.segmenter.facts()}

    @property
    def vocab_size(self) -> int:
        """All symbols."""
        return SYMBOLS

    def get_vocab(self) -> dict[str, int]:
        """Symbols by name: a byte is the character of that number."""
        return dict(_SYMBOL_OF)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """A prompt of a text, or of two on end."""
        return open_prompt(token_ids_0 + (token_ids_1 or []))

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for special symbols, 0 for text."""
        ids = (
            token_ids_0
            if already_has_special_tokens
            else self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        )
        return [int(symbol in (PAD, BOS, EOD)) for symbol in ids]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write what decides where patches begin. Without the prefix: it is found by its name."""
        return tuple(map(str, save_segmenter(self.segmenter, Path(save_directory), patch_bytes=self.patch_bytes)))

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:  # type: ignore[override]
        """Strings are made symbols at once; the library's way, a name for each, takes ten times as long."""
        if not (options.get("is_split_into_words") or options.get("sanitize_control_tokens")):
            text, text_pair = self._as_ids(text), self._as_ids(text_pair)
        return super()._encode_plus(text, text_pair=text_pair, **options)

    def _as_ids(self, text: Any) -> Any:
        if isinstance(text, str):
            return self.encode_bytes(text_to_bytes(text)) or text
        if isinstance(text, (list, tuple)):
            return type(text)(self._as_ids(part) for part in text)
        return text

    def tokenize(self, text: str, **options: Any) -> list[str]:  # type: ignore[override]
        """The names of a text's symbols."""
        return [_NAMES[symbol] for symbol in self.encode_bytes(text_to_bytes(text))]

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        unknown = [str(token) for token in new_tokens or () if str(token) not in _SYMBOL_OF]
        if unknown:
            raise VocabularyError(
                f"a tokenizer of bytes has {SYMBOLS} symbols and takes no others: {', '.join(map(repr, unknown[:3]))} cannot "
                "be added. Write such marks as text; their bytes are read as any others."
            )
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _convert_token_to_id(self, token: str) -> int | None:
        return _SYMBOL_OF.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return _NAMES[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of named symbols."""
        return self._decode([_SYMBOL_OF[token] for token in tokens])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "replace",
        **options: Any,
    ) -> str:
        """Special symbols give no text in any case. errors: `surrogateescape` keeps bytes that are no UTF-8."""
        return decode_symbols([token_ids] if isinstance(token_ids, int) else token_ids).decode(errors=errors)


class _NoModel(PreTrainedConfig):
    """AutoTokenizer finds classes of others by what is registered for a configuration; bytes belong to none."""

    model_type = "limbeck_bytes"


AutoTokenizer.register(_NoModel, slow_tokenizer_class=ByteTokenizer, exist_ok=True)
