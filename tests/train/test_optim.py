"""Groups, schedules, and optimiser state that goes through safetensors unchanged."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from limbeck.train.optim import build_optimizer, learning_rate_scale, weight_decay_scale


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


def build(model, kind, **options):
    words = {
        "kind": kind, "learning_rate": 1e-2, "mixer_learning_rate": 1e-1, "weight_decay": 0.5, "betas": (0.9, 0.95),
        "mixer_names": frozenset({"mixer.weight", "mixer.bias", "taps"}),
    }  # fmt: skip
    return build_optimizer(model.named_parameters(), **words | options)


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


class ByteModel:
    """Names and shapes as small models of bytes and of tokens have them; a tied matrix has one name."""

    def __init__(self):
        shapes = {
            "network.embedding.weight": (260, 8), "network.embedding.ngrams.weight": (64, 8), "network.head.weight": (260, 8),
            "network.output.weight": (260, 8), "network.decoder.positions.weight": (16, 8),
            "network.decoder.blocks.0.attention.out.weight": (8, 8), "network.trunk.feed_forwards.0.up.weight": (16, 8),
            "network.trunk.mixers.1.query.weight": (8, 8), "network.trunk.norm.weight": (8,),
            "network.trunk.residual_scale": (), "network.trunk.mixers.0.short_weight": (24, 1, 3),
            "network.trunk.mixers.0.decay_CN": (8, 4), "network.trunk.mixers.0.skip_bias": (8,),
        }  # fmt: skip
        torch.manual_seed(0)
        self.parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        for name in ("decay_CN", "skip_bias"):
            self.parameters[f"network.trunk.mixers.0.{name}"]._no_weight_decay = True

    def named_parameters(self):
        return self.parameters.items()


def test_groups_of_a_byte_model():
    model = ByteModel()
    optimizers = build(
        model,
        "muon",
        mixer_names=frozenset(),
        mixer_learning_rate=None,
        embedding_learning_rate=0.3,
        scalar_learning_rate=0.2,
    )
    assert {name.removeprefix("network."): group for name, group in groups_of(optimizers, model).items()} == {
        "embedding.weight": ("AdamW", 0.3, 0.0),
        "embedding.ngrams.weight": ("AdamW", 0.3, 0.0),
        "head.weight": ("AdamW", 0.3, 0.0),
        "output.weight": ("AdamW", 0.3, 0.0),
        "decoder.positions.weight": ("AdamW", 0.3, 0.0),
        "decoder.blocks.0.attention.out.weight": ("Muon", 1e-2, 0.5),
        "trunk.feed_forwards.0.up.weight": ("Muon", 1e-2, 0.5),
        "trunk.mixers.1.query.weight": ("Muon", 1e-2, 0.5),
        "trunk.norm.weight": ("AdamW", 0.2, 0.0),
        "trunk.residual_scale": ("AdamW", 0.2, 0.0),
        "trunk.mixers.0.short_weight": ("AdamW", 1e-2, 0.0),
        "trunk.mixers.0.decay_CN": ("AdamW", 1e-2, 0.0),
        "trunk.mixers.0.skip_bias": ("AdamW", 1e-2, 0.0),
    }


def test_rates_by_kind_leave_those_of_new_mixers():
    model = Tiny()
    groups = groups_of(build(model, "adamw", embedding_learning_rate=0.3, scalar_learning_rate=0.2), model)
    assert groups["embed_in.weight"] == ("AdamW", 0.3, 0.0)
    assert groups["body.weight"] == ("AdamW", 1e-2, 0.5)
    assert groups["body.bias"] == ("AdamW", 0.2, 0.0)
    assert groups["mixer.bias"] == ("AdamW", 1e-1, 0.0)
    assert groups["taps"] == ("AdamW", 1e-1, 0.0)
    groups = groups_of(build(model, "adamw", mixer_learning_rate=None, scalar_learning_rate=0.2), model)
    assert groups["embed_in.weight"] == ("AdamW", 1e-2, 0.5)
    assert groups["mixer.bias"] == ("AdamW", 0.2, 0.0)
    assert groups["taps"] == ("AdamW", 1e-2, 0.0)


def test_cautious_decay_by_hand():
    """AdamW's first step is the rate times the gradient's sign: decay comes only where that shrinks the weight."""
    weight = nn.Parameter(torch.tensor([[2.0, 2.0, -2.0, -2.0, 0.5, 0.0]]))
    idle = nn.Parameter(torch.tensor([[4.0]]))
    optimizers = build_optimizer(
        [("a.weight", weight), ("b.weight", idle)], kind="adamw", learning_rate=0.1, mixer_learning_rate=None,
        mixer_names=frozenset(), weight_decay=0.5, betas=(0.9, 0.95), cautious_decay=True,
    )  # fmt: skip
    weight.grad = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 1.0]])
    optimizers.step(scale=1.0)
    assert_close(weight.data, torch.tensor([[2 - 0.1 - 0.1, 2.1, -2.1, -2 + 0.1 + 0.1, 0.5 - 0.025, -0.1]]))
    assert idle.item() == 4.0, "what has no gradient is left alone, as without caution"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_cautious_decay_against_a_twin_that_does_not_decay(kind):
    """From the same state, the cautious step is the step without decay less decay where the signs agree."""
    torch.manual_seed(0)
    careful, twin = Tiny().double(), Tiny().double()
    optimizers = build(careful, kind, cautious_decay=True)
    plain = build(twin, kind, weight_decay=0.0)
    for i in range(4):
        twin.load_state_dict(careful.state_dict())
        before = {name: p.detach().clone() for name, p in careful.named_parameters()}
        for model, optimizer in ((careful, optimizers), (twin, plain)):
            optimizer.zero_grad()
            model(torch.tensor([i % 5, 2])).backward()
            optimizer.step(scale=0.5, **({"decay_scale": 0.25} if model is careful else {}))
        shares = []
        for name, found in careful.named_parameters():
            after = dict(twin.named_parameters())[name].detach()
            decays = name in ("body.weight", "mixer.weight", "embed_in.weight")
            rate = 0.5 * (1e-1 if name == "mixer.weight" else 1e-2) * 0.25 * 0.5 * decays
            agrees = (before[name] - after) * before[name] >= 0
            assert_close(found.detach(), after - rate * before[name] * agrees, atol=1e-15, rtol=0)
            shares.append(float(agrees.double().mean()))
        assert min(shares) < 0.9


def test_decay_that_falls_to_zero():
    assert [weight_decay_scale(step, 4, schedule="linear") for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [weight_decay_scale(step, 4, schedule="constant") for step in range(4)] == [1.0] * 4
    weight = nn.Parameter(torch.full((1, 1), 3.0, dtype=torch.float64))
    optimizers = build_optimizer(
        [("a.weight", weight)], kind="adamw", learning_rate=0.1, mixer_learning_rate=None, mixer_names=frozenset(),
        weight_decay=0.5, betas=(0.9, 0.95),
    )  # fmt: skip
    expected = 3.0
    for step in range(4):
        weight.grad = torch.zeros_like(weight)
        optimizers.step(scale=0.5, decay_scale=weight_decay_scale(step, 4, schedule="linear"))
        expected *= 1 - 0.5 * 0.1 * 0.5 * (1 - step / 4)
    assert weight.item() == pytest.approx(expected, rel=1e-14)


OPTIONS = {"cautious_decay": True, "embedding_learning_rate": 0.3, "scalar_learning_rate": 0.02}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_survives_a_round_trip_bit_for_bit(kind, options):
    torch.manual_seed(0)
    model = Tiny()
    optimizers = build(model, kind, **options)

    def steps(model, optimizers, count):
        for i in range(count):
            optimizers.zero_grad()
            model(torch.tensor([i % 5, 2])).backward()
            optimizers.step(scale=1.0 / (i + 1))

    steps(model, optimizers, 3)
    twin = Tiny()
    twin.load_state_dict(model.state_dict())
    resumed = build(twin, kind, **options)
    resumed.load_state_tensors(optimizers.state_tensors())
    steps(model, optimizers, 3)
    steps(twin, resumed, 3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one, other, atol=0, rtol=0)


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


def test_warm_up_stable_decay_against_a_table():
    """20 updates: 2 of warm-up, then full, and over the last 5 linearly to a tenth, which update 20 would have."""
    table = [0.5, *[1.0] * 15, 0.82, 0.64, 0.46, 0.28]
    words = {"schedule": "wsd", "warmup_share": 0.1, "decay_share": 0.25, "final_share": 0.1}
    assert_close([learning_rate_scale(step, 20, **words) for step in range(20)], table)
    assert learning_rate_scale(20, 20, **words) == pytest.approx(0.1)
    assert_close([learning_rate_scale(step, 3, **words) for step in range(3)], [1.0, 1.0, 1.0])
