"""Attention, rotary positions and feed-forward against slow references with loops."""

import math

import pytest
import torch

from limbeck.core.errors import RecipeError
from limbeck.nn.blocks import FeedForward, LowRank, SelfAttention, apply_rotary, linear


def slow_rotary(x_d, position, theta):
    half = len(x_d) // 2
    out = list(x_d)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x_d[i] * math.cos(angle) - x_d[i + half] * math.sin(angle)
        out[i + half] = x_d[i] * math.sin(angle) + x_d[i + half] * math.cos(angle)
    return torch.stack(out)


def slow_norm(x_d, norm):
    return x_d if norm is None else x_d / (x_d.square().mean() + 1e-6).sqrt() * norm.weight


def slow_attention(attention, x_BTD, positions_BT, allowed):
    """One query, head and key at a time. allowed(b, q, k): whether q may look at k."""
    batch, length, _ = x_BTD.shape
    d, per_group = attention.head_width, attention.heads // attention.kv_heads
    rows = []
    for b in range(batch):
        for t in range(length):
            heads = []
            for h in range(attention.heads):
                at = slice(h * d, (h + 1) * d)
                of = slice(h // per_group * d, (h // per_group + 1) * d)
                query = slow_norm(attention.query.weight[at] @ x_BTD[b, t], attention.query_norm)
                scores, values = [], []
                for s in range(length):
                    if not allowed(b, t, s):
                        continue
                    key = slow_norm(attention.key.weight[of] @ x_BTD[b, s], attention.key_norm)
                    if attention.rope_theta is not None:
                        key = slow_rotary(key, int(positions_BT[b, s]), attention.rope_theta)
                        turned = slow_rotary(query, int(positions_BT[b, t]), attention.rope_theta)
                    else:
                        turned = query
                    scores.append(turned @ key / math.sqrt(d))
                    values.append(attention.value.weight[of] @ x_BTD[b, s])
                weights = torch.softmax(torch.stack(scores), dim=0)
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            rows.append(attention.out.weight @ torch.cat(heads))
    return torch.stack(rows).unflatten(0, (batch, length))


def noisy(module):
    """Every parameter moved, so that none is one or zero by its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


CASES = {
    "plain": {"heads": 2, "qk_norm": False, "rope_theta": None},
    "grouped": {"heads": 4, "kv_heads": 2, "qk_norm": False, "rope_theta": None},
    "normalised": {"heads": 2, "rope_theta": None},
    "rotary": {"heads": 2, "qk_norm": False, "rope_theta": 100.0},
    "all": {"heads": 6, "kv_heads": 2, "head_width": 4},
    "both ways": {"heads": 2, "causal": False},
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_attention_is_the_slow_one_forward_and_backward(options, masked):
    torch.manual_seed(0)
    attention = noisy(SelfAttention(12, **options).double())
    x_BTD = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    positions_BT = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 0, 9, 2]])
    mask_BQK = (torch.rand(2, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)

    def allowed(b, q, k):
        return bool(mask_BQK[b, q, k]) if masked else (k <= q or not attention.causal)

    out_BTD = attention(x_BTD, mask_BQK=mask_BQK if masked else None, positions_BT=positions_BT)
    slow_BTD = slow_attention(attention, x_BTD, positions_BT, allowed)
    torch.testing.assert_close(out_BTD, slow_BTD, atol=1e-12, rtol=1e-10)
    weight_BTD = torch.randn_like(out_BTD)
    inputs = [x_BTD, *attention.parameters()]
    fast = torch.autograd.grad((out_BTD * weight_BTD).sum(), inputs)
    slow = torch.autograd.grad((slow_BTD * weight_BTD).sum(), inputs)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


def test_positions_default_to_counting_and_only_differences_matter():
    torch.manual_seed(1)
    attention = SelfAttention(8, 2).double()
    x_BTD = torch.randn(1, 6, 8, dtype=torch.float64)
    out_BTD = attention(x_BTD)
    for start in (0, 5, 1000):
        shifted_BTD = attention(x_BTD, positions_BT=torch.arange(start, start + 6).unsqueeze(0))
        torch.testing.assert_close(shifted_BTD, out_BTD, atol=1e-11, rtol=1e-10)


def test_rotary_by_hand():
    x_BHTd = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).double().expand(1, 3, 2, 2)
    turned = apply_rotary(x_BHTd, torch.tensor([[0, 2]]), 10.0)
    expected = torch.tensor([[1.0, 0.0], [math.cos(2), math.sin(2)]]).double().expand(1, 3, 2, 2)
    torch.testing.assert_close(turned, expected, atol=1e-7, rtol=0)


def test_packed_rows_project_as_padded_ones_do():
    attention = SelfAttention(16, 4, 2)
    x_BTD = torch.randn(3, 5, 16)
    whole = attention.project(x_BTD)
    packed = attention.project(x_BTD.flatten(0, 1))
    for padded, rows in zip(whole, packed, strict=True):
        torch.testing.assert_close(rows, padded.flatten(0, 1))


def test_half_precision_stays_so():
    attention = SelfAttention(16, 4, 2).bfloat16()
    assert attention(torch.randn(1, 4, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    mixed = SelfAttention(16, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(torch.randn(1, 4, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("relu2", 2.0**2 * 5),
        ("gelu", 2.0 * 0.5 * (1 + math.erf(math.sqrt(2))) * 5),
        ("swiglu", 3.0 / (1 + math.exp(-3)) * 2 * 5),
    ],
)
def test_feed_forward_by_hand(activation, expected):
    layer = FeedForward(1, 1, activation=activation).double()
    with torch.no_grad():
        layer.up.weight.fill_(2.0)
        layer.down.weight.fill_(5.0)
        if layer.gate is not None:
            layer.gate.weight.fill_(3.0)
    torch.testing.assert_close(layer(torch.ones(1, 1).double()), torch.full((1, 1), expected).double())


def test_feed_forward_may_change_the_width():
    assert FeedForward(4, 6, width_out=9, bias=True)(torch.randn(2, 3, 4)).shape == (2, 3, 9)


def test_a_delta_starts_as_nothing_and_is_added():
    torch.manual_seed(0)
    delta, x = LowRank(6, 5, 2), torch.randn(3, 6)
    torch.testing.assert_close(delta(x), torch.zeros(3, 5), atol=0, rtol=0)
    layer = FeedForward(6, 5, width_out=6)
    deltas = {"up": noisy(delta)}
    change = deltas["up"].second.weight @ deltas["up"].first.weight
    expected = layer.down((x @ (layer.up.weight + change).T).relu().square())
    torch.testing.assert_close(layer(x, deltas=deltas), expected, atol=1e-5, rtol=1e-5)


def test_starts():
    torch.manual_seed(0)
    wide = linear(400, 300, bias=True)
    assert wide.weight.std().item() == pytest.approx(1 / 20, rel=0.02)
    assert not wide.bias.any()
    assert not SelfAttention(8, 2, output_scale=0.0).out.weight.any()
    assert not FeedForward(8, 16, output_scale=0.0).down.weight.any()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SelfAttention(12, 4, 3), "4 heads cannot be shared out over 3"),
        (lambda: SelfAttention(12, 5), "not a multiple of 5 heads"),
        (lambda: SelfAttention(9, 3), "even head width, not 3"),
        (lambda: FeedForward(4, 4, activation="relu"), "Did you mean"),
    ],
)
def test_what_cannot_be_is_refused(build, words):
    with pytest.raises(RecipeError, match=words):
        build()
