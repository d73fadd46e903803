"""The commands of the target store, as a person types them."""

import importlib.util
import json
import sys

import pytest
from tests import tiny
from typer.testing import CliRunner

from limbeck.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-store")
    text = tiny.write_text(folder / "text.jsonl")
    teacher = tiny.make_teacher(folder / "teacher", text)
    words = tiny.recipe(teacher, text).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(json.dumps(words))  # YAML holds JSON
    return folder


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + result.stderr
    return result


def capture(place, name, *overrides):
    return call("capture", place / "recipe.yaml", *overrides, "--store", place / name, "--json")


def test_capture_inspect_verify_and_merge(place):
    facts = json.loads(capture(place, "one", "capture.k=4", "capture.tokens=640", "capture.rows_per_shard=8").stdout)
    assert facts["finished"]
    assert facts["tokens"] == 640
    assert facts["fidelity"]["top1_agreement"] == 1
    again = json.loads(capture(place, "one", "capture.k=4", "capture.tokens=640", "capture.rows_per_shard=8").stdout)
    assert (again["new_rows"], again["rows"]) == (0, facts["rows"])
    assert json.loads(call("store", "inspect", place / "one", "--json").stdout)["rows"] == facts["rows"]
    verified = json.loads(call("store", "verify", place / "one", "--teacher", place / "teacher", "--json").stdout)
    assert verified["problems"] == []
    assert verified["fidelity"]["mean_kl_nats"] < 1e-4
    capture(place, "two", "capture.k=4", "capture.tokens=1280", "capture.rows_per_shard=8")
    merged = json.loads(call("store", "merge", place / "one", place / "two", "--into", place / "both", "--json").stdout)
    assert (merged["rows"], merged["duplicates"]) == (40, 20)
    assert "sound" in call("store", "verify", place / "both").stdout


def test_faults_end_with_2_and_one_message(place):
    capture(place, "hurt", "capture.k=4", "capture.tokens=320")
    shard = next((place / "hurt").rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "truncated" in call("store", "verify", place / "hurt", code=2).stdout
    assert "Traceback" not in call("store", "inspect", place / "nowhere", code=2).stderr
    stage = "stages=[{kind: distil, tokens: 320, batch_tokens: 320, learning_rate: 1e-3}]"
    words = [f"teacher={{store: {place / 'nowhere'}}}", "student={source: embedded}", stage]
    result = call("run", place / "recipe.yaml", *words, "controls={}", "--run-folder", place / "run", code=2)
    assert "not a target store" in result.stderr
    result = call("capture", place / "recipe.yaml", "teacher={itself: {}}", "student={source: x}", "stages=[]", code=2)
    assert "stages" in result.stderr


def test_capture_on_a_cluster_needs_ray(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = call("capture", place / "recipe.yaml", "capture.ray={workers: 2}", "--store", place / "none", code=2)
    assert "pip install 'limbeck[ray]'" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_cluster_writes_the_store_that_one_process_writes(place):
    words = ("capture.k=4", "capture.tokens=640", "capture.rows_per_shard=8", "capture.hidden_layers=[1]")
    capture(place, "alone", *words)
    capture(place, "together", *words, "capture.ray={workers: 2}")
    for shard in sorted((place / "alone").rglob("*.parquet")):
        assert (place / "together" / shard.relative_to(place / "alone")).read_bytes() == shard.read_bytes()
