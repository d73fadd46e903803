import copy

import pytest
import torch
from tests.models.families import FAMILIES, tiny_teacher, token_ids

from limbeck.models.documents import document_positions, documents_of_positions, forward_packed, separate_padding
from limbeck.models.hybrid import build_student

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [4, 4, 1, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]])
LAYOUTS = [["hyena", "hyena"], ["attention", "hyena"], ["hyena", "attention"], ["attention", "attention"]]


def separately(model, ids_BT):
    """Each document run alone, put back in place."""
    rows = []
    for ids_T, documents_T in zip(ids_BT, DOCUMENTS, strict=True):
        _, sizes = documents_T.unique_consecutive(return_counts=True)
        rows.append(
            torch.cat([model(part[None], use_cache=False).logits for part in ids_T.split(sizes.tolist())], dim=1)
        )
    return torch.cat(rows)


def test_positions_restart():
    assert document_positions(DOCUMENTS).tolist() == [[0, 1, 2, 3, 4, *range(9)], [0, 1, 0, *range(9), 0, 1]]


def test_documents_are_read_off_positions():
    found = documents_of_positions(document_positions(DOCUMENTS))
    assert found.tolist() == [[0] * 5 + [1] * 9, [0, 0, 1] + [2] * 9 + [3, 3]]
    assert documents_of_positions(torch.arange(5, 9)[None]) is None
    assert documents_of_positions(torch.arange(1)[None]) is None


def test_padding_is_a_document_of_its_own():
    mask = torch.ones_like(DOCUMENTS)
    mask[:, :2] = 0
    assert separate_padding(DOCUMENTS, mask)[:, :3].tolist() == [[-1, -1, 0], [-1, -1, 1]]
    assert separate_padding(DOCUMENTS, None) is DOCUMENTS


@pytest.mark.parametrize("mixers", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_as_if_alone(family, mixers):
    student = build_student(tiny_teacher(family), mixers=mixers, hyena={})
    ids_BT = token_ids(2, DOCUMENTS.shape[1])
    with torch.no_grad():
        expected = separately(student, ids_BT)
        for found in (
            student(ids_BT, document_ids=DOCUMENTS),
            student(ids_BT, position_ids=document_positions(DOCUMENTS)),
            forward_packed(student, ids_BT, DOCUMENTS),
        ):
            torch.testing.assert_close(found.logits, expected, atol=2e-5, rtol=1e-4)
            assert found.past_key_values is None


@pytest.mark.parametrize("is_eager", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_teacher_keeps_packed_documents_apart(family, is_eager):
    teacher = copy.deepcopy(tiny_teacher(family))
    if is_eager:
        teacher.set_attn_implementation("eager")
    ids_BT = token_ids(2, DOCUMENTS.shape[1])
    with torch.no_grad():
        found = forward_packed(teacher, ids_BT, DOCUMENTS).logits
        torch.testing.assert_close(found, separately(teacher, ids_BT), atol=2e-5, rtol=1e-4)
        whole = forward_packed(teacher, ids_BT, None).logits
        torch.testing.assert_close(whole, teacher(ids_BT).logits, atol=0, rtol=0)
        body = forward_packed(teacher.base_model, ids_BT, DOCUMENTS).last_hidden_state
    assert body.shape[:2] == ids_BT.shape


def test_packing_and_padding_together():
    student = build_student(tiny_teacher("mistral"), mixers=["hyena", "attention"], hyena={})
    ids_BT = token_ids(1, 8)
    with torch.no_grad():
        plain = student(ids_BT, document_ids=DOCUMENTS[:1, :8]).logits
        padded_ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids_BT], dim=1)
        padded_documents = torch.cat([DOCUMENTS[:1, :3], DOCUMENTS[:1, :8]], dim=1)
        mask = torch.tensor([[0, 0, 0] + [1] * 8])
        padded = student(padded_ids, attention_mask=mask, document_ids=padded_documents).logits
    torch.testing.assert_close(padded[:, 3:], plain, atol=2e-5, rtol=1e-4)


def test_gradients_do_not_cross_documents():
    student = build_student(tiny_teacher("opt"), mixers=["hyena", "attention"], hyena={})
    embedded = student.get_input_embeddings()(token_ids(1, 8)).detach().requires_grad_(True)
    logits = student(inputs_embeds=embedded, document_ids=DOCUMENTS[:1, :8], use_cache=False).logits
    logits[:, 5:].sum().backward()
    assert embedded.grad[:, :5].abs().max() == 0
    assert embedded.grad[:, 5:].abs().min() > 0


def test_documents_and_a_cache_exclude_each_other():
    student = build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})
    with pytest.raises(ValueError, match="exclude each other"):
        student(token_ids(2, 14), document_ids=DOCUMENTS, use_cache=True)
