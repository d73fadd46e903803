"""Whether a recipe's texts are there and can be read, and how often its tokens will read them. Only a sample is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limbeck import reading
from limbeck.core.errors import LimbeckError
from limbeck.data.text import TextSource, file_bytes, is_on_the_hub, read_documents, split_share
from limbeck.preflight import load_tokenizer
from limbeck.recipe import Recipe
from limbeck.store.manifest import is_store, is_unfinished

# How much of a source is read, and of that how much is turned into tokens.
SAMPLE_BYTES = 1_000_000
TOKENISED_BYTES = 200_000
# What is assumed where there is no tokenizer yet; a byte model adds a symbol for the end of each patch.
TOKENS_PER_BYTE = 0.25
SYMBOLS_PER_BYTE = 1.25
# Beyond about so many readings of the same text, more of them teach little (Muennighoff et al. 2023, arXiv:2305.16264).
MOST_READINGS = 4


@dataclass
class TextFindings:
    """A row for every text; warnings: what may not be as hoped; problems: what `run` would refuse."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Estimate:
    """What a source holds, from a sample. sample: documents of its beginning."""

    text_bytes: float
    documents: float
    sample: tuple[str, ...]


def look_at_texts(recipe: Recipe) -> TextFindings:
    """Open every text of a recipe, estimate what is in it, and say how often training will read it.

    Texts of the hub and target stores are named, but not opened.
    """
    found = TextFindings()
    uses: dict[str, list[Any]] = {
        "training": list(recipe.data.train),
        "held out": list(recipe.data.heldout),
        "evaluation": list(recipe.evaluation.texts or []),
    }
    pace: float | None = None
    for use, sources in uses.items():
        for words in sources:
            row: dict[str, Any] = {"text": f"{words.source} ({words.split})", "for": use}
            found.rows.append(row)
            try:
                estimate = _estimate(words)
            except LimbeckError as error:
                found.problems.append(str(error))
                continue
            if estimate is None:
                continue
            pace = pace or tokens_per_byte(recipe, estimate.sample)
            row |= {"bytes": round(estimate.text_bytes), "documents": round(estimate.documents)}
            row["tokens"] = round(pace * estimate.text_bytes)
    _count_readings(recipe, found)
    return found


def _estimate(words: Any) -> Estimate | None:
    """What a source holds; None when it is not looked at. Raises: DataError when it cannot be read, or nothing is in it."""
    source: TextSource = reading.text_source(words)
    folder = Path(source.source).expanduser()
    if is_store(folder) or is_unfinished(folder) or is_on_the_hub(source):
        return None
    sample = tuple(read_documents(source) if source.source == "factbook" else _begin(read_documents(source)))
    if not sample:
        raise reading.no_documents(source)
    sampled = sum(len(document.encode()) for document in sample)
    if sampled < SAMPLE_BYTES or not folder.exists():
        return Estimate(sampled, len(sample), sample)
    rows = list(_begin(read_documents(replace(source, split="all", rows="documents"))))
    text = file_bytes(source, rows=rows) * split_share(source.split)
    return Estimate(text, text * len(sample) / sampled, sample)


def _begin(documents: Iterator[str]) -> Iterator[str]:
    """Documents until the sample is full."""
    gathered = 0
    for document in documents:
        yield document
        gathered += len(document.encode())
        if gathered >= SAMPLE_BYTES:
            return


def tokens_per_byte(recipe: Recipe, sample: tuple[str, ...]) -> float:
    """Tokens that a byte of this text becomes: counted where the tokenizer is at hand, else assumed."""
    words, teacher = recipe.tokenizer, recipe.teacher
    if words.segmenter is not None:
        return SYMBOLS_PER_BYTE
    name = words.source or recipe.student.source or (teacher.start if teacher is not None else None)
    if words.train_vocab_size is not None or name is None:
        return TOKENS_PER_BYTE
    text = "\n".join(sample)[:TOKENISED_BYTES]
    try:
        return len(load_tokenizer(name)(text, verbose=False)["input_ids"]) / max(1, len(text.encode()))
    except LimbeckError:  # said where teacher and student are compared
        return TOKENS_PER_BYTE


def _count_readings(recipe: Recipe, found: TextFindings) -> None:
    """How often the tokens of all stages go through each training text; a weight makes its text go by more often."""
    rows = [row for row in found.rows if row["for"] == "training"]
    is_asked = recipe.teacher is not None and recipe.teacher.kind == "closed"
    if is_asked or not all(row.get("tokens") for row in rows):
        return
    weights = [words.weight for words in recipe.data.train]
    total = sum(weight * row["tokens"] for weight, row in zip(weights, rows, strict=True))
    for weight, row in zip(weights, rows, strict=True):
        row["times_read"] = round(recipe.total_tokens * weight / total, 2) if total else 0.0
        if row["times_read"] > MOST_READINGS:
            found.warnings.append(
                f"training reads {row['text']} about {row['times_read']:.0f} times; beyond about {MOST_READINGS} times the same text "
                "teaches little more. Give more text, or fewer tokens (stages.<name>.tokens, or --budget)."
            )
