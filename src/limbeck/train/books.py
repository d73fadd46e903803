"""What a stage has cost so far: time, operations, energy. The books are kept in its checkpoints, so that a continued
stage goes on from them; what was spent after the last checkpoint of a run that was killed is lost, and done again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from limbeck.core.runtime import world_size
from limbeck.models.metering import FlopMeter
from limbeck.train.lesson import Lesson

NO_COUNTER = "no counter was looked for"
# Counters are read so often at most, and so many times at least in the time that the fastest takes to go round.
_SECONDS_BETWEEN_READINGS = 10.0
_READINGS_A_ROUND = 4


Energy = tuple[float | None, str]
"""Joules, or None; and what reports them, or why there are none."""


class EnergyCounters(Protocol):
    """Counters of joules, as `evaluate.energy` finds them."""

    @property
    def method(self) -> str:
        """What reports them, in words."""
        ...

    @property
    def longest_seconds(self) -> float | None:
        """Over more than this a counter might have gone round twice; None when it never goes round."""
        ...

    def read(self) -> list[float]:
        """The counters now. May raise anything."""
        ...

    def joules(self, start: list[float], end: list[float]) -> float:
        """What was spent between two readings."""
        ...


class EnergyBook:
    """Joules between `begin` and the last reading.

    counters: those of the machine, or why there are none. Whatever goes wrong with them is a reason why there is no figure;
    it never stops a run. Once a part could not be measured, the whole is not: `joules` is None, and `note` says why.
    """

    def __init__(self, counters: EnergyCounters | str | None, *, clock: Callable[[], float] = time.monotonic):
        self.joules: float | None = 0.0
        self.note = ""
        self._clock, self._time = clock, 0.0
        self._counters = None if isinstance(counters, str) else counters
        self._last: list[float] | None = None
        if self._counters is None:
            self._give_up(counters if isinstance(counters, str) else NO_COUNTER)
        else:
            self.note = self._counters.method

    def begin(self) -> None:
        """Count from here."""
        self._time, self._last = self._clock(), self._read()

    def observe(self, *, now: bool = False) -> None:
        """Take in what was spent since the last reading, if that is long ago or it is wanted `now`."""
        if self._counters is None or self._last is None:
            return
        longest = self._counters.longest_seconds
        passed = self._clock() - self._time
        every = _SECONDS_BETWEEN_READINGS if longest is None else longest / _READINGS_A_ROUND
        if not now and passed < min(_SECONDS_BETWEEN_READINGS, every):
            return
        end = self._read()
        if end is None:
            return
        if longest is not None and passed > longest:
            self._give_up(f"in {passed:.0f} s between two readings the counter may have gone round more than once")
            return
        spent = self._counters.joules(self._last, end)
        if not spent >= 0:
            self._give_up("the counter went back: it was set to zero by something else")
        elif self.joules is not None:
            self.joules += spent
        self._time, self._last = self._time + passed, end

    def _read(self) -> list[float] | None:
        if self._counters is None:
            return None
        try:
            return self._counters.read()
        except Exception as error:  # a figure for the books is no reason to lose a run, whatever a driver raises
            self._give_up(f"the counter could not be read any more ({type(error).__name__}: {error})")
            return None

    def _give_up(self, reason: str) -> None:
        self.joules, self.note, self._counters, self._last = None, reason, None, None


def joined(before: Energy, after: Energy) -> Energy:
    """What two parts of a stage took together; unknown when one is, with the first reason."""
    if before[0] is None:
        return before
    if after[0] is None:
        return None, f"a part of it was measured, then: {after[1]}" if before[0] else after[1]
    return before[0] + after[0], after[1] or before[1]


class Books:
    """Seconds, operations and joules of one stage. All processes must call `update` and `facts` alike.

    Operations are those of all processes. Energy is that of the first process's machine on processors, and of every
    process's card on cards.
    """

    def __init__(self, lesson: Lesson, *, device: torch.device, energy: EnergyCounters | str | None = None):
        self.seconds, self.flops = 0.0, 0
        self.meter = FlopMeter(lesson.networks())
        self._device = device
        self._before: Energy = (0.0, "")
        self._energy = EnergyBook(energy)
        self._energy.begin()

    def load(self, facts: dict[str, Any]) -> None:
        """Go on from a checkpoint's books."""
        self.seconds, self.flops = facts["seconds"], facts.get("flops", 0)
        self._before = facts.get("joules"), facts.get("energy_note", "it was not measured before the run was continued")

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around an update."""
        begun, counted = time.monotonic(), self.meter.flops
        yield
        self.flops += self._of_all(self.meter.flops - counted)
        self._energy.observe()
        self.seconds += time.monotonic() - begun

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps. energy_note: what reports the joules, or why there are none (then they are None)."""
        self._energy.observe(now=True)
        joules, note = joined(self._before, self._energy_of_all())
        return {"seconds": self.seconds, "flops": self.flops, "joules": joules, "energy_note": note}

    def _of_all(self, flops: int) -> int:
        if world_size() == 1:
            return flops
        total = torch.tensor(flops, dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(total)
        return int(total)

    def _energy_of_all(self) -> Energy:
        joules, note = self._energy.joules, self._energy.note
        if world_size() == 1 or self._device.type == "cpu":
            return joules, note
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        total = torch.tensor(math.nan if joules is None else joules, dtype=dtype, device=self._device)
        torch.distributed.all_reduce(total)
        if math.isnan(float(total)):
            return None, note if joules is None else "the card of another process could not be read"
        return float(total), note
