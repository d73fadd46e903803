"""Where a byte-level model's patches begin: rules that cut bytes into pieces, by name, saved and read back.

A rule cuts any bytes into pieces of at least one byte, always in the same way, and loses none. It does not know how
long a patch may be: `limit_pieces` splits what is too long. Nothing here needs transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from limbeck.core.errors import CheckpointError, RecipeError, unknown_piece
from limbeck.core.files import read_json, write_json
from limbeck.models.bare_folder import SEGMENTER_FILE
from limbeck.models.bpe_segmenter import BpeSegmenter
from limbeck.models.entropy_segmenter import EntropySegmenter
from limbeck.models.simple_segmenters import FixedSegmenter, SpaceSegmenter

_FORMAT = 1


class Segmenter(Protocol):
    """A rule that cuts bytes into pieces."""

    @property
    def name(self) -> str:
        """As a recipe writes it."""
        ...

    def split(self, data: bytes) -> list[int]:
        """Lengths of the pieces: each at least 1, together as long as the data, the same for the same data."""
        ...

    def facts(self) -> dict[str, Any]:
        """All that decides where it cuts, as JSON; `kind` is its row in `SEGMENTERS`."""
        ...


def limit_pieces(lengths: Sequence[int], most: int) -> list[int]:
    """Split every piece that is longer than `most` into pieces of `most` and a rest."""
    pieces = np.asarray(lengths, dtype=np.int64)
    if not len(pieces) or pieces.max() <= most:
        return list(lengths)
    parts = -(-pieces // most)
    found = np.full(parts.sum(), most, dtype=np.int64)
    found[np.cumsum(parts) - 1] = pieces - most * (parts - 1)
    return found.tolist()


def open_segmenter(words: str, *, patch_bytes: int) -> Segmenter:
    """A segmenter by what a recipe writes: `space`, `fixed:4`, or `bpe:` and a hub id or folder.

    patch_bytes: most symbols in a patch, the closing one included.

    Raises: RecipeError for an unknown word, one that cannot be had by name, or fixed pieces longer than a patch;
    VocabularyError when a tokenizer hides its bytes; TeacherError when it cannot be loaded.
    """
    kind, _, argument = words.partition(":")
    if kind not in SEGMENTERS:
        raise RecipeError(unknown_piece("segmenter", kind, SEGMENTERS))
    segmenter: Segmenter = SEGMENTERS[kind].from_words(argument)
    check_fit(segmenter, patch_bytes)
    return segmenter


def check_fit(segmenter: Segmenter, patch_bytes: int) -> None:
    """Raises: RecipeError when patches of so many symbols hold no byte, or not the pieces of fixed length."""
    if patch_bytes < 2:
        raise RecipeError(
            f"patch_bytes is {patch_bytes}: a patch is at least a byte and the symbol that closes it. Give 2 or more."
        )
    if isinstance(segmenter, FixedSegmenter) and segmenter.length_bytes > patch_bytes - 1:
        raise RecipeError(
            f"segmenter {segmenter.name} does not fit into patches of {patch_bytes} symbols, one of which closes the patch. "
            f"Give patch_bytes {segmenter.length_bytes + 1}, or fixed:{patch_bytes - 1}."
        )


def segmenter_fingerprint(segmenter: Segmenter) -> str:
    """SHA-256 of where it cuts; its name does not matter."""
    return hashlib.sha256(json.dumps(segmenter.facts(), sort_keys=True).encode()).hexdigest()


def save_segmenter(segmenter: Segmenter, folder: Path, *, patch_bytes: int) -> list[Path]:
    """Write all that `read_segmenter` needs into a folder, and say which files."""
    files = segmenter.save_files(folder) if isinstance(segmenter, BpeSegmenter) else []
    write_json(
        folder / SEGMENTER_FILE,
        {"format": _FORMAT, "name": segmenter.name, "patch_bytes": patch_bytes, "segmenter": segmenter.facts()},
    )
    return [folder / SEGMENTER_FILE, *files]


def read_segmenter(folder: Path) -> tuple[Segmenter, int]:
    """The segmenter saved in a folder, and its `patch_bytes`.

    Raises: CheckpointError when its file is missing, damaged, or of a newer kind.
    """
    path = folder / SEGMENTER_FILE
    advice = "Save the tokenizer into the folder again."
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {SEGMENTER_FILE}, which says where patches begin. {advice}")
    try:
        words = read_json(path)
        if words["format"] != _FORMAT:
            raise CheckpointError(f"{path}: format {words['format']!r} is not known here. Update Limbeck.")
        facts, patch_bytes = words["segmenter"], int(words["patch_bytes"])
        if facts["kind"] not in SEGMENTERS:
            raise CheckpointError(f"{path}: {unknown_piece('segmenter', str(facts['kind']), SEGMENTERS)}")
        segmenter = SEGMENTERS[facts["kind"]].from_facts(facts, folder=folder, name=str(words["name"]))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}). {advice}") from error
    check_fit(segmenter, patch_bytes)
    return segmenter, patch_bytes


SEGMENTERS: dict[str, Any] = {
    "space": SpaceSegmenter,
    "fixed": FixedSegmenter,
    "ngram_entropy": EntropySegmenter,
    "bpe": BpeSegmenter,
}
