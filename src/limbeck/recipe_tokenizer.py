"""How text becomes tokens, as a recipe writes it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from limbeck.recipe_values import ADDED, NonEmpty, Part, Problems, Whole, refuse_problems

TEACHER_BORDERS = "teacher"
TRAINED_BORDERS = "trained"
_BYTES_PER_PATCH = 4.5
_SEGMENTERS = re.compile(r"teacher|trained|space|ngram_entropy|fixed:[1-9]\d{0,3}|bpe:.+")


class Tokenizer(Part):
    """How text becomes tokens; by default as the teacher does it."""

    source: NonEmpty | None = Field(default=None, description="Hub id or folder; null takes the teacher's.")
    train_vocab_size: Annotated[int, Field(ge=260, le=1_000_000), Whole] | None = Field(
        default=None, description="Train a byte-level BPE of this many tokens on data.train."
    )
    segmenter: NonEmpty | None = Field(
        default=None,
        description="Read bytes in place of tokens, pooled into patches that are cut by this rule: `space` (before words), "
        "`fixed:4`, `ngram_entropy` (where the next byte is hard to guess), `teacher` (at the teacher's token borders: what "
        "exact distillation from it needs), `trained` (at those of train_vocab_size), or `bpe:` and a hub id or folder.",
    )
    patch_bytes: Annotated[int, Field(ge=2, le=256), Whole] | None = Field(
        default=None,
        description="With segmenter: most symbols in a patch, the one that closes it included; null takes the student's, 16 for most.",
    )
    bytes_per_patch: Annotated[float, Field(gt=1, le=255)] = Field(
        default=_BYTES_PER_PATCH, description="With ngram_entropy: the mean length of patches to aim at."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        problems: Problems = {}
        if self.source is not None and self.train_vocab_size is not None:
            problems["train_vocab_size"] = "give either source or train_vocab_size, not both"
        if self.segmenter is None:
            for name in ("patch_bytes", "bytes_per_patch"):
                if getattr(self, name) != Tokenizer.model_fields[name].default:
                    problems[name] = "it belongs to a student that reads bytes. Give segmenter too, or remove it"
        elif not _SEGMENTERS.fullmatch(self.segmenter) and self.segmenter.partition(":")[0] not in ADDED["segmenter"]:
            problems["segmenter"] = (
                f'"{self.segmenter[:80]}" is no rule. Use space, fixed:4, ngram_entropy, teacher, trained, or bpe: and a '
                "hub id or folder, or name the file that adds it: limbeck --plugin FILE.py (in Python: import it first)"
            )
        elif self.source is not None:
            problems["source"] = f"bytes have no tokenizer. To cut at its borders write segmenter: bpe:{self.source}"
        elif (self.segmenter == TRAINED_BORDERS) != (self.train_vocab_size is not None):
            problems["segmenter"] = "trained and train_vocab_size belong together: the one cuts at the other's borders"
        elif self.segmenter != "ngram_entropy" and self.bytes_per_patch != _BYTES_PER_PATCH:
            problems["bytes_per_patch"] = "only ngram_entropy aims at a mean length. Remove it"
        refuse_problems(problems)
        return self
