"""From the words of a stage to its lesson: the terms of the loss, and what they meet in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck import assembly
from limbeck.core.errors import RecipeError
from limbeck.core.runtime import derive_seed
from limbeck.models.surgery import find_attention
from limbeck.objectives.features import FEATURE_OBJECTIVES
from limbeck.recipe_objectives import FEATURES, Objective, OnPolicy, Ramp
from limbeck.stage_costs import ADAPTIVE_ROWS
from limbeck.teachers.exact import ExactTeacher
from limbeck.teachers.trie import TrieTeacher
from limbeck.teaching import target_source, trie_paths
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.lesson import Lesson
from limbeck.train.on_policy import AdaptiveLesson, MiniLLMLesson, OnPolicyLesson
from limbeck.train.rollouts import Writing
from limbeck.train.stages import AlignLesson
from limbeck.train.trie import TrieLesson

if TYPE_CHECKING:
    from limbeck.pipeline import Run


def build_lesson(work: Run, plan: assembly.StagePlan, student: Any, *, power: Mapping[int, float]) -> Lesson:
    """The lesson of a phase."""
    spec = plan.spec
    if spec.kind == "align":
        return _align_lesson(work, plan, student, power)
    if spec.kind == "tune":
        return DistilLesson(student, None, [Term("cross_entropy")])
    terms, projections = _terms(work, spec, student)
    source, usable = target_source(work, student, terms)
    if spec.on_policy is not None:
        return _on_policy_lesson(work, spec, student, source, terms, projections, usable)
    if trie_paths(terms):
        return TrieLesson(student, source, terms)
    return DistilLesson(
        student, source, terms, projections=projections, vocabulary_size=usable,
        crosses_tokenizers=work.teaching.is_cross_tokenizer and not isinstance(source, ExactTeacher | TrieTeacher),
    )  # fmt: skip


def _on_policy_lesson(
    work: Run, spec: Any, student: Any, source: Any, terms: list[Term], projections: Any, usable: int | None
) -> Lesson:
    words: OnPolicy = spec.on_policy
    writing = Writing(
        prompt_tokens=words.prompt_tokens, max_new_tokens=words.max_new_tokens, temperature=words.temperature,
        top_p=words.top_p, end_token=work.tokenizer.eos_token_id, rows_at_a_time=spec.micro_batch_sequences,
    )  # fmt: skip
    if words.method == "minillm":
        return MiniLLMLesson(
            student, source, terms, writing=writing, teacher_share=words.teacher_share, vocabulary_size=usable
        )
    shared: dict[str, Any] = {"writing": writing, "projections": projections, "vocabulary_size": usable}
    if words.method == "mixed":
        return OnPolicyLesson(student, source, terms, share=0.5 if words.share is None else words.share, **shared)
    rows = min(ADAPTIVE_ROWS, work.heldout.windows)
    return AdaptiveLesson(
        student, source, terms, heldout=work.heldout.batch(0, rows).to(work.device), buffer_rows=words.buffer,
        first_share=words.share or 0.0, **shared,
    )  # fmt: skip


def _align_lesson(work: Run, plan: assembly.StagePlan, student: Any, power: Mapping[int, float]) -> AlignLesson:
    assert plan.layers is not None
    mixers = student.mixers()
    teacher = work.teacher.model
    modules = {site.layer_index: site.module for site in find_attention(teacher) if site.layer_index in plan.layers}
    return AlignLesson(
        student, teacher, student_mixers=mixers, teacher_mixers=modules,
        operators={layer: mixers[layer].operator for layer in plan.layers},
        power=power, layers=plan.layers, inputs=plan.spec.inputs,
    )  # fmt: skip


def _terms(work: Run, spec: Any, student: Any) -> tuple[list[Term], Any]:
    """The recipe's objectives as terms, and the projections that widths make necessary."""
    objectives: list[Objective] = spec.terms()
    pairs: dict[str, list[tuple[int, int]]] = {}
    for term in objectives:
        if term.objective in FEATURES:
            try:
                pairs[term.objective] = _pairs(work, term, student)
            except RecipeError as error:
                raise RecipeError(f"stages.{spec.name}: {term.objective}: {error}") from error
    terms = [
        Term(
            term.objective, term.weight.at if isinstance(term.weight, Ramp) else _constant(term.weight),
            term.temperature, term.missing, dict(term.options), tuple(pairs.get(term.objective, ())),
        )
        for term in objectives
    ]  # fmt: skip
    projected = sorted(
        {pair for name, found in pairs.items() if FEATURE_OBJECTIVES[name].needs_projection for pair in found}
    )
    if not projected:
        return terms, None
    from limbeck.models.anatomy import hidden_width
    from limbeck.models.projections import FeatureProjections

    widths = hidden_width(student), _teacher_width(work, student)
    if widths[0] == widths[1]:
        return terms, None
    seed = derive_seed(work.recipe.seed, "projections")
    projections = FeatureProjections(projected, student_width=widths[0], teacher_width=widths[1], seed=seed)
    return terms, projections.to(work.device)


def _constant(weight: float) -> Any:
    return lambda progress: weight


def _teacher_width(work: Run, student: Any) -> int:
    from limbeck.models.anatomy import hidden_width

    if work.recipe.teacher is not None and work.recipe.teacher.itself is not None:
        return hidden_width(student)
    if work.teacher is not None:
        return hidden_width(work.teacher.model)
    widths = set(work.teaching.store.manifest.hidden_width.values())
    return int(widths.pop())


def _pairs(work: Run, term: Objective, student: Any) -> list[tuple[int, int]]:
    from limbeck.models.anatomy import find_layers
    from limbeck.models.layer_maps import layer_map

    own = len(find_layers(student))
    words: Any = term.layers
    if work.teacher is not None:
        return layer_map(words, own, len(find_layers(work.teacher.model)))
    if work.teaching.store is None:
        return layer_map(words, own, own)
    if not isinstance(words, list):
        layers = list(work.teaching.store.hidden_layers)
        raise RecipeError(
            f"{term.objective}: name the layers as pairs of student and teacher layers; the store has the teacher's {layers}."
        )
    return layer_map(words, own, max(work.teaching.store.hidden_layers, default=0))
