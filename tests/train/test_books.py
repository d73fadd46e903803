"""The books of a stage: energy by made-up counters, whatever these do; and the same after a stop."""

import pytest
import torch
from tests.train.test_trainer import SETTINGS, Model, NextToken, data

from limbeck.core.errors import CheckpointError
from limbeck.core.runtime import StopRequest
from limbeck.evaluate.energy import EnergyMeter
from limbeck.models.metering import FlopMeter
from limbeck.train.books import Books, EnergyBook, joined
from limbeck.train.metrics import MetricsLog
from limbeck.train.trainer import train_stage


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Counter:
    """A counter of 10 W that goes round at `top` joules; `fails` makes it raise."""

    def __init__(self, clock, top=None):
        self.clock, self.top, self.fails, self.offset = clock, top, None, 0.0

    def __call__(self):
        if self.fails:
            raise self.fails
        joules = 10 * (self.clock.now - 100) + self.offset
        return [joules % self.top if self.top else joules]


def book(top=None):
    clock = Clock()
    counter = Counter(clock, top)
    one = EnergyBook(EnergyMeter("made up", counter, [top], 0.0), clock=clock)
    one.begin()
    return one, clock, counter


def test_energy_adds_up_and_is_read_now_and_then():
    one, clock, _ = book()
    for _ in range(7):
        clock.now += 3
        one.observe()
    assert one.joules == 120  # read after 12 s; the rest is not long enough ago
    one.observe(now=True)
    assert (one.joules, one.note) == (210, "made up")


def test_a_counter_that_goes_round_is_followed_in_time():
    # 1,500 J at a thousand watts at most fill in 1.5 s at the earliest, so it is read four times as often.
    one, clock, _ = book(top=1500.0)
    for _ in range(1000):
        clock.now += 1.0
        one.observe()
    assert one.joules == pytest.approx(10_000)


def test_a_gap_in_which_it_may_have_gone_round_twice_gives_no_figure():
    one, clock, _ = book(top=1500.0)
    clock.now += 5.0
    one.observe()
    assert one.joules is None
    assert "gone round more than once" in one.note
    clock.now += 1.0
    one.observe(now=True)
    assert one.joules is None


@pytest.mark.parametrize(
    "error", [PermissionError("no"), OSError("gone"), ValueError("no number"), RuntimeError("GPU is lost")]
)
def test_a_counter_that_fails_never_stops_a_run(error):
    one, clock, counter = book()
    clock.now += 20
    one.observe()
    counter.fails = error
    clock.now += 20
    one.observe()
    assert one.joules is None
    assert type(error).__name__ in one.note
    counter.fails = None
    one.observe(now=True)
    assert one.joules is None


def test_a_counter_that_fails_at_the_start_or_goes_back():
    one, clock, counter = book()
    counter.fails = OSError("gone")
    one.begin()
    one.observe(now=True)
    assert one.joules is None
    one, clock, counter = book()
    clock.now += 20
    counter.offset = -1000.0
    one.observe()
    assert one.joules is None
    assert "went back" in one.note


def test_no_counter_says_why():
    assert EnergyBook("not reported by this machine (why)").note == "not reported by this machine (why)"
    assert EnergyBook(None).joules is None


def test_parts_of_a_stage_join():
    assert joined((2.0, "a"), (3.0, "b")) == (5.0, "b")
    assert joined((None, "why"), (3.0, "b")) == (None, "why")
    assert joined((0.0, ""), (None, "why")) == (None, "why")
    joules, note = joined((2.0, "a"), (None, "why"))
    assert joules is None
    assert note.endswith("then: why")


class Steps:
    """A counter that shows so many joules more each time it is read."""

    method, longest_seconds = "steps", None

    def __init__(self):
        self.shown = 0.0

    def read(self):
        self.shown += 1.0
        return [self.shown]

    def joules(self, start, end):
        return end[0] - start[0]


class StopAfter(StopRequest):
    def __init__(self, updates):
        self.left = updates

    @property
    def exit_code(self):
        self.left -= 1
        return 143 if self.left < 0 else None


def trained(folder, *, stop=None, energy=None):
    log = MetricsLog(folder / "metrics.jsonl")
    return train_stage(
        NextToken(Model()), data(), SETTINGS, folder=folder / "ck", log=log, arm="student", seed=1,
        device=torch.device("cpu"), stop=stop, energy=energy,
    )  # fmt: skip


def test_a_stopped_stage_has_the_same_operations_and_all_of_its_energy(tmp_path):
    whole = trained(tmp_path / "whole", energy=Steps())
    with pytest.raises(SystemExit):
        trained(tmp_path / "parts", stop=StopAfter(9), energy=Steps())
    again = trained(tmp_path / "parts", energy=Steps())
    assert again.flops == whole.flops
    # A row of 8 tokens, 640 in all, through one matrix of 8 x 260, forth and back.
    assert whole.flops == 3 * 2 * 640 * 8 * 260
    assert whole.joules > 0
    assert again.joules > 0
    assert again.energy_note == "steps"


def test_energy_before_the_stop_is_kept_or_the_whole_is_unknown(tmp_path):
    with pytest.raises(SystemExit):
        trained(tmp_path, stop=StopAfter(9), energy=Steps())
    found = trained(tmp_path, energy="not reported by this machine")
    assert found.joules is None
    assert found.energy_note == "a part of it was measured, then: not reported by this machine"
    with pytest.raises(SystemExit):
        trained(tmp_path / "other", stop=StopAfter(9), energy="not allowed")
    found = trained(tmp_path / "other", energy=Steps())
    assert (found.joules, found.energy_note) == (None, "not allowed")


def test_the_books_listen_no_longer_when_the_stage_is_over(tmp_path):
    lesson = NextToken(Model())
    before = {name: len(module._forward_hooks) for name, module in lesson.named_modules()}
    books = Books(lesson, device=torch.device("cpu"))
    assert any(len(module._forward_hooks) for module in lesson.modules())
    books.meter.close()
    assert before == {name: len(module._forward_hooks) for name, module in lesson.named_modules()}


def test_a_stage_that_cannot_be_continued_listens_no_longer(tmp_path):
    trained(tmp_path)
    for weights in (tmp_path / "ck").glob("*/model.safetensors"):
        weights.write_bytes(b"")
    lesson = NextToken(Model())
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.warns(UserWarning, match="changed"), pytest.raises(CheckpointError):
        train_stage(
            lesson, data(), SETTINGS, folder=tmp_path / "ck", log=log, arm="student", seed=1,
            device=torch.device("cpu"),
        )  # fmt: skip
    assert not any(module._forward_hooks for module in lesson.modules())


def test_what_cannot_be_counted_costs_no_run_and_is_said(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")

    def fails(self, module, args, kwargs, output):
        raise AttributeError("no such shape")

    monkeypatch.setattr(FlopMeter, "_matrix", fails)
    result = trained(tmp_path / "failed")
    assert result.curve == whole.curve
    assert result.flops < whole.flops
    [told] = result.warnings
    assert told == (
        "the operations of Linear (AttributeError: no such shape) could not be counted: the FLOPs are without them"
    )
