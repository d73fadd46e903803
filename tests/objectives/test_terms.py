"""Terms: names, options, factors; what they have in common is computed once."""

import pytest
import torch
from tests.objectives import checks
from tests.objectives.references import DIVERGENCES
from torch.testing import assert_close

from limbeck.core.errors import RecipeError
from limbeck.objectives import terms as terms_module
from limbeck.objectives.divergences import cross_entropy
from limbeck.objectives.sparse import COMPARISONS, sparse_divergence
from limbeck.objectives.terms import LOGIT_OBJECTIVES, LogitTerm, term_values


def test_the_table_lists_every_objective_with_its_options():
    assert set(LOGIT_OBJECTIVES) == {"cross_entropy", *COMPARISONS}
    assert LOGIT_OBJECTIVES["jensen_shannon"].options == {"beta": 0.5}
    assert LOGIT_OBJECTIVES["hinge"].options == {"margin": None, "top_k": 32}
    assert {name for name, about in LOGIT_OBJECTIVES.items() if about.is_divergence} == set(DIVERGENCES)
    assert [name for name, about in LOGIT_OBJECTIVES.items() if not about.needs_targets] == ["cross_entropy"]


def test_the_temperature_factor_is_for_divergences():
    assert LogitTerm("kl", 0.5, "forward_kl", temperature=3.0).factor == 4.5
    assert LogitTerm("order", 0.5, "hinge", temperature=3.0).factor == 0.5
    assert LogitTerm("text", 0.5, "cross_entropy", temperature=3.0).factor == 0.5


@pytest.mark.parametrize(
    "name", [name for name in DIVERGENCES if name not in ("total_variation", "sorted_earth_mover", "alpha_beta")]
)
def test_the_factor_keeps_gradients_in_size(name):
    """High temperatures make every one of these a multiple of the squared error of logits."""
    student, teacher = checks.random_logits().requires_grad_(), checks.random_logits(seed=1)

    def gradient(heat):
        term = LogitTerm("it", 1.0, name, temperature=heat)
        return torch.autograd.grad(term.factor * COMPARISONS[name](student, teacher, temperature=heat).sum(), student)[
            0
        ]

    assert_close(gradient(1e3), gradient(2e3), rtol=1e-2, atol=1e-4)


def test_the_factor_of_forward_kl():
    def total(student, teacher, heat):
        term = LogitTerm("kl", 1.0, "forward_kl", temperature=heat)
        return term.factor * COMPARISONS["forward_kl"](student, teacher, temperature=heat).sum()

    checks.check_temperature_factor(total)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"objective": "forwrad_kl"}, 'unknown objective "forwrad_kl". Did you mean "forward_kl"?'),
        ({"objective": "forward_kl", "missing": "zero"}, 'unknown way to treat missing mass "zero"'),
        ({"objective": "forward_kl", "temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"objective": "jensen_shannon", "options": {"bate": 0.5}}, 'unknown option of jensen_shannon "bate"'),
        ({"objective": "jensen_shannon", "options": {"beta": 1.5}}, "beta must lie between 0 and 1, got 1.5"),
        ({"objective": "cross_entropy", "options": {"beta": 1.5}}, 'unknown option of cross_entropy "beta"'),
        ({"objective": "hinge", "options": {"top_k": "many"}}, "top_k|str"),
    ],
)
def test_terms_that_cannot_be_are_refused(words, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        LogitTerm("it", 1.0, **words)


def test_values_are_those_of_the_objectives():
    student, teacher = checks.random_logits(), checks.random_logits(seed=1)
    ids = torch.tensor([0, 3, 6, 3])
    terms = [
        LogitTerm("text", 1.0, "cross_entropy"),
        LogitTerm("kl", 1.0, "forward_kl", temperature=2.0),
        LogitTerm("js", 1.0, "jensen_shannon", options={"beta": 0.2}),
    ]
    dense = term_values(terms, student, target_ids_N=ids, teacher=teacher)
    assert_close(dense[0], cross_entropy(student, ids))
    assert_close(dense[1], COMPARISONS["forward_kl"](student, teacher, temperature=2.0))
    assert_close(dense[2], COMPARISONS["jensen_shannon"](student, teacher, beta=0.2))
    kept = checks.keep_top(teacher, 3)
    sparse = term_values(terms, student, target_ids_N=ids, teacher=kept)
    assert_close(sparse[0], dense[0])
    assert_close(sparse[1], sparse_divergence("forward_kl", student, kept, temperature=2.0))
    assert_close(sparse[2], sparse_divergence("jensen_shannon", student, kept, options={"beta": 0.2}))


def test_softened_distributions_are_computed_once(monkeypatch):
    calls = []
    real = terms_module.log_probs
    monkeypatch.setattr(terms_module, "log_probs", lambda logits, heat: calls.append(heat) or real(logits, heat))
    names = ["cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon"]
    terms = [LogitTerm(name, 1.0, name) for name in names] + [LogitTerm("soft", 1.0, "forward_kl", temperature=2.0)]
    term_values(terms, torch.randn(3, 5), target_ids_N=torch.zeros(3, dtype=torch.long), teacher=torch.randn(3, 5))
    assert sorted(calls) == [1.0, 1.0, 2.0, 2.0]


def test_a_term_without_its_teacher_is_refused():
    with pytest.raises(ValueError, match="the term kl"):
        term_values(
            [LogitTerm("kl", 1.0, "forward_kl")], torch.randn(2, 3), target_ids_N=torch.zeros(2).long(), teacher=None
        )
