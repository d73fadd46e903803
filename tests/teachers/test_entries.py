"""The top k and random draws of a teacher's distribution, against slow references."""

import math

import pytest
import torch

from limbeck.core.errors import TrainingError
from limbeck.core.types import Batch
from limbeck.teachers.entries import Sampled, TopK, sampled_targets, top_k_targets, uniforms_of


def unchanged(hidden):
    return hidden


def batch_of(ids, documents=None):
    ids_BT = torch.as_tensor(ids)
    return Batch(
        ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), None if documents is None else torch.as_tensor(documents)
    )


def test_top_k_by_hand():
    logits_BTV = torch.tensor([[[0.1, 0.6, 0.25, 0.05]]]).log() + 3
    kept = top_k_targets(logits_BTV, unchanged, k=2, chunk_tokens=8)
    assert kept.ids_BTK.tolist() == [[[1, 2]]]
    torch.testing.assert_close(kept.log_probs_BTK, torch.tensor([[[0.6, 0.25]]]).log())
    torch.testing.assert_close(kept.tail_log_prob_BT, torch.tensor([[0.15]]).log())
    assert kept.weights_BTK is None


@pytest.mark.parametrize("vocabulary", [7, 700])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("spread", [0.1, 12.0])
def test_top_k_against_a_slow_reference(vocabulary, chunk_tokens, spread):
    logits_BTV = torch.randn(2, 5, vocabulary) * spread
    kept = top_k_targets(logits_BTV, unchanged, k=3, chunk_tokens=chunk_tokens)
    for row in range(2):
        for place in range(5):
            logits = [float(value) for value in logits_BTV[row, place]]
            order = sorted(range(vocabulary), key=lambda token: -logits[token])
            weights = [math.exp(value - max(logits)) for value in logits]
            assert kept.ids_BTK[row, place].tolist() == order[:3]
            expected = torch.tensor([logits[i] - max(logits) - math.log(sum(weights)) for i in order[:3]])
            torch.testing.assert_close(kept.log_probs_BTK[row, place], expected)
            rest = math.log(sum(weights[i] for i in order[3:])) - math.log(sum(weights))
            torch.testing.assert_close(kept.tail_log_prob_BT[row, place].item(), rest, atol=2e-5, rtol=1e-5)


def test_all_entries_leave_nothing():
    logits_BTV = torch.randn(2, 3, 130)
    kept = top_k_targets(logits_BTV, unchanged, k=130, chunk_tokens=2)
    assert (kept.tail_log_prob_BT == -torch.inf).all()
    dense = torch.zeros(2, 3, 130).scatter(-1, kept.ids_BTK, kept.log_probs_BTK)
    torch.testing.assert_close(dense, logits_BTV.log_softmax(-1))
    assert top_k_targets(logits_BTV, unchanged, k=999, chunk_tokens=2).ids_BTK.shape[-1] == 130


def test_a_sure_teacher_keeps_its_small_tail():
    logits_BTV = torch.tensor([[[50.0, 0.0, 0.0]]])
    kept = top_k_targets(logits_BTV, unchanged, k=1, chunk_tokens=1)
    torch.testing.assert_close(kept.tail_log_prob_BT.item(), math.log(2) - 50, atol=1e-5, rtol=0)


def test_sixteen_bits_become_float32_log_probabilities():
    kept = top_k_targets(torch.randn(1, 2, 9, dtype=torch.bfloat16), unchanged, k=9, chunk_tokens=1)
    assert kept.log_probs_BTK.dtype == torch.float32
    torch.testing.assert_close(kept.log_probs_BTK.exp().sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers(bad):
    logits_BTV = torch.randn(2, 3, 5)
    logits_BTV[1, 2, 4] = bad
    with pytest.raises(TrainingError, match="not numbers .* at 1 positions"):
        top_k_targets(logits_BTV, unchanged, k=2, chunk_tokens=2)
    with pytest.raises(TrainingError, match="not numbers"):
        sampled_targets(logits_BTV, unchanged, torch.rand(2, 3, 4, dtype=torch.float64), chunk_tokens=2)
    logits_BTV[1, 2, 4] = -torch.inf
    assert top_k_targets(logits_BTV, unchanged, k=5, chunk_tokens=2).log_probs_BTK[1, 2, 4] == -torch.inf


def test_draws_by_hand():
    """Cumulated 0.2, 0.5, 1.0: numbers in each stretch draw its token; joined, with weights count / N."""
    logits_BTV = torch.tensor([[[0.2, 0.3, 0.5]]]).log() - 7
    uniforms = torch.tensor([[[0.1, 0.6, 0.99, 0.19999]]], dtype=torch.float64)
    drawn = sampled_targets(logits_BTV, unchanged, uniforms, chunk_tokens=1)
    assert drawn.ids_BTK.tolist() == [[[2, 0, -1, -1]]]
    assert drawn.weights_BTK is not None
    torch.testing.assert_close(drawn.weights_BTK, torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]))
    torch.testing.assert_close(drawn.log_probs_BTK[..., :2], torch.tensor([[[0.5, 0.2]]]).log())
    assert (drawn.log_probs_BTK[..., 2:] == -torch.inf).all()
    torch.testing.assert_close(drawn.tail_log_prob_BT, torch.tensor([[0.3]]).log())


def test_draws_from_a_flatter_proposal_by_hand():
    """p = (0.8, 0.2) at temperature 2 is drawn from q = (2/3, 1/3); the weight of a draw is p / q."""
    logits_BTV = torch.tensor([[[0.8, 0.2]]]).log()
    uniforms = torch.tensor([[[0.5, 0.6, 0.7]]], dtype=torch.float64)
    drawn = sampled_targets(logits_BTV, unchanged, uniforms, chunk_tokens=1, temperature=2.0)
    assert drawn.ids_BTK.tolist() == [[[0, 1, -1]]]
    assert drawn.weights_BTK is not None
    torch.testing.assert_close(drawn.weights_BTK, torch.tensor([[[2 / 3 * 1.2, 1 / 3 * 0.6, 0.0]]]))


@pytest.mark.parametrize("temperature", [0.8, 1.0, 2.0])
def test_the_estimate_is_unbiased(temperature):
    """Over all numbers of a fine regular grid, the mean estimate of sum p f is the sum itself."""
    vocabulary, grid = 6, 20_000
    logits_V = torch.randn(vocabulary)
    uniforms = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).view(1, grid, 1)
    drawn = sampled_targets(
        logits_V.expand(1, grid, -1), unchanged, uniforms, chunk_tokens=grid, temperature=temperature
    )
    values_V = torch.randn(vocabulary)
    assert drawn.weights_BTK is not None
    estimate = (drawn.weights_BTK * values_V[drawn.ids_BTK.clamp_min(0)]).sum(-1).double().mean().float()
    torch.testing.assert_close(estimate, (logits_V.softmax(-1) * values_V).sum(), atol=1e-3, rtol=0)


def test_tokens_that_cannot_be_are_never_drawn():
    logits_BTV = torch.tensor([[[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]]).expand(1, 3, 5)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64).view(1, 3, 1)
    drawn = sampled_targets(logits_BTV, unchanged, uniforms, chunk_tokens=3)
    assert drawn.ids_BTK.flatten().tolist() == [1, 3, 3]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 64])
def test_draws_do_not_depend_on_chunks(chunk_tokens):
    logits_BTV = torch.randn(3, 20, 50)
    uniforms = torch.rand(3, 20, 8, dtype=torch.float64)
    one = sampled_targets(logits_BTV, unchanged, uniforms, chunk_tokens=60)
    other = sampled_targets(logits_BTV, unchanged, uniforms, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(other.ids_BTK, one.ids_BTK, atol=0, rtol=0)
    torch.testing.assert_close(other.weights_BTK, one.weights_BTK, atol=0, rtol=0)


def test_numbers_depend_on_the_row_alone():
    ids = [[5, 6, 7, 8], [9, 10, 11, 12]]
    both = uniforms_of(batch_of(ids), draws=3, seed=0)
    assert both.shape == (2, 4, 3)
    torch.testing.assert_close(uniforms_of(batch_of(ids[1:]), draws=3, seed=0), both[1:], atol=0, rtol=0)
    one_document = uniforms_of(batch_of(ids, [[4] * 4] * 2), draws=3, seed=0)
    torch.testing.assert_close(one_document, both, atol=0, rtol=0)
    assert (uniforms_of(batch_of(ids), draws=3, seed=1) != both).all()
    packed = uniforms_of(batch_of(ids, [[0, 0, 1, 1], [0, 0, 0, 0]]), draws=3, seed=0)
    assert (packed[0] != both[0]).all()
    torch.testing.assert_close(packed[1], both[1], atol=0, rtol=0)


def test_impossible_numbers_are_refused():
    for make in (lambda: TopK(0), lambda: Sampled(0), lambda: Sampled(3, temperature=0.0)):
        with pytest.raises(ValueError):
            make()
