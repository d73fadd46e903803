"""One JSON line per logged update, and progress a person can read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from limbeck.core.files import explain_full_disk, write_atomic


class MetricsLog:
    """Appends JSON lines to a file. After a resume, lines past the resumed update are taken back."""

    def __init__(self, path: Path | None):
        self.path = path

    def write(self, **facts: Any) -> None:
        """Append one line."""
        if self.path is None:
            return
        with explain_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(facts) + "\n")

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


class Progress(Protocol):
    """Whatever shows a stage's progress."""

    def start(self, title: str, total: int, done: int) -> None:
        """A stage of `total` tokens begins, `done` of them behind it."""

    def advance(self, tokens: int, note: str) -> None:
        """`tokens` more are done."""

    def finish(self) -> None:
        """The stage ended."""


class SilentProgress:
    """Shows nothing."""

    def start(self, title: str, total: int, done: int) -> None: ...

    def advance(self, tokens: int, note: str) -> None: ...

    def finish(self) -> None: ...


class PlainProgress:
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

    def finish(self) -> None:
        """Nothing to close."""


class LiveProgress:
    """A bar with ETA in a terminal (rich)."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip

    def start(self, title: str, total: int, done: int) -> None:
        """Show a new bar."""
        self._bar.start()
        self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def advance(self, tokens: int, note: str) -> None:
        """Move the bar."""
        self._bar.update(self._task, advance=tokens, note=note)

    def finish(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.stop()


def choose_progress(wanted: bool) -> Progress:
    """A live bar on a terminal, plain lines elsewhere, nothing when it is not wanted."""
    import sys

    if not wanted:
        return SilentProgress()
    return LiveProgress() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else PlainProgress()
