"""The network over tokens: one matrix with one name, a quiet start, and reading on from a cache."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.nn.test_trunk import BASE, HYENA

from limbeck.core.errors import RecipeError
from limbeck.nn.compact import CompactNetwork
from limbeck.nn.trunk import TrunkCache

VOCABULARY = 31


def network_of(*, moved=True, trunk=None, **options):
    torch.manual_seed(0)
    network = CompactNetwork(vocab_size=VOCABULARY, trunk=BASE | (trunk or {}), **options).double().eval()
    if moved:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def ids(rows=2, length=9):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def test_logits_by_their_definition():
    network, ids_BT = network_of(), ids()
    embedded = network.embedding.weight[ids_BT]
    hidden = network.trunk(embedded / embedded.square().mean(-1, keepdim=True).sqrt())
    expected = 15 * torch.tanh(hidden @ network.embedding.weight.T / 15)
    torch.testing.assert_close(network(ids_BT), expected, atol=1e-9, rtol=1e-9)
    uncapped = network_of(logit_softcap=None)
    torch.testing.assert_close(15 * torch.tanh(uncapped(ids_BT) / 15), expected, atol=1e-9, rtol=1e-9)


def test_a_tied_matrix_has_one_name_and_both_gradients():
    network, ids_BT = network_of(), ids()
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    assert [name for name in names if "embedding" in name or "head" in name] == ["embedding.weight"]
    assert [name for name in network.state_dict() if "head" in name] == []
    assert next(network.head.parameters()) is network.embedding.weight
    apart = network_of(tie_embeddings=False)
    apart.load_state_dict(network.state_dict() | {"head.weight": network.embedding.weight})
    torch.testing.assert_close(apart(ids_BT), network(ids_BT), atol=0, rtol=0)
    for model in (network, apart):
        F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    both = apart.embedding.weight.grad + apart.head.weight.grad
    torch.testing.assert_close(network.embedding.weight.grad, both, atol=1e-12, rtol=1e-9)


def test_copies_and_conversions_stay_tied():
    network = copy.deepcopy(network_of()).to(torch.float32)
    assert network.head.weight is network.embedding.weight
    with torch.no_grad():
        network.embedding.weight.zero_()
    assert not network(ids()).any()
    network.set_embedding(torch.nn.Embedding(40, BASE["width"]))
    assert network(ids()).shape[-1] == 40


@pytest.mark.parametrize("width", [16, 256])
def test_training_starts_at_the_loss_of_knowing_nothing(width):
    torch.manual_seed(0)
    network = CompactNetwork(vocab_size=500, trunk={"width": width, "layers": 2, "heads": 4, "feed_forward": 32})
    ids_BT = torch.randint(500, (4, 64))
    logits_BTV = network(ids_BT).double()
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)
    own = logits_BTV.gather(-1, ids_BT.unsqueeze(-1))
    assert own.mean().item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("trunk", [{}, HYENA], ids=["attention", "hyena"])
@torch.no_grad()
def test_reading_on_is_one_pass(trunk):
    network, ids_BT = network_of(trunk=trunk), ids()
    cache = TrunkCache.empty(network.trunk, 2, "cpu", torch.float64)
    parts = [network(part, cache=cache) for part in ids_BT.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), network(ids_BT), atol=1e-10, rtol=1e-10)


def test_flops_add_the_head():
    network = network_of()
    assert network.flops_per_token(8) == network.trunk.flops_per_position(8) + 2 * VOCABULARY * BASE["width"]


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="logit_softcap must be positive"):
        network_of(logit_softcap=0.0)
    with pytest.raises(RecipeError, match="vocab_size"):
        CompactNetwork(vocab_size=0, trunk=BASE)
