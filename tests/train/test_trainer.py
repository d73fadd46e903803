"""The loop: it learns, it does not care how a batch is split, and a stopped run goes on bit for bit."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.core.errors import RecipeError, TrainingError
from limbeck.core.runtime import StopRequest
from limbeck.data.order import Mixture
from limbeck.data.windows import TokenWindows
from limbeck.train.lesson import Lesson
from limbeck.train.metrics import MetricsLog
from limbeck.train.stages import DropoutSchedule
from limbeck.train.trainer import StageSettings, load_weights, train_stage, weights_of


class Model(nn.Module):
    def __init__(self, vocabulary=260):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(vocabulary, 8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, vocabulary)

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


def changed(**options):
    return StageSettings(**{**vars(SETTINGS), **options})


OPTIONS = {
    "none": {},
    "average": {"ema_decay": 0.9},
    "rates": {"embedding_learning_rate": 0.2, "scalar_learning_rate": 0.01},
    "cautious": {"cautious_decay": True, "weight_decay": 0.5},
    "fading": {"decay_schedule": "linear"},
    "muon": {"optimizer": "muon", "cautious_decay": True, "embedding_learning_rate": 0.2, "schedule": "wsd"},
    "dropout": {"dropout": DropoutSchedule("triangular", 0.0, 0.4, cycles=3)},
    "length": {"length_curriculum": ((0.3, 4), (0.4, 2))},
    "patch": {"patch_curriculum": ((0.3, 3), (0.4, 5))},
    "all": {
        "optimizer": "muon", "ema_decay": 0.9, "cautious_decay": True, "decay_schedule": "linear", "schedule": "wsd",
        "embedding_learning_rate": 0.2, "scalar_learning_rate": 0.01, "dropout": DropoutSchedule("linear", 0.0, 0.3),
        "length_curriculum": ((0.5, 2),), "patch_curriculum": ((0.7, 4),),
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stopped_anywhere_and_continued_is_bit_identical(tmp_path, options):
    settings = changed(**options)
    whole, _ = trained(tmp_path / "whole", settings=settings)

    class StopAt(StopRequest):
        def __init__(self, after):
            self.left = after

        @property
        def exit_code(self):
            self.left -= 1
            return 143 if self.left < 0 else None

    for after in (1, 7, 9, 18):
        with pytest.raises(SystemExit) as stopped:
            trained(tmp_path / str(after), settings=settings, stop=StopAt(after))
        assert stopped.value.code == 143
        continued, result = trained(tmp_path / str(after), settings=settings)
        assert same(whole, continued)
        lines = [json.loads(line) for line in (tmp_path / str(after) / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 21))
        assert len(result.curve) == 20


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "none"])
def test_every_option_changes_something(tmp_path, name):
    without, _ = trained(tmp_path / "without")
    model, result = trained(tmp_path / "with", settings=changed(**OPTIONS[name]))
    assert not same(without, model)
    assert result.tokens == 640
    assert np.isfinite(result.final_loss)


class Watching(NextToken):
    """Remembers every batch, dropout and weight that an update has."""

    def __init__(self, student):
        super().__init__(student)
        self.seen, self.rates, self.weights = [], [], []

    def forward(self, batch):
        self.seen.append(batch)
        self.rates.append(self.student.drop.p)
        return super().forward(batch)

    def end_update(self, step):
        self.weights.append({name: p.detach().clone() for name, p in self.student.named_parameters()})


def watched(folder, settings):
    kept = []

    def lesson(model):
        kept.append(Watching(model))
        return kept[0]

    model, _ = trained(folder, settings=settings, lesson=lesson)
    return model, kept[0]


def test_rows_grow_over_the_stage_and_tokens_stay(tmp_path):
    _, lesson = watched(tmp_path, changed(length_curriculum=((0.3, 4), (0.4, 2))))
    assert [tuple(batch.input_ids_BT.shape) for batch in lesson.seen] == [(16, 2)] * 6 + [(8, 4)] * 8 + [(4, 8)] * 6
    for update, batch in enumerate(lesson.seen):
        assert torch.equal(batch.input_ids_BT.flatten(), data().batch(4 * update, 4).input_ids_BT.flatten())


def test_micro_batches_hold_as_many_tokens_of_shorter_rows(tmp_path):
    settings = changed(length_curriculum=((1.0, 4),), micro_batch_sequences=2)
    _, lesson = watched(tmp_path / "parts", settings)
    assert {tuple(batch.input_ids_BT.shape) for batch in lesson.seen} == {(8, 2)}


def test_a_lesson_sees_the_cut_patches(tmp_path):
    _, lesson = watched(tmp_path, changed(patch_curriculum=((0.5, 3),)))
    ends = [[place for place, symbol in enumerate(batch.input_ids_BT[0]) if symbol == 259] for batch in lesson.seen]
    assert ends == [[2, 5]] * 10 + [[]] * 10


def test_dropout_follows_its_course_and_the_model_has_its_own_back(tmp_path):
    model, lesson = watched(tmp_path / "course", changed(dropout=DropoutSchedule("linear", 0.0, 0.38)))
    torch.testing.assert_close(lesson.rates, [0.02 * update for update in range(20)])
    assert model.drop.p == 0.1
    _, lesson = watched(tmp_path / "number", changed(dropout=0.25))
    assert set(lesson.rates) == {0.25}
    _, lesson = watched(tmp_path / "none", changed())
    assert set(lesson.rates) == {0.1}


def test_the_average_of_the_weights_is_what_a_stage_leaves(tmp_path):
    model, lesson = watched(tmp_path, changed(ema_decay=0.8))
    average = dict(Model().named_parameters())
    for update, weights in enumerate(lesson.weights, start=1):
        decay = min(0.8, (1 + update) / (10 + update))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    for name, found in model.named_parameters():
        torch.testing.assert_close(found, average[name])
        assert not torch.equal(found, lesson.weights[-1][name])


def test_curricula_that_do_not_fit_are_refused_before_training(tmp_path):
    with pytest.raises(RecipeError, match=r"stages.tune.length_curriculum: rows of 8 tokens cannot be cut into 3"):
        trained(tmp_path, settings=changed(length_curriculum=((0.5, 3),)))
    assert not list(tmp_path.glob("ck/*"))


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first, _ = trained(tmp_path)

    class Never(NextToken):
        def forward(self, batch):
            raise AssertionError("trained again")

    again, _ = trained(tmp_path, lesson=Never)
    assert same(first, again)


def test_micro_batches_add_up(tmp_path):
    whole, _ = trained(tmp_path / "4", settings=changed(micro_batch_sequences=4))
    parts, _ = trained(tmp_path / "3", settings=changed(micro_batch_sequences=3))
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
