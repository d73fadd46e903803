"""Projections that stand beside the student."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.families import tiny_teacher
from torch.testing import assert_close

from limbeck.models.projections import FeatureProjections

PAIRS = [(1, 2), (2, 4)]


def test_equal_widths_need_none():
    projections = FeatureProjections(PAIRS, student_width=4, teacher_width=4)
    states = torch.randn(2, 3, 4)
    assert list(projections.parameters()) == []
    assert projections(states, (2, 4)) is states


def test_asked_for_they_start_as_the_identity():
    projections = FeatureProjections(PAIRS, student_width=4, teacher_width=4, always=True)
    states = torch.randn(2, 3, 4)
    assert len(list(projections.parameters())) == 2
    assert_close(projections(states, (1, 2)), states)
    with torch.no_grad():
        projections.weights_ED["student_1_teacher_2"].mul_(2)
    assert_close(projections(states, (1, 2)), 2 * states)
    assert_close(projections(states, (2, 4)), states)


def test_each_pair_has_its_own_linear_map():
    projections = FeatureProjections(PAIRS, student_width=3, teacher_width=5)
    states = torch.randn(2, 4, 3, requires_grad=True)
    for pair in PAIRS:
        weight = projections.weights_ED[f"student_{pair[0]}_teacher_{pair[1]}"]
        assert weight.shape == (5, 3)
        assert_close(projections(states, pair), states @ weight.T)
        assert_close(weight.T @ weight, torch.eye(3))
    first, second = projections.parameters()
    assert not torch.equal(first, second)
    projections(states, PAIRS[0]).sum().backward()
    assert first.grad is not None
    assert states.grad is not None
    assert second.grad is None
    assert projections(states.bfloat16(), PAIRS[0]).dtype == torch.float32


def test_the_start_is_drawn_from_the_seed_alone():
    def weights(seed):
        return list(FeatureProjections(PAIRS, student_width=3, teacher_width=5, seed=seed).parameters())

    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = weights(7)
    torch.manual_seed(2)
    again, other = weights(7), weights(8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    torch.set_rng_state(before)
    weights(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_saved_and_loaded_they_are_the_same(tmp_path):
    projections = FeatureProjections(PAIRS, student_width=3, teacher_width=5, seed=1)
    save_file(projections.state_dict(), tmp_path / "projections.safetensors")
    loaded = FeatureProjections(PAIRS, student_width=3, teacher_width=5, seed=2)
    loaded.load_state_dict(load_file(tmp_path / "projections.safetensors"), strict=True)
    states = torch.randn(1, 2, 3)
    for pair in PAIRS:
        assert_close(loaded(states, pair), projections(states, pair), atol=0, rtol=0)


def test_training_them_leaves_no_trace_in_the_student(tmp_path):
    student = copy.deepcopy(tiny_teacher("llama"))
    names = set(student.state_dict())
    projections = FeatureProjections([(1, 1)], student_width=32, teacher_width=40)
    optimizer = torch.optim.SGD([*student.parameters(), *projections.parameters()], lr=0.1)
    hidden = student(torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states[1]
    projections(hidden, (1, 1)).square().mean().backward()
    optimizer.step()
    student.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert set(student.state_dict()) == names
    assert saved <= names


def test_an_unknown_pair_is_refused():
    with pytest.raises(KeyError, match="student layer 1 and teacher layer 4"):
        FeatureProjections(PAIRS, student_width=3, teacher_width=3)(torch.zeros(1, 1, 3), (1, 4))
