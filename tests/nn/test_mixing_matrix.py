"""The operator written as matrices gives what the operator gives."""

import pytest
import torch
from torch.testing import assert_close

from limbeck.nn.hyena import HyenaOperator
from limbeck.nn.mixing_matrix import mixing_matrix

FILTERS = {"modal": {}, "implicit": {"filter_length": 16}, "explicit": {"filter_length": 5}}
MASK = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [3] * 7])


def build(filter_name="modal", *, order=2):
    torch.manual_seed(0)
    operator = HyenaOperator(
        5, inner_width=6, order=order, filter=filter_name, filter_options=FILTERS[filter_name]
    ).double()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return operator


def values_of(operator, hidden, mask, documents):
    """The short-convolved value stream [B, C, T]: the only one that the matrix does not hold."""
    projected = operator.in_proj(hidden) * (1.0 if mask is None else mask.unsqueeze(-1))
    documents = torch.zeros(hidden.shape[:2]) if documents is None else documents
    rows = torch.zeros_like(projected)
    for b in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            rows[b, t] = operator.short_bias
            for lag in range(operator.short_conv):
                if lag <= t and (documents[b, t - lag : t + 1] == documents[b, t]).all():
                    rows[b, t] += operator.short_weight[:, -1 - lag] * projected[b, t - lag]
    return rows.chunk(operator.order + 1, dim=-1)[-1].transpose(1, 2)


@pytest.mark.parametrize(("mask", "documents"), [(None, None), (MASK, None), (None, DOCUMENTS), (MASK, DOCUMENTS)])
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("filter_name", FILTERS)
def test_the_matrix_applied_to_the_values_is_the_operator(filter_name, order, mask, documents):
    operator = build(filter_name, order=order)
    hidden = torch.randn(2, 7, 5, dtype=torch.float64)
    matrix = mixing_matrix(operator, hidden, mask_BT=mask, document_ids_BT=documents)
    assert matrix.shape == (2, 6, 7, 7)
    mixed = (matrix @ values_of(operator, hidden, mask, documents).unsqueeze(-1)).squeeze(-1)
    expected = operator(hidden, mask_BT=mask, document_ids_BT=documents)
    assert_close(operator.out_proj(mixed.transpose(1, 2)), expected, atol=1e-6, rtol=1e-5)


def test_nothing_comes_from_the_future_from_padding_or_from_another_document():
    matrix = mixing_matrix(build(), torch.randn(2, 7, 5, dtype=torch.float64), mask_BT=MASK, document_ids_BT=DOCUMENTS)
    seen = matrix.abs().amax(1) > 0
    run = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7])
    allowed = torch.ones(7, 7).tril().bool() & (run.unsqueeze(-1) == run.unsqueeze(1)) & MASK.unsqueeze(1)
    assert torch.equal(seen, allowed)


def test_gradients_reach_gates_and_filters():
    operator = build()
    mixing_matrix(operator, torch.randn(2, 7, 5, dtype=torch.float64)).square().sum().backward()
    for name, parameter in operator.named_parameters():
        assert (parameter.grad is None) == name.startswith("out_proj"), name
    gates, value = operator.in_proj.weight.grad[:12], operator.in_proj.weight.grad[12:]
    assert gates.abs().sum() > 0
    assert_close(value, torch.zeros_like(value))
