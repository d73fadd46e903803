"""Which layer learns from which."""

import pytest

from limbeck.core.errors import RecipeError
from limbeck.models.layer_maps import layer_map


@pytest.mark.parametrize(
    ("words", "student", "teacher", "expected"),
    [
        ("all", 4, 4, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ("all", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("all", 3, 8, [(1, 3), (2, 5), (3, 8)]),
        ("all", 4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ("all", 5, 1, [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]),
        ("all", 1, 9, [(1, 9)]),
        ({"uniform": 1}, 6, 12, [(6, 12)]),
        ({"uniform": 3}, 6, 12, [(2, 4), (4, 8), (6, 12)]),
        ({"uniform": 2}, 5, 10, [(3, 6), (5, 10)]),
        ({"uniform": 6}, 6, 4, [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (6, 4)]),
        ("last", 6, 12, [(6, 12)]),
        ({"last": 3}, 6, 12, [(4, 10), (5, 11), (6, 12)]),
        ([[6, 12], [2, 3]], 6, 12, [(2, 3), (6, 12)]),
        ([(0, 0), (-1, -1), (-6, -2)], 6, 12, [(0, 0), (1, 11), (6, 12)]),
    ],
)
def test_maps_by_hand(words, student, teacher, expected):
    assert layer_map(words, student, teacher) == expected


@pytest.mark.parametrize("student", range(1, 25))
@pytest.mark.parametrize("teacher", [1, 2, 5, 12, 31])
def test_all_spreads_over_the_whole_depth(student, teacher):
    pairs = layer_map("all", student, teacher)
    assert [own for own, _ in pairs] == list(range(1, student + 1))
    theirs = [layer for _, layer in pairs]
    assert theirs == sorted(theirs)
    assert theirs[-1] == teacher
    assert all(1 <= layer <= teacher for layer in theirs)
    for own, layer in pairs:
        assert layer == 1 or abs(layer / teacher - own / student) <= 0.5 / teacher + 1e-9
    if student <= teacher:
        assert len(set(theirs)) == student


@pytest.mark.parametrize("student", [1, 4, 7, 30])
@pytest.mark.parametrize("teacher", [1, 4, 9, 24])
def test_uniform_takes_evenly_from_all(student, teacher):
    every = layer_map("all", student, teacher)
    assert layer_map({"uniform": student}, student, teacher) == every
    for count in range(1, student + 1):
        pairs = layer_map({"uniform": count}, student, teacher)
        assert len(set(pairs)) == count
        assert set(pairs) <= set(every)
        assert pairs[-1] == (student, teacher)
        gaps = [
            after - before for before, after in zip([0, *(s for s, _ in pairs)], [s for s, _ in pairs], strict=False)
        ]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("unifrom", "'unifrom' is no layer map. Write \"all\""),
        ({"first": 2}, "is no layer map"),
        ({"last": 2, "uniform": 2}, "is no layer map"),
        ({}, "is no layer map"),
        ([], "is no layer map"),
        (3, "is no layer map"),
        ({"last": 5}, "5 must be a whole number from 1 to 4"),
        ({"uniform": 7}, "7 must be a whole number from 1 to 6"),
        ({"uniform": 0}, "0 must be"),
        ({"uniform": True}, "True must be"),
        ({"uniform": "2"}, "'2' must be"),
        ([[1, 2, 3]], "no pair"),
        ([[1, 2.0]], "no pair"),
        ([3, 4], "3 is no pair"),
        ([[7, 1]], "the student has no layer 7; it has 6 blocks"),
        ([[1, -5]], "the teacher has no layer -5; it has 4 blocks"),
        ([[1, 4], [1, -1]], r"the pair \[1, 4\] is given twice"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(RecipeError, match=message):
        layer_map(words, 6, 4)
