"""Answers that were paid for, kept in an append-only file, so that a stopped capture never asks twice.

One JSON object a line: the hash of the question, what was understood of the answer, the tokens it cost, and a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.core.errors import StoreError
from limbeck.core.files import explain_full_disk

_BEGIN = b'{"sum":"'


@dataclass(frozen=True)
class Question:
    """One request. path: below the base address, such as "/completions". body: its JSON.

    context: whatever else the meaning of the kept answer depends on, as JSON, such as a tokenizer's fingerprint.
    """

    path: str
    body: Mapping[str, Any]
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 of path, body and context. The address is not part of it: a server that moved is not paid twice."""
        content = json.dumps([self.path, self.body, self.context], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass
class Usage:
    """Tokens that answers cost, as the endpoint counts them.

    uncounted: answers whose cost the endpoint did not tell.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(**(Counter(asdict(self)) + Counter(asdict(other))))

    def cost(self, *, input_price: float | None, output_price: float | None) -> float | None:
        """What it costs, prices being those of a million tokens; None when a price or a count is unknown."""
        if input_price is None or output_price is None or self.uncounted:
            return None
        return (self.prompt_tokens * input_price + self.completion_tokens * output_price) / 1e6


def read_usage(answer: Mapping[str, Any]) -> Usage:
    """The `usage` of an answer; one that is missing or malformed is counted as such."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(read) is not int or type(written) is not int or min(read, written) < 0:
        return Usage(answers=1, uncounted=1)
    return Usage(1, read, written)


@dataclass(frozen=True)
class KeptAnswer:
    """What was understood of an answer, as JSON, and what it cost."""

    content: Any
    usage: Usage = field(default_factory=Usage)


class AnswerFile:
    """Answers by question, on disk; only where each one lies is held in memory. Several threads may use it.

    A last line without its end, which a killed process leaves behind, is cut off and its question asked again.
    Raises: StoreError when another line is damaged; the message names it.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._places: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        with explain_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.ftruncate(self._file, self._read_places())
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def get(self, question: Question) -> KeptAnswer | None:
        """The answer to a question, or None."""
        place = self._places.get(question.key)
        if place is None:
            return None
        start, length = place
        return _parse(os.pread(self._file, length, start))[1]

    def put(self, question: Question, answer: KeptAnswer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        line = _format(question.key, answer)
        with self._lock, explain_full_disk(self.path):
            start = os.lseek(self._file, 0, os.SEEK_END)
            written = os.write(self._file, line)
            if written < len(line):
                os.ftruncate(self._file, start)
                raise OSError(28, "No space left on device")
            os.fsync(self._file)
            self._places[question.key] = (start, len(line))

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _read_places(self) -> int:
        """Note where every answer lies. Returns the length of the intact part of the file."""
        start = 0
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n") and (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
                    break
                try:
                    key, _ = _parse(line)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise StoreError(
                        f"{self.path}:{number}: this kept answer is damaged ({error}). Delete that line, and the same "
                        "command asks its question again; all others are used as they are."
                    ) from error
                self._places[key] = (start, len(line))
                start += len(line)
        return start


def _format(key: str, answer: KeptAnswer) -> bytes:
    row = {"key": key, "answer": answer.content, "usage": asdict(answer.usage)}
    content = json.dumps(row, separators=(",", ":"))
    return _BEGIN + f'{_sum(content)}",{content[1:]}\n'.encode()


def _parse(line: bytes) -> tuple[str, KeptAnswer]:
    row = json.loads(line)
    wanted = row.pop("sum")
    if _sum(json.dumps(row, separators=(",", ":"))) != wanted:
        raise ValueError("its checksum differs")
    return row["key"], KeptAnswer(row["answer"], Usage(**row["usage"]))


def _sum(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
