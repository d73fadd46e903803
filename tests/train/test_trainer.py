"""The loop: it learns, it does not care how a batch is split, and a stopped run goes on bit for bit."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.core.errors import TrainingError
from limbeck.core.runtime import StopRequest
from limbeck.data.order import Mixture
from limbeck.data.windows import TokenWindows
from limbeck.train.lesson import Lesson
from limbeck.train.metrics import MetricsLog
from limbeck.train.trainer import StageSettings, load_weights, train_stage, weights_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(11, 8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        return self.head(self.drop(self.embed(ids)))


class NextToken(Lesson):
    def forward(self, batch):
        logits = self.student(batch.input_ids_BT)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch.input_ids_BT[:, 1:].flatten(), reduction="sum"), {}


def data():
    tokens = (np.arange(2000) % 11).astype(np.int32)
    return Mixture([TokenWindows(tokens, np.array([0]), context_tokens=8)], weights=[1.0], seed=3)


SETTINGS = StageSettings(name="tune", tokens=640, batch_tokens=32, learning_rate=0.05, checkpoint_every_tokens=96)


def trained(folder, *, settings=SETTINGS, stop=None, lesson=NextToken):
    model = Model()
    if settings.micro_batch_sequences:
        model.drop.p = 0.0
    log = MetricsLog(folder / "metrics.jsonl")
    result = train_stage(
        lesson(model),
        data(),
        settings,
        folder=folder / "ck",
        log=log,
        arm="student",
        seed=1,
        device=torch.device("cpu"),
        stop=stop,
    )
    return model, result


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_learns(tmp_path):
    _, result = trained(tmp_path)
    assert result.tokens == 640
    assert result.curve[-1][1] < 0.5 * result.curve[0][1]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_stopped_anywhere_and_continued_is_bit_identical(tmp_path, ema):
    settings = StageSettings(**{**vars(SETTINGS), "ema_decay": ema})
    whole, _ = trained(tmp_path / "whole", settings=settings)

    class StopAt(StopRequest):
        def __init__(self, after):
            self.left = after

        @property
        def exit_code(self):
            self.left -= 1
            return 143 if self.left < 0 else None

    for after in (1, 7, 9, 23):
        with pytest.raises(SystemExit) as stopped:
            trained(tmp_path / str(after), settings=settings, stop=StopAt(after))
        assert stopped.value.code == 143
        continued, result = trained(tmp_path / str(after), settings=settings)
        assert same(whole, continued)
        lines = [json.loads(line) for line in (tmp_path / str(after) / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 21))
        assert len(result.curve) == 20


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first, _ = trained(tmp_path)

    class Never(NextToken):
        def forward(self, batch):
            raise AssertionError("trained again")

    again, _ = trained(tmp_path, lesson=Never)
    assert same(first, again)


def test_micro_batches_add_up(tmp_path):
    def settings(rows):
        return StageSettings(**{**vars(SETTINGS), "micro_batch_sequences": rows})

    whole, _ = trained(tmp_path / "4", settings=settings(4))
    parts, _ = trained(tmp_path / "3", settings=settings(3))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    class Breaks(NextToken):
        calls = 0

        def forward(self, batch):
            Breaks.calls += 1
            loss, terms = super().forward(batch)
            return (loss * float("nan") if Breaks.calls == 8 else loss), terms

    with pytest.raises(TrainingError, match=r"update 8 of 20.*Lower this stage's learning_rate"):
        trained(tmp_path, lesson=Breaks)
    assert sorted(path.name for path in (tmp_path / "ck").iterdir()) == ["step-00000003", "step-00000006"]


def test_weights_of_another_model_are_refused():
    with pytest.raises(TrainingError, match="another model"):
        load_weights(Model(), {"nothing": torch.zeros(1)})
    model = Model()
    load_weights(model, {name: tensor.clone() for name, tensor in weights_of(model)})
