"""Several teachers as one: mixtures by hand, routing by row, and what is exact."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.models.families import VOCABULARY, tiny_teacher, token_ids

from limbeck.core.errors import TeacherError, VocabularyError
from limbeck.core.types import Batch, DenseTargets, SparseTargets, Targets
from limbeck.teachers.base import TargetSource, Wanted
from limbeck.teachers.entries import Dense, Sampled, TopK
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.several import SeveralTeachers, weights_by_text


class Says:
    """A teacher that says the same [V] at every position, dense or in part."""

    def __init__(self, probs, *, keep=None, name="one", weights=None):
        self.log_p_V = torch.tensor(probs).log()
        self.keep, self.name, self.weights, self.rows_asked = keep, name, weights, []

    @property
    def vocabulary_size(self):
        return len(self.log_p_V)

    def prepare(self, wanted):
        self.wanted = wanted

    def targets(self, batch):
        B, T = batch.input_ids_BT.shape
        self.rows_asked.append(B)
        if self.keep is None:
            # A constant is added: logits may carry any.
            return Targets(DenseTargets.from_logits((self.log_p_V + 2.5).expand(B, T, -1)))
        ids = torch.tensor(self.keep)
        left = [i for i in range(len(self.log_p_V)) if i not in self.keep]
        tail = self.log_p_V[left].logsumexp(0) if left else torch.tensor(-torch.inf)
        weights = None if self.weights is None else torch.tensor(self.weights).expand(B, T, -1)
        return Targets(
            SparseTargets(
                ids.expand(B, T, -1), self.log_p_V[ids].expand(B, T, -1), tail.expand(B, T), weights
            )
        )  # fmt: skip


def batch_of(rows=3, length=11, keys=None):
    ids_BT = token_ids(rows, length)
    documents_BT = torch.zeros_like(ids_BT)
    documents_BT[:, 4:] = 1
    return Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), documents_BT, None, keys)


def head_of(targets):
    assert isinstance(targets.logits, DenseTargets)
    return targets.logits.head(targets.logits.hidden_BTD.flatten(0, 1)).unflatten(
        0, targets.logits.hidden_BTD.shape[:2]
    )


def as_dict(sparse, row=0, place=0):
    return {
        token: log_p
        for token, log_p in zip(
            sparse.ids_BTK[row, place].tolist(), sparse.log_probs_BTK[row, place].exp().tolist(), strict=True
        )
        if token >= 0
    }


ONE, TWO = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [2.0, 6.0], [0.0, 1.0]])
def test_a_dense_mixture_by_hand(weights):
    several = SeveralTeachers([Says(ONE), Says(TWO, name="two")], weights=weights)
    assert isinstance(several, TargetSource)
    assert (several.name, several.vocabulary_size) == ("one + two", 4)
    first, second = weights or [0.5, 0.5]
    expected_V = (torch.tensor(ONE) * first + torch.tensor(TWO) * second) / (first + second)
    targets = several.targets(batch_of())
    torch.testing.assert_close(head_of(targets).softmax(-1), expected_V.expand(3, 11, -1))
    assert targets.weight_B is None


@pytest.mark.parametrize("kinds", [(Dense(), Dense()), (TopK(VOCABULARY), TopK(VOCABULARY))], ids=["dense", "sparse"])
def test_live_teachers_of_two_families_with_everything_kept(kinds):
    """Hidden states of different widths side by side; with k = V the sparse mixture is the dense one."""
    models = [tiny_teacher("llama"), tiny_teacher("gemma2", layers=1)]
    sources = [LiveTeacher(model, entries=kind) for model, kind in zip(models, kinds, strict=True)]
    batch = batch_of()
    alone = [head_of(LiveTeacher(model).targets(batch)).double().softmax(-1) for model in models]
    expected_BTV = 0.3 * alone[0] + 0.7 * alone[1]
    logits = SeveralTeachers(sources, weights=[0.3, 0.7]).targets(batch).logits
    if isinstance(logits, DenseTargets):
        picked_BT = torch.rand(3, 11) < 0.5
        mixed_NV = logits.head(logits.hidden_BTD[picked_BT]).double().softmax(-1)
        torch.testing.assert_close(mixed_NV, expected_BTV[picked_BT], atol=1e-6, rtol=1e-5)
    else:
        assert (logits.tail_log_prob_BT == -torch.inf).all()
        used_BTK = logits.ids_BTK >= 0
        assert (used_BTK.sum(-1) == VOCABULARY).all()
        dense_BTV = torch.zeros(3, 11, VOCABULARY).scatter(-1, logits.ids_BTK[..., :VOCABULARY],
                                                           logits.log_probs_BTK[..., :VOCABULARY].exp())  # fmt: skip
        torch.testing.assert_close(dense_BTV.double(), expected_BTV, atol=1e-6, rtol=1e-5)


def test_sixteen_bit_teachers_keep_their_weights_to_the_last_digit():
    models = [copy.deepcopy(tiny_teacher(family)).bfloat16() for family in ("llama", "phi")]
    batch, third = batch_of(), torch.tensor([[1 / 3, 2 / 3]] * 3)
    alone = [head_of(LiveTeacher(model).targets(batch)).float().softmax(-1) for model in models]
    targets = SeveralTeachers([LiveTeacher(model) for model in models], weights=lambda _: third).targets(batch)
    torch.testing.assert_close(head_of(targets).softmax(-1), alone[0] / 3 + alone[1] * 2 / 3, atol=1e-6, rtol=1e-5)


def test_the_union_of_sparse_targets_by_hand():
    several = SeveralTeachers([Says(ONE, keep=[0, 1]), Says(TWO, keep=[3, 1], name="two")], weights=[1, 3])
    sparse = several.targets(batch_of()).logits
    assert isinstance(sparse, SparseTargets)
    # Exact for token 1, which both kept; a lower bound for 0 and 3.
    found = as_dict(sparse)
    assert list(found) == [3, 1, 0]
    expected = {3: 0.75 * 0.4, 1: 0.25 * 0.3 + 0.75 * 0.2, 0: 0.25 * 0.5}
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(sparse.tail_log_prob_BT[0, 0].exp().item(), 0.25 * 0.2 + 0.75 * 0.4, atol=1e-6, rtol=0)
    assert sum(found.values()) + 0.35 == pytest.approx(1)
    assert sparse.ids_BTK[0, 0].tolist()[3] == -1
    assert sparse.log_probs_BTK[0, 0, 3] == -torch.inf
    assert sparse.weights_BTK is None


def test_only_common_entries_are_exact():
    teachers = [Says(ONE, keep=[0, 1]), Says(TWO, keep=[3, 1], name="two")]
    sparse = SeveralTeachers(teachers, weights=[1, 3], kept="common").targets(batch_of()).logits
    assert isinstance(sparse, SparseTargets)
    exact = 0.25 * 0.3 + 0.75 * 0.2
    assert as_dict(sparse) == pytest.approx({1: exact}, rel=1e-6)
    torch.testing.assert_close(sparse.tail_log_prob_BT[0, 0].exp().item(), 1 - exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kept", ["union", "common"])
def test_masses_of_top_k_mixtures_sum_to_one(kept):
    sources = [LiveTeacher(tiny_teacher(family), entries=TopK(9)) for family in ("llama", "phi", "gpt2")]
    sparse = SeveralTeachers(sources, weights=[1, 2, 3], kept=kept).targets(batch_of()).logits
    assert isinstance(sparse, SparseTargets)
    total_BT = sparse.log_probs_BTK.exp().sum(-1) + sparse.tail_log_prob_BT.exp()
    torch.testing.assert_close(total_BT, torch.ones(3, 11))
    assert (sparse.log_probs_BTK.diff(dim=-1).nan_to_num(0) <= 0).all()
    for ids in sparse.ids_BTK.flatten(0, 1).tolist():
        used = [token for token in ids if token >= 0]
        assert len(set(used)) == len(used)


def test_sampled_targets_add_up():
    one = Says(ONE, keep=[0, 1, 2], weights=[0.5, 0.25, 0.25])
    two = Says(TWO, keep=[1, 3, 0], weights=[0.5, 0.25, 0.25], name="two")
    sparse = SeveralTeachers([one, two], weights=[1, 3]).targets(batch_of()).logits
    assert isinstance(sparse, SparseTargets)
    assert sparse.weights_BTK is not None
    found = dict(zip(sparse.ids_BTK[0, 0].tolist(), sparse.weights_BTK[0, 0].tolist(), strict=True))
    found.pop(-1)
    expected = {0: 0.25 * 0.5 + 0.75 * 0.25, 1: 0.25 * 0.25 + 0.75 * 0.5, 2: 0.25 * 0.25, 3: 0.75 * 0.25}
    assert found == pytest.approx(expected, rel=1e-6)
    live = [LiveTeacher(tiny_teacher(family), entries=Sampled(6)) for family in ("llama", "phi")]
    weights_BTK = SeveralTeachers(live).targets(batch_of()).logits.weights_BTK
    torch.testing.assert_close(weights_BTK.sum(-1), torch.ones(3, 11))


@pytest.mark.parametrize("keep", [None, [0, 1]], ids=["dense", "top-k"])
def test_rows_are_routed_by_any_function_of_the_batch(keep):
    one, two = Says(ONE, keep=keep), Says(TWO, keep=keep, name="two")
    weights_BI = torch.tensor([[1, 0], [0, 1], [0.25, 0.25], [0, 0]])
    targets = SeveralTeachers([one, two], weights=lambda batch: weights_BI).targets(batch_of(4))
    assert (one.rows_asked, two.rows_asked) == ([2], [2])
    torch.testing.assert_close(targets.weight_B, torch.tensor([1.0, 1.0, 0.5, 0.0]))
    mixed = [(a + b) / 2 for a, b in zip(ONE, TWO, strict=True)]
    if keep is None:
        probs_BTV = head_of(targets).softmax(-1)
        torch.testing.assert_close(probs_BTV[:, 5], torch.tensor([ONE, TWO, mixed, [0.25] * 4]))
        return
    sparse = targets.logits
    assert isinstance(sparse, SparseTargets)
    for row, probs in enumerate([ONE, TWO, mixed]):
        assert as_dict(sparse, row) == pytest.approx({0: probs[0], 1: probs[1]}, rel=1e-6)
        torch.testing.assert_close(sparse.tail_log_prob_BT[row, 2].exp().item(), probs[2] + probs[3], atol=1e-6, rtol=0)
    assert as_dict(sparse, 3) == {}
    assert sparse.tail_log_prob_BT[3].tolist() == [0.0] * 11


def test_teachers_of_certain_texts_count_in_their_rows_alone():
    batch = replace(batch_of(4), sources=(0, 1, 2, 0))
    found = weights_by_text([1.0, 3.0, 1.0], [None, [0, 1], [1]])(batch)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75, 0], [0.2, 0.6, 0.2], [1, 0, 0], [0.25, 0.75, 0]]))
    assert not weights_by_text([1.0], [[1]])(batch_of(3)).any()


@pytest.mark.parametrize("keep", [None, [0, 1]], ids=["dense", "top-k"])
def test_a_batch_without_any_teacher(keep):
    teachers = [Says(ONE, keep=keep), Says(TWO, keep=keep, name="two")]
    targets = SeveralTeachers(teachers, weights=lambda batch: torch.zeros(3, 2)).targets(batch_of())
    torch.testing.assert_close(targets.weight_B, torch.zeros(3))
    if keep is None:
        torch.testing.assert_close(head_of(targets).softmax(-1), torch.full((3, 11, 4), 0.25))
    else:
        assert (targets.logits.ids_BTK == -1).all()
        assert (targets.logits.tail_log_prob_BT == 0).all()


def test_what_is_wanted_reaches_every_teacher():
    teachers = [Says(ONE), Says(TWO, name="two")]
    several = SeveralTeachers(teachers, name="both")
    several.prepare(Wanted())
    assert all(teacher.wanted == Wanted() for teacher in teachers)
    with pytest.raises(TeacherError, match="the teacher both gives logits, but .* hidden.*one teacher alone"):
        several.prepare(Wanted(hidden=(1,)))


def test_teachers_that_cannot_be_mixed():
    with pytest.raises(VocabularyError, match=r"4 \(one\), 3 \(two\)"):
        SeveralTeachers([Says(ONE), Says([0.5, 0.25, 0.25], name="two")])
    with pytest.raises(TeacherError, match="dense and top-k targets, which cannot be mixed"):
        SeveralTeachers([Says(ONE), Says(TWO, keep=[1], name="two")]).targets(batch_of())
    with pytest.raises(TeacherError, match="none is named"):
        SeveralTeachers([])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 teachers"),
        ([1.0, -1.0], "must be 0 or more"),
        ([0.0, 0.0], "one of them above 0"),
        ([1.0, float("nan")], "must be 0 or more"),
        (lambda batch: torch.ones(3, 3), r"shape \(3, 3\); \(3, 2\) was expected"),
        (lambda batch: -torch.ones(3, 2), "negative or not a number"),
    ],
)
def test_weights_that_cannot_be(weights, message):
    with pytest.raises(TeacherError, match=message):
        SeveralTeachers([Says(ONE), Says(TWO)], weights=weights).targets(batch_of())
