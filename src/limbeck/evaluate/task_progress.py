"""How far an examination is: a line after each task, and now and then within one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from limbeck.evaluate.task_data import TaskItems

EVERY_SECONDS = 15.0


class TaskProgress:
    """Tells a line per task, with the time that is left by the work done so far (characters times likelihoods asked for)."""

    def __init__(
        self, say: Callable[[str], None], tasks: Mapping[str, TaskItems], *, limit: int | None, places: int
    ) -> None:
        """tasks: all that will be run on each place."""
        self.tell, self._places, self._done_places = say, places, -1
        self._work = {name: _work(items, limit) for name, items in tasks.items()}
        self._likelihoods = {name: sum(items.likelihoods(limit)) for name, items in tasks.items()}
        self._names = list(tasks)
        self._worked, self._seconds = 0.0, 0.0

    def begin(self, place: str) -> None:
        """The tasks of one place begin."""
        self._place, self._done = place, 0
        self._done_places += 1
        self._start_task()

    def _start_task(self) -> None:
        self._started = self._told = time.monotonic()
        self._answered = 0

    def watching(self, kept: Any) -> Any:
        """The same keeper of answers, which also counts them."""
        note, self._answered = kept.add_partial, len(kept)

        def add_partial(kind: str, arguments: Any, answer: Any) -> None:
            note(kind, arguments, answer)
            self._count()

        kept.add_partial = add_partial
        return kept

    def _count(self) -> None:
        self._answered += 1
        now = time.monotonic()
        if now - self._told >= EVERY_SECONDS:
            self._told = now
            name = self._names[self._done]
            self.tell(f"{self._title(name)}: {self._answered:,} of {self._likelihoods[name]:,} likelihoods")

    def end(self, name: str, words: str) -> None:
        """A task is over."""
        seconds = time.monotonic() - self._started
        self._worked += self._work[name]
        self._seconds += seconds
        title = self._title(name)
        self._done += 1
        self.tell(f"{title}: {words} ({seconds:.1f} s{self._left()})")
        self._start_task()

    def skip(self) -> None:
        """A task needs no work: its results were kept."""
        self._done += 1
        self._start_task()

    def _title(self, name: str) -> str:
        return f"{self._place} {self._done + 1}/{len(self._names)} {name}"

    def _left(self) -> str:
        rest = sum(self._work[name] for name in self._names[self._done :])
        rest += sum(self._work.values()) * (self._places - 1 - self._done_places)
        if not rest or not self._worked:
            return ""
        seconds = rest * self._seconds / self._worked
        return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"


def _work(items: TaskItems, limit: int | None) -> float:
    return float(
        sum(asked * len(str(row)) for row, asked in zip(items.rows[:limit], items.likelihoods(limit), strict=True))
    )
