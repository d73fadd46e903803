"""The benchmarks' gates, turns, readings and tables, on tiny inputs: what is wrong is refused, what is kept is drawn."""

import io
import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks import again, convolution, peers, summary, whole_model
from benchmarks import all as whole_set
from benchmarks._headlines import HEADLINES, RESULTS, Headline, Kept, name_of, read_kept
from benchmarks._kept import command_of, spread_of
from benchmarks._peers import by_hand, job, limbeck, packages
from benchmarks._peers.pace import Channel, Pace

TINY = job.Job(
    vocabulary=300, width=64, layers=1, rows=2, context=12, steps=4, heldout_rows=2, teacher_steps=2
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("job")
    job.prepare(place, TINY, documents=1)
    return place


def done_by(module, folder, settings=TINY):
    student, teacher = job.open_models(folder, settings)
    pace = Pace(Channel(io.StringIO(), io.StringIO()), steps=settings.steps, block=2, device="cpu", watches=True)
    losses = module.train(folder, settings, student, teacher, pace)
    return {"losses": losses, "heldout_kl": job.heldout_kl(student, teacher, job.rows_of(folder)["heldout"])}


def test_the_same_job_by_hand_and_by_the_package(folder):
    facts = {"by hand": done_by(by_hand, folder), "limbeck": done_by(limbeck, folder)}
    torch.testing.assert_close(facts["limbeck"]["losses"], facts["by hand"]["losses"], rtol=1e-5, atol=0)
    assert len(facts["by hand"]["losses"]) == TINY.steps
    assert facts["by hand"]["losses"][-1] < facts["by hand"]["losses"][0]
    peers.gate(facts, what="here")


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"weight_decay": 50.0}, {"beta1": 0.2}])
def test_the_gate_refuses_another_job(folder, change):
    facts = {"by hand": done_by(by_hand, folder), "limbeck": done_by(limbeck, folder, replace(TINY, **change))}
    with pytest.raises(SystemExit, match="limbeck: held-out KL .* not the same job"):
        peers.gate(facts, what="here")


def test_the_gate_looks_at_the_first_loss_too_and_tells_of_what_was_not_run(capsys):
    facts = {
        "by hand": {"losses": [1.0], "heldout_kl": 0.5},
        "trl GKDTrainer": {"not_run": "no such module"},
        "limbeck": {"losses": [1.001], "heldout_kl": 0.5},
    }
    with pytest.raises(SystemExit, match="limbeck: first loss"):
        peers.gate(facts, what="here")
    assert "trl GKDTrainer: not run here: no such module" in capsys.readouterr().out
    facts["limbeck"]["losses"] = [float("nan")]
    with pytest.raises(SystemExit, match="first loss nan"):
        peers.gate(facts, what="here")


def test_the_loss_by_hand_is_the_definition(folder):
    student, teacher = job.open_models(folder, TINY)
    ids_BT = job.rows_of(folder)["heldout"]
    with torch.no_grad():
        p, q = (torch.softmax(model(input_ids=ids_BT).logits[:, :-1].double(), -1) for model in (teacher, student))
        expected = (p * (p.log() - q.log())).sum(-1).mean()
        torch.testing.assert_close(by_hand.loss_of(student, teacher, ids_BT).double(), expected, rtol=1e-5, atol=1e-7)
    assert job.heldout_kl(student, teacher, ids_BT) == pytest.approx(float(expected), rel=1e-6)


def test_every_contender_reads_the_rows_in_the_packages_order(folder):
    rows_NT = job.rows_of(folder)["train"]
    ordered_NT = job.rows_in_order(folder, TINY)
    assert ordered_NT.shape == (TINY.steps * TINY.rows, TINY.context)
    assert sorted(map(tuple, ordered_NT.tolist())) == sorted(map(tuple, rows_NT.tolist()))
    batch = job.RowWindows(rows_NT).rows([1, 0])
    assert torch.equal(batch.input_ids_BT, rows_NT[[1, 0]])
    assert batch.target_count == 2 * (TINY.context - 1)
    assert not batch.loss_mask_BT[:, 0].any()


def test_a_contender_stops_after_every_block():
    out = io.StringIO()
    pace = Pace(Channel(out, io.StringIO("go\n" * 3)), steps=4, block=2, device="cpu")
    pace.ready()
    for _ in range(4):
        pace.step_done()
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert said[0] == {"ready": True}
    assert [len(block["wall"]) for block in said[1:]] == [2, 2]
    lost = Pace(Channel(out, io.StringIO("")), steps=4, block=2, device="cpu")
    with pytest.raises(SystemExit):
        lost.ready()


def test_turns_become_ratios_block_by_block():
    def run(own, other):
        return {
            "limbeck": {"blocks": [{"wall": [s] * 3, "cpu": [s]} for s in own], "heldout_kl": 1.0},
            "by hand": {"blocks": [{"wall": [s] * 3, "cpu": [s]} for s in other], "heldout_kl": 1.0},
        }

    found = peers.figures_of([run([1, 2], [2, 6]), run([1], [1])], {"limbeck": [30, 20], "by hand": [60, 80]}, TINY)
    assert found["ratios"]["by hand"]["speed"] == {"median": 2.0, "low": 1.0, "high": 3.0, "blocks": [2.0, 3.0, 1.0]}
    assert found["ratios"]["by hand"]["memory"] == {"median": 0.375, "low": 0.25, "high": 0.5, "blocks": [0.5, 0.25]}
    assert found["tokens_per_second"]["limbeck"]["blocks"] == [24.0, 12.0, 24.0]
    assert "limbeck" not in found["ratios"]


@pytest.mark.slow
def test_peers_from_end_to_end(tmp_path, capsys):
    whole_set.main(["--quick", "--results", str(tmp_path), "--only", "peers"])
    assert "training, tokens a second against by hand" in capsys.readouterr().out
    kept = json.loads((tmp_path / "peers-cpu.json").read_text(encoding="utf-8"))
    (found,) = kept["results"]["sizes"].values()
    assert found["heldout_kl"]["limbeck"] == pytest.approx(found["heldout_kl"]["by hand"], rel=1e-3)
    assert found["peak_bytes"]["limbeck"]["median"] > 0
    assert kept["circumstances"]["command"].startswith("python -m benchmarks peers --vocabularies 512")
    file = str(tmp_path / "peers-cpu.json")
    with pytest.raises(SystemExit) as ended:
        again.main(["--compare", file, file])
    assert ended.value.code == 0


def test_quick_figures_never_take_the_place_of_kept_ones(capsys):
    with pytest.raises(SystemExit):
        whole_set.main(["--quick"])
    assert "must not take the place" in capsys.readouterr().err


@pytest.mark.slow
def test_a_peer_that_cannot_be_run_is_told_of_with_its_error(folder, tmp_path):
    chosen = SimpleNamespace(threads=1, block=2)
    empty = tmp_path / "packages"
    empty.mkdir()
    contender = peers.Contender("trl GKDTrainer", tmp_path / "no job there", chosen, empty, watch=1)
    try:
        with pytest.raises(RuntimeError, match="job.json"):
            contender.listen()
    finally:
        contender.close()


def test_private_folders_are_whole_or_not_there(tmp_path, monkeypatch):
    calls = []

    def fails(command, **rest):
        calls.append(command)
        return SimpleNamespace(returncode=1, stderr="ERROR: one\nERROR: no such version\n\n")

    monkeypatch.setattr(packages.subprocess, "run", fails)
    with pytest.raises(packages.NotInstalled, match="no such version"):
        packages.private_folder("x", ["x==1"], root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(packages.subprocess, "run", lambda command, **rest: SimpleNamespace(returncode=0, stderr=""))
    made = packages.private_folder("x", ["x==1"], root=tmp_path)
    monkeypatch.setattr(packages.subprocess, "run", fails)
    assert packages.private_folder("x", ["x==1"], root=tmp_path) == made
    assert {"--no-deps", "--target"} <= set(calls[0])
    with pytest.raises(packages.NotInstalled):  # another version is another folder's content
        packages.private_folder("x", ["x==2"], root=tmp_path)
    assert made.exists()


def test_the_convolution_gate(monkeypatch):
    convolution.gate(["limbeck"])
    right = convolution.by_limbeck
    for wrong in (
        lambda u, h: right(u, h) - u,
        lambda u, h: right(u, h).roll(1, 1),
        lambda u, h: right(u.detach(), h) + 0 * u,
    ):
        monkeypatch.setitem(convolution.CONVOLUTIONS, "limbeck", wrong)
        with pytest.raises(SystemExit, match="differs from the definition"):
            convolution.gate(["limbeck"])


@pytest.fixture(scope="module")
def teacher():
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    return whole_model.teacher_of(shape)


def test_attention_with_either_cache_passes_the_gate(teacher):
    whole_model.gate(teacher, {whole_model.STATIC: whole_model.WithStaticCache(teacher, longest=72)})


def test_the_whole_model_gate_refuses_a_cache_that_forgets(teacher):
    class Forgetful(whole_model.WithStaticCache):
        def forward(self, input_ids, past_key_values=None, **rest):
            return super().forward(input_ids, None, **rest)

    with pytest.raises(SystemExit, match="step by step differs"):
        whole_model.gate(teacher, {whole_model.STATIC: Forgetful(teacher, longest=72)})


def test_whole_models_in_turn(teacher):
    models = {"attention": teacher, whole_model.STATIC: whole_model.WithStaticCache(teacher, longest=12)}
    row = whole_model.measure_in_turn({**models, "modal": teacher}, 8, blocks=2, decode_tokens=2)
    # 12 places against 10 tokens, and a counter or two.
    assert row[whole_model.STATIC]["cache_bytes"] == pytest.approx(row["attention"]["cache_bytes"] * 1.2, abs=32)
    row["attention"]["prefill_seconds"] = spread_of([2.0, 6.0])
    row["modal"]["prefill_seconds"] = spread_of([1.0, 2.0])
    ratios = whole_model.ratios_of(row, "modal")
    assert ratios["attention"]["prefill"]["blocks"] == [2.0, 3.0]
    assert set(ratios) == {"attention", whole_model.STATIC}


def test_commands_name_no_place_of_one_machine():
    words = ["peers", "--json", "/a/b.json", "--rows", "4", "--packages=/c", "--text", "/d/train.txt", "--folder", "/e"]
    assert command_of(words) == "python -m benchmarks peers --rows 4 --text train.txt"


def test_spreads():
    assert spread_of([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "blocks": [3.0, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ((2.0, 1.8, 2.2), (2.1, 2.05, 2.4), True),
        ((2.0, 1.8, 2.2), (2.3, 2.25, 2.4), False),
        ((2.0, 1.9, 2.6), (2.5, 2.4, 2.7), True),
        ((2.0, None, None), (2.05, None, None), True),
        ((2.0, 1.99, 2.01), (2.08, 2.07, 2.09), True),
        ((2.0, None, None), (2.15, None, None), True),
        ((2.0, None, None), (2.3, None, None), False),
        ((2.0, None, None), (2.4, 1.9, 2.6), True),
        ((None, None, None), (None, None, None), True),
        ((2.0, None, None), (None, None, None), False),
    ],
)
def test_agreement(old, new, same):
    def of(values):
        return Headline("x", *values, blocks=1 if values[1] is None else 3)

    assert of(old).agrees_with(of(new)) is same
    assert of(new).agrees_with(of(old)) is same


def kept(**changes):
    line = Headline("speed", 2.0, 1.5, 2.5, 3, is_main=True)
    facts = {
        "processor": "P",
        "device": "cpu",
        "threads": 2,
        "date": "2026-01-02",
        "commit": "abc",
        "command": "python -m benchmarks x",
    }
    return Kept("peers", "peers-cpu.json", facts, [replace(line, **changes)])


def test_comparing_tells_of_another_machine_and_ends_red():
    lines, agrees = again.compare(kept(), kept())
    assert agrees
    assert lines == ["agrees             speed: x2.00 (1.50 to 2.50) then, x2.00 (1.50 to 2.50) now"]
    other = kept(ratio=9.0, low=8.0, high=10.0)
    lines, agrees = again.compare(kept(), replace(other, circumstances=other.circumstances | {"processor": "Q"}))
    assert not agrees
    assert lines[0] == "processor: P then, Q now"
    assert lines[1].startswith("DIFFERS")
    lines, agrees = again.compare(kept(), kept(what="another"))
    assert not agrees
    assert lines[-1] == "nothing was measured in both"


def test_pooled_runs_have_the_range_of_both(tmp_path, capsys):
    facts = {"processor": "one", "device": "cpu", "threads": 2, "command": "python -m benchmarks mixers"}
    for name, speeds, raw, alone in (("a", [1.0, 3.0], [5, 6], 1), ("b", [2.0, 7.0], [7, 8], 2)):
        results = {"sizes": [1, 2], "speed": spread_of(speeds), "raw": {"x": raw}, "cache": alone}
        (tmp_path / f"{name}.json").write_text(json.dumps({"circumstances": facts, "results": results}))
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    again.main(["--pool", *files, "--json", str(tmp_path / "both.json")])
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["results"] == {
        "sizes": [1, 2], "speed": {"median": 2.5, "low": 1.0, "high": 7.0, "blocks": [1.0, 3.0, 2.0, 7.0]},
        "raw": {"x": [5, 6, 7, 8]}, "cache": 1,
    }  # fmt: skip
    assert both["circumstances"]["runs"] == 2
    other = {"circumstances": facts | {"threads": 1}, "results": {}}
    (tmp_path / "c.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="not measured by one command"):
        again.main(["--pool", files[0], str(tmp_path / "c.json"), "--json", str(tmp_path / "both.json")])


def test_measuring_again_runs_the_kept_command(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(
        again.subprocess,
        "run",
        lambda command, **rest: ran.append(command[1:]) or subprocess.CompletedProcess(command, 0),
    )
    again.rerun(kept(), tmp_path / "new.json")
    assert ran == [["-m", "benchmarks", "x", "--json", str(tmp_path / "new.json")]]
    with pytest.raises(SystemExit, match="there is no such file"):
        again.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("line", "side"),
    [
        ({}, 1),
        ({"low": 0.9}, 0),
        ({"ratio": 0.8, "low": 0.7, "high": 0.9}, -1),
        ({"ratio": 0.8, "low": 0.7, "high": 0.9, "more_is_better": False}, 1),
        ({"ratio": 1.2, "low": 1.1, "high": 1.3, "more_is_better": False}, -1),
        ({"low": None, "high": None, "blocks": 1}, 0),
        ({"ratio": None}, 0),
    ],
)
def test_which_side_of_one_a_range_lies_on(line, side):
    (headline,) = kept(**line).headlines
    assert summary.side(headline) == side
    assert summary.cell(headline).startswith("**") is (side == 1)


def write_results(place):
    spread = spread_of([1.5, 2.0])
    found = {
        "ratios": {"by hand": {"speed": spread, "memory": spread_of([0.5])}},
        "not_run": {"trl GKDTrainer": "no wheel | here"},
    }
    data = {"circumstances": kept().circumstances, "results": {"sizes": {"4096": found}}}
    place.mkdir()
    (place / "peers-cpu.json").write_text(json.dumps(data), encoding="utf-8")
    (place / "step-overhead-cpu.json").write_text(
        json.dumps({"circumstances": {}, "results": {"4096": {}}}), encoding="utf-8"
    )
    (place / "demo-10x-cpu.json").write_text("{}", encoding="utf-8")


def test_results_are_drawn_between_the_marks(tmp_path):
    write_results(tmp_path / "results")
    (tmp_path / "docs").mkdir()
    page = f"before\n\n{summary.OPEN}\nold\n{summary.CLOSE}\n\nafter\n"
    for name in ("docs/benchmarks.md", "README.md"):
        (tmp_path / name).write_text(page, encoding="utf-8")
    drawn = []
    for _ in range(2):
        summary.main(["--results", str(tmp_path / "results"), "--root", str(tmp_path)])
        drawn.append(
            [
                (tmp_path / name).read_bytes()
                for name in ("docs/benchmarks.md", "README.md", "docs/figures/benchmarks.svg")
            ]
        )
    assert drawn[0] == drawn[1]
    long, short, picture = (part.decode() for part in drawn[0])
    assert short.startswith("before\n\n<!-- benchmarks -->\n| what |")
    assert short.endswith("<!-- /benchmarks -->\n\nafter\n")
    assert "\nold\n" not in short
    row = "| training, tokens a second against by hand, vocabulary 4,096 | **x1.75 (1.50 to 2.00)** | above 1 | `python -m benchmarks x` |"
    assert f"{row} P, 2 thread(s), 2026-01-02, abc |" in short
    assert "not run: no wheel \\| here" in long
    assert "measure it again" in long
    assert "training, peak memory against by hand" in picture


def test_pages_without_marks(tmp_path, capsys):
    write_results(tmp_path / "results")
    (tmp_path / "docs").mkdir()
    for name in ("docs/benchmarks.md", "README.md"):
        (tmp_path / name).write_text("nothing\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="docs/benchmarks.md: expected one"):
        summary.main(["--results", str(tmp_path / "results"), "--root", str(tmp_path)])
    (tmp_path / "docs" / "benchmarks.md").write_text(f"{summary.OPEN}\n{summary.CLOSE}\n", encoding="utf-8")
    summary.main(["--results", str(tmp_path / "results"), "--root", str(tmp_path)])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "nothing\n"
    assert "left as it is" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no results in it"):
        summary.main(["--results", str(tmp_path / "docs"), "--root", str(tmp_path)])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_kept_result_can_be_read(path):
    found = read_kept(path)
    assert (found is None) == (name_of(path) is None)
    assert found is None or found.problem or found.headlines


def test_every_benchmark_with_headlines_exists():
    assert all((RESULTS.parent / f"{name}.py").exists() for name in HEADLINES)
    assert set(whole_set.SET) <= set(HEADLINES)
    assert set(whole_set.QUICK) == set(whole_set.SET)
