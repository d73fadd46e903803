"""Objectives on hidden states, maps and relations: by hand, against slow float64 references, and their invariants."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from limbeck.core.errors import RecipeError
from limbeck.objectives.features import (
    FEATURE_OBJECTIVES,
    attention_kl,
    contrastive,
    feature_loss,
    feature_positions,
    hidden_cosine,
    hidden_mse,
    linear_cka,
    mixing_matrix_distance,
    qkv_relation,
    value_relation,
)

ROWS, LENGTH, WIDTH, HEADS = 2, 6, 4, 3


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def maps(seed, *, heads=HEADS):
    """Causal attention maps [B, H, T, T]."""
    scores = draw(ROWS, heads, LENGTH, LENGTH, seed=seed)
    return scores.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -math.inf).softmax(-1)


def sample(name, seed):
    """A tensor, or three, of the kind that an objective compares."""
    needs = FEATURE_OBJECTIVES[name].needs
    if needs[0] in ("attention", "mixer"):
        return maps(seed)
    drawn = tuple(draw(ROWS, LENGTH, WIDTH, seed=seed + 10 * place) for place in range(len(needs)))
    return drawn[0] if len(drawn) == 1 else drawn


def leaves(value):
    return value if isinstance(value, tuple) else (value,)


def value_of(name, student, teacher, **context):
    options = {"relation_heads": 2} if "relation_heads" in FEATURE_OBJECTIVES[name].options else {}
    return FEATURE_OBJECTIVES[name].function(student, teacher, **options, **context)


# By hand.


def test_hidden_mse_by_hand():
    student, teacher = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]])
    assert_close(hidden_mse(student, teacher), torch.tensor([[(4 + 9) / 2]]))


def test_hidden_cosine_by_hand():
    student, teacher = torch.tensor([[[2.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [-3.0, 0.0]]])
    assert_close(hidden_cosine(student, teacher), torch.tensor([[1 - 1 / math.sqrt(2), 2.0]]))


def test_linear_cka_by_hand():
    """Four positions in two pairs, and in two other pairs.

    Inner products off the diagonal: 1 within a pair, -1 else; rows sum to -1. U-centred: 1 + 1/2 + 1/2 - 2/3 = 4/3 within,
    -2/3 else. Twice the inner product over the six pairs of positions: 2 (-8/9 - 8/9) + 2 (4/9) = -24/9; squares 48/9.
    """
    student = torch.tensor([[[-1.0], [-1.0], [1.0], [1.0]]])
    teacher = torch.tensor([[[-1.0], [1.0], [-1.0], [1.0]]])
    assert_close(linear_cka(student, teacher), torch.full((1, 4), 1 + 24 / 48))


def test_contrastive_by_hand():
    states = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
    expected = math.log(1 + math.exp(-1 / 0.5))
    assert_close(contrastive(states, states, temperature=0.5), torch.full((1, 2), expected, dtype=torch.float64))


def test_attention_kl_by_hand():
    teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    student = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.2, 0.8]]]], dtype=torch.float64)
    first = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    expected = [0.0, (first - math.log(0.8)) / 2]
    assert_close(attention_kl(student, teacher), torch.tensor([expected], dtype=torch.float64))


def test_mixing_matrix_distance_by_hand():
    teacher = torch.tensor([[[[1.0, 0.0], [2.0, 3.0]]]])
    student = torch.tensor([[[[1.0, 0.0], [2.0, 1.0]], [[3.0, 0.0], [1.0, 3.0]]]])
    assert_close(mixing_matrix_distance(student, teacher), torch.tensor([[(0 + 4) / 2, (4 + 1) / 2]]))


def test_each_teacher_matrix_is_the_target_of_consecutive_student_matrices():
    teacher = maps(1, heads=2)
    student = teacher[:, [0, 0, 0, 1, 1, 1]]
    assert_close(mixing_matrix_distance(student, teacher), torch.zeros(ROWS, LENGTH, dtype=torch.float64))


def test_value_relation_by_hand():
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    own = 1 / (1 + math.exp(-1 / math.sqrt(2)))
    expected = own * math.log(own / 0.5) + (1 - own) * math.log((1 - own) / 0.5)
    assert_close(
        value_relation(student, teacher, relation_heads=1), torch.tensor([[0.0, expected]], dtype=torch.float64)
    )


# Slow references.


def slow_hidden_mse(student, teacher):
    return torch.stack([((s - t) ** 2).sum() / len(s) for s, t in zip(student, teacher, strict=True)])


def slow_hidden_cosine(student, teacher):
    return torch.stack([1 - s @ t / (s @ s).sqrt() / (t @ t).sqrt() for s, t in zip(student, teacher, strict=True)])


def slow_hsic(one, two):
    """The U-statistic of independence: a mean over all four different positions."""
    terms = [
        (one[i] @ one[j]) * (two[i] @ two[j] + two[q] @ two[r] - 2 * (two[i] @ two[q]))
        for i, j, q, r in itertools.permutations(range(len(one)), 4)
    ]
    return torch.stack(terms).mean()


def slow_linear_cka(student, teacher):
    power = slow_hsic(student, student) * slow_hsic(teacher, teacher)
    return (1 - slow_hsic(student, teacher) / power.sqrt()).expand(len(student))


def slow_contrastive(student, teacher):
    rows = []
    for t, own in enumerate(student):
        similar = [own @ other / own.norm() / other.norm() / 0.1 for other in teacher]
        rows.append(-(similar[t].exp() / torch.stack(similar).exp().sum()).log())
    return torch.stack(rows)


def slow_attention_kl(student, teacher):
    rows = []
    for t in range(LENGTH):
        kl = [p[t, s] * (p[t, s] / q[t, s]).log() for q, p in zip(student, teacher, strict=True) for s in range(t + 1)]
        rows.append(torch.stack(kl).sum() / HEADS)
    return torch.stack(rows)


def slow_mixing_matrix_distance(student, teacher):
    return torch.stack(
        [sum(((m[t] - a[t]) ** 2).sum() for m, a in zip(student, teacher, strict=True)) / HEADS for t in range(LENGTH)]
    )


def slow_value_relation(student, teacher, *, heads=2):
    rows = []
    for t in range(LENGTH):
        total = torch.zeros((), dtype=torch.float64)
        for head in range(heads):
            relations = []
            for side in (student, teacher):
                width = side.shape[-1] // heads
                part = side[:, head * width : (head + 1) * width]
                scores = torch.stack([part[t] @ part[s] / math.sqrt(width) for s in range(t + 1)])
                relations.append(scores.exp() / scores.exp().sum())
            total = total + (relations[1] * (relations[1] / relations[0]).log()).sum()
        rows.append(total / heads)
    return torch.stack(rows)


def slow_qkv_relation(student, teacher):
    return sum(slow_value_relation(s, t) for s, t in zip(student, teacher, strict=True))


SLOW = {
    "hidden_mse": slow_hidden_mse,
    "hidden_cosine": slow_hidden_cosine,
    "linear_cka": slow_linear_cka,
    "contrastive": slow_contrastive,
    "attention_kl": slow_attention_kl,
    "mixing_matrix_distance": slow_mixing_matrix_distance,
    "value_relation": slow_value_relation,
    "qkv_relation": slow_qkv_relation,
}


def row_of(value, row):
    return tuple(part[row] for part in value) if isinstance(value, tuple) else value[row]


@pytest.mark.parametrize("name", FEATURE_OBJECTIVES)
def test_against_reference_with_gradient(name):
    student, teacher = sample(name, 1), sample(name, 2)
    for leaf in leaves(student):
        leaf.requires_grad_()
    fast = value_of(name, student, teacher)
    slow = torch.stack([SLOW[name](row_of(student, row), row_of(teacher, row)) for row in range(ROWS)])
    assert_close(fast, slow)
    weights = draw(ROWS, LENGTH, seed=3)
    ours = torch.autograd.grad((fast * weights).sum(), leaves(student))
    theirs = torch.autograd.grad((slow * weights).sum(), leaves(student))
    for mine, right in zip(ours, theirs, strict=True):
        assert_close(mine, right)


# Invariants.


def test_the_table_knows_its_functions():
    for name, objective in FEATURE_OBJECTIVES.items():
        assert objective.function.__name__ == name
        assert objective.description
        assert objective.source.startswith("arXiv:")


@pytest.mark.parametrize("name", [name for name, entry in FEATURE_OBJECTIVES.items() if entry.is_divergence])
def test_divergences_are_zero_on_equals(name):
    states = sample(name, 4)
    assert_close(value_of(name, states, states), torch.zeros(ROWS, LENGTH, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", FEATURE_OBJECTIVES)
def test_what_differs_costs_and_the_teacher_is_not_trained(name):
    student, teacher = sample(name, 5), sample(name, 6)
    for leaf in (*leaves(student), *leaves(teacher)):
        leaf.requires_grad_()
    value = value_of(name, student, teacher)
    assert value.shape == (ROWS, LENGTH)
    assert value.sum() > 0.05
    value.sum().backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves(student))


@pytest.mark.parametrize("name", FEATURE_OBJECTIVES)
def test_rows_do_not_touch_each_other(name):
    """So any split of a batch into micro-batches adds up to the same loss."""
    student, teacher = sample(name, 7), sample(name, 8)
    together = value_of(name, student, teacher)
    for row in range(ROWS):
        one = [tuple(part[row : row + 1] for part in leaves(side)) for side in (student, teacher)]
        if not isinstance(student, tuple):
            one = [side[0] for side in one]
        assert_close(value_of(name, *one), together[row : row + 1])


@pytest.mark.parametrize("name", FEATURE_OBJECTIVES)
def test_half_precision_is_computed_in_float32(name):
    def cast(value, dtype):
        return tuple(part.to(dtype) for part in value) if isinstance(value, tuple) else value.to(dtype)

    student, teacher = cast(sample(name, 9), torch.bfloat16), cast(sample(name, 10), torch.bfloat16)
    value = value_of(name, student, teacher)
    assert value.dtype == torch.float32
    assert_close(value, value_of(name, cast(student, torch.float32), cast(teacher, torch.float32)), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["linear_cka", "contrastive"])
def test_positions_that_do_not_count_change_nothing(name):
    student, teacher = draw(1, 9, 4, seed=1), draw(1, 9, 4, seed=2)
    mask = torch.tensor([[True, True, False, True, True, False, True, True, False]])
    kept = [side[mask].unsqueeze(0) for side in (student, teacher)]
    value = value_of(name, student, teacher, mask_BT=mask)
    assert_close(value[mask], value_of(name, *kept)[0])
    assert_close(value[~mask], torch.zeros(3, dtype=torch.float64))
    student[~mask], teacher[~mask] = 1e6, math.nan
    assert_close(value_of(name, student, teacher.nan_to_num(-1e9), mask_BT=mask), value)


def test_alignment_ignores_rotation_scale_and_shift_and_takes_any_widths():
    student, teacher = draw(1, 7, 5, seed=1), draw(1, 7, 3, seed=2)
    rotation = torch.linalg.qr(draw(5, 5, seed=3)).Q
    value = linear_cka(student, teacher)
    assert_close(linear_cka(3 * student @ rotation + 10, 0.01 * teacher - 2), value)
    assert_close(
        linear_cka(student @ rotation * 7, student), torch.zeros(1, 7, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("name", ["hidden_cosine", "linear_cka", "contrastive"])
def test_the_size_of_the_states_does_not_matter(name):
    student, teacher = draw(1, 6, 4, seed=1, dtype=torch.float32), draw(1, 6, 4, seed=2, dtype=torch.float32)
    assert_close(value_of(name, 1e12 * student, 1e-9 * teacher), value_of(name, student, teacher))


def test_alignment_of_unrelated_wide_states_is_near_one():
    """The biased estimate would be near zero here: 16 positions, 512 channels."""
    values = torch.stack([linear_cka(draw(4, 16, 512, seed=2 * i), draw(4, 16, 512, seed=2 * i + 1)) for i in range(8)])
    assert abs(values.mean().item() - 1) < 0.05


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_alignment_of_too_few_positions_is_nothing(kept):
    student = draw(1, 6, 4, seed=1).requires_grad_()
    mask = torch.arange(6).unsqueeze(0) < kept
    value = linear_cka(student, draw(1, 6, 4, seed=2), mask_BT=mask)
    assert_close(value, torch.zeros(1, 6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(gradient).all()


def test_alignment_survives_one_enormous_position():
    """Float32 with a first token a thousand times as long, as decoders have."""
    student, teacher = draw(1, 32, 16, seed=1), draw(1, 32, 16, seed=2)
    student[:, 0] *= 1000
    teacher[:, 0] *= 1000
    assert_close(linear_cka(student.float(), teacher.float()).double(), linear_cka(student, teacher), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [0.0, 1e-15, 1e15])
@pytest.mark.parametrize("name", ["hidden_cosine", "linear_cka", "contrastive", "value_relation"])
def test_extreme_states_give_finite_values_and_gradients(name, size):
    student = (draw(1, 6, 4, seed=1, dtype=torch.float32) * size).requires_grad_()
    value = value_of(name, student, draw(1, 6, 4, seed=2, dtype=torch.float32))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_a_student_that_never_looks_pays_much_but_not_infinitely():
    teacher = torch.tensor([[[[0.0, 1.0]]]])
    student = torch.tensor([[[[1.0, 0.0]]]], requires_grad=True)
    value = attention_kl(student, teacher)
    assert_close(value, torch.tensor([[-math.log(1e-30)]]))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["value_relation", "qkv_relation"])
def test_packed_documents_are_related_to_themselves_alone(name):
    student, teacher = sample(name, 1), sample(name, 2)
    document_ids = torch.tensor([[5, 5, 7, 7, 7, 5]] * ROWS)
    packed = value_of(name, student, teacher, document_ids_BT=document_ids)
    for place in (slice(0, 2), slice(2, 5), slice(5, 6)):
        alone = [tuple(part[:, place] for part in leaves(side)) for side in (student, teacher)]
        alone = alone if isinstance(student, tuple) else [side[0] for side in alone]
        assert_close(value_of(name, *alone), packed[:, place])


def test_relations_do_not_see_the_future():
    student, teacher = draw(1, 6, 4, seed=1), draw(1, 6, 4, seed=2)
    before = value_relation(student, teacher, relation_heads=2)
    student[:, 4:], teacher[:, 4:] = 9.0, -9.0
    assert_close(value_relation(student, teacher, relation_heads=2)[:, :4], before[:, :4], atol=0, rtol=0)


def test_relations_between_models_of_other_widths_and_heads():
    student, teacher = draw(2, 6, 8, seed=1), draw(2, 6, 12, seed=2)
    slow = torch.stack([slow_value_relation(student[row], teacher[row], heads=4) for row in range(2)])
    assert_close(value_relation(student, teacher, relation_heads=4), slow)
    wide = torch.cat([student.unflatten(-1, (4, 2))] * 2, dim=-1).flatten(-2) / math.sqrt(math.sqrt(2))
    assert_close(
        value_relation(wide, student, relation_heads=4), torch.zeros(2, 6, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_feature_loss_masks_and_passes_on_what_each_objective_takes():
    loss_mask = torch.tensor([[False, True, True, False, True, True], [False, False, True, True, True, False]])
    mask = feature_positions(loss_mask)
    assert mask.tolist() == [[True, True, False, True, True, False], [False, True, True, True, False, False]]
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1]] * ROWS)
    for name, objective in FEATURE_OBJECTIVES.items():
        student, teacher = sample(name, 1), sample(name, 2)
        options = {"relation_heads": 2} if "relation_heads" in objective.options else {}
        value = feature_loss(name, student, teacher, mask_BT=mask, document_ids_BT=document_ids, options=options)
        context = {"mask_BT": mask, "document_ids_BT": document_ids}
        whole = value_of(name, student, teacher, **{key: context[key] for key in objective.context})
        assert_close(value, torch.where(mask, whole, 0.0))


# What is refused.


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match='unknown feature objective "hidden_msa". Did you mean "hidden_mse"'):
        feature_loss("hidden_msa", draw(1, 2, 4), draw(1, 2, 4), mask_BT=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match='contrastive: unknown option "temprature"'):
        feature_loss(
            "contrastive", draw(1, 2, 4), draw(1, 2, 4),
            mask_BT=torch.ones(1, 2, dtype=torch.bool), options={"temprature": 1.0},
        )  # fmt: skip
    for name in ("hidden_mse", "hidden_cosine", "contrastive"):
        with pytest.raises(ValueError, match=f"{name}.*projection"):
            value_of(name, draw(1, 2, 4), draw(1, 2, 5))
    with pytest.raises(ValueError, match="same tokens"):
        linear_cka(draw(1, 2, 4), draw(1, 3, 4))
    with pytest.raises(ValueError, match="temperature must be positive"):
        contrastive(draw(1, 2, 4), draw(1, 2, 4), temperature=0.0)
    with pytest.raises(RecipeError, match="value_relation and qkv_relation"):
        attention_kl(maps(1), maps(2, heads=2))
    with pytest.raises(ValueError, match="multiple"):
        mixing_matrix_distance(maps(1), maps(2, heads=2))
    with pytest.raises(ValueError, match=r"relation_heads 3 .* 8 and 12; choose one of 1, 2, 4"):
        value_relation(draw(1, 2, 8), draw(1, 2, 12), relation_heads=3)
    with pytest.raises(ValueError, match="relation_heads 0"):
        qkv_relation([draw(1, 2, 8)], [draw(1, 2, 8)], relation_heads=0)
