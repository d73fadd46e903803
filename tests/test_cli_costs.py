"""The efficiency command, as a person types it."""

import json
import shutil

import pytest
from tests import tiny
from typer.testing import CliRunner

from limbeck import costing
from limbeck.cli import app
from limbeck.evaluate.energy import EnergyMeter
from limbeck.models.flops import forward_flops_per_token

QUICK = ["--context", 12, "--context", 24, "--batch", 1, "--batch", 2, "--repeats", 2, "--decode-tokens", 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-costs")
    text = tiny.write_text(folder / "text.jsonl", documents=120)
    tiny.make_teacher(folder / "one", text, train_steps=20)
    tiny.make_teacher(folder / "two", text, family="gpt2")
    make_byte_model(folder / "bytes")
    return folder


def make_byte_model(folder):
    from limbeck.models.byte_pool import BytePoolConfig, BytePoolForCausalLM
    from limbeck.models.byte_tokenizer import ByteTokenizer

    settings = {"width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "qk_norm": False, "residual_scalars": False}
    BytePoolForCausalLM(BytePoolConfig(trunk=settings, patch_bytes=16)).save_pretrained(folder)
    ByteTokenizer("space", patch_bytes=16).save_pretrained(folder)


def call(*words, code=0):
    result = CliRunner().invoke(app, ["efficiency", *(str(word) for word in words)])
    assert result.exit_code == code, result.output + result.stderr
    return result


def rows_of(facts, place):
    return {(row["context"], row["batch"]): row for row in facts["rows"] if row["place"] == str(place)}


def test_models_with_the_same_tokens(place, tmp_path):
    words = [place / "one", place / "two", "--text", place / "text.jsonl", "--out", tmp_path / "new" / "out"]
    facts = json.loads(call(*words, *QUICK, "--json").stdout)
    one, two = facts["models"]
    assert one["parameters"] * 4 == one["parameter_bytes"] == one["shipped_bytes"]["float32"]
    assert one["folder_bytes"] == sum(file.stat().st_size for file in (place / "one").iterdir())
    assert 0 < one["bits_per_byte"] < two["bits_per_byte"]  # only the first has learned
    rows = rows_of(facts, place / "one")
    assert list(rows) == [(12, 1), (12, 2), (24, 1), (24, 2)]
    model = costing.open_place(str(place / "one"), device="cpu").model
    for (context, batch), row in rows.items():
        assert row["tokens"] == context
        assert row["forward_flops_per_token"] == forward_flops_per_token(model, context)
        assert row["forward_flops_per_byte"] == pytest.approx(row["forward_flops_per_token"] / one["bytes_per_token"])
        assert row["prefill_tokens_per_second"] == pytest.approx(batch * context / row["prefill_seconds"])
        slowest, fastest = row["prefill_bytes_per_second_range"]
        assert slowest <= row["prefill_bytes_per_second"] <= fastest
        assert row["decode_tokens_per_second"] == pytest.approx(batch / row["decode_seconds"])
        assert row["running_bytes"] == row["peak_memory_bytes"] + one["parameter_bytes"]
        assert row["cache_bytes"] == batch * (context + 2) * 2 * 2 * 32 * 4
    assert rows[12, 1]["forward_flops_per_token"] < rows[24, 1]["forward_flops_per_token"]  # the quadratic part
    files = {file.name for file in (tmp_path / "new" / "out").iterdir()}
    costs = ("parameters", "bytes-shipped", "flops", "prefill", "decode", "memory")
    assert files == {"efficiency.json", "efficiency.md"} | {f"bits-per-byte-vs-{cost}.svg" for cost in costs}
    assert json.loads((tmp_path / "new" / "out" / "efficiency.json").read_text()) == facts
    text = (tmp_path / "new" / "out" / "efficiency.md").read_text()
    assert all(f"]({name})" in text for name in files if name.endswith("svg"))
    assert "## Pareto fronts" in text


def test_models_with_other_tokens_are_compared_by_the_byte(place):
    facts = json.loads(call(place / "one", place / "bytes", "--text", place / "text.jsonl", *QUICK, "--json").stdout)
    assert facts["protocol"]["by_byte"]
    tokens, symbols = (rows_of(facts, place / name)[24, 2] for name in ("one", "bytes"))
    assert symbols["tokens"] > tokens["tokens"] == 24
    assert symbols["text_bytes"] == pytest.approx(tokens["text_bytes"], rel=0.3)
    of_bytes = facts["models"][1]["bytes_per_token"]
    assert symbols["decode_bytes_per_second"] == pytest.approx(symbols["decode_tokens_per_second"] * of_bytes)
    assert {front["cost"] for front in facts["fronts"]} >= {"forward_flops_per_byte", "decode_bytes_per_second"}


def test_it_speaks_to_people_and_without_a_text_there_is_no_quality(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(costing, "find_meter", lambda _device: "not reported by this machine (none)")
    shown = call(
        place / "two", "--context", 400, "--context", 8, "--batch", 1, "--repeats", 1, "--decode-tokens", 1
    ).stdout
    assert "skipped, its learned positions end at 256 tokens" in shown
    assert "Energy: not reported by this machine (none)." in shown
    assert "Quality: not measured" in shown
    assert "Prefill tokens/s" in shown
    assert "Pareto" not in shown


def test_a_bytes_model_shows_bytes(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    words = [place / "bytes", "--context", 8, "--batch", 1, "--repeats", 1, "--decode-tokens", 1]
    assert "Decode bytes/s" in call(*words).stdout


def test_energy_that_is_reported_is_shown(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    counter = iter(range(10**6))
    meter = EnergyMeter("a made-up counter", lambda: [float(next(counter))], [None], 0.0)
    monkeypatch.setattr(costing, "find_meter", lambda _device: meter)
    words = [place / "one", "--context", 8, "--batch", 2, "--repeats", 1, "--decode-tokens", 4]
    row = json.loads(call(*words, "--json").stdout)["rows"][0]
    assert row["decode_joules_per_token"] == pytest.approx(1 / 8)
    assert row["prefill_joules_per_byte"] == pytest.approx(row["prefill_joules_per_token"] * 8 / row["text_bytes"])
    shown = call(*words).stdout
    assert "Decode J/token" in shown
    assert "Energy: a made-up counter." in shown


def test_a_runs_own_text_and_its_accuracies_are_used(place, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(place / "one", run / "model")
    recipe = tiny.recipe(place / "two", place / "text.jsonl").model_dump(mode="json")
    (run / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(costing, "model_fingerprint", lambda loaded: loaded.source.split("/")[-1])
    facts = {"items": 5, "headline": "acc", "group": "sciq"}
    for name, value in (("model", 0.75), ("two", 0.5)):
        content = {"fingerprint": name, "tasks": {"sciq": facts | {"metrics": {"acc": {"value": value}}}}}
        (run / "evaluation" / "tasks").mkdir(parents=True, exist_ok=True)
        (run / "evaluation" / "tasks" / f"{name}.json").write_text(json.dumps(content))
    words = [run, place / "two", "--context", 8, "--batch", 1, "--repeats", 1, "--decode-tokens", 1]
    found = json.loads(call(*words, "--out", tmp_path / "out", "--json").stdout)
    assert [model["accuracy"] for model in found["models"]] == [0.75, 0.5]
    assert found["protocol"]["tasks"] == ["sciq (5 items)"]
    assert found["protocol"]["text"] == [f"{place / 'text.jsonl'} (heldout)"]
    assert found["models"][0]["folder_bytes"] == sum(file.stat().st_size for file in (run / "model").iterdir())
    assert (tmp_path / "out" / "accuracy-vs-parameters.svg").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ONE", "ONE"], "named twice"),
        (["nowhere/at/all"], "no folder"),
        (["ONE", "--text", "EMPTY"], "no text to measure with"),
        (["ONE", "--text", "nowhere.txt"], "no such file"),
        (["ONE", "--out", "TEXT"], "is a file"),
        (["ONE", "--out", "TEXT/below"], "is a file"),
        (["ONE", "--context", "0"], "--context"),
        (["ONE", "--batch", "0"], "--batch"),
        ([], "PLACE"),
    ],
)
def test_bad_words_end_with_2_and_one_message(place, words, said):
    (place / "empty.txt").write_text("")
    known = {"ONE": place / "one", "TEXT": place / "text.jsonl", "EMPTY": place / "empty.txt"}
    known["TEXT/below"] = place / "text.jsonl" / "below"
    result = call(*(known.get(word, word) for word in words), code=2)
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_numbers_below_one_are_refused_from_python(place):
    with pytest.raises(costing.DataError, match="repeats is 0"):
        costing.measure_places([str(place / "one")], repeats=0)
    with pytest.raises(costing.DataError, match="context is missing"):
        costing.measure_places([str(place / "one")], contexts=[])
