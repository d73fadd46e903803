"""The display: what it says, at every width, and that it leaves a terminal as it found it."""

import io
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from limbeck.train.dashboard import REDRAWS_PER_SECOND, Dashboard, Forecast, Series, sparkline
from limbeck.train.metrics import PlainProgress, PlannedStage, SilentProgress, choose_progress

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shown(width=80, *, encoding="utf-8", **facts):
    """A display in the midst of a stage, drawn at a width: 40 updates of 100 tokens, 2.5 s each."""
    clock = Clock()
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    board = Dashboard(Console(file=stream, width=width, height=30, record=True), clock=clock)
    board.plan("demo", [
        PlannedStage("student", "align", 1000, is_finished=True), PlannedStage("student", "distil", 10_000),
        PlannedStage("from_scratch", "tune", 6000), PlannedStage("copied", "distil", 5000),
    ])  # fmt: skip
    board.start("student · distil", 10_000, 1000)
    for number in range(40):
        clock.now += 2.5
        board.observe(terms={"loss": 5.0 - number / 10, "forward_kl": 3.0}, learning_rate=3e-4, **facts)
        board.advance(100, "loss 1.1")
    board.observe(checkpoint_tokens=4800)
    return board, clock


def test_it_says_where_the_run_is_and_how_long_it_will_take():
    board, _ = shown()
    said = board.frame().plain
    assert "demo · student (arm 1 of 3) · distil (stage 2 of 2)" in said
    assert " 50 %  5,000/10,000 tokens" in said
    assert "40 tokens/s, stage ~2 min left" in said  # 5,000 tokens at 40 tokens/s
    # then 6,000 of a stage never seen and 5,000 of one like this, all at the same pace: (5 + 6 + 5) thousand / 40
    assert "all training ~7 min left" in said
    assert re.search(r"loss +1.1 +~2", said)
    assert "█" in said
    assert "▁" in said
    assert "learning rate 0.0003" in said
    assert "checkpoint at 4,800 tokens" in said
    board.finish()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_every_line_fits_and_says_the_same_at_60_columns(width):
    board, _ = shown(width, warnings=["the align stage leaves layer 3 at 0.9 of the signal's power, " * 3])
    lines = board.frame().plain.splitlines()
    assert all(len(line) < width or width == 20 for line in lines), lines
    if width >= 60:
        text = " ".join(lines)
        for part in ("demo", "student", "distil", "5,000/10,000 tokens", "stage ~2 min left", "all training ~7 min left", "loss", "forward_kl",
                     "learning rate 0.0003", "checkpoint at 4,800 tokens", "! the align stage"):  # fmt: skip
            assert part in text, part
    board.finish()


def test_a_resize_is_seen_at_the_next_frame():
    board, _ = shown(80)
    wide = board.frame().plain
    board.console.width = 50
    narrow = board.frame().plain
    assert max(map(len, wide.splitlines())) > 50 > max(map(len, narrow.splitlines()))
    board.finish()


def test_a_terminal_without_unicode_gets_ascii():
    board, _ = shown(80, encoding="ascii")
    board.note("ein Häkchen ✓")
    assert board.frame().plain.isascii()
    board.finish()
    board.console.file.flush()
    assert b"student ? distil: 5,000 of 10,000 tokens in 2 min" in board.console.file.buffer.getvalue()


def test_a_plan_is_not_needed_and_other_titles_are_taken_as_they_are():
    board = Dashboard(Console(file=io.StringIO(), width=80), clock=Clock())
    board.start("capture", 1000, 0)
    board.advance(100, "7 rows")
    said = board.frame().plain
    assert said.splitlines()[0] == "capture"
    assert "100/1,000 tokens" in said
    assert "7 rows" in said
    assert "training" not in said
    board.finish()
    board.finish()
    assert board.console.file.getvalue().count("capture: 100 of 1,000 tokens in 0 s") == 1


def test_nothing_to_do_and_nothing_measured_are_no_faults():
    board = Dashboard(Console(file=io.StringIO(), width=80), clock=Clock())
    board.frame()
    board.start("student · align", 0, 0)
    board.observe(terms={"loss": math.nan})
    assert "0/0 tokens" in board.frame().plain
    assert "stage ? left" in board.frame().plain
    board.finish()


def test_notes_stand_in_the_scrollback_and_in_the_display():
    board, _ = shown()
    board.note("layer 3 keeps its attention")
    assert board.frame().plain.splitlines()[-1] == "layer 3 keeps its attention"
    assert "layer 3 keeps its attention" in board.console.export_text()
    board.start("student · tune", 1000, 0)
    assert "attention" not in board.frame().plain, "a note of an earlier stage says nothing about this one"
    board.finish()


def test_the_average_has_no_bias_and_the_course_keeps_its_shape():
    series = Series(half_life=5)
    assert series.average is None
    series.add(3.0)
    assert series.average == pytest.approx(3.0)
    values = [math.sin(n / 100) for n in range(1000)]
    for value in values:
        series.add(value)
    keep = 0.5 ** (1 / 5)
    weights = [keep ** (1000 - n) for n in range(1001)]
    expected = sum(w * v for w, v in zip(weights, [3.0, *values], strict=True)) / sum(weights)
    assert series.average == pytest.approx(expected, rel=1e-12)
    assert len(series.points) <= 128
    series.add(math.inf)
    assert math.isinf(series.last)
    assert series.average == pytest.approx(expected, rel=1e-12)


def test_the_course_is_even_over_a_long_stage():
    series = Series()
    for number in range(4096):
        series.add(float(number))
    steps = {after - before for before, after in zip(series.points, series.points[1:], strict=False)}
    assert len(steps) == 1, "each point stands for as many values"


def test_a_sparkline_by_hand():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"
    assert sparkline([], 8) == sparkline([1.0], 0) == ""
    assert len(sparkline(list(range(1000)), 32)) == 32


def plan(*rows):
    return [PlannedStage(*row) for row in rows]


def test_the_forecast_uses_each_stages_own_measured_rate():
    forecast = Forecast(plan(("s", "align", 100), ("s", "distil", 200), ("c", "distil", 300), ("t", "tune", 400)))
    forecast.enter("s", "align", 100)
    assert forecast.seconds_left(50, None) is None
    assert forecast.seconds_left(50, 2.0) == 50 * 2 + (200 + 300 + 400) * 2  # nothing else is known
    forecast.measure("align", 100, 200.0)
    forecast.enter("s", "distil", 200)
    assert forecast.seconds_left(80, 5.0) == 80 * 5 + 300 * 5 + 400 * 2  # tune: the mean of what was measured
    forecast.measure("distil", 200, 1000.0)
    forecast.enter("t", "tune", 400)
    assert forecast.seconds_left(10, 1.0) == 10
    assert forecast.place() == ("arm 3 of 3", "stage 1 of 1")


def test_phases_of_a_progressive_stage_share_its_tokens():
    forecast = Forecast(plan(("s", "align", 300), ("s", "distil", 100)))
    left = []
    for layer in range(3):
        forecast.enter("s", f"align-layer{layer:02d}", 100)
        left.append(forecast.seconds_left(100, 1.0))
        assert forecast.place() == ("arm 1 of 1", "stage 1 of 2")
    assert left == [400, 300, 200]
    forecast.enter("s", "distil", 100)
    assert forecast.seconds_left(100, 1.0) == 100


def test_what_is_finished_is_passed_over_and_replicas_follow():
    rows = [("s", "a", 10, True), ("c", "a", 10, True), ("s", "a", 10), ("c", "a", 10)]
    forecast = Forecast(plan(*rows))
    forecast.enter("s", "a", 10)
    assert forecast.place() == ("arm 3 of 4", "stage 1 of 1")
    assert forecast.seconds_left(10, 1.0) == 20


def test_who_gets_which_display(monkeypatch):
    class Stream(io.StringIO):
        terminal = True

        def isatty(self):
            return self.terminal

    out, err = Stream(), Stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_progress(True), Dashboard)
    assert type(choose_progress(False)) is SilentProgress
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_progress(True), PlainProgress)
    monkeypatch.setenv("TERM", "xterm")
    out.terminal = False  # a log or a pipe: lines in it must not be torn by a display on the other stream
    assert isinstance(choose_progress(True), PlainProgress)


def test_plain_progress_prints_lines_and_takes_what_the_display_takes(capsys):
    plain = PlainProgress(every_seconds=0)
    plain.plan("demo", [])
    plain.start("student · align", 100, 0)
    plain.observe(terms={"loss": 1.0})
    plain.advance(50, "loss 1.000")
    plain.note("a word")
    plain.finish()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("student · align: 50/100 tokens")
    assert second == "a word"
    assert REDRAWS_PER_SECOND <= 4


# A real terminal -------------------------------------------------------------------------------------------------------

TRAIN = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.train.test_trainer import Model, NextToken, changed, data
from limbeck.core.runtime import stop_on_signals
from limbeck.train.metrics import MetricsLog, PlannedStage, choose_progress
from limbeck.train.trainer import train_stage
folder, updates, pause = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
progress = choose_progress(True)
progress.plan("demo", [PlannedStage("student", "tune", 32 * updates), PlannedStage("control", "tune", 32 * updates)])
class Slow(NextToken):
    def forward(self, batch):
        time.sleep(pause)
        return super().forward(batch)
settings = changed(tokens=32 * updates)
print("before")
with stop_on_signals() as stop:
    for arm in ("student", "control"):
        train_stage(Slow(Model()), data(), settings, folder=folder / arm, log=MetricsLog(folder / "m.jsonl"), arm=arm, seed=1,
                    device=torch.device("cpu"), progress=progress, stop=stop)
        progress.note(f"a note about {arm}")
print("after")
"""


def screen(raw, width):
    """What stands on a terminal after these bytes: lines, carriage returns, cursor up, and erasing are understood."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]", raw):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token.startswith("\x1b["):
            count = int(re.sub(r"\D", "", token) or 1)
            if token.endswith("A"):
                row = max(0, row - count)
            elif token.endswith("K"):
                rows[row] = ""
        else:
            if column == width:
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row].ljust(column)[:column] + token + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows]


def in_terminal(arguments, *, width=80, stop_at=None, **environment):
    """Run Python in a pseudo-terminal; Ctrl-C is typed when `stop_at` has appeared. Returns (output, exit code)."""
    import fcntl
    import struct
    import termios

    main, other = os.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    kept = {
        key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=other, stdout=other, stderr=other, start_new_session=True,
        env=kept | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | environment,
    )  # fmt: skip
    os.close(other)
    raw, stopped, deadline = b"", False, time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([main], [], [], 0.1)[0]:
            try:
                part = os.read(main, 65536)
            except OSError:
                break
            if not part:
                break
            raw += part
        if stop_at and not stopped and stop_at in raw.decode("utf-8", "replace"):
            stopped = True
            os.killpg(process.pid, signal.SIGINT)
    os.close(main)
    return raw.decode("utf-8", "replace"), process.wait(timeout=30)


needs_terminal = pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")


@needs_terminal
@pytest.mark.parametrize("width", [80, pytest.param(60, marks=pytest.mark.slow)])
def test_a_stage_on_a_terminal_leaves_whole_lines(tmp_path, width):
    said, code = in_terminal(["-c", TRAIN, str(ROOT), str(tmp_path), "25", "0.05"], width=width)
    assert code == 0, said
    for part in (
        "demo · student (arm 1 of 2) · tune",
        "800 tokens",
        "stage ~",
        "all training ~",
        "loss",
        "learning rate",
    ):
        assert part in said, part
    lines = [line for line in screen(said, width) if line]
    joined = "\n".join(lines)
    assert (lines[0], lines[-1]) == ("before", "after"), joined
    assert "student · tune: 800 tokens in" in joined
    assert "control · tune: 800 tokens in" in joined
    assert "a note about student" in joined
    assert "learning rate" not in joined, "the display is gone at the end"
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor is visible again"


@needs_terminal
@pytest.mark.slow
def test_ctrl_c_leaves_the_terminal_sane(tmp_path):
    said, code = in_terminal(["-c", TRAIN, str(ROOT), str(tmp_path), "2000", "0.05"], stop_at="learning rate")
    assert code == 130, said
    lines = [line for line in screen(said, 80) if line]
    assert lines[-1].startswith("student · tune: ")
    assert " of 64,000 tokens" in lines[-1]
    assert any(line.startswith("stopping after this step") for line in lines)
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")


@needs_terminal
@pytest.mark.slow
def test_no_color_is_honoured_and_a_dumb_terminal_gets_lines(tmp_path):
    said, code = in_terminal(["-c", TRAIN, str(ROOT), str(tmp_path / "a"), "30", "0.03"], NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", said)
    said, code = in_terminal(["-c", TRAIN, str(ROOT), str(tmp_path / "b"), "10", "0"], TERM="dumb")
    assert code == 0
    assert "\x1b" not in said
    assert "student · tune: 320/320 tokens" in said


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.tiny import make_teacher, recipe, write_text
from limbeck import pipeline
folder = Path(sys.argv[2])
text = write_text(folder / "text.jsonl")
words = recipe(make_teacher(folder / "teacher", text), text, controls={"from_scratch": True, "copied": False, "teacher_more": False})
pipeline.run(words, run_folder=folder / "run")
print("after")
"""


@needs_terminal
@pytest.mark.slow
def test_a_whole_run_on_a_terminal(tmp_path):
    said, code = in_terminal(["-c", RUN, str(ROOT), str(tmp_path)])
    assert code == 0, said
    assert "1,280 tokens" in said
    assert "3,840 tokens" in said
    assert "stage ~" in said
    lines = [line for line in screen(said, 80) if line]
    assert lines[-1] == "after"
    assert "learning rate" not in "\n".join(lines)
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")
