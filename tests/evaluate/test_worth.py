"""Was the teacher worth it: the interval by hand."""

import math

import pytest

from limbeck.evaluate.worth import teacher_worth


def test_one_seed_has_the_interval_of_its_blocks():
    worth = teacher_worth("from_scratch", [0.10], [0.02])
    assert (worth.nats, worth.low, worth.high) == pytest.approx((0.10, 0.10 - 0.0392, 0.10 + 0.0392))
    assert (worth.seeds, worth.answer, worth.control) == (1, "yes", "from_scratch")
    assert "one seed" in worth.method


def test_several_seeds_have_the_interval_of_students_t():
    # Mean 0.2, standard deviation 0.1, and 4.303 is the quantile of two degrees of freedom.
    worth = teacher_worth("from_scratch", [0.1, 0.2, 0.3], [9.0, 9.0, 9.0])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (worth.nats, worth.low, worth.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert worth.answer == "unclear"
    two = teacher_worth("from_scratch", [-0.30, -0.32], [0.0, 0.0])
    half = 12.706 * 0.02 / math.sqrt(2) / math.sqrt(2)
    assert (two.low, two.high) == pytest.approx((-0.31 - half, -0.31 + half))
    assert two.answer == "no"
    many = teacher_worth("from_scratch", [0.0, 1.0] * 16, [None] * 32)
    assert many.high - many.nats == pytest.approx(1.96 * math.sqrt(8 / 31) / math.sqrt(32))


@pytest.mark.parametrize("nats", [0.1, -0.1])
def test_a_single_block_of_one_seed_answers_nothing(nats):
    worth = teacher_worth("from_scratch", [nats], [None])
    assert (worth.nats, worth.low, worth.high, worth.answer) == (nats, None, None, "unclear")


def test_nothing_to_compare_is_refused():
    for differences, errors in (([], []), ([0.1], [])):
        with pytest.raises(ValueError, match="one standard error are needed"):
            teacher_worth("from_scratch", differences, errors)
