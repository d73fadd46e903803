"""How a contender is made to take turns: it stops after every block of steps until it is told to go on."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any, TextIO

import torch

from limbeck.evaluate.memory import MemoryWatch, watch_memory


class Channel:
    """Lines of JSON to the process that started this one; whatever libraries print goes to standard error instead."""

    def __init__(self, out: TextIO, words: TextIO):
        self.out, self.words = out, words

    @classmethod
    def take_standard_streams(cls) -> Channel:
        """Keep standard output for the channel alone."""
        out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        return cls(out, sys.stdin)

    def say(self, **facts: Any) -> None:
        """One line."""
        self.out.write(json.dumps(facts) + "\n")
        self.out.flush()

    def wait(self) -> None:
        """Until the next word; an ended channel ends this process."""
        if not self.words.readline():
            raise SystemExit(3)


class Pace:
    """Told of the start and of every finished step; measures steps and waits between blocks.

    With `watches` nothing is timed and nobody is waited for: the highest memory use from the start to the last step is
    found instead, so that what a program does after its last step (writing a checkpoint) is not in it.
    """

    def __init__(self, channel: Channel, *, steps: int, block: int, device: str, watches: bool = False):
        self.channel, self.steps, self.block, self.watches = channel, steps, block, watches
        self.device = torch.device(device)
        self.done = 0
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.memory: MemoryWatch | None = None
        self._stack = ExitStack()

    def ready(self) -> None:
        """Everything is loaded; the first step comes next."""
        if self.watches:
            self.memory = self._stack.enter_context(watch_memory(self.device))
            return
        self.channel.say(ready=True)
        self._wait()

    def step_done(self) -> None:
        """One update is done."""
        self.done += 1
        if self.watches:
            if self.done == self.steps:
                self._stack.close()
            return
        wall, cpu = self._clocks()
        self.wall.append(wall - self._begun[0])
        self.cpu.append(cpu - self._begun[1])
        if self.done % self.block == 0 or self.done == self.steps:
            self.channel.say(wall=self.wall, cpu=self.cpu)
            self.wall, self.cpu = [], []
            self._wait()  # after the last step too: what comes then must not disturb the others' last block
            return
        self._begun = self._clocks()

    def _wait(self) -> None:
        self.channel.wait()
        self._begun = self._clocks()

    def _clocks(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()
