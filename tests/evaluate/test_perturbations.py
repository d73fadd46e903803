"""Spoilt text: pure in text, rate and seed; touching what it says, as often as it says."""

import random
from pathlib import Path

import pytest

from limbeck.core.errors import DataError
from limbeck.evaluate.perturbations import PERTURBATIONS, perturb
from limbeck.models.symbol_streams import text_to_bytes

TEXT = "The quick brown Fox\njumps over 13 lazy dogs; naïve café 日本語 🙂 \0 end. " * 40
BROKEN = b"ok \xff\xfe \xe2\x82 \xc3\xa9 end".decode("utf-8", errors="surrogateescape")


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_is_a_function_of_text_rate_and_seed(name):
    low, middle, high = PERTURBATIONS[name].rates
    assert 0 < low < middle < high <= 1
    assert perturb(TEXT, name, rate=0.0, seed=3) == TEXT
    assert perturb(TEXT, name, rate=middle, seed=3) == perturb(TEXT, name, rate=middle, seed=3) != TEXT
    assert perturb(TEXT, name, rate=low, seed=3) != perturb(TEXT, name, rate=low, seed=4)
    random.seed(0)
    before = random.getstate()
    perturb(TEXT, name, rate=high, seed=5)
    assert random.getstate() == before
    assert perturb("", name, rate=1.0, seed=0) == ""


@pytest.mark.parametrize("name", [name for name in PERTURBATIONS if name != "raw_bytes"])
def test_all_but_raw_bytes_stay_utf8(name):
    for rate in (*PERTURBATIONS[name].rates, 1.0):
        perturb(TEXT, name, rate=rate, seed=1).encode("utf-8")


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_broken_text_is_taken_too(name):
    for text in (BROKEN, "lone \ud800 surrogate", "\0", "🙂"):
        text_to_bytes(perturb(text, name, rate=1.0, seed=1))


def test_rates_are_probabilities_of_a_touch():
    letters = "abcdefghij" * 2000
    for name in ("substitute", "random_case", "raw_bytes"):
        spoilt = perturb(letters, name, rate=0.1, seed=0)
        data, clean = text_to_bytes(spoilt), letters.encode()
        touched = sum(one != other for one, other in zip(data, clean, strict=True))
        assert 1800 < touched < 2200, name  # 2000 expected, standard deviation 42
    assert 17_800 < len(perturb(letters, "delete", rate=0.1, seed=0)) < 18_200
    assert 21_800 < len(perturb(letters, "insert", rate=0.1, seed=0)) < 22_200


def test_full_rates_by_hand():
    assert perturb("Straße Ab", "upper", rate=1.0, seed=0) == "STRASSE AB"
    assert perturb("The END", "lower", rate=1.0, seed=0) == "the end"
    assert perturb("aB é", "random_case", rate=1.0, seed=0) == "Ab É"
    assert perturb("Shchuka xylo, zhuk 7", "cyrillic", rate=1.0, seed=0) == "Щука ксйло, жук 7"
    assert perturb("A 1!", "full_width", rate=1.0, seed=0) == "\uff21 \uff11\uff01"
    assert perturb("Pacey z", "homoglyphs", rate=1.0, seed=0) == "\u0420\u0430\u0441\u0435\u0443 z"
    assert perturb("é日", "delete", rate=1.0, seed=0) == "é日"
    assert perturb("ab", "delete", rate=1.0, seed=0) == ""
    spaces = perturb("a b" * 200, "white_space", rate=1.0, seed=0)
    assert set(spaces.replace("  ", "_")) == {"a", "b", "_", "\t", "\n"}


def test_typos_are_slips_of_neighbouring_fingers():
    assert {perturb("d", "typos", rate=1.0, seed=seed) for seed in range(300)} == {*"sferxc", "dd", ""}
    assert {perturb("Q", "typos", rate=1.0, seed=seed) for seed in range(300)} == {*"WA", "QQ", ""}
    assert "od!" in {perturb("dog!", "typos", rate=1.0, seed=seed) for seed in range(300)}
    assert perturb("日 12", "typos", rate=1.0, seed=0) == "日 12"


def test_what_cannot_be_done_is_refused():
    with pytest.raises(DataError, match='Did you mean "typos"'):
        perturb("a", "typo", rate=0.1, seed=0)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            perturb("a", "upper", rate=rate, seed=0)


def test_the_page_tells_what_there_is():
    page = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text(encoding="utf-8")
    for name, kind in PERTURBATIONS.items():
        rates = ", ".join(f"{rate:g}" for rate in kind.rates)
        assert f"| `{name}` | {kind.about} | {rates} |" in page
