"""A segmenter that cuts where the tokens of a Hugging Face tokenizer do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.core.errors import CheckpointError, VocabularyError
from limbeck.core.files import write_atomic
from limbeck.models.borders import offsets_in_text
from limbeck.models.simple_segmenters import SpaceSegmenter
from limbeck.models.token_bytes import PROBES, TokenBytes, encode_text, read_token_bytes
from limbeck.models.tokenizers import pipeline_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BORDERS_FILE = "segmenter_tokenizer.json"
# Texts longer than this are cut before they are tokenised, at a space if one is near.
_CHARACTERS_AT_ONCE = 1 << 18
_SPACE_WITHIN = 1 << 12
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


class BpeSegmenter:
    """Pieces are the bytes of a tokenizer's tokens. Any bytes can be cut: those that are no UTF-8 stand alone.

    A space that the tokenizer writes before a text of its own accord belongs to no piece. Where its normaliser rewrites
    text (accents, to Unicode's composed form), the rewritten words are cut by `SpaceSegmenter`. Texts beyond 262,144
    characters are tokenised in parts of that size at most. The names of special tokens in a text are text.
    """

    def __init__(self, pipeline: str, *, name: str):
        """pipeline: what `tokenizers.Tokenizer.to_str` writes. name: of the tokenizer.

        Raises: VocabularyError when the tokens do not show their bytes, or merges are left out at random.
        """
        self._tokenizer = Pipeline(pipeline, name)
        self._json = pipeline
        self.tokenizer_name = name
        self.tokens: TokenBytes = read_token_bytes(self._tokenizer)
        """The bytes of every token."""
        self._pieces = [piece or b"" for piece in self.tokens.pieces]
        self._fallback = SpaceSegmenter()

    @property
    def name(self) -> str:
        """As a recipe writes it."""
        return f"bpe:{self.tokenizer_name}"

    @property
    def tokenizer_fingerprint(self) -> str:
        """`tokenizer_fingerprint` of the tokenizer whose borders these are."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, name: str | None = None) -> BpeSegmenter:
        """The borders of a tokenizer of transformers. name: what to call it; by default the last part of its folder.

        Raises: VocabularyError when its tokens do not show their bytes, or when it is no pipeline of `tokenizers`.
        """
        source = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        name = name or (Path(source).name if Path(source).exists() else source)
        read_token_bytes(tokenizer)
        try:
            pipeline = pipeline_json(tokenizer)
        except Exception as error:  # parts written in Python cannot be saved; the library says so with a bare Exception
            raise _no_pipeline(name) from error
        if pipeline is None:
            raise _no_pipeline(name)
        segmenter = cls(pipeline, name=name)
        probes = list(PROBES.values())
        if encode_text(tokenizer, probes) != encode_text(segmenter._tokenizer, probes):
            raise _no_pipeline(name)
        return segmenter

    @classmethod
    def from_words(cls, argument: str) -> BpeSegmenter:
        """`bpe:` and a hub id or folder. Raises: TeacherError when it cannot be loaded."""
        from limbeck.models.teacher import load_tokenizer

        return cls.from_tokenizer(load_tokenizer(argument))

    @classmethod
    def from_facts(cls, facts: dict[str, Any], *, folder: Path, name: str) -> BpeSegmenter:
        """What `save_files` wrote. Raises: CheckpointError when it is missing or another than `facts` says."""
        path = folder / BORDERS_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} lacks {BORDERS_FILE}, the tokenizer at whose borders patches end. Save the tokenizer again."
            )
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["tokenizer_sha256"]:
            raise CheckpointError(
                f"{path} is damaged: its checksum is another. Save the tokenizer into the folder again."
            )
        return cls(content.decode(), name=name.removeprefix("bpe:"))

    def facts(self) -> dict[str, Any]:
        """All that decides where it cuts, as JSON: the checksum of the tokenizer, which is a file of its own."""
        return {"kind": "bpe", "tokenizer_sha256": self.tokenizer_fingerprint}

    def save_files(self, folder: Path) -> list[Path]:
        """Write the tokenizer beside the facts."""
        write_atomic(folder / BORDERS_FILE, self._json)
        return [folder / BORDERS_FILE]

    def split(self, data: bytes) -> list[int]:
        """Lengths of the pieces; they add up to those of the data."""
        lengths: list[int] = []
        for group in _in_groups(_parts(data)):
            texts = list(dict.fromkeys(part for part in group if not _is_broken(part)))
            cuts = dict(zip(texts, map(self._cut, texts, encode_text(self._tokenizer, texts))))
            for part in group:
                lengths += cuts.get(part) or [1] * len(part)
        return lengths

    def _cut(self, text: str, ids: list[int]) -> list[int]:
        data, written = text.encode(), b"".join([self._pieces[token] for token in ids])
        lengths = self.tokens.lengths[ids]
        lengths = lengths[lengths > 0]
        if written != data and self.tokens.adds_space and written == b" " + data:
            lengths[0] -= 1
            lengths = lengths[lengths > 0]
        elif written != data:
            return self._cut_rewritten(text, data, ids)
        return lengths.tolist()

    def _cut_rewritten(self, text: str, data: bytes, ids: list[int]) -> list[int]:
        """Pieces of a text that the tokenizer has changed: its own where they are certain, else those before words."""
        offsets = offsets_in_text(np.asarray(ids, dtype=np.int64), text, self.tokens, self._tokenizer)
        sure = offsets.ends[offsets.is_border]
        places = np.unique(np.clip(np.concatenate([sure, [0, len(data)]]), 0, len(data)))
        is_own = np.isin(places[1:], sure)
        is_own[np.searchsorted(places, offsets.ends[~offsets.is_border]) - 1] = False
        found: list[int] = []
        for low, high, own in zip(places[:-1].tolist(), places[1:].tolist(), is_own.tolist()):
            found += [high - low] if own else self._fallback.split(data[low:high])
        return found


def _no_pipeline(name: str) -> VocabularyError:
    return VocabularyError(
        f"{name}: what this tokenizer does is not written down in a tokenizer.json (parts of it are Python code), so it "
        "cannot be saved with a model as the rule that cuts its patches. Choose a tokenizer that transformers calls "
        '"fast", or the segmenter space.'
    )


def _parts(data: bytes) -> Iterator[str]:
    """Runs of text, none too long to be tokenised at once, and runs of bytes that are no UTF-8 (as U+DC80 to U+DCFF)."""
    for part in _NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape")):
        low = 0
        while low < len(part):
            high = _end_of_part(part, low)
            yield part[low:high]
            low = high


def _end_of_part(text: str, low: int) -> int:
    """Where a part of a long text ends: before a space that follows a word, if there is one near."""
    high = low + _CHARACTERS_AT_ONCE
    if high >= len(text):
        return len(text)
    for place in range(high, high - _SPACE_WITHIN, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return high


def _in_groups(parts: Iterator[str]) -> Iterator[list[str]]:
    """Parts gathered to about as much as is tokenised at once."""
    group: list[str] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part)
        if size >= _CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_broken(part: str) -> bool:
    """Whether these are bytes that are no UTF-8: text has no surrogates."""
    return "\ud800" <= part[0] <= "\udfff"


class Pipeline:
    """A pipeline of `tokenizers` with the face of a transformers tokenizer, as far as this package looks at one."""

    eos_token_id = None

    def __init__(self, pipeline: str, name: str):
        from tokenizers import Tokenizer

        self.name_or_path = name
        self.backend_tokenizer: Tokenizer = Tokenizer.from_str(pipeline)
        self.backend_tokenizer.encode_special_tokens = True
        self.added_tokens_decoder = self.backend_tokenizer.get_added_tokens_decoder()
        self.all_special_ids = [token for token, kind in self.added_tokens_decoder.items() if kind.special]
        if getattr(self.backend_tokenizer.model, "dropout", None):
            raise VocabularyError(
                f"{name} leaves out merges at random (dropout {self.backend_tokenizer.model.dropout}), so the same text would "
                "be cut in another way each time. Set the dropout in its tokenizer.json to null."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew: the library forgets in copies that names of special tokens are text."""
        return type(self), (self.backend_tokenizer.to_str(), self.name_or_path)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        encodings = self.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    def decode(self, ids: list[int]) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=False)
