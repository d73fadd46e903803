"""The judging commands, as a person types them."""

import json

import pytest
from tests import tiny
from typer.testing import CliRunner

from limbeck.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-judge")
    text = tiny.write_text(folder / "text.jsonl", documents=40)
    tiny.make_teacher(folder / "one", text, train_steps=20)
    tiny.make_teacher(folder / "two", text, family="llama")
    return folder


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + result.stderr
    return result


def test_robustness_sets_models_beside_each_other(place):
    words = [place / "one", place / "two", "--text", place / "text.jsonl", "--max-bytes", 400, "--seeds", 2]
    words += ["--perturbation", "typos", "--perturbation", "raw_bytes", "--level", 3, "--context-bytes", 64]
    facts = json.loads(call("robustness", *words, "--json").stdout)
    names = [str(place / "one"), str(place / "two")]
    assert [row["perturbation"] for row in facts["rows"]] == ["typos", "raw_bytes"]
    assert list(facts["clean"]) == list(facts["rows"][0]["models"]) == names
    assert facts["protocol"]["bytes"] == 400
    assert facts["protocol"]["seeds"] == [0, 1]
    typos = facts["rows"][0]["models"]
    assert typos[names[0]]["ratio"] > 1  # it has learned the text; noise costs it
    assert 1 < facts["mean_ratio"][names[0]] == typos[names[0]]["ratio"]
    assert "not UTF-8" in facts["rows"][1]["models"][names[0]]["unreadable"]


def test_robustness_speaks_to_people(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    words = [place / "one", "--text", place / "text.jsonl", "--max-bytes", 200, "--seeds", 2, "--context-bytes", 64]
    shown = call("robustness", *words, "--perturbation", "lower", "--perturbation", "raw_bytes", "--level", 3).stdout
    assert "clean" in shown
    assert "(x" in shown
    assert "mean ratio to clean" in shown
    assert "no figure for raw_bytes: not UTF-8" in shown
    assert "spread over seeds" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which text to spoil"),
        (["--text", "TEXT", "--perturbation", "typo"], 'Did you mean "typos"'),
        (["--text", "EMPTY"], "the text is empty"),
        (["--text", "TEXT", "--level", "4"], "level"),
        (["--text", "nowhere.txt"], "no such file"),
    ],
)
def test_bad_words_end_with_2_and_one_message(place, words, said):
    (place / "empty.txt").write_text("")
    given = [{"TEXT": place / "text.jsonl", "EMPTY": place / "empty.txt"}.get(word, word) for word in words]
    result = call("robustness", place / "one", *given, code=2)
    assert said in result.stderr
    assert "Traceback" not in result.output
