"""Trackers: they get every point of metrics.jsonl once, whatever stops the run, and never stop it themselves."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.train.test_trainer import SETTINGS, Model, NextToken, StopRequest, data, torch, train_stage

from limbeck.core.errors import EnvironmentFault
from limbeck.train import tracking
from limbeck.train.metrics import MetricsLog
from limbeck.train.tracking import NO_TRACKERS, SentFile, open_trackers, report_figures, without_secrets

CONFIG = {"name": "demo", "stages": [{"tokens": 640}], "teacher": {"url": "https://me:key@host/v1?token=1#x"}}


class Kept:
    """A tracker that keeps what it is told. `fails_at`: the call of `log` that raises."""

    everything: list["Kept"] = []
    fails_at = None
    fails_to_begin = False

    def __init__(self, opening):
        if Kept.fails_to_begin:
            raise ConnectionError("no such host")
        self.opening, self.points, self.finished = opening, [], 0
        Kept.everything.append(self)

    def log(self, place, tokens, values, *, point):
        if Kept.fails_at is not None and len(self.points) == Kept.fails_at:
            raise ConnectionError("the network is gone\nsecond line")
        self.points.append((place, tokens, values, point))

    def finish(self):
        self.finished += 1


@pytest.fixture
def kept(monkeypatch):
    """`tensorboard` stands for the tracker above."""
    monkeypatch.setattr(tracking, "TRACKERS", {"tensorboard": Kept})
    monkeypatch.setattr(tracking, "_import", lambda name: None)
    monkeypatch.setattr(Kept, "everything", [])
    monkeypatch.setattr(Kept, "fails_at", None)
    monkeypatch.setattr(Kept, "fails_to_begin", False)
    return Kept


def train(folder, *, stop=None, arm="student", said=None):
    """A short stage with a tracker."""
    say = (said if said is not None else []).append
    with open_trackers(["tensorboard"], folder, run="demo", config=CONFIG, say=say) as trackers:
        log = MetricsLog(folder / "metrics.jsonl", trackers)
        train_stage(
            NextToken(Model()), data(), SETTINGS, folder=folder / arm / "ck", log=log, arm=arm, seed=1, device=torch.device("cpu"), stop=stop,
        )  # fmt: skip
        trackers.report({"student": {"perplexity": 7.0}, "verdict": {"headline": "Good."}})


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(trackers):
    """(name, tokens) to loss, for every point; a point sent twice is an error."""
    found = [
        ((name, tokens), value)
        for tracker in trackers
        for _, tokens, values, _ in tracker.points
        for name, value in values.items()
        if name.endswith("/loss")
    ]
    assert len(dict(found)) == len(found), "a point was sent twice"
    return dict(found)


def expected(folder):
    return {(f"{line['arm']}/{line['stage']}/loss", line["tokens"]): line["loss"] for line in logged(folder)}


def test_every_line_of_the_log_and_the_report_go_to_the_tracker(tmp_path, kept):
    train(tmp_path)
    (tracker,) = kept.everything
    assert losses([tracker]) == expected(tmp_path)
    assert len(losses([tracker])) == 20
    _, tokens, values, _ = tracker.points[0]
    assert tokens == 32
    assert set(values) == {f"student/tune/{name}" for name in ("loss", "gradient_norm", "learning_rate")}
    assert values["student/tune/learning_rate"] == pytest.approx(
        0.05
    )  # after warm-up, which is less than one update here
    assert tracker.points[-1][2] == {"report/student/perplexity": 7.0, "report/headline": "Good."}
    assert [point for *_, point in tracker.points] == list(range(21)), "what wandb calls a step only rises"
    assert tracker.finished == 1
    assert tracker.opening.run == "demo"
    assert tracker.opening.is_new


class StopAt(StopRequest):
    def __init__(self, after):
        self.left = after

    @property
    def exit_code(self):
        self.left -= 1
        return 143 if self.left < 0 else None


@pytest.mark.parametrize("after", [1, 7, 18])
def test_a_stopped_run_goes_on_in_the_same_tracker_run_without_doubled_steps(tmp_path, kept, after):
    with pytest.raises(SystemExit):
        train(tmp_path, stop=StopAt(after))
    assert kept.everything[0].finished == 1, "closed by the request to stop too"
    train(tmp_path)
    first, second = kept.everything
    assert first.opening.id == second.opening.id
    assert not second.opening.is_new
    assert losses([first, second]) == expected(tmp_path)
    points = [point for tracker in (first, second) for *_, point in tracker.points]
    assert points == list(range(21))


def test_a_killed_run_repeats_updates_but_not_points(tmp_path, kept):
    """A kill leaves logged updates after the last checkpoint, and a line cut short; the tracker has them already."""
    with pytest.raises(SystemExit):
        train(tmp_path, stop=StopAt(9))
    newest = sorted((tmp_path / "student" / "ck").glob("step-*"))
    for folder in newest[1:]:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink()
        folder.rmdir()
    with open(tmp_path / "tracking" / "tensorboard.jsonl", "a") as stream:
        stream.write('{"at": "stu')
    before = len(logged(tmp_path))
    train(tmp_path)
    assert losses(kept.everything) == expected(tmp_path)
    assert len(kept.everything[0].points) == before
    assert all(json.loads(line) for line in (tmp_path / "tracking" / "tensorboard.jsonl").read_text().splitlines()[-3:])


def test_a_tracker_that_fails_is_told_of_once_and_gets_the_rest_next_time(tmp_path, kept):
    kept.fails_at, said = 5, []
    train(tmp_path, said=said)
    assert len(logged(tmp_path)) == 20, "the training went on"
    assert len(said) == 1
    assert "tensorboard failed (ConnectionError: the network is gone)" in said[0]
    assert len(kept.everything[0].points) == 5
    kept.fails_at = None
    train(tmp_path)
    assert losses(kept.everything) == expected(tmp_path)


def test_a_tracker_named_later_gets_what_was_logged_before(tmp_path, kept):
    MetricsLog(tmp_path / "metrics.jsonl").write(arm="student", stage="align", step=4, tokens=128, loss=2.0)
    further = MetricsLog(tmp_path / "seeds" / "1" / "metrics.jsonl")
    further.write(arm="student", stage="align", step=4, tokens=128, loss=3.0)
    (tmp_path / "metrics.jsonl").open("a").write('[1]\n{"other": 1}\ntorn')
    with open_trackers(["tensorboard"], tmp_path, run="demo", config={}) as trackers:
        MetricsLog(None, trackers).write(arm="student", stage="align", step=5, tokens=160, loss=1.0)
        further.trackers = trackers.under("seeds/1")
        further.write(arm="student", stage="align", step=5, tokens=160, loss=1.5)
    assert losses(kept.everything) == {
        ("student/align/loss", 128): 2.0,
        ("seeds/1/student/align/loss", 128): 3.0,
        ("seeds/1/student/align/loss", 160): 1.5,
    }  # fmt: skip  (a log without a file, as other ranks have it, sends nothing)


def test_a_tracker_that_cannot_begin_is_refused_before_training(tmp_path, kept):
    kept.fails_to_begin = True
    with (
        pytest.raises(EnvironmentFault, match="tensorboard could not begin.*no such host.*WANDB_MODE=offline"),
        open_trackers(["tensorboard"], tmp_path, run="demo", config={}),
    ):
        pytest.fail("training would have begun")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    with (
        pytest.raises(EnvironmentFault, match=rf'{name} was asked for.*pip install "limbeck\[trackers\]"'),
        open_trackers([name], tmp_path, run="demo", config={}),
    ):
        pytest.fail("training would have begun")
    assert not (tmp_path / "tracking").exists()


def test_without_trackers_nothing_is_written_and_other_ranks_open_none(tmp_path, kept, monkeypatch):
    with open_trackers([], tmp_path, run="demo", config={}) as trackers:
        MetricsLog(tmp_path / "m.jsonl", trackers).write(arm="a", stage="b", step=1, tokens=1, loss=1.0)
    NO_TRACKERS.write(arm="a", stage="b", step=1, tokens=1, loss=1.0)
    monkeypatch.setenv("RANK", "1")
    with open_trackers(["tensorboard"], tmp_path, run="demo", config={}) as trackers:
        trackers.write(arm="a", stage="b", step=1, tokens=1, loss=1.0)
    assert not kept.everything
    assert not (tmp_path / "tracking").exists()


def test_the_config_holds_no_secrets():
    assert without_secrets(CONFIG)["teacher"]["url"] == "https://host/v1"
    assert without_secrets({"a": ["http://user@h:8000/v1", 3, None], "p": "me@x: no address"}) == {
        "a": ["http://h:8000/v1", 3, None], "p": "me@x: no address",
    }  # fmt: skip


def test_the_reports_main_figures():
    facts = {
        "student": {"perplexity": 10.8, "parameters": 5, "top1_agreement": None, "samples": []}, "teacher": None,
        "controls": {"copied": {"bits_per_byte": 1.1}, "equal_flops": None}, "verdict": {"headline": "H."},
    }  # fmt: skip
    assert report_figures(facts) == {
        "report/student/perplexity": 10.8, "report/student/parameters": 5.0, "report/controls/copied/bits_per_byte": 1.1, "report/headline": "H.",
    }  # fmt: skip


def test_a_damaged_file_of_what_was_sent_costs_nothing_but_its_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "abc"}\n\x00garbage\n{"at": "s/a", "step": 3}\n{"at": "s/a", "st')
    sent = SentFile(path)
    assert (sent.id, sent.points, sent.is_new) == ("abc", 1, False)
    assert sent.has("s/a", 3)
    assert not sent.has("s/a", 4)
    sent.add("s/a", 4)
    assert SentFile(path).has("s/a", 4)


# The real ones ---------------------------------------------------------------------------------------------------------


def run_twice(tmp_path, name):
    """A stage stopped and continued, each in a process of its own, with a real tracker."""
    code = (
        "import sys; from pathlib import Path; from tests.train import test_tracking as t\n"
        "stop = t.StopAt(int(sys.argv[3])) if int(sys.argv[3]) else None\n"
        "t.train_with(sys.argv[2], Path(sys.argv[1]), stop)\n"
    )
    for after, expected_code in ((7, 143), (0, 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), name, str(after)], capture_output=True, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == expected_code, done.stderr
        assert done.stdout == "", "a tracker writes nothing between the run's own lines"


def train_with(name, folder, stop):
    """For the processes above."""
    with open_trackers([name], folder, run="demo", config=CONFIG) as trackers:
        log = MetricsLog(folder / "metrics.jsonl", trackers)
        train_stage(
            NextToken(Model()), data(), SETTINGS, folder=folder / "ck", log=log, arm="student", seed=1, device=torch.device("cpu"), stop=stop,
        )  # fmt: skip
        trackers.report({"student": {"perplexity": 7.0}})


def test_tensorboard_has_every_point_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(SystemExit):
        train_with("tensorboard", tmp_path, StopAt(7))
    train_with("tensorboard", tmp_path, None)
    events = EventAccumulator(
        str(tmp_path / "tracking" / "tensorboard" / "demo"), size_guidance={"scalars": 0, "tensors": 0}
    )
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("student/tune/loss")]
    assert found == [(line["tokens"], pytest.approx(line["loss"], rel=1e-6)) for line in logged(tmp_path)]
    assert [event.value for event in events.Scalars("report/student/perplexity")] == [7.0]
    (recipe,) = events.Tensors("recipe/text_summary")
    assert b'"url": "https://host/v1"' in recipe.tensor_proto.string_val[0]


@pytest.mark.slow
def test_wandb_offline_has_every_point_once(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    run_twice(tmp_path, "wandb")
    files = sorted((tmp_path / "tracking" / "wandb").glob("offline-run-*/*.wandb"))
    records = [
        wandb_internal_pb2.Record.FromString(part) for file in files for part in wandb_records(file.read_bytes())
    ]
    assert len({record.run.run_id for record in records if record.HasField("run")}) == 1
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    found = Counter(row["student/tune/tokens"] for row in rows if "student/tune/loss" in row)
    assert found == Counter(line["tokens"] for line in logged(tmp_path))
    steps = [record.history.step.num for record in records if record.HasField("history")]
    assert steps == sorted(set(steps))
    assert {"report/student/perplexity": 7.0}.items() <= rows[-1].items()


def wandb_records(content):
    """The records of a .wandb file: blocks of 32 KiB, each record behind 4 bytes of checksum, 2 of length, 1 of kind."""
    at, part = 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part, at = part + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield part
            part = b""


@pytest.mark.slow
def test_trackio_has_every_point_once(tmp_path):
    try:
        import trackio  # noqa: F401
    except ImportError:
        pytest.skip("trackio is not installed, or not whole")
    run_twice(tmp_path, "trackio")
    import sqlite3

    with sqlite3.connect(tmp_path / "tracking" / "trackio" / "limbeck.db") as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
        names = {name for (name,) in database.execute("select distinct run_name from metrics")}
    found = Counter(step for step, metrics in rows if "student/tune/loss" in json.loads(metrics))
    assert found == Counter(line["tokens"] for line in logged(tmp_path))
    assert len(names) == 1
