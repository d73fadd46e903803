"""Figures of tasks: against sums by hand, and the verdicts of paired comparison."""

import math
import statistics

import pytest

from limbeck.core.errors import EvaluationError
from limbeck.evaluate.task_results import (
    by_place,
    chance_corrected,
    compare_items,
    group_facts,
    mean_difference,
    paired,
    task_facts,
    value_of,
)

RIGHT = [{"acc": float(value), "nats": 1.0 + number} for number, value in enumerate([1, 0, 1, 1, 0, 1, 1, 1])]
WRONG = [{"acc": 0.0, "nats": 4.0 + 1.5 * number} for number in range(8)]
PAGES = [
    {"nats": 3.0, "bytes": 4.0, "words": 1.0},
    {"nats": 5.0, "bytes": 10.0, "words": 2.0},
    {"nats": 1.0, "bytes": 2.0, "words": 1.0},
]


def test_accuracy_and_its_standard_error_by_hand():
    values = [item["acc"] for item in RIGHT]
    assert value_of(RIGHT, "acc") == pytest.approx((0.75, statistics.stdev(values) / math.sqrt(8)))
    assert value_of(RIGHT[:1], "acc") == (1.0, None)


def test_perplexity_by_the_delta_method():
    values = [item["nats"] for item in RIGHT]
    perplexity = math.exp(statistics.fmean(values))
    assert value_of(RIGHT, "perplexity") == pytest.approx(
        (perplexity, perplexity * statistics.stdev(values) / math.sqrt(8))
    )
    assert value_of([{"nats": 800.0}], "perplexity") == (math.inf, None)


def test_bits_per_byte_weigh_texts_by_their_length():
    value, error = value_of(PAGES, "bits_per_byte")
    assert value == pytest.approx(9 / 16 / math.log(2))
    residuals = [page["nats"] - 9 / 16 * page["bytes"] for page in PAGES]
    assert error == pytest.approx(math.sqrt(3 / 2 * sum(one**2 for one in residuals)) / 16 / math.log(2))
    assert value_of(PAGES, "word_perplexity")[0] == pytest.approx(math.exp(9 / 4))
    assert value_of(PAGES, "byte_perplexity")[0] == pytest.approx(math.exp(9 / 16))


def test_correction_for_chance():
    assert chance_corrected(0.25, 0.25) == 0
    assert chance_corrected(1.0, 0.25) == 1
    assert chance_corrected(0.1, 0.25) < 0
    assert chance_corrected(0.5, None) is None


def test_a_model_against_itself_is_a_tie():
    for metric in ("acc", "perplexity"):
        found = paired(RIGHT, RIGHT, metric)
        assert (found.value, found.standard_error, found.verdict) == (0, 0, "tie")


def test_pairs_by_hand_and_the_mirror():
    differences = [one["acc"] - other["acc"] for one, other in zip(RIGHT, WRONG, strict=True)]
    found, mirror = paired(RIGHT, WRONG, "acc"), paired(WRONG, RIGHT, "acc")
    assert found.value == pytest.approx(statistics.fmean(differences))
    assert found.standard_error == pytest.approx(statistics.stdev(differences) / math.sqrt(8))
    assert (found.verdict, mirror.verdict) == ("win", "lose")
    assert mirror.value == pytest.approx(-found.value)


def test_less_is_better_for_perplexity_and_bits():
    assert paired(RIGHT, WRONG, "perplexity").verdict == "win"
    pages = PAGES * 3
    worse = [page | {"nats": 1.3 * page["nats"]} for page in pages]
    assert paired(pages, worse, "bits_per_byte").verdict == "win"
    assert paired(worse, pages, "bits_per_byte").verdict == "lose"


def test_pairing_sees_what_two_errors_would_not():
    hard = [{"acc": 1.0, "nats": 10.0 * number} for number in range(20)]
    slightly = [{"acc": 1.0, "nats": 10.0 * number + 0.1 + 0.01 * (number % 3)} for number in range(20)]
    assert paired(hard, slightly, "perplexity").verdict == "win"
    apart = math.hypot(
        *(value_of(items, "perplexity")[1] / value_of(items, "perplexity")[0] for items in (hard, slightly))
    )
    assert apart > abs(paired(hard, slightly, "perplexity").value)


def test_two_standard_errors_are_asked_for():
    base = [{"acc": 0.0}] * 100
    few = [{"acc": float(number < 4)} for number in range(100)]
    more = [{"acc": float(number < 5)} for number in range(100)]
    assert [paired(items, base, "acc").verdict for items in (few, more)] == ["win", "win"]
    assert paired([{"acc": float(number < 3)} for number in range(100)], base, "acc").verdict == "tie"
    assert paired([{"acc": 1.0}], [{"acc": 0.0}], "acc").verdict == "tie", "one item proves nothing"
    assert [paired(RIGHT[2:4] * n, WRONG[2:4] * n, "acc").verdict for n in (3, 4)] == ["tie", "win"], "nor do six"


def test_other_items_cannot_be_compared():
    with pytest.raises(EvaluationError, match="the same items"):
        paired(RIGHT, WRONG[:3], "acc")
    with pytest.raises(EvaluationError, match="the same items"):
        paired(PAGES, [page | {"bytes": 7.0} for page in PAGES], "bits_per_byte")


def test_facts_of_a_task():
    facts = task_facts(
        metrics=["acc", "acc_norm"], items=[item | {"acc_norm": 1.0} for item in RIGHT], said={"acc": 0.75, "acc_norm": 1.0},
        said_errors={"acc": 0.2, "acc_norm": None}, higher_is_better={"acc": True}, chance=0.5,
    )  # fmt: skip
    assert facts["headline"] == "acc"
    assert facts["items"] == 8
    assert facts["metrics"]["acc"] == {
        "value": 0.75, "standard_error": 0.2, "higher_is_better": True, "chance": 0.5, "chance_corrected": 0.5,
    }  # fmt: skip
    assert facts["metrics"]["acc_norm"]["standard_error"] == 0.0
    for said in ({"acc": math.nan}, {"acc": math.inf}, {}):
        with pytest.raises(EvaluationError, match="acc is"):
            task_facts(metrics=["acc"], items=RIGHT, said=said, said_errors={}, higher_is_better={}, chance=0.5)


def _facts(value, error, items):
    metric = {"value": value, "standard_error": error, "chance": 0.5}
    return {"items": items, "metrics": {"acc": metric}}


def test_a_group_is_the_macro_average():
    facts = group_facts({"one": _facts(0.5, 0.03, 1000), "two": _facts(0.9, 0.04, 10)}, whole=67)
    assert facts["metrics"]["acc"]["value"] == pytest.approx(0.7)
    assert facts["metrics"]["acc"]["standard_error"] == pytest.approx(0.025)
    assert facts["metrics"]["acc"]["chance_corrected"] == pytest.approx(0.4)
    assert (facts["tasks"], facts["tasks_of_the_group"], facts["items"]) == (2, 67, 1010)
    assert group_facts({"one": _facts(0.5, None, 1)}, whole=1)["metrics"]["acc"]["standard_error"] is None


def test_the_difference_of_two_groups():
    found = mean_difference([paired(RIGHT, WRONG, "acc"), paired(WRONG, WRONG, "acc")])
    assert found.value == pytest.approx(0.375)
    assert found.standard_error == pytest.approx(paired(RIGHT, WRONG, "acc").standard_error / 2)
    assert found.verdict == "win"
    assert set(compare_items(RIGHT, WRONG, ["acc", "perplexity"])) == {"acc", "perplexity"}


def test_accuracy_by_depth():
    rows = [{"depth": 0.0}, {"depth": 1.0}, {"depth": 0.0}, {"depth": 1.0}]
    assert by_place(rows, RIGHT[:3], "depth") == {"0.0": 1.0, "1.0": 0.0}


def test_an_average_of_small_tasks_is_a_tie():
    right, wrong = [{"acc": 1.0}] * 2, [{"acc": 0.0}] * 2
    found = mean_difference([paired(right, wrong, "acc")] * 3)
    assert (found.value, found.verdict, found.items) == (1.0, "tie", 6)
    large = paired([{"acc": 1.0}] * 8, [{"acc": 0.0}] * 8, "acc")
    assert mean_difference([large] * 3).verdict == "win"
    assert mean_difference([large, large, paired(right, wrong, "acc")]).verdict == "tie"
