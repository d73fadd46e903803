"""`limbeck generate` on a small model, without the command line's own libraries, which take more memory than the model.

Only plain words are read here. Whatever else is typed (--help, --json, a wrong value, a model that is not small) is left to
`cli.py`, which knows all commands, means the same by these words, and says what is wrong.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from limbeck import writing

_INTEGER = r"\d{1,18}"
_DECIMAL = r"\d{1,18}(\.\d{1,18})?"


@dataclass(frozen=True)
class Number:
    """An option that takes a number: what it is without being given, and between which bounds it lies."""

    default: float
    least: float
    most: float

    def read(self, word: str) -> float | None:
        """The number of a plain word; None when it is no such number or out of bounds."""
        is_whole = isinstance(self.default, int)
        if not re.fullmatch(_INTEGER if is_whole else _DECIMAL, word, flags=re.ASCII):
            return None
        number = int(word) if is_whole else float(word)
        return number if self.least <= number <= self.most else None


MAX_NEW_TOKENS = Number(64, 1, 1_000_000)
TEMPERATURE = Number(0.8, 0, 100)
TOP_P = Number(0.95, 0.01, 1)
SEED = Number(0, 0, 10**18)
OPTIONS = {
    "--max-new-tokens": MAX_NEW_TOKENS,
    "--temperature": TEMPERATURE,
    "--top-p": TOP_P,
    "--seed": SEED,
}


def read_words(words: list[str]) -> tuple[str, str, dict[str, Any]] | None:
    """Place, prompt and options of a plain `generate`; None leaves the words to the whole command line."""
    if words[:1] != ["generate"]:
        return None
    texts: list[str] = []
    choice = {name: option.default for name, option in OPTIONS.items()}
    rest: Iterator[str] = iter(words[1:])
    for word in rest:
        if not word.startswith("-"):
            texts.append(word)
            continue
        name, equals, value = word.partition("=")
        number = OPTIONS[name].read(value if equals else next(rest, "")) if name in OPTIONS else None
        if number is None:
            return None
        choice[name] = number
    if len(texts) != 2 or writing.small_model(texts[0]) is None:
        return None
    return texts[0], texts[1], {name[2:].replace("-", "_"): number for name, number in choice.items()}


def generate_plainly(place: str, prompt: str, choice: dict[str, Any]) -> int:
    """Print what follows a prompt, and return the exit code."""
    try:
        writing.prepare_process(place)
        for piece in writing.generate_from(place, prompt, **choice):
            print(piece, end="", flush=True)
        print(flush=True)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _settle(error)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return _settle(error)
    return 0


def _settle(error: BaseException) -> int:
    from limbeck.console import settle

    return settle(error)
