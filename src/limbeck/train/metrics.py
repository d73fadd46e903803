"""One JSON line per logged update, and progress a person can read (on a terminal: `dashboard`)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from limbeck.core.files import explain_full_disk, write_atomic
from limbeck.train.tracking import NO_TRACKERS, Trackers


class MetricsLog:
    """Appends JSON lines to a file, and sends them to the trackers. After a resume, lines past the resumed update are taken
    back (trackers keep them, and are not sent them twice)."""

    def __init__(self, path: Path | None, trackers: Trackers = NO_TRACKERS):
        self.path, self.trackers = path, trackers

    def write(self, **facts: Any) -> None:
        """Append one line."""
        if self.path is None:
            return
        with explain_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(facts) + "\n")
        self.trackers.write(**facts)

    def rewind(self, *, arm: str, stage: str, step: int) -> None:
        """Drop this stage's lines after update `step`, and a last line that a kill cut short."""
        lines = self.lines()
        kept = [line for line in lines if (line["arm"], line["stage"]) != (arm, stage) or line["step"] <= step]
        if self.path is not None and self.path.exists():
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if self.path is None or not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run will train, or has trained before it was stopped."""

    arm: str
    stage: str
    tokens: int
    is_finished: bool = False


class Progress(Protocol):
    """Whatever shows how far a run is."""

    def plan(self, run: str, stages: Sequence[PlannedStage]) -> None:
        """The run's name and all it will train, in order; what shows less need not be told."""

    def opening(self, text: str) -> None:
        """What a run does before its first stage; shown only on a terminal."""

    def start(self, title: str, total: int, done: int) -> None:
        """A stage of `total` tokens begins, `done` of them behind it. A title is `arm · stage`, or other words."""

    def advance(self, tokens: int, note: str) -> None:
        """`tokens` more are done."""

    def observe(self, **facts: Any) -> None:
        """What the last update left: `terms` (name to value), `learning_rate`, `checkpoint_tokens`, `warnings`."""

    def note(self, text: str) -> None:
        """A line for the person, that a display in the way must make room for."""

    def finish(self) -> None:
        """The stage ended."""


class SilentProgress:
    """Shows nothing but notes."""

    def plan(self, run: str, stages: Sequence[PlannedStage]) -> None: ...

    def opening(self, text: str) -> None: ...

    def start(self, title: str, total: int, done: int) -> None: ...

    def advance(self, tokens: int, note: str) -> None: ...

    def observe(self, **facts: Any) -> None: ...

    def note(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)

    def finish(self) -> None: ...


class PlainProgress(SilentProgress):
    """A line every few seconds: for logs and pipes."""

    def __init__(self, every_seconds: float = 10.0):
        self.every_seconds = every_seconds

    def start(self, title: str, total: int, done: int) -> None:
        """Remember where the stage began."""
        self.title, self.total, self.done, self.begun_at = title, total, done, done
        self.begun = self.shown = time.monotonic()

    def advance(self, tokens: int, note: str) -> None:
        """Print when it is time."""
        self.done += tokens
        now = time.monotonic()
        if now - self.shown < self.every_seconds and self.done < self.total:
            return
        self.shown = now
        rate = (self.done - self.begun_at) / max(now - self.begun, 1e-9)
        remaining = (self.total - self.done) / max(rate, 1e-9)
        print(
            f"{self.title}: {self.done:,}/{self.total:,} tokens, {rate:,.0f} tokens/s, {remaining:.0f} s left, {note}",
            flush=True,
        )


def choose_progress(wanted: bool) -> Progress:
    """A live display on a terminal, plain lines where one of the two streams is none, nothing when it is not wanted."""
    if not wanted:
        return SilentProgress()
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if not is_terminal or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return PlainProgress()
    from limbeck.train.dashboard import Dashboard

    return Dashboard()
