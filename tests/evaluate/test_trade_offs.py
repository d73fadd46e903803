"""Fronts of measured models, the accuracies they may use, and their figures."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from limbeck.core.errors import CheckpointError, EvaluationError
from limbeck.evaluate import cost_tables
from limbeck.evaluate.cost_figures import draw_trade_off
from limbeck.evaluate.kept_accuracies import mean_accuracies, read_accuracies
from limbeck.evaluate.trade_offs import to_draw, trade_offs

MODELS = [
    {"place": "a", "parameters": 10, "folder_bytes": 50, "bits_per_byte": 2.0, "accuracy": None},
    {"place": "b", "parameters": 20, "folder_bytes": None, "bits_per_byte": 1.5, "accuracy": 0.5},
    {"place": "c", "parameters": 30, "folder_bytes": 40, "bits_per_byte": 1.7, "accuracy": 0.25},
]


def row(place, context, batch, speed, **changes):
    return {
        "place": place, "context": context, "batch": batch, "forward_flops_per_token": context * speed,
        "forward_flops_per_byte": None, "prefill_tokens_per_second": speed, "prefill_tokens_per_second_range": [speed - 1, speed + 1],
        "decode_tokens_per_second": None, "running_bytes": 7,
    } | changes  # fmt: skip


ROWS = [
    row(place, context, batch, speed)
    for context in (8, 64)
    for batch in (1, 4)
    for place, speed in (("a", 30.0), ("b", 10.0), ("c", 20.0))
]


def found_by(quality, cost, rows=ROWS):
    everything = trade_offs(MODELS, rows, by_byte=False)
    return [one for one in everything if (one.quality.key, one.cost.key) == (quality, cost)]


def test_fronts_by_hand():
    (parameters,) = found_by("bits_per_byte", "parameters")
    assert parameters.points == {"a": (10, 2.0), "b": (20, 1.5), "c": (30, 1.7)}
    assert parameters.front == ["a", "b"]
    assert (parameters.context, parameters.batch) == (None, None)
    (shipped,) = found_by("bits_per_byte", "folder_bytes")
    assert shipped.front == ["c"]  # b's folder is not known
    speeds = found_by("bits_per_byte", "prefill_tokens_per_second")
    assert [(one.context, one.batch) for one in speeds] == [(8, 1), (8, 4), (64, 1), (64, 4)]
    assert all(one.front == ["a", "b", "c"] for one in speeds)
    assert speeds[0].spreads["a"] == (29.0, 31.0)
    assert [one.front for one in found_by("accuracy", "parameters")] == [["b"]]


def test_what_is_counted_is_shown_once_for_all_batches():
    assert [(one.context, one.batch) for one in found_by("bits_per_byte", "forward_flops_per_token")] == [
        (8, None),
        (64, None),
    ]


def test_ties_stay_and_what_was_not_measured_is_left_out():
    (memory, *_) = found_by("bits_per_byte", "running_bytes")
    assert memory.front == ["b"]
    assert found_by("bits_per_byte", "decode_tokens_per_second") == []
    skipped = [one | ({"running_bytes": None} if one["place"] == "b" else {}) for one in ROWS]
    assert found_by("bits_per_byte", "running_bytes", skipped)[0].front == ["c"]


def test_no_number_is_no_trade_off():
    with pytest.raises(EvaluationError, match="nan"):
        found_by("bits_per_byte", "running_bytes", [one | {"running_bytes": math.nan} for one in ROWS])


def test_what_is_drawn_is_where_most_were_measured_then_the_longest_context_alone():
    longest = [
        one | ({"prefill_tokens_per_second": None} if (one["place"], one["context"]) == ("a", 64) else {})
        for one in ROWS
    ]
    drawn = {(one.quality.key, one.cost.key): one for one in to_draw(trade_offs(MODELS, ROWS, by_byte=False))}
    one = drawn["bits_per_byte", "prefill_tokens_per_second"]
    assert (one.context, one.batch) == (64, 1)
    drawn = {(one.quality.key, one.cost.key): one for one in to_draw(trade_offs(MODELS, longest, by_byte=False))}
    assert drawn["bits_per_byte", "prefill_tokens_per_second"].context == 8


def test_a_figure_stands_alone_and_is_the_same_each_time():
    names = {"a": "first <one>", "b": "second & last", "c": "third"}
    drawn = {one.cost.key: one for one in to_draw(trade_offs(MODELS, ROWS, by_byte=False))}
    for one in (drawn["parameters"], drawn["prefill_tokens_per_second"]):
        text = draw_trade_off(one, names)
        assert text == draw_trade_off(one, names)
        root = ElementTree.fromstring(text)
        said = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
        assert all(names[place] in said for place in one.points)
        assert one.cost.words in said
        assert "--series-1: #" in text
        assert "prefers-color-scheme: dark" in text
        assert "script" not in text


def test_many_models_have_marks_of_their_own():
    models = [{"place": f"m{n}", "parameters": n + 1, "bits_per_byte": 1 / (n + 1)} for n in range(16)]
    (one,) = trade_offs(models, [], by_byte=False)
    assert len(one.front) == 16
    text = draw_trade_off(one, {model["place"]: f"model number {model['place']}" for model in models})
    assert text.count("model number") >= 16


def test_a_table_of_fronts_only_where_there_are_some():
    assert cost_tables.fronts_table([]) is None
    table = cost_tables.fronts_table(found_by("bits_per_byte", "parameters"))
    assert table.rows == [["bits per byte", "parameters", "–", "–", "a, b"]]


def task(group, value, *, items=10, headline="acc"):
    return {"group": group, "items": items, "headline": headline, "metrics": {headline: {"value": value}}}


def test_accuracies_by_hand(tmp_path):
    one = {
        "fingerprint": "x",
        "tasks": {"sciq": task("sciq", 0.5), "p": task("blimp", 0.9), "w": task("w", 1.3, headline="bits_per_byte")},
        "groups": {"blimp": {"items": 20, "headline": "acc", "metrics": {"acc": {"value": 0.75}}}},
    }
    other = {"fingerprint": "y", "tasks": {"sciq": task("sciq", 0.25), "boolq": task("boolq", 1.0)}, "groups": {}}
    fewer = {"fingerprint": "y", "tasks": {"sciq": task("sciq", 0.9, items=3)}}
    contents = {"a": one, "comparison": {"places": {"y": other}}, "fewer": fewer, "else": {"kept": 1}, "list": [1]}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = read_accuracies(sorted(tmp_path.glob("*.json")))
    assert {key[:2]: value for key, value in found["x"].items()} == {("sciq", 10): 0.5, ("blimp", 20): 0.75}
    assert {key[:2]: value for key, value in found["y"].items()} == {
        ("sciq", 10): 0.25,
        ("boolq", 10): 1.0,
        ("sciq", 3): 0.9,
    }
    assert mean_accuracies(found) == ({"x": 0.5, "y": 0.25}, ["sciq (10 items)"])
    assert mean_accuracies({"x": found["x"]})[0] == {"x": 0.625}
    assert mean_accuracies({"x": found["x"], "z": {("boolq", 3, ""): 1.0}}) == ({}, [])
    assert mean_accuracies({}) == ({}, [])


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        ({}, True),
        ({"data_sha256": "b"}, False),  # as many items of another split
        ({"version": "2.0"}, False),
        ({"lm_eval": "0.4.11"}, False),
    ],
)
def test_only_the_same_items_asked_the_same_way_are_set_beside_each_other(tmp_path, other, is_same):
    for fingerprint, words in (("x", {}), ("y", other)):
        one = task("sciq", 0.5) | {"data_sha256": "a", "version": "1.0"} | words
        content = {"fingerprint": fingerprint, "lm_eval": words.get("lm_eval", "0.4.13"), "tasks": {"sciq": one}}
        (tmp_path / f"{fingerprint}.json").write_text(json.dumps(content))
    means, tasks = mean_accuracies(read_accuracies(sorted(tmp_path.glob("*.json"))))
    assert (means, tasks) == (({"x": 0.5, "y": 0.5}, ["sciq (10 items)"]) if is_same else ({}, []))


def test_an_average_over_other_members_of_a_group_is_another_figure_and_a_task_counts_once(tmp_path):
    for fingerprint, member in (("x", "p"), ("y", "q")):
        mean = {"items": 20, "headline": "acc", "metrics": {"acc": {"value": 0.75}}}
        tasks = {member: task("blimp", 0.9), "r": task("blimp", 0.6)}
        content = {"fingerprint": fingerprint, "tasks": tasks, "groups": {"blimp": mean}}
        (tmp_path / f"{fingerprint}.json").write_text(json.dumps(content))
        for items in (3, 30):
            few = {"fingerprint": fingerprint, "tasks": {"sciq": task("sciq", items / 100, items=items)}}
            (tmp_path / f"{fingerprint}-{items}.json").write_text(json.dumps(few))
    means, tasks = mean_accuracies(read_accuracies(sorted(tmp_path.glob("*.json"))))
    assert (means, tasks) == ({"x": 0.3, "y": 0.3}, ["sciq (30 items)"])


@pytest.mark.parametrize(
    "content", ['{"fingerprint": "x", "tasks": {"a": {}}}', '{"places": {"a": 3}}', '{"places"', '{"places": []}']
)
def test_a_damaged_result_is_named(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"bad\.json"):
        read_accuracies([tmp_path / "bad.json"])
