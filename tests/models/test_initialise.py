"""Calibrated starts: closed forms against plain loops, and better than what they replace."""

import pytest
import torch
from torch.testing import assert_close

from limbeck.core.errors import RecipeError
from limbeck.core.types import Batch
from limbeck.models.hybrid import build_student
from limbeck.models.initialise import (
    calibrate,
    capture,
    copy_projections,
    inner_output,
    mean_attention_by_lag,
    moments,
    normalised_error,
    ridge_solution,
)
from limbeck.models.surgery import find_attention
from limbeck.nn.hyena import HyenaOperator


@pytest.fixture(scope="module")
def teacher():
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def batches(count, rows=4, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(53, (rows, width), generator=generator)
        found.append(Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    return found


def test_mean_attention_by_lag_against_a_loop(teacher):
    batch = batches(1)[0]
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        weights = teacher(input_ids=batch.input_ids_BT, output_attentions=True).attentions[1]
    teacher.set_attn_implementation("sdpa")
    found = mean_attention_by_lag(teacher, [batch], layers=[1])[1]
    for lag in (0, 1, 7, 23):
        by_hand = torch.stack([weights[:, :, t, t - lag] for t in range(lag, 24)]).mean((0, 1))
        assert_close(found[:, lag], by_hand)
    assert teacher.config._attn_implementation == "sdpa"


def test_the_ridge_solution_against_least_squares():
    torch.manual_seed(1)
    features, targets = torch.randn(5, 12, 6, dtype=torch.float64) + 1, torch.randn(5, 12, 4, dtype=torch.float64) - 2
    known = moments(features, targets, rows=2)
    weight, bias = ridge_solution(known, ridge=0.0, has_bias=True)
    flat, wanted = features.flatten(0, 1), targets.flatten(0, 1)
    expected = torch.linalg.lstsq(torch.cat([flat, torch.ones(60, 1, dtype=torch.float64)], 1), wanted).solution
    assert_close(torch.cat([weight.T, bias[None]]), expected)
    by_hand = (flat @ weight.T + bias - wanted).square().sum()
    assert known.squared_error(weight, bias) == pytest.approx(float(by_hand))
    weight, bias = ridge_solution(known, ridge=0.0, has_bias=False)
    assert_close(weight.T, torch.linalg.lstsq(flat, wanted).solution)
    assert not bias.any()


def test_scaled_moments_are_those_of_scaled_features():
    features, targets = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    factor = torch.tensor([2.0, 0.1], dtype=torch.float64)
    one, other = moments(features, targets).scaled(factor), moments(features * factor, targets)
    assert_close(one.gram_MM, other.gram_MM)
    assert_close(one.cross_MD, other.cross_MD)


def test_a_ridge_by_hand():
    known = moments(torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[2.0], [2.0]]]))
    weight, _ = ridge_solution(known, ridge=0.5, has_bias=False)
    assert float(weight) == pytest.approx(4 / 3)


def test_inner_output_is_what_the_output_projection_sees():
    operator = HyenaOperator(6).double()
    inputs = torch.randn(5, 12, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_close(operator.out_proj(inner_output(operator, inputs, document_ids_BT=None, rows=2)), operator(inputs))


def test_normalised_error_by_hand():
    operator = HyenaOperator(4).double()
    inputs, outputs = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = (operator(inputs) - outputs).square().sum() / outputs.square().sum()
    assert normalised_error(operator, inputs, outputs, document_ids_BT=None) == pytest.approx(float(expected))
    torch.nn.init.zeros_(operator.out_proj.weight)
    torch.nn.init.zeros_(operator.out_proj.bias)
    assert normalised_error(operator, inputs, outputs, document_ids_BT=None) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "hyena", [{"filter": "modal"}, {"filter": "explicit"}, {"filter": "implicit"}, {"order": 3}, {"inner_width": 64}]
)
def test_calibration_beats_zero_random_and_plain_copies(teacher, hyena):
    torch.manual_seed(2)
    student = build_student(teacher, mixers=["hyena", "hyena"], hyena=hyena).eval()
    operators = {layer: mixer.operator for layer, mixer in student.mixers().items()}
    fits = calibrate(teacher, operators, batches(16), batches(4, seed=9))
    sites = {site.layer_index: site for site in find_attention(teacher)}
    unseen = capture(teacher, batches(4, seed=9), {layer: site.module for layer, site in sites.items()})
    for fit in fits:
        assert fit.after < 0.95
        assert fit.after < fit.before
        again = normalised_error(operators[fit.layer], *unseen[fit.layer], document_ids_BT=None)
        assert again == pytest.approx(fit.after, rel=1e-5)
        copy_projections(operators[fit.layer], sites[fit.layer])
        assert normalised_error(operators[fit.layer], *unseen[fit.layer], document_ids_BT=None) > fit.after


def test_channels_that_do_not_hold_the_heads_are_refused(teacher):
    student = build_student(teacher, mixers=["hyena", "attention"], hyena={"inner_width": 40})
    operators = {layer: mixer.operator for layer, mixer in student.mixers().items()}
    with pytest.raises(RecipeError, match=r"40 inner channels are not a multiple.*hyena\.expand"):
        calibrate(teacher, operators, batches(2), batches(1))
