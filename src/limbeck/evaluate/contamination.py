"""Whether a training text holds pieces of the items a model is judged on.

An item is touched when a run of 13 of its words stands in the training text in the same order, or the whole of a piece
of 8 to 12 words. Case and punctuation do not count. Source: Brown et al. 2020, arXiv:2005.14165, appendix C; deviation:
there whole documents are cut around a match, and the length of the run depends on the data set.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.evaluate.task_results import Item, value_of

RUN_WORDS = 13
LEAST_WORDS = 8
MOST_CHARACTERS = 100_000_000

_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")


def words_of(text: str) -> list[str]:
    """The words of a text as they are compared: without case and punctuation ("don't" is one word).

    Letters that can be written in several ways are one (NFKC), and marks belong to the letter before them: vowel signs, as
    in Hindi, do not end a word.
    """
    plain = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return _word_pattern(plain.isascii()).findall(_APOSTROPHE.sub("", plain))


@functools.cache
def _word_pattern(is_ascii: bool) -> re.Pattern[str]:
    if is_ascii:
        return re.compile(r"[^\W_]+")
    marks = "".join(mark for mark in map(chr, range(0x300, 0x20000)) if unicodedata.category(mark) in ("Mn", "Mc"))
    return re.compile(rf"[^\W_]+(?:[{marks}]+[^\W_]*)*")


@dataclass
class OverlapIndex:
    """The runs of words of many items, ready to be met in a text.

    `runs` leads from the first 8 words of a run to its further words and the items that have it; `too_short` are items
    without a piece of 8 words, of which nothing can be said.
    """

    runs: dict[tuple[str, ...], dict[tuple[str, ...], set[tuple[str, int]]]]
    too_short: set[tuple[str, int]]

    @classmethod
    def build(
        cls,
        tasks: Mapping[str, Sequence[tuple[str, ...]]],
        *,
        run_words: int = RUN_WORDS,
        least_words: int = LEAST_WORDS,
    ) -> OverlapIndex:
        """tasks: for each task its items, each as pieces of running text."""
        index = cls({}, set())
        for task, items in tasks.items():
            for number, pieces in enumerate(items):
                found = [run for piece in pieces for run in _runs(words_of(piece), run_words, least_words)]
                for run in found:
                    after = index.runs.setdefault(run[:least_words], {})
                    after.setdefault(run[least_words:], set()).add((task, number))
                if not found:
                    index.too_short.add((task, number))
        return index

    def touched(self, documents: Iterable[str], *, most_characters: int = MOST_CHARACTERS) -> Touched:
        """Read a training text, up to so many characters, and say which items it touches."""
        found: set[tuple[str, int]] = set()
        read, is_whole = 0, True
        head = len(next(iter(self.runs), ()))
        for document in documents:
            if read >= most_characters:
                is_whole = False
                break
            part = document[: most_characters - read]
            is_whole = is_whole and len(part) == len(document)
            read += len(part)
            words = words_of(part) if self.runs else []
            for place, start in enumerate(zip(*(words[shift:] for shift in range(head)), strict=False)):
                for rest, items in self.runs.get(start, {}).items():
                    if tuple(words[place + head : place + head + len(rest)]) == rest:
                        found |= items
        return Touched(found, self.too_short, read, is_whole)


@dataclass(frozen=True)
class Touched:
    """Items that a training text touches, as (task, number), those too short to tell, and how much was read."""

    items: set[tuple[str, int]]
    too_short: set[tuple[str, int]]
    characters: int
    is_whole: bool


def _runs(words: Sequence[str], run_words: int, least_words: int) -> Iterator[tuple[str, ...]]:
    if least_words <= len(words) < run_words:
        yield tuple(words)
    for start in range(len(words) - run_words + 1):
        yield tuple(words[start : start + run_words])


def contamination_facts(task: str, items: Sequence[Item], metric: str, touched: Touched) -> dict[str, Any]:
    """The share of a task's items that the training text touches, and the score on all others.

    items: the first items of the task, as they were scored. Items too short to tell count as clean, and are counted.
    """
    numbers = [number for number in range(len(items)) if (task, number) in touched.items]
    clean = [item for number, item in enumerate(items) if (task, number) not in touched.items]
    value, error = value_of(clean, metric) if clean else (None, None)
    return {
        "items": len(items), "touched": len(numbers), "share": len(numbers) / len(items),
        "too_short_to_tell": sum((task, number) in touched.too_short for number in range(len(items))),
        "metric": metric, "clean_value": value, "clean_standard_error": error, "first_touched": numbers[:20],
    }  # fmt: skip
