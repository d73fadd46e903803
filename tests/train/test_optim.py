"""Groups, schedules, and optimiser state that goes through safetensors unchanged."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from limbeck.train.optim import build_optimizer, learning_rate_scale


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_in = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.mixer = nn.Linear(4, 4)
        self.taps = nn.Parameter(torch.randn(4, 6))
        self.taps._no_weight_decay = True
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, ids):
        return (self.mixer(self.body(self.embed_in(ids))) @ self.taps).square().mean()


def build(model, kind):
    return build_optimizer(
        model.named_parameters(), kind=kind, learning_rate=1e-2, mixer_learning_rate=1e-1,
        mixer_names=frozenset({"mixer.weight", "mixer.bias", "taps"}), weight_decay=0.5, betas=(0.9, 0.95),
    )  # fmt: skip


def groups_of(optimizers, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (type(optimizer).__name__, group["base_lr"], group["weight_decay"])
        for optimizer in optimizers.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_groups_of_adamw():
    model = Tiny()
    groups = groups_of(build(model, "adamw"), model)
    assert groups["body.weight"] == ("AdamW", 1e-2, 0.5)
    assert groups["body.bias"] == ("AdamW", 1e-2, 0.0)
    assert groups["mixer.weight"] == ("AdamW", 1e-1, 0.5)
    assert groups["taps"] == ("AdamW", 1e-1, 0.0)
    assert "frozen.weight" not in groups


def test_groups_of_muon():
    model = Tiny()
    groups = groups_of(build(model, "muon"), model)
    assert groups["body.weight"][0] == "Muon"
    assert groups["embed_in.weight"][0] == "AdamW"
    assert groups["taps"][0] == "AdamW"
    assert groups["body.bias"][0] == "AdamW"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_survives_a_round_trip_bit_for_bit(kind):
    torch.manual_seed(0)
    model = Tiny()
    optimizers = build(model, kind)

    def steps(model, optimizers, count):
        for i in range(count):
            optimizers.zero_grad()
            model(torch.tensor([i % 5, 2])).backward()
            optimizers.step(scale=1.0 / (i + 1))

    steps(model, optimizers, 3)
    twin = Tiny()
    twin.load_state_dict(model.state_dict())
    resumed = build(twin, kind)
    resumed.load_state_tensors(optimizers.state_tensors())
    steps(model, optimizers, 3)
    steps(twin, resumed, 3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def scale(step, kind, steps=100):
    return learning_rate_scale(step, steps, schedule=kind, warmup_share=0.1, decay_share=0.2, final_share=0.1)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear(kind):
    assert_close([scale(i, kind) for i in range(10)], [(i + 1) / 10 for i in range(10)])


def test_schedules_by_hand():
    assert scale(10, "cosine") == pytest.approx(1.0)
    assert scale(55, "cosine") == pytest.approx(0.1 + 0.9 * 0.5)
    assert scale(99, "cosine") == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert scale(79, "wsd") == 1.0
    assert scale(90, "wsd") == pytest.approx(0.1 + 0.9 * 0.5)
    assert scale(99, "constant") == 1.0
