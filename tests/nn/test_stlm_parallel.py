"""The original's byte model: its blocks, that symbols of a patch are independent, and that nothing reads padding."""

import pytest
import torch
from tests.nn.small_byte_models import (
    assert_same_logits,
    forbid,
    plain_block,
    rows_of,
    small_network,
    split_patches,
    stream,
)

from limbeck.core.symbols import BOS, EOP, PAD
from limbeck.nn.byte_pool_settings import PARALLEL_DEFAULTS, BytePoolSettings
from limbeck.nn.stlm_parallel import widths

OPTIONS = {"mode": "stlm_parallel", "encoder_layers": 3}


def plain_widening(block, x_ND):
    """Attention with a residual, and the feed-forward's output alone."""
    whole_ND = plain_block(_Halved(block), x_ND, causal=False)
    return block.feed_forward(block.feed_forward_norm(whole_ND))


class _Halved:
    """A block whose feed-forward adds nothing."""

    def __init__(self, block):
        self.attention, self.attention_norm = block.attention, block.attention_norm
        self.feed_forward = self.feed_forward_norm = lambda x: x * 0


def slow_parallel_logits(network, symbols):
    """Logits [T, V] of one document that begins with BOS."""
    encoder, decoder, patch_bytes = network.encoder, network.decoder, network.settings.patch_bytes

    def latent(patch):
        read = patch[:-1] if patch[-1] == EOP and len(patch) > 1 else patch
        x_ND = network.embedding(torch.tensor(read), torch.arange(len(read))) + encoder.positions.weight[: len(read)]
        for block in encoder.blocks:
            x_ND = plain_widening(block, x_ND)
        return x_ND.mean(0)

    patches = split_patches(symbols)
    states_SD = network.trunk(torch.stack([latent(patch) for patch in patches if patch[-1] >= PAD]).unsqueeze(0))[0]
    logits = []
    for number, patch in enumerate(patches):
        for slot, symbol in enumerate(patch):
            state_D, standing = (states_SD[number], 0) if symbol >= PAD else (states_SD[number - 1], slot + 1)
            x_PD = decoder.down(state_D).view(patch_bytes, -1) + decoder.positions.weight
            for block in decoder.blocks:
                x_PD = plain_widening(block, x_PD)
            logits.append(network.output(x_PD[standing]) + forbid(standing, patch_bytes, x_PD.dtype))
    return torch.stack(logits)


@pytest.mark.parametrize("trunk", ["attention", "hyena"])
def test_agrees_with_reading_patch_by_patch(trunk):
    network = small_network(trunk, **OPTIONS)
    rows = [[BOS, *stream(30, seed=1)], [BOS, *stream(11, seed=2)][:10]]
    for row, found in zip(rows, network(rows_of(*rows)), strict=True):
        assert_same_logits(found[: len(row)], slow_parallel_logits(network, row))


def test_gradients_agree():
    network = small_network("attention", **OPTIONS)
    row = [BOS, *stream(14, seed=3)]
    weight = torch.randn(len(row), 260, dtype=torch.float64)
    parameters = list(network.parameters())
    found, expected = (
        torch.autograd.grad((logits.clamp_min(-1e3) * weight).sum(), parameters)
        for logits in (network(torch.tensor([row]))[0], slow_parallel_logits(network, row))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_symbols_of_a_patch_do_not_depend_on_each_other():
    network = small_network("attention", **OPTIONS)
    first, second = network(torch.tensor([[1, 2, EOP, 3, 4, 5, EOP], [1, 2, EOP, 9, 8, 7, EOP]]))
    torch.testing.assert_close(first[:6], second[:6], atol=1e-12, rtol=0)
    assert (first[6] - second[6]).abs().max() > 1e-3


def test_settings_that_are_not_given_are_the_originals():
    settings = BytePoolSettings.read({"mode": "stlm_parallel", "local_heads": 4, "trunk": {
        "width": 768, "layers": 1, "heads": 16, "feed_forward": 64}})  # fmt: skip
    assert settings.local_heads == 4
    assert settings.patch_bytes == PARALLEL_DEFAULTS["patch_bytes"]
    assert widths(128, 768, layers=4) == [(128, 256), (256, 256), (256, 256), (256, 768)]
    assert widths(8, 16, layers=1) == [(8, 16)]
