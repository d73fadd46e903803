"""The probes: right by construction, the same everywhere, and fair to whoever guesses."""

import re

import pytest

from limbeck.evaluate.probes import MQAR_PAIRS, PASSKEY_DEPTHS, PASSKEY_WORDS, probe_items, probe_names


@pytest.mark.parametrize("name", probe_names())
def test_the_same_name_and_seed_give_the_same_rows(name):
    one = probe_items(name)
    assert one == probe_items(name)
    assert one.sha256 != probe_items(name, seed=1).sha256
    assert len({row["context"] for row in one.rows}) == len(one.rows)


def test_the_rows_are_those_that_were_published():
    """A change of these sums changes every figure that people have: raise the version of the task then."""
    assert probe_items("mqar_4").sha256.startswith("e3c9f65a13519fb9")
    assert probe_items("passkey_64").sha256.startswith("d5bc189871e04806")


@pytest.mark.parametrize("pairs", MQAR_PAIRS)
def test_the_right_value_stands_beside_the_key(pairs):
    for row in probe_items(f"mqar_{pairs}").rows:
        *told, asked = row["context"].split("\n")
        said = dict(line.split(": ") for line in told)
        key = asked.removesuffix(":")
        assert len(said) == pairs
        assert said[key] == row["choices"][row["answer"]]
        assert [line for line in told[pairs:] if line.startswith(f"{key}:")] == [], "a key is asked once"
        answered = {line.split(": ")[1] for line in told[pairs:]}
        assert sorted(row["choices"]) == sorted(set(said.values()) - answered)


def test_a_guess_that_does_not_look_at_the_key_has_chance():
    """Taking the first choice, or the value said last, is right as often as chance says."""
    for name in ("mqar_4", "mqar_8"):
        rows = [row for seed in range(20) for row in probe_items(name, seed=seed).rows]
        chance = sum(1 / len(row["choices"]) for row in rows) / len(rows)
        for guess in (0, -1):
            right = sum(row["answer"] == guess % len(row["choices"]) for row in rows) / len(rows)
            assert right == pytest.approx(chance, abs=4 * (chance * (1 - chance) / len(rows)) ** 0.5)
        assert probe_items(name).chance() == pytest.approx(chance)


@pytest.mark.parametrize("words", PASSKEY_WORDS)
def test_the_number_is_hidden_at_its_depth(words):
    rows = probe_items(f"passkey_{words}").rows
    assert {row["depth"] for row in rows[: len(PASSKEY_DEPTHS)]} == set(PASSKEY_DEPTHS), "a limit still sees all depths"
    for row in rows:
        number = row["choices"][row["answer"]]
        assert set(re.findall(r"\d+", row["context"])) == {number}
        assert len(set(row["choices"])) == len(row["choices"]) == 5
        length = len(row["context"].split())
        assert words <= length <= words + 12
        place = row["context"].index(number) / len(row["context"])
        assert abs(place - row["depth"]) < 0.1 + 20 / words
    assert probe_items(f"passkey_{words}").chance() == 0.2
