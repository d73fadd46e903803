"""Which tokens of a text are scored, with how much context, and how many bytes and words they stand for.

A document is cut into windows of at most `context` input tokens that start `stride` tokens apart. Every token that has
something before it is predicted exactly once, by the first window that reaches it, so that all but the first window's
tokens see at least `context - stride + 1` tokens of context. No window reaches into another document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.core.errors import DataError
from limbeck.models.symbol_streams import text_to_bytes

POSITION_TABLE = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")


@dataclass(frozen=True)
class ScoredDocument:
    """A tokenised document, cut to what is scored.

    `index` is its place in the caller's list; `first_target` the first scored position in `ids` (always >= 1); `bytes`
    and `words` belong to the scored text alone.
    """

    index: int
    ids: list[int]
    first_target: int
    bytes: int
    words: int

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first_target


@dataclass(frozen=True)
class Window:
    """Inputs `ids[start:stop]` of one document; the scored targets are the positions `first_target .. stop`."""

    document: int
    start: int
    stop: int
    first_target: int

    @property
    def length(self) -> int:
        """How many input tokens the model reads."""
        return self.stop - self.start

    @property
    def tokens(self) -> int:
        """How many tokens this window scores."""
        return self.stop + 1 - self.first_target


def sliding_windows(tokens: int, *, document: int, first_target: int, context: int, stride: int) -> list[Window]:
    """Windows that score each of the positions `first_target .. tokens - 1` exactly once."""
    windows: list[Window] = []
    start, target, last = 0, first_target, tokens - 1
    while target <= last:
        stop = min(start + context, last)
        if stop >= target:
            windows.append(Window(document, start, stop, target))
            target = stop + 1
        start += stride
    return windows


def _splits_no_character(offsets: Sequence[tuple[int, int]], cut: int) -> bool:
    """Whether the text before token `cut` and the text from it on share no character."""
    if cut <= 0 or cut >= len(offsets):
        return True
    (_, previous_end), (start, end) = offsets[cut - 1], offsets[cut]
    return start >= previous_end or start == end


def _scored_range(offsets: Sequence[tuple[int, int]], *, first: int, budget: int | None) -> tuple[int, int]:
    """The token range to score, moved inwards until neither end splits a character (byte-level tokens can)."""
    count = len(offsets)
    while first < count and not _splits_no_character(offsets, first):
        first += 1
    stop = count if budget is None else min(count, first + budget)
    while stop > first and not _splits_no_character(offsets, stop):
        stop -= 1
    return first, stop


def prepare_document(tokenizer: Any, text: str, *, index: int, budget: int | None = None) -> ScoredDocument | None:
    """Tokenise a document and cut it to at most `budget` scored tokens; None when nothing in it can be scored.

    With a beginning-of-text token the first token of the document is scored too; without one it is context only, and
    its bytes are not counted. The scored text is found by character offsets, or, where the tokenizer has none, by
    decoding. A tokenizer of bytes says what it has read byte for byte: a budget may cut a patch or a character there.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    has_offsets = bool(getattr(tokenizer, "is_fast", False))
    extra = {"return_offsets_mapping": True} if has_offsets else {}
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, **extra)
    ids = list(encoded["input_ids"])
    first = 0 if bos is not None else 1
    if has_offsets:
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        first, stop = _scored_range(offsets, first=first, budget=budget)
    else:
        stop = len(ids) if budget is None else min(len(ids), first + budget)
    if stop <= first:
        return None
    if hasattr(tokenizer, "decode_bytes"):
        scored = tokenizer.decode_bytes(ids[first:stop]).decode(errors="surrogateescape")
    elif has_offsets:
        scored = text[offsets[first - 1][1] if first else 0 : None if stop == len(ids) else offsets[stop - 1][1]]
    else:
        scored = text if (first, stop) == (0, len(ids)) else tokenizer.decode(ids[first:stop])
    lead = [] if bos is None else [int(bos)]
    return ScoredDocument(
        index=index,
        ids=lead + ids[:stop],
        first_target=first + len(lead),
        bytes=len(text_to_bytes(scored)),
        words=len(scored.split()),
    )


def prepare_documents(tokenizer: Any, documents: Sequence[str], *, max_tokens: int | None) -> list[ScoredDocument]:
    """Tokenise documents in the order given until `max_tokens` scored tokens are reached.

    Raises: DataError when there is no document, when one is not text, or when nothing can be scored.
    """
    if isinstance(documents, str) or not documents:
        raise DataError("there is no text to score: expected a list with at least one document, each a string.")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens is {max_tokens}; expected at least 1 (or null for the whole text).")
    prepared: list[ScoredDocument] = []
    left = max_tokens
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise DataError(f"document {index} to score is {type(text).__name__}; expected a string.")
        document = prepare_document(tokenizer, text, index=index, budget=left)
        if document is None:
            continue
        prepared.append(document)
        if left is not None:
            left -= document.tokens
            if left <= 0:
                break
    if not prepared:
        raise DataError(
            f"none of the {len(documents)} documents has a token that can be scored: each is empty, or a single token "
            "without anything before it. Give longer documents."
        )
    return prepared


def position_limit(model: nn.Module) -> int | None:
    """The longest text a model's learned position table covers (GPT-2, OPT); None for models without such a table.

    Rotary models may be asked for more than they were trained on, so they have no limit here; nor does a table of other
    positions (those within a patch of bytes) make one: it is not as long as the configuration says texts may be.
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limits = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and POSITION_TABLE.search(name.rsplit(".", 1)[-1])
    ]
    return min((limit for limit in limits if longest is None or limit >= longest), default=None)
