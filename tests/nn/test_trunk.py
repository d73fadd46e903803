"""A trunk in one pass: causal, deaf to padding, documents apart; and every way of sharing weights."""

import itertools

import pytest
import torch
from torch import nn

from limbeck.core.errors import RecipeError
from limbeck.nn.trunk import Trunk, TrunkSettings
from limbeck.nn.trunk_settings import Step, plan_steps

BASE = {"width": 16, "layers": 4, "heads": 4, "kv_heads": 2, "feed_forward": 24, "zero_init": False}
HYENA = {"mixers": ["attention", "hyena", "hyena", "attention"]}
VARIANTS = {
    "plain": {},
    "no scalars, no norms, no rotary": {"residual_scalars": False, "qk_norm": False, "rope_theta": None},
    "swiglu": {"activation": "swiglu"},
    "hyena": HYENA,
    "feed-forward of all": {"share_feed_forward": "all"},
    "feed-forward of the interior": {"share_feed_forward": "interior"},
    "attention output": {"share_mixers": "output"},
    "mixers": {"share_mixers": "all"},
    "mixers of two kinds": {"share_mixers": "all", **HYENA},
    "all shared, deltas": {"share_mixers": "all", "share_feed_forward": "all", "delta_rank": 2, "activation": "swiglu"},
    "output shared, deltas": {"share_mixers": "output", "delta_rank": 2},
    "repeat": {"repeat": 2},
    "repeat hyena": {"repeat": 2, **HYENA},
    "loop": {"loop": [1, 2, 3]},
    "loop, deltas": {"loop": [1, 2, 2], "delta_rank": 3},
    "everything": {"loop": [0, 1, 2], "repeat": 2, "share_mixers": "output", "share_feed_forward": "interior"},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def trunk_of(seed=0, *, moved=True, **options):
    """A float64 trunk in which every parameter was moved, so that none is one or zero by its start."""
    torch.manual_seed(seed)
    trunk = Trunk(TrunkSettings(**BASE | options)).double().eval()
    if moved:
        with torch.no_grad():
            for parameter in trunk.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return trunk


def inputs(rows=3, length=9):
    return torch.randn(rows, length, BASE["width"], dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@every_variant
def test_the_past_does_not_see_the_future(options):
    trunk, x_BSD = trunk_of(**options), inputs()
    changed_BSD = x_BSD.clone()
    changed_BSD[:, 5:] = torch.randn_like(changed_BSD[:, 5:])
    first, second = trunk(x_BSD), trunk(changed_BSD)
    torch.testing.assert_close(second[:, :5], first[:, :5], atol=1e-10, rtol=1e-10)
    assert (second[:, 5] - first[:, 5]).abs().max() > 1e-3
    influence_BSD = torch.autograd.grad(trunk(x_BSD.requires_grad_())[:, 4].sum(), x_BSD)[0]
    torch.testing.assert_close(influence_BSD[:, 5:], torch.zeros_like(influence_BSD[:, 5:]), atol=1e-10, rtol=0)
    assert (influence_BSD[:, :5].abs().sum(-1) > 0).all()


@every_variant
def test_padding_anywhere_changes_nothing(options):
    trunk, x_BSD = trunk_of(**options), inputs()
    mask_BS = torch.tensor(
        [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool
    )
    out_BSD = trunk(x_BSD, mask_BS=mask_BS)
    for row in range(2):
        alone_SD = trunk(x_BSD[row : row + 1, mask_BS[row]])[0]
        torch.testing.assert_close(out_BSD[row, mask_BS[row]], alone_SD, atol=1e-10, rtol=1e-10)
    assert not out_BSD[~mask_BS].any()
    noise_BSD = torch.where(mask_BS.unsqueeze(-1), x_BSD, torch.full_like(x_BSD, 1e3))
    torch.testing.assert_close(trunk(noise_BSD, mask_BS=mask_BS), out_BSD, atol=0, rtol=0)
    assert not trunk(x_BSD, mask_BS=torch.zeros_like(mask_BS)).any()


@every_variant
def test_packed_documents_are_alone(options):
    trunk, x_BSD = trunk_of(**options), inputs()
    documents_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5], [3, 1, 1, 1, 3, 3, 0, 0, 0]])
    out_BSD = trunk(x_BSD, document_ids_BS=documents_BS)
    for row, ids in enumerate(documents_BS.tolist()):
        start = 0
        for _, group in itertools.groupby(ids):
            stop = start + len(list(group))
            alone_SD = trunk(x_BSD[row : row + 1, start:stop])[0]
            torch.testing.assert_close(out_BSD[row, start:stop], alone_SD, atol=1e-10, rtol=1e-10)
            start = stop


@pytest.mark.parametrize("options", [{}, HYENA], ids=["attention", "hyena"])
def test_padding_among_packed_documents(options):
    trunk, x_BSD = trunk_of(**options), inputs(1)
    documents_BS = torch.tensor([[0, 0, 9, 0, 9, 1, 1, 9, 1]])
    mask_BS = documents_BS != 9
    out_BSD = trunk(x_BSD, document_ids_BS=documents_BS, mask_BS=mask_BS)
    for places in ([0, 1, 3], [5, 6, 8]):
        torch.testing.assert_close(out_BSD[:, places], trunk(x_BSD[:, places]), atol=1e-10, rtol=1e-10)


def test_the_plain_trunk_by_its_definition():
    trunk, x_BSD = trunk_of(), inputs(2, 5)
    y_BSD = x_BSD
    for number, block in enumerate(trunk.layers):
        y_BSD = trunk.residual_scales[number] * y_BSD + trunk.input_scales[number] * x_BSD
        y_BSD = y_BSD + block.mixer(block.mixer_norm(y_BSD))
        y_BSD = y_BSD + block.feed_forward(block.feed_forward_norm(y_BSD))
    torch.testing.assert_close(trunk(x_BSD), trunk.norm(y_BSD), atol=1e-12, rtol=1e-12)


def test_plans():
    def plan(**options):
        return [
            (step.layer, step.mixer, step.output, step.feed_forward)
            for step in plan_steps(TrunkSettings(**BASE | options))
        ]

    assert plan() == [(n, n, n, n) for n in range(4)]
    assert plan(share_feed_forward="all") == [(n, n, n, 0) for n in range(4)]
    assert plan(share_feed_forward="interior") == [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 1), (3, 3, 3, 3)]
    assert plan(share_mixers="output") == [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 1, 2), (3, 3, 3, 3)]
    assert plan(share_mixers="all") == [(0, 0, 0, 0), (1, 1, 1, 1), (2, 1, 1, 2), (3, 3, 3, 3)]
    assert [step[0] for step in plan(repeat=2)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [step[0] for step in plan(loop=[1, 2, 3])] == [0, 1, 2, 1, 2, 1, 2, 3]
    assert [step[0] for step in plan(loop=[0, 1, 2], repeat=2)] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
    mixed = plan(
        layers=6, share_mixers="all", mixers=["attention", "hyena", "attention", "hyena", "attention", "hyena"]
    )
    assert [step[1] for step in mixed] == [0, 1, 2, 1, 2, 5]
    outputs = plan(
        layers=6, share_mixers="output", mixers=["hyena", "hyena", "attention", "attention", "hyena", "hyena"]
    )
    assert [step[2] for step in outputs] == [0, 1, 2, 2, 4, 5]
    assert Step(1, 1, 1, 1) in plan_steps(TrunkSettings(**BASE))


@every_variant
def test_every_tensor_has_one_name_and_state_dicts_come_back(options):
    trunk, x_BSD = trunk_of(**options), inputs()
    names = [name for name, _ in trunk.named_parameters(remove_duplicate=False)]
    tensors = {id(parameter) for parameter in trunk.parameters()}
    assert len(names) == len(set(names)) == len(tensors)
    state = trunk.state_dict()
    addresses = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(addresses)) == len(addresses)
    again = trunk_of(seed=1, **options)
    again.load_state_dict(state)
    torch.testing.assert_close(again(x_BSD), trunk(x_BSD), atol=0, rtol=0)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in trunk.parameters())


class Apart(nn.Module):
    """The same computation with a copy of everything for each run: what sharing is measured against."""

    def __init__(self, trunk):
        super().__init__()
        runs = len(trunk.plan)
        flat = {
            "layers": runs,
            "share_feed_forward": "none",
            "share_mixers": "none",
            "repeat": 1,
            "loop": None,
            "delta_rank": 0,
        }
        mixers = [trunk.settings.mixer_of(step.layer) for step in trunk.plan]
        self.trunk = Trunk(TrunkSettings.read(trunk.settings.as_dict() | flat | {"mixers": mixers})).double().eval()
        self.origin = {}
        own = dict(trunk.named_parameters())
        with torch.no_grad():
            for name, parameter in self.trunk.named_parameters():
                self.origin[name] = _origin(trunk, name)
                parameter.copy_(own[self.origin[name]])


def _origin(trunk, name):
    parts = name.split(".")
    if parts[0] != "layers":
        return name
    step, part = trunk.plan[int(parts[1])], parts[2]
    owner = {"mixer": step.mixer, "feed_forward": step.feed_forward}.get(part, step.layer)
    if parts[2:4] == ["mixer", "out"]:
        owner = step.output
    return ".".join(["layers", str(owner), *parts[2:]])


SHARED = {name: options for name, options in VARIANTS.items() if "delta_rank" not in options}


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
def test_a_shared_tensor_gets_the_sum_of_the_gradients(options):
    trunk, x_BSD = trunk_of(**options), inputs()
    apart = Apart(trunk)
    torch.testing.assert_close(apart.trunk(x_BSD), trunk(x_BSD), atol=1e-12, rtol=1e-10)
    weight_BSD = torch.randn_like(x_BSD)
    (trunk(x_BSD) * weight_BSD).sum().backward()
    (apart.trunk(x_BSD) * weight_BSD).sum().backward()
    sums = {name: torch.zeros_like(parameter) for name, parameter in trunk.named_parameters()}
    for name, parameter in apart.trunk.named_parameters():
        sums[apart.origin[name]] += parameter.grad
    for name, parameter in trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], atol=1e-9, rtol=1e-8)
    assert trunk.parameters_run() == sum(p.numel() for p in apart.trunk.parameters())
    assert trunk.flops_per_position(64) == apart.trunk.flops_per_position(64)


@pytest.mark.parametrize("name", ["all shared, deltas", "output shared, deltas", "loop, deltas"])
def test_deltas_start_as_nothing_and_tell_runs_apart(name):
    options = VARIANTS[name]
    with_deltas = trunk_of(moved=False, **options)
    without = trunk_of(moved=False, **options | {"delta_rank": 0})
    without.load_state_dict({k: v for k, v in with_deltas.state_dict().items() if not k.startswith("deltas")})
    x_BSD = inputs()
    torch.testing.assert_close(with_deltas(x_BSD), without(x_BSD), atol=0, rtol=0)
    with_deltas(x_BSD).square().sum().backward()
    second = [p for n, p in with_deltas.named_parameters() if n.startswith("deltas") and "second" in n]
    assert second
    assert all(parameter.grad.abs().max() > 0 for parameter in second)
    with torch.no_grad():
        second[0].add_(0.1)
    assert (with_deltas(x_BSD) - without(x_BSD)).abs().max() > 1e-4
    more = trunk_of(**options).flops_per_position(10) - trunk_of(**options | {"delta_rank": 0}).flops_per_position(10)
    assert more == 2 * sum(p.numel() for n, p in with_deltas.named_parameters() if n.startswith("deltas"))


def test_which_matrices_get_deltas():
    trunk = trunk_of(share_mixers="output", share_feed_forward="interior", delta_rank=1)
    assert [set(deltas) for deltas in trunk.deltas] == [set(), {"out", "up", "down"}, {"out", "up", "down"}, set()]


def test_zero_start_is_the_identity_and_still_learns():
    trunk = trunk_of(moved=False, zero_init=True, **HYENA)
    x_BSD = inputs()
    torch.testing.assert_close(trunk(x_BSD), trunk.norm(x_BSD), atol=0, rtol=0)
    (trunk(x_BSD) * torch.randn_like(x_BSD)).sum().backward()
    for block in trunk.layers:
        out = block.mixer.out.weight if hasattr(block.mixer, "out") else block.mixer.out_proj.weight
        assert out.grad.abs().max() > 0
        assert block.feed_forward.down.weight.grad.abs().max() > 0


def test_hooks_on_blocks_see_every_run():
    trunk, seen = trunk_of(loop=[1, 2, 2]), []
    for layer, block in enumerate(trunk.layers):
        block.register_forward_hook(lambda _m, _a, out, layer=layer: seen.append((layer, out.shape)))
    trunk(inputs())
    assert [layer for layer, _ in seen] == [0, 1, 2, 1, 2, 3]


def test_dropout_works_in_training_alone():
    trunk, x_BSD = trunk_of(dropout=0.5), inputs()
    torch.testing.assert_close(trunk(x_BSD), trunk(x_BSD), atol=0, rtol=0)
    trunk.train()
    assert (trunk(x_BSD) - trunk(x_BSD)).abs().max() > 1e-3


def test_flops_by_hand():
    trunk = trunk_of()
    per_layer = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 2 * 16 * 24) + 4 * 16 * (10 + 1) / 2
    assert trunk.flops_per_position(10) == 4 * per_layer


def test_the_same_seed_gives_the_same_start():
    one, two, other = (trunk_of(seed, moved=False, **HYENA).state_dict() for seed in (3, 3, 4))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=0, rtol=0)
    assert any((tensor != other[name]).any() for name, tensor in one.items())


def test_settings_survive_json():
    settings = TrunkSettings(**BASE | {"loop": (1, 2, 2), "mixers": ["attention"] * 4})
    assert TrunkSettings.read(settings.as_dict()) == settings
    assert isinstance(settings.as_dict()["loop"], list)
    assert TrunkSettings.read({"width": 8, "layers": 1, "heads": 2, "feed_forward": 8}).kv_heads == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widht": 4}, 'Did you mean "width"'),
        ({"layers": 0}, "trunk.layers: must be at least 1"),
        ({"layers": 10**9}, "cannot be right"),
        ({"loop": [0, 3, 10**8]}, "cannot be right"),
        ({"activation": "silu"}, "trunk.activation"),
        ({"mixers": ["attention"]}, "1 are given for 4 layers"),
        ({"mixers": ["attention", "hiena", "hyena", "hyena"]}, 'Did you mean "hyena"'),
        ({"share_mixers": "some"}, "trunk.share_mixers"),
        ({"layers": 3, "share_mixers": "all"}, "needs 4 layers"),
        ({"loop": [2, 1, 2]}, "trunk.loop"),
        ({"loop": [0, 4, 2]}, "layers 0 to 3"),
        ({"share_mixers": "output", **HYENA}, "shares nothing here"),
        ({"share_mixers": "all", "mixers": ["attention", "hyena", "attention", "hyena"]}, "shares nothing here"),
        ({"delta_rank": 4}, "nothing is shared"),
        ({"delta_rank": 4, "repeat": 2, **HYENA}, "Hyena operator that runs more than once takes no deltas"),
        ({"dropout": 1.0}, "trunk.dropout"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        TrunkSettings.read(BASE | options)
    with pytest.raises(RecipeError, match="feed_forward must be given"):
        TrunkSettings.read({"width": 4, "layers": 1, "heads": 1})
