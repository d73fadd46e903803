"""The student as its own teacher: averages by hand, generations, and states that come back."""

import copy

import pytest
import torch
from tests.models.families import tiny_teacher, token_ids
from torch import nn

from limbeck.core.errors import CheckpointError
from limbeck.core.types import Batch, DenseTargets, SparseTargets
from limbeck.models.hybrid import build_student
from limbeck.models.packing import forward_batch
from limbeck.teachers.base import TargetSource, Wanted
from limbeck.teachers.entries import TopK
from limbeck.teachers.own import EmaTeacher, PreviousGeneration


def batch_of(rows=2, length=9):
    ids_BT = token_ids(rows, length)
    return Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))


def student_of(dtype=torch.float32):
    return build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={}).to(dtype)


def change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)


def dense_logits(source, batch):
    targets = source.targets(batch).logits
    assert isinstance(targets, DenseTargets)
    return targets.head(targets.hidden_BTD.flatten(0, 1)).unflatten(0, targets.hidden_BTD.shape[:2])


def logits_of(model, batch):
    with torch.no_grad():
        return forward_batch(model.eval(), batch).logits


def test_an_average_by_hand():
    """decay 0.9; the first updates keep (1 + step) / (10 + step): 2/11 and 3/12."""
    student = student_of()
    teacher = EmaTeacher(student, decay=0.9)
    assert isinstance(teacher, TargetSource)
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    w0 = student.get_parameter(name).detach().clone()
    change(student, 1)
    teacher.update(student, 1)
    w1 = student.get_parameter(name).detach().clone()
    change(student, 2)
    teacher.update(student, 2)
    w2 = student.get_parameter(name).detach()
    expected = 3 / 12 * (2 / 11 * w0 + 9 / 11 * w1) + 9 / 12 * w2
    torch.testing.assert_close(teacher.model.get_parameter(name).data, expected)
    before = teacher.model.get_parameter(name).detach().clone()
    teacher.update(student, 1_000_000)
    torch.testing.assert_close(teacher.model.get_parameter(name).data, 0.9 * before + 0.1 * w2)


def test_the_average_against_a_slow_reference():
    student = student_of().double()
    teacher = EmaTeacher(student, decay=0.7)
    slow = {name: p.detach().clone() for name, p in student.named_parameters()}
    for step in range(1, 30):
        change(student, step)
        teacher.update(student, step)
        keep = min(0.7, (1 + step) / (10 + step))
        slow = {name: keep * slow[name] + (1 - keep) * p.detach() for name, p in student.named_parameters()}
    for name, parameter in teacher.model.named_parameters():
        torch.testing.assert_close(parameter.data, slow[name])


def test_what_it_says_is_what_its_weights_say():
    student, batch = student_of(), batch_of()
    teacher = EmaTeacher(student, decay=0.5)
    start_BTV = logits_of(copy.deepcopy(student), batch)
    change(student, 1)
    torch.testing.assert_close(dense_logits(teacher, batch), start_BTV, atol=2e-6, rtol=1e-6)
    teacher.update(student, 1)
    torch.testing.assert_close(dense_logits(teacher, batch), logits_of(teacher.model, batch), atol=2e-6, rtol=1e-6)
    assert not torch.allclose(dense_logits(teacher, batch), start_BTV)
    follows = EmaTeacher(student, decay=0.0)
    change(student, 2)
    follows.update(student, 1)
    torch.testing.assert_close(dense_logits(follows, batch), logits_of(student, batch), atol=2e-6, rtol=1e-6)


def test_teaching_leaves_the_student_alone():
    student = student_of().train()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher = EmaTeacher(student, decay=0.5)
    teacher.update(student, 3)
    teacher.targets(batch_of())
    assert student.training
    assert not teacher.model.training
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.data, before[name], atol=0, rtol=0)
    own = {p.data_ptr() for p in teacher.model.parameters()}
    assert not own & {p.data_ptr() for p in student.parameters()}


def test_tied_weights_stay_tied():
    teacher = EmaTeacher(student_of(), decay=0.5)
    model = teacher.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum("embed_tokens" in name or "lm_head" in name for name in teacher.state_tensors()) == 1


def test_small_steps_of_sixteen_bit_weights_are_not_lost():
    """An average in bfloat16 would not move at all: a thousandth of 0.25 is below its rounding of 1."""
    student = student_of(torch.bfloat16)
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        student.get_parameter(name).fill_(1.0)
    teacher = EmaTeacher(student, decay=0.999)
    with torch.no_grad():
        student.get_parameter(name).fill_(1.25)
    for step in range(100_000, 100_500):
        teacher.update(student, step)
    expected = 1.25 - 0.25 * 0.999**500
    torch.testing.assert_close(teacher.state_tensors()[name].mean().item(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(teacher.model.get_parameter(name).float().mean().item(), expected, atol=4e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_average_goes_on_as_if_it_had_not_stopped(dtype):
    student = student_of(dtype)
    whole = EmaTeacher(student, decay=0.9)
    for step in (1, 2):
        change(student, step)
        whole.update(student, step)
    saved = {name: tensor.clone() for name, tensor in whole.state_tensors().items()}
    resumed = EmaTeacher(student_of(dtype), decay=0.9)
    resumed.load_state_tensors(saved)
    batch = batch_of()
    torch.testing.assert_close(dense_logits(resumed, batch), dense_logits(whole, batch), atol=0, rtol=0)
    for teacher in (whole, resumed):
        again = copy.deepcopy(student)
        change(again, 3)
        teacher.update(again, 3)
    for name, tensor in whole.state_tensors().items():
        torch.testing.assert_close(resumed.state_tensors()[name], tensor, atol=0, rtol=0)
    torch.testing.assert_close(dense_logits(resumed, batch), dense_logits(whole, batch), atol=0, rtol=0)


def test_a_state_of_another_student_is_refused():
    teacher = EmaTeacher(student_of(), decay=0.9)
    state = dict(teacher.state_tensors())
    name = next(iter(state))
    with pytest.raises(CheckpointError, match=f"the student's average belongs to another student.*{name}"):
        teacher.load_state_tensors({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(CheckpointError, match=name):
        teacher.load_state_tensors(state | {name: state[name][:1]})


def test_generations_follow_each_other():
    student, batch = student_of(), batch_of()
    start_BTV = logits_of(copy.deepcopy(student), batch)
    teacher = PreviousGeneration(student, every=2)
    assert isinstance(teacher, TargetSource)
    change(student, 1)
    teacher.update(student, 1)
    torch.testing.assert_close(dense_logits(teacher, batch), start_BTV, atol=2e-6, rtol=1e-6)
    change(student, 2)
    teacher.update(student, 2)
    second_BTV = logits_of(copy.deepcopy(student), batch)
    change(student, 3)
    teacher.update(student, 3)
    torch.testing.assert_close(dense_logits(teacher, batch), second_BTV, atol=2e-6, rtol=1e-6)
    other = PreviousGeneration(student_of(), every=2)
    other.load_state_tensors(teacher.state_tensors())
    torch.testing.assert_close(dense_logits(other, batch), second_BTV, atol=2e-6, rtol=1e-6)


def test_a_frozen_student_stays():
    student, batch = student_of(), batch_of()
    teacher = PreviousGeneration(student)
    start_BTV = logits_of(copy.deepcopy(student), batch)
    for step in range(1, 4):
        change(student, step)
        teacher.update(student, step)
    torch.testing.assert_close(dense_logits(teacher, batch), start_BTV, atol=2e-6, rtol=1e-6)
    teacher.advance(student)
    torch.testing.assert_close(dense_logits(teacher, batch), logits_of(student, batch), atol=2e-6, rtol=1e-6)


def test_it_hands_over_what_a_live_teacher_does():
    teacher = EmaTeacher(student_of(), decay=0.9, entries=TopK(4), vocabulary_size=90)
    teacher.prepare(Wanted(hidden=(1,)))
    targets = teacher.targets(batch_of())
    assert isinstance(targets.logits, SparseTargets)
    assert targets.logits.ids_BTK.shape == (2, 9, 4)
    assert targets.hidden[1].shape == (2, 9, 32)
    assert teacher.vocabulary_size == 90


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="decay is 1.5"):
        EmaTeacher(student_of(), decay=1.5)
    with pytest.raises(ValueError, match="every is 0"):
        PreviousGeneration(student_of(), every=0)
