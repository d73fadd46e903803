"""Overlap with the training text: against a search without an index, and what counts as the same."""

import random

import pytest

from limbeck.evaluate.contamination import RUN_WORDS, OverlapIndex, contamination_facts, words_of

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def found(items, documents, **options):
    return OverlapIndex.build({"task": items}).touched(documents, **options)


def brute_force(items, documents, *, run_words=13, least_words=8):
    """Every run of every piece, looked for in the padded words of every document."""
    texts = [f" {' '.join(words_of(document))} " for document in documents]
    touched = set()
    for number, pieces in enumerate(items):
        for piece in pieces:
            words = words_of(piece)
            size = min(run_words, len(words))
            runs = (
                [words[start : start + size] for start in range(len(words) - size + 1)] if size >= least_words else []
            )
            if any(f" {' '.join(run)} " in text for run in runs for text in texts):
                touched.add(("task", number))
    return touched


def test_case_and_punctuation_do_not_count():
    assert words_of("Don't STOP -- the_cat's 'mat', 3.5!") == ["dont", "stop", "the", "cats", "mat", "3", "5"]
    spoken = "ONE, two; three... four 'five' six-seven (eight) nine ten eleven twelve: thirteen."
    assert found([(THIRTEEN,)], [f"before {spoken} after"]).items == {("task", 0)}


def test_thirteen_words_in_a_row_touch_and_twelve_do_not():
    longer = f"zero {THIRTEEN} fourteen"
    assert found([(longer,)], [THIRTEEN]).items == {("task", 0)}
    assert not found([(longer,)], [THIRTEEN.rsplit(" ", 1)[0]]).items
    assert not found([(longer,)], [THIRTEEN.replace("six", "sex")]).items


def test_short_pieces_count_whole_from_eight_words_on():
    eight, seven = " ".join(THIRTEEN.split()[:8]), " ".join(THIRTEEN.split()[:7])
    result = found([(eight,), (seven,), (seven, eight)], [f"a {eight} b"])
    assert result.items == {("task", 0), ("task", 2)}
    assert result.too_short == {("task", 1)}


def test_nothing_runs_across_pieces_or_documents():
    half = THIRTEEN.split()
    assert not found([(" ".join(half[:6]), " ".join(half[6:]))], [THIRTEEN]).items
    assert not found([(THIRTEEN,)], [" ".join(half[:6]), " ".join(half[6:])]).items


@pytest.mark.parametrize("seed", range(4))
def test_as_a_search_without_an_index(seed):
    draw = random.Random(seed)

    def sentence(most):
        return " ".join(draw.choice("ab") for _ in range(draw.randrange(most)))

    items = [tuple(sentence(20) for _ in range(draw.randrange(3))) for _ in range(60)]
    documents = [sentence(400) for _ in range(4)]
    result = found(items, documents)
    assert result.items == brute_force(items, documents)
    assert 0 < len(result.items) < 60 - len(result.too_short)


def test_the_cap_is_said():
    text = f"{'x ' * 100}{THIRTEEN}"
    whole, part = found([(THIRTEEN,)], [text, "more"]), found([(THIRTEEN,)], [text, "more"], most_characters=50)
    assert (whole.is_whole, whole.characters) == (True, len(text) + 4)
    assert (part.is_whole, part.characters, part.items) == (False, 50, set())
    assert not found([(THIRTEEN,)], [text, "more"], most_characters=len(text)).is_whole
    assert not found([(THIRTEEN,)], [text], most_characters=50).is_whole


def test_the_score_on_clean_items():
    touched = found([(THIRTEEN,), ("short",), ("other " * 9,), ("more " * 9,)], [THIRTEEN])
    items = [{"acc": 1.0}, {"acc": 0.0}, {"acc": 1.0}]
    facts = contamination_facts("task", items, "acc", touched)
    assert (facts["items"], facts["touched"], facts["too_short_to_tell"], facts["first_touched"]) == (3, 1, 1, [0])
    assert facts["share"] == pytest.approx(1 / 3)
    assert facts["clean_value"] == 0.5
    assert contamination_facts("task", items[:1], "acc", touched)["clean_value"] is None


def test_one_writing_of_a_letter_is_like_another_and_marks_do_not_cut_words():
    assert (
        words_of("na\u00efve Stra\u00dfe \ufb01ne")
        == words_of("NAI\u0308VE STRASSE fine")
        == ["na\u00efve", "strasse", "fine"]
    )
    assert words_of("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e") == [
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\u092d\u093e\u0937\u093e",
    ]
    assert words_of("x_y 3.14 \u65e5\u672c\u8a9e\u3002") == ["x", "y", "3", "14", "\u65e5\u672c\u8a9e"]
    composed = " ".join(f"caf\u00e9{number}" for number in range(RUN_WORDS))
    found = OverlapIndex.build({"t": [(composed,)]}).touched([composed.replace("\u00e9", "e\u0301")])
    assert found.items == {("t", 0)}
