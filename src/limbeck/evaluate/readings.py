"""The same text in each model's own tokens, and what of it a model is given when its speed is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.core.errors import DataError, VocabularyError
from limbeck.models.symbol_streams import text_to_bytes
from limbeck.models.token_bytes import read_token_bytes
from limbeck.models.tokenizers import encoder


@dataclass(frozen=True)
class Reading:
    """A text in one model's tokens. lengths: bytes of each token, 0 for those that stand for no text."""

    ids: Sequence[int]
    lengths: Sequence[float]

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token stands for on average."""
        return sum(self.lengths) / len(self.ids)

    def tokens_of(self, count: float) -> int:
        """How many tokens it takes to hold so many bytes, one at least."""
        total = 0.0
        for place, length in enumerate(self.lengths):
            total += length
            if total >= count:
                return place + 1
        return len(self.ids)

    def starts(self, rows: int) -> list[int]:
        """Where each of so many rows begins: spread over the text, and after a symbol of no length where there are any.

        Such a symbol ends a patch of bytes, so that no row begins inside one.
        """
        ends = [place for place, length in enumerate(self.lengths) if not length]
        wanted = [row * len(self.ids) // rows for row in range(rows)]
        if not ends:
            return wanted
        return [place and next((end + 1 for end in ends if end >= place), 0) % len(self.ids) for place in wanted]


@dataclass(frozen=True)
class Prompt:
    """Tokens for one model: so many of each row are read at once, the others one by one."""

    ids_BT: torch.Tensor
    context: int


def read_text(tokenizer: Any, text: str) -> Reading:
    """Put a text into a tokenizer's tokens. A tokenizer that does not show the bytes of its tokens gives each the same.

    Raises: DataError when nothing of the text is left.
    """
    ids = encoder(tokenizer)([text])[0]
    if not ids:
        raise DataError("the text to measure with is empty: expected at least one token of it. Give other text.")
    try:
        pieces = read_token_bytes(tokenizer).lengths
    except VocabularyError:
        return Reading(ids, [len(text_to_bytes(text)) / len(ids)] * len(ids))
    return Reading(ids, [int(pieces[token]) for token in ids])


def random_prompt(vocabulary: int, context: int, decode_tokens: int, *, batch: int = 1) -> Prompt:
    """Tokens drawn evenly, the same each time."""
    generator = torch.Generator().manual_seed(context)
    return Prompt(torch.randint(vocabulary, (batch, context + decode_tokens), generator=generator), context)


def prompts_of(
    readings: Sequence[Reading], context: int, decode_tokens: int, *, batch: int = 1, reference: int = -1
) -> list[Prompt]:
    """As many bytes for each model as `context` tokens of the reference hold; the text is repeated where it is short."""
    first = readings[reference]
    held = _bytes_of(first, context)
    prompts = []
    for reading in readings:
        count = context if reading == first else _tokens_holding(reading, held)
        rows = [_row(reading, start, count + decode_tokens) for start in reading.starts(batch)]
        prompts.append(Prompt(torch.stack(rows), count))
    return prompts


def _bytes_of(reading: Reading, tokens: int) -> float:
    whole, rest = divmod(tokens, len(reading.ids))
    return whole * sum(reading.lengths) + sum(reading.lengths[:rest])


def _tokens_holding(reading: Reading, count: float) -> int:
    """`tokens_of`, where the text is repeated as often as need be."""
    whole, rest = divmod(count, sum(reading.lengths) or 1)
    return max(1, int(whole) * len(reading.ids) + (reading.tokens_of(rest) if rest else 0))


def _row(reading: Reading, start: int, tokens: int) -> torch.Tensor:
    return torch.tensor(reading.ids)[(start + torch.arange(tokens)) % len(reading.ids)]
