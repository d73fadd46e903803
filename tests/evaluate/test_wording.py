import math

import pytest

from limbeck.evaluate.wording import count, duration, listing, memory, number, percent, ratio


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (24.1, "24.10"),
        (0.04567, "0.04567"),
        (1234567.8, "1,234,568"),
        (0, "0"),
        (0.00001234, "1.23e-05"),
        (-3.14159, "-3.142"),
        (9.9999, "10.00"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_number(value, words):
    assert number(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (999_999, "1.00 M"), (3.41e6, "3.41 M"), (2e15, "2.00 P")],
)
def test_count(value, words):
    assert count(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(512, "512 B"), (13_651_968, "13.7 MB"), (2.5e9, "2.50 GB"), (None, "–"), (9e18, "9,000 PB")]
)
def test_memory(value, words):
    assert memory(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0000004, "0.400 µs"),
        (0.00072, "720 µs"),
        (0.0315, "31.5 ms"),
        (71.2, "71.2 s"),
        (200, "3 min 20 s"),
        (7265, "2 h 1 min"),
        (0, "0 s"),
        (None, "–"),
    ],
)
def test_duration(value, words):
    assert duration(value) == words


def test_ratio_percent_and_listing():
    assert ratio(1.2345) == "×1.23"
    assert ratio(None) == "–"
    assert percent(0.713) == "71.3 %"
    assert percent(None) == "–"
    assert listing([512]) == "512"
    assert listing([512, 2048, 8192]) == "512, 2,048 and 8,192"
