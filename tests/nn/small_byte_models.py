"""Small byte models with weights that matter, random streams of symbols, and a slow reading of both."""

import random

import torch
import torch.nn.functional as F

from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS
from limbeck.nn.byte_pool import BytePoolNetwork
from limbeck.nn.byte_pool_settings import BytePoolSettings

TRUNKS = {
    "attention": {"heads": 4, "kv_heads": 2},
    "hyena": {"heads": 4, "mixers": ("hyena", "attention")},
    "looped": {"heads": 4, "loop": (0, 1, 2)},
}


def small_network(trunk="attention", *, seed=0, dtype=torch.float64, **options):
    """A network whose every parameter is away from its special start, so that nothing is hidden by zeros."""
    torch.manual_seed(seed)
    settings = {"patch_bytes": 5, "local_width": 8, "local_heads": 2, "decoder_layers": 2, **options}
    shape = {"width": 16, "layers": 2, "feed_forward": 24, "zero_init": False, **TRUNKS[trunk]}
    network = BytePoolNetwork(BytePoolSettings.read(settings | {"trunk": shape}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network.to(dtype).eval()


def stream(symbols, *, patch_bytes=5, seed=0, end_share=0.1):
    """A grammatical stream of so many symbols or one patch more, from its beginning."""
    draw = random.Random(seed)
    out = []
    while len(out) < symbols:
        if draw.random() < end_share:
            out.append(EOD)
        else:
            out += [draw.randrange(256) for _ in range(draw.randint(1, patch_bytes - 1))] + [EOP]
    return out


def rows_of(*rows):
    """Rows as one tensor, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [PAD] * (longest - len(row)) for row in rows])


def split_patches(symbols):
    """A grammatical row as lists of symbols; the last one may be open."""
    patches = [[]]
    for symbol in symbols:
        if symbol == BOS and patches[-1]:
            patches.append([])
        patches[-1].append(symbol)
        if symbol in (BOS, EOD, EOP):
            patches.append([])
    return [patch for patch in patches if patch]


def plain_block(block, x_ND, *, causal):
    """A local block on one sequence, with attention written out."""
    attention = block.attention
    h = block.attention_norm(x_ND)
    n, d = len(h), attention.head_width
    q, k, v = (layer(h).view(n, -1, d) for layer in (attention.query, attention.key, attention.value))
    if attention.query_norm is not None:
        q, k = attention.query_norm(q), attention.key_norm(k)
    scores_HQK = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
    if causal:
        scores_HQK = scores_HQK.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    y_ND = torch.einsum("hqk,khd->qhd", scores_HQK.softmax(-1), v).flatten(1)
    x_ND = x_ND + attention.out(y_ND)
    return x_ND + block.feed_forward(block.feed_forward_norm(x_ND))


def _embedded(network, patch, positions):
    """One patch's symbols as vectors of root mean square 1."""
    x_ND = network.embedding(torch.tensor(patch), torch.arange(len(patch))) + positions.weight[: len(patch)]
    return F.rms_norm(x_ND, x_ND.shape[-1:], eps=1e-12)


def slow_logits(network, symbols):
    """Logits [T, V] of one document without padding, patch by patch, for mean pooling."""
    encoder, decoder, settings = network.encoder, network.decoder, network.settings
    patches = split_patches(symbols)
    if symbols[0] == BOS:
        patches = patches[1:]

    def latent(patch):
        read = patch[:-1] if patch[-1] == EOP and len(patch) > 1 else patch
        x_ND = _embedded(network, read, encoder.positions)
        for block in encoder.blocks:
            x_ND = plain_block(block, x_ND, causal=False)
        return encoder.norm(encoder.up(x_ND.mean(0)))

    states_SD = network.trunk(torch.stack([latent(patch) for patch in [[BOS], *patches]]).unsqueeze(0))[0]

    def predictions(state_D, known, asked):
        prefix_KD = decoder.down(state_D).view(settings.prefix_slots, -1)
        x_ND = torch.cat([prefix_KD, _embedded(network, known, decoder.positions)]) if known else prefix_KD
        for block in decoder.blocks:
            x_ND = plain_block(block, x_ND, causal=True)
        rows = []
        for standing in asked:
            y_D = F.rms_norm(x_ND[settings.prefix_slots - 1 + standing], x_ND.shape[-1:], eps=1e-12)
            logits_V = network.embedding.symbols.weight @ y_D
            if settings.logit_softcap is not None:
                logits_V = settings.logit_softcap * torch.tanh(logits_V / settings.logit_softcap)
            rows.append(logits_V + forbid(standing, settings.patch_bytes, logits_V.dtype))
        return rows

    logits = predictions(states_SD[0], [], [0]) if symbols[0] == BOS else []
    for number, patch in enumerate(patches):
        inside = patch if patch[-1] < PAD else patch[:-1]
        logits += predictions(states_SD[number], inside, range(1, len(inside) + 1))
        if patch[-1] >= PAD:
            logits += predictions(states_SD[number + 1], [], [0])
    return torch.stack(logits)


def forbid(standing, patch_bytes, dtype):
    """0 for symbols that may come next, -1e10 less the logit's own worth for the others."""
    out_V = torch.zeros(SYMBOLS, dtype=dtype)
    out_V[[PAD, BOS, EOP if standing == 0 else EOD]] = -1e10
    if standing == patch_bytes - 1:
        out_V[:256] = -1e10
    return out_V


def assert_same_logits(found, expected, *, tolerance=1e-10):
    """Equal where symbols are allowed, and both forbidden elsewhere."""
    torch.testing.assert_close(found < -1e8, expected < -1e8)
    torch.testing.assert_close(found.clamp_min(-1e3), expected.clamp_min(-1e3), atol=tolerance, rtol=0)
