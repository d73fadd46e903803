"""Dropout over a stage: its courses by hand, setting it, and putting a model's own back."""

import pytest
from torch import nn
from torch.testing import assert_close

from limbeck.core.errors import RecipeError
from limbeck.train.stages import DropoutSchedule, dropout_put_back, set_dropout


def rates(steps, **words):
    schedule = DropoutSchedule(**words)
    return [schedule.rate(step, steps) for step in range(steps)]


def test_courses_by_hand():
    assert rates(3, kind="constant", start=0.2, end=0.9) == [0.2, 0.2, 0.2]
    assert_close(rates(5, kind="linear", start=0.0, end=0.4), [0.0, 0.1, 0.2, 0.3, 0.4])
    assert_close(rates(5, kind="linear", start=0.4, end=0.0), [0.4, 0.3, 0.2, 0.1, 0.0])
    assert_close(
        rates(9, kind="triangular", start=0.1, end=0.3, cycles=2), [0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 0.3, 0.2, 0.1]
    )
    assert rates(1, kind="linear", start=0.1, end=0.3) == [0.1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "linaer"}, 'Did you mean "linear"'),
        ({"start": -0.1}, "at least 0"),
        ({"end": 1.0}, "below 1"),
        ({"cycles": 0}, "a cycle at least"),
    ],
)
def test_courses_that_cannot_be_are_refused(words, message):
    with pytest.raises(RecipeError, match=message):
        DropoutSchedule(**words)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.2


def test_own_rates_are_put_back():
    model = nn.Sequential(nn.Dropout(0.1), Attention(), nn.Linear(2, 2))
    with dropout_put_back(model):
        set_dropout(model, 0.5)
        assert (model[0].p, model[1].attention_dropout) == (0.5, 0.5)
    assert (model[0].p, model[1].attention_dropout) == (0.1, 0.2)
