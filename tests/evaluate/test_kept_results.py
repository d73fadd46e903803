"""Results that are kept: read again as they were, and nothing is believed that does not agree with itself."""

import json
import math

import pytest

from limbeck.core.errors import EvaluationError
from limbeck.evaluate.kept_results import read_result, write_result

SCORE = {
    "task": "lambada_openai", "version": "1.0", "metrics": {"acc": 0.5, "perplexity": math.exp(1.5)},
    "standard_errors": {"acc": 0.5, "perplexity": None}, "higher_is_better": {"acc": True, "perplexity": False}, "seconds": 0.1,
    "items": [{"acc": 1.0, "nats": 1.0}, {"acc": 0.0, "nats": 2.0}], "notes": [],
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    write_result(tmp_path / "a.json", SCORE, key="k")
    return tmp_path / "a.json"


def test_what_is_kept_is_read_again(file):
    assert read_result(file, "k") == SCORE | {"key": "k"}
    assert read_result(file, "another") is None
    assert read_result(file.with_name("none.json"), "k") is None


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {}},
        {"metrics": {"acc": math.nan}},
        {"metrics": {"acc": math.inf}},
        {"metrics": {"acc": "0.5"}},
        {"metrics": {"acc": 10**400}},
        {"metrics": {"acc": 0.75}},  # not what the items give
        {"metrics": {"acc_norm": 0.5}},
        {"metrics": 5},
        {"items": {}},
        {"items": {"acc": []}},
        {"items": {"acc": ["x", "y"], "nats": [1.0, 2.0]}},
        {"items": {"acc": [1.0, 1.0], "nats": [1.0, 2.0]}},
        {"items": {"acc": [1.0], "nats": [1.0, 2.0]}},
        {"standard_errors": None},
        {"standard_errors": {"acc": "much"}},
        {"higher_is_better": None},
        {"version": {"a": 1}},
        {"seconds": "<b>"},
        {"key": 3},
    ],
)
def test_what_was_tampered_with_is_as_if_it_were_not_there(file, change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert read_result(file, "k") is None


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 100_000, b"\xff\x00", b'{"key": "k"}', b'{"key": "k", "items": {"a": [1]}}']
)
def test_what_is_damaged_is_as_if_it_were_not_there(file, content):
    file.write_bytes(content)
    assert read_result(file, "k") is None


def test_what_is_no_number_is_not_kept(tmp_path):
    with pytest.raises(EvaluationError, match="no numbers"):
        write_result(tmp_path / "a.json", SCORE | {"seconds": math.nan}, key="k")
