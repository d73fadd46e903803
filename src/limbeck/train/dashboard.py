"""What a terminal shows while a run trains: where it is, how the losses go, how long it will take.

Only the drawing lives here. Everything is told from outside through the methods of `metrics.Progress`; the display is
redrawn by a clock of its own, twice a second, whatever the number of updates.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from limbeck.train.metrics import PlannedStage

REDRAWS_PER_SECOND = 2
WIDEST = 78
MOST_TERMS = 6
_POINTS = 64
_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"
_RESIDENT_PAGES = Path("/proc/self/statm")


class Series:
    """The values of one figure over a stage: their exponential average, and the whole course in a few dozen points."""

    def __init__(self, *, half_life: float = 20.0):
        self.last = math.nan
        self.points: list[float] = []
        self._keep = 0.5 ** (1 / half_life)
        self._sum = self._weight = 0.0
        self._stride, self._part, self._parts = 1, 0.0, 0

    def add(self, value: float) -> None:
        """One more value; one that is not finite is shown as the last, and otherwise left out."""
        self.last = value
        if not math.isfinite(value):
            return
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        self._part, self._parts = self._part + value, self._parts + 1
        if self._parts < self._stride:
            return
        self.points.append(self._part / self._parts)
        self._part, self._parts = 0.0, 0
        if len(self.points) == 2 * _POINTS:
            self.points = [(one + two) / 2 for one, two in zip(self.points[::2], self.points[1::2], strict=True)]
            self._stride *= 2

    @property
    def average(self) -> float | None:
        """The exponential average, without a bias toward zero at the start; None before the first value."""
        return self._sum / self._weight if self._weight else None


def sparkline(values: Sequence[float], width: int, *, glyphs: str = _BLOCKS) -> str:
    """A line of at most `width` glyphs from the least value to the greatest; equal values lie on the floor."""
    count = min(width, len(values))
    if count <= 0:
        return ""
    cuts = [len(values) * number // count for number in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    top = len(glyphs) - 1
    return "".join(glyphs[round(top * (mean - low) / (high - low)) if high > low else 0] for mean in means)


class Forecast:
    """How much of a run is behind it and how long the rest will take, from the rates measured so far.

    A stage that has not been seen yet is taken to go as fast as the same stage of another arm did, or else as the mean.
    """

    def __init__(self, stages: Sequence[PlannedStage] = ()):
        self.stages = list(stages)
        self.position: int | None = None
        self._spent: dict[str, tuple[float, float]] = {}
        self._earlier_phases = self._phase_tokens = 0

    def enter(self, arm: str, stage: str, tokens: int) -> None:
        """A stage begins, or the next phase of the one that runs (a progressive stage has one for each layer)."""
        first = 0 if self.position is None else self.position
        found = self._find(arm, stage, first)
        if found is not None and found == self.position and self._phase_tokens:
            self._earlier_phases += self._phase_tokens
        else:
            self._earlier_phases = 0
        self.position, self._phase_tokens = found if found is not None else self.position, tokens

    def _find(self, arm: str, stage: str, first: int) -> int | None:
        here = [n for n, one in enumerate(self.stages) if n >= first and one.arm == arm and not one.is_finished]
        exact = [n for n in here if self.stages[n].stage == stage]
        phases = [n for n in here if stage.startswith(self.stages[n].stage + "-")]
        return next(iter(exact or phases), None)

    def measure(self, stage: str, tokens: int, seconds: float) -> None:
        """A stage took this long for so many tokens, in this process."""
        before_tokens, before_seconds = self._spent.get(stage, (0.0, 0.0))
        self._spent[stage] = (before_tokens + tokens, before_seconds + seconds)

    def seconds_left(self, tokens_left: int, seconds_per_token: float | None) -> float | None:
        """Seconds to the end of the last planned stage: `tokens_left` at the current pace, then what follows it."""
        if self.position is None or seconds_per_token is None:
            return None
        here = self.stages[self.position]
        phases_left = max(0, here.tokens - self._earlier_phases - self._phase_tokens)
        total = (tokens_left + phases_left) * seconds_per_token
        tokens, seconds = map(sum, zip((0.0, 0.0), *self._spent.values(), strict=True))
        for stage in self.stages[self.position + 1 :]:
            if stage.is_finished:
                continue
            own_tokens, own_seconds = self._spent.get(stage.stage, (tokens, seconds))
            pace = own_seconds / own_tokens if own_tokens else seconds_per_token
            total += stage.tokens * (seconds_per_token if stage.stage == here.stage else pace)
        return total

    def place(self) -> tuple[str, str]:
        """Which arm of how many, and which of its stages, in words; nothing where no plan was told."""
        if self.position is None:
            return "", ""
        arms = [n for n, one in enumerate(self.stages) if n == 0 or one.arm != self.stages[n - 1].arm]
        begins = max(n for n in arms if n <= self.position)
        ends = next((n for n in arms if n > begins), len(self.stages))
        arm = f"arm {arms.index(begins) + 1} of {len(arms)}"
        return arm, f"stage {self.position - begins + 1} of {ends - begins}"


@dataclass
class _Shown:
    """The stage on display. `done_before`: what a resume found done."""

    title: str
    total: int
    done: int
    began: float
    done_before: int
    last_time: float
    detail: str = ""
    terms: dict[str, Series] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    pace: Series = field(default_factory=Series)


class Dashboard:
    """A live display (rich). Lines printed while it stands go above it; at the end of a stage one line stays."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console(stderr=True, highlight=False)
        self.run = ""
        self.forecast = Forecast()
        self.last_note, self._note_style = "", "dim"
        self._clock = clock
        self._live: Live | None = None
        self._shown = self._new("", 0, 0)

    def plan(self, run: str, stages: Sequence[PlannedStage]) -> None:
        """The run's name and all it will train, in order."""
        self.run, self.forecast = run, Forecast(stages)

    def opening(self, text: str) -> None:
        """Print a line before there is a display."""
        self._print(text)

    def start(self, title: str, total: int, done: int) -> None:
        """Show a stage."""
        self.finish()
        self._shown, self.last_note = self._new(title, total, done), ""
        arm, _, stage = title.partition(" · ")
        self.forecast.enter(arm, stage, total)
        self._live = Live(
            console=self.console, get_renderable=self.frame, refresh_per_second=REDRAWS_PER_SECOND, transient=True,
            redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty(), vertical_overflow="crop",
        )  # fmt: skip
        self._live.start()

    def advance(self, tokens: int, note: str) -> None:
        """`tokens` more are done."""
        shown, now = self._shown, self._clock()
        if tokens > 0:
            shown.pace.add((now - shown.last_time) / tokens)
        shown.done, shown.detail, shown.last_time = shown.done + tokens, note, now

    def observe(self, **facts: Any) -> None:
        """What an update left: `terms` (name to value), `learning_rate`, `checkpoint_tokens`, `warnings`."""
        for name, value in facts.pop("terms", {}).items():
            self._shown.terms.setdefault(name, Series()).add(value)
        warnings = facts.pop("warnings", [])
        if warnings:
            self.last_note, self._note_style = f"! {warnings[-1]}", "yellow"
        self._shown.facts |= facts

    def note(self, text: str) -> None:
        """Print a line above the display, and keep it in sight until the stage ends."""
        self.last_note, self._note_style = text, "dim"
        self._print(text)

    def finish(self) -> None:
        """Take the display down and leave one line about the stage."""
        live, self._live = self._live, None
        if live is None:
            return
        shown = self._shown
        seconds, here = self._clock() - shown.began, shown.done - shown.done_before
        self.forecast.measure(shown.title.partition(" · ")[2], here, seconds)
        try:
            of = "" if shown.done >= shown.total else f" of {shown.total:,}"
            rate = f", {here / seconds:,.0f} tokens/s" if here and seconds > 0 else ""
            detail = f", {shown.detail}" if shown.detail else ""
            self._print(f"{shown.title}: {shown.done:,}{of} tokens in {_duration(seconds)}{rate}{detail}")
        finally:
            live.stop()

    def frame(self) -> Text:
        """The display as it stands now, for the width that the terminal has now."""
        # One column stays free: some terminals break the line when the last one is written.
        width = max(20, min(self.console.width - 1, WIDEST))
        is_plain = self.console.options.ascii_only
        lines = [self._heading(width, is_plain), self._bar(width, is_plain), *_flowed(self._times(), width)]
        lines += [*self._term_lines(width, is_plain), *_flowed(self._machine(), width)]
        lines += [Text(" ".join(self.last_note.split()), style=self._note_style)] if self.last_note else []
        for line in lines:
            line.plain = line.plain.encode(self.console.encoding, "replace").decode(self.console.encoding)
            line.truncate(width, overflow="crop" if is_plain else "ellipsis")
        return Text("\n").join(lines)

    def _print(self, text: str) -> None:
        """Above the display. A glyph that the terminal's encoding lacks must not stop a training."""
        text = text.encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _new(self, title: str, total: int, done: int) -> _Shown:
        now = self._clock()
        return _Shown(title, total, done, now, done, now)

    def _heading(self, width: int, is_plain: bool) -> Text:
        arm, _, stage = self._shown.title.partition(" · ")
        which_arm, which_stage = self.forecast.place() if stage else ("", "")
        parts = [self.run] if self.run else []
        parts += [f"{arm} ({which_arm})" if which_arm else arm]
        parts += [f"{stage} ({which_stage})" if which_stage else stage] if stage else []
        full = (" - " if is_plain else " · ").join(parts)
        short = full.replace("(arm ", "(").replace("(stage ", "(").replace(" of ", "/")
        return Text(full if len(full) <= width else short, style="bold")

    def _bar(self, width: int, is_plain: bool) -> Text:
        share = min(1.0, self._shown.done / self._shown.total) if self._shown.total else 0.0
        said = f" {math.floor(100 * share):>3} %  {self._shown.done:,}/{self._shown.total:,} tokens"
        room = max(5, min(32, width - len(said)))
        full = math.floor(share * room)
        on, off = ("#", "-") if is_plain else ("━", "╌")
        return Text.assemble((on * full, "green"), (off * (room - full), "dim"), said)

    def _times(self) -> list[str]:
        pace = self._shown.pace.average
        left = max(0, self._shown.total - self._shown.done)
        parts = [f"{1 / pace:,.0f} tokens/s" if pace else "- tokens/s"]
        parts.append(f"stage {_about(None if pace is None else left * pace)} left")
        if self.forecast.position is not None:
            parts.append(f"all training {_about(self.forecast.seconds_left(left, pace))} left")
        return parts

    def _term_lines(self, width: int, is_plain: bool) -> list[Text]:
        terms = list(self._shown.terms.items())[:MOST_TERMS]
        if not terms:
            return [Text(self._shown.detail)] if self._shown.detail else []
        label = min(18, max(len(name) for name, _ in terms))
        glyphs = _PLAIN_BLOCKS if is_plain else _BLOCKS
        lines = []
        for name, series in terms:
            said = f"{name[:label]:<{label}} {series.last:>9.4g}  ~{series.average or 0.0:<9.4g} "
            line = Text(said)
            line.append(sparkline(list(series.points), min(32, width - len(said)), glyphs=glyphs), style="cyan")
            lines.append(line)
        rest = len(self._shown.terms) - len(terms)
        return lines + ([Text(f"and {rest} more")] if rest else [])

    def _machine(self) -> list[str]:
        parts = []
        if "learning_rate" in self._shown.facts:
            parts.append(f"learning rate {self._shown.facts['learning_rate']:.3g}")
        memory = _memory()
        if memory is not None:
            parts.append(memory)
        if "checkpoint_tokens" in self._shown.facts:
            parts.append(f"checkpoint at {self._shown.facts['checkpoint_tokens']:,} tokens")
        return parts


def _flowed(parts: Sequence[str], width: int) -> list[Text]:
    """Parts in as few lines as hold them whole."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return [Text(line) for line in lines]


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86_400:.1f} days"


def _about(seconds: float | None) -> str:
    return "?" if seconds is None else f"~{_duration(seconds)}"


def _memory() -> str | None:
    """The most that the accelerator held, or what the process holds now; None where the system does not say."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"CUDA memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most"
    try:
        pages = int(_RESIDENT_PAGES.read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return f"memory {pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.2f} GB"
