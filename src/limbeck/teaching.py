"""From the words of a recipe to a teacher that hands over targets, and to the lesson of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import assembly
from limbeck.core.errors import RecipeError, VocabularyError
from limbeck.core.runtime import derive_seed
from limbeck.models.heads import SplitModel
from limbeck.models.surgery import find_attention
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.models.vocabulary import TokenizerComparison, compare_tokenizers, require_same_tokens
from limbeck.objectives.features import FEATURE_OBJECTIVES
from limbeck.recipe import Recipe
from limbeck.recipe_objectives import CROSS_TOKENIZER, FEATURES, Objective, OnPolicy, Ramp
from limbeck.recipe_teachers import Teacher
from limbeck.store.store import TargetStore
from limbeck.teachers.base import TargetSource
from limbeck.teachers.crossed import CrossTokenizerTeacher
from limbeck.teachers.entries import Dense, Entries, Sampled, TopK
from limbeck.teachers.exact import ExactTeacher
from limbeck.teachers.live import LiveTeacher, load_live_model
from limbeck.teachers.own import EmaTeacher, PreviousGeneration
from limbeck.teachers.several import SeveralTeachers, weights_by_text
from limbeck.teachers.stored import StoredTargets
from limbeck.teachers.stored_aligned import StoredAlignedTargets
from limbeck.teachers.stored_windows import StoreWindows
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.lesson import Lesson
from limbeck.train.on_policy import AdaptiveLesson, MiniLLMLesson, OnPolicyLesson
from limbeck.train.rollouts import Writing
from limbeck.train.stages import AlignLesson

if TYPE_CHECKING:
    from limbeck.pipeline import Run


# Held-out rows by which an adaptive share of the student's own writing is set.
_ADAPTIVE_ROWS = 16


@dataclass
class Teaching:
    """What all stages of a run share of their teacher.

    kind: as `Teacher.kind`, or "none". comparison: how the student's tokenizer stands to the teacher's; None when they
    are one and the same, or the teacher has none here. store: the targets that were captured. members: several teachers.
    """

    kind: str
    name: str | None
    comparison: TokenizerComparison | None = None
    is_cross_tokenizer: bool = False
    store: TargetStore | None = None
    members: list[Any] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        if self.kind == "none":
            return {}
        found: dict[str, Any] = {"kind": self.kind, "name": self.name, "other_tokenizer": self.is_cross_tokenizer}
        if self.comparison is not None:
            found["tokenizers"] = self.comparison.verdict
        if self.store is not None:
            teacher = self.store.manifest.teacher
            found |= {"store": str(self.store.folder), "store_teacher": dict(teacher)}
            found |= {"store_tokens": self.store.manifest.tokens, "fidelity": self.store.manifest.fidelity}
        return found


def open_teaching(work: Run) -> Teaching:
    """Find out, before anything is trained, whether the teacher and the student understand each other.

    Raises: VocabularyError with a table of what differs; StoreError for a store that is damaged, has holes, or was made
    with another tokenizer or teacher; RecipeError.
    """
    words = work.recipe.teacher
    if words is None:
        return Teaching("none", None)
    teaching = Teaching(words.kind, words.source)
    if words.kind == "store" or (words.kind == "served"):
        folder = Path(words.store).expanduser() if words.store else work.folder / "store"
        teaching.store = TargetStore(folder)
        teaching.name = teaching.store.teacher_name
        teaching.is_cross_tokenizer = teaching.store.tokenizer not in (None, tokenizer_fingerprint(work.tokenizer))
    elif words.closed is not None:
        teaching.name = f"{words.closed.model} at {words.closed.url}"
        teaching.store = TargetStore(work.folder / "store")
    elif words.itself is not None:
        teaching.name = "the student itself"
    elif words.several is not None:
        teaching.name = " + ".join(member.source for member in words.several)
        teaching.members = _open_members(work, words)
    if work.teacher is not None and work.teacher.tokenizer is not work.tokenizer:
        teaching.comparison = compare_tokenizers(work.tokenizer, work.teacher.tokenizer)
        if teaching.store is None:
            teaching.is_cross_tokenizer = not teaching.comparison.can_share_logits
    _check_objectives(work.recipe, teaching)
    if teaching.store is not None and words.closed is None:
        _check_store(work, teaching)
    return teaching


def _open_members(work: Run, words: Teacher) -> list[Any]:
    assert words.several is not None
    members = [work.teacher]
    for member in words.several[1:]:
        loaded = load_live_model(
            member.source, revision=member.revision, dtype=words.dtype, device=words.device or work.device,
            quantise=words.quantise, offload=words.offload,
        )  # fmt: skip
        loaded.model.requires_grad_(False)
        require_same_tokens(
            compare_tokenizers(work.teacher.tokenizer, loaded.tokenizer), asked_for=f"teacher.several ({member.source})"
        )
        members.append(loaded)
    return members


def _check_objectives(recipe: Recipe, teaching: Teaching) -> None:
    """Refuse losses on logits between models whose tokens differ, and what is for such models alone between others."""
    if teaching.is_cross_tokenizer and teaching.members:
        raise VocabularyError(
            "teacher.several: a mixture of predictions needs the student's tokens to be the teachers'. Take one teacher as "
            "source, with chunk_likelihood, or leave out tokenizer and student.source."
        )
    named = {term.objective for stage in recipe.stages if stage.kind == "distil" for term in stage.terms()}
    if "chunk_likelihood" in named and not teaching.is_cross_tokenizer:
        raise VocabularyError(
            "chunk_likelihood is for a student with other tokens than its teacher; these two share theirs, so forward_kl "
            "says more at less cost. Use that."
        )
    if not teaching.is_cross_tokenizer or (recipe.teacher is not None and recipe.teacher.exact):
        return
    wrong = [
        term.objective
        for stage in recipe.stages
        if stage.kind == "distil"
        for term in stage.terms()
        if term.objective not in CROSS_TOKENIZER
    ]
    if not wrong:
        return
    advice = "Use chunk_likelihood (ALM) or sorted_earth_mover (ULD), alone or with cross_entropy."
    if teaching.comparison is not None:
        raise VocabularyError(
            f"{wrong[0]} compares predictions token by token, but the student's tokens are not the teacher's. {advice}\n"
            + teaching.comparison.table()
        )
    raise VocabularyError(
        f"{wrong[0]} compares predictions token by token, but the store was captured with another tokenizer than the student's. {advice}"
    )


def _check_store(work: Run, teaching: Teaching) -> None:
    """Every shard whole, every row there, before training begins."""
    assert teaching.store is not None
    if teaching.is_cross_tokenizer:
        if _store_windows(work) is None:
            raise RecipeError(
                f"data.train: a student with other tokens reads the store's own text. Write data: {{train: [{teaching.store.folder}]}}."
            )
        teaching.store.check()
        return
    source = StoredTargets(teaching.store, expected_teacher=_expected_teacher(work, teaching))
    rows = max(1, work.recipe.total_tokens // work.data.context_tokens)
    source.check(work.data.batch(first, min(64, rows - first)) for first in range(0, min(rows, work.data.windows), 64))


def _expected_teacher(work: Run, teaching: Teaching) -> str | None:
    """The model that stands beside the store must be the one that was captured."""
    assert teaching.store is not None
    return None if work.teacher is None or teaching.store.teacher is None else work.teacher.fingerprint


def _store_windows(work: Run) -> StoreWindows | None:
    return next((source for source in work.data.sources if isinstance(source, StoreWindows)), None)


def entries_of(words: Teacher, *, seed: int, vocabulary_size: int) -> Entries:
    """How much of its distribution a live teacher hands over; never more entries than there are tokens."""
    if words.targets == "top_k":
        return TopK(min(words.top_k, vocabulary_size))
    return Sampled(words.draws, seed=seed) if words.targets == "sampled" else Dense()


def target_source(work: Run, student: Any) -> tuple[TargetSource | None, int | None]:
    """The teacher of a stage, and how many rows of the student's logits to use (None: all)."""
    words, teaching = work.recipe.teacher, work.teaching
    if words is None or words.closed is not None:
        return None, None
    entries = entries_of(
        words, seed=derive_seed(work.recipe.seed, "draws"), vocabulary_size=SplitModel(student).vocabulary_size
    )
    if words.itself is not None:
        own: TargetSource = (
            EmaTeacher(student, decay=words.itself.decay, entries=entries)
            if words.itself.rule == "average"
            else PreviousGeneration(student, every=words.itself.every, entries=entries)
        )
        return own, None
    if teaching.store is not None:
        return _stored(work), None
    if teaching.is_cross_tokenizer and words.exact:
        rows = SplitModel(student).vocabulary_size
        exact = ExactTeacher(
            work.teacher.model, work.teacher.tokenizer, work.tokenizer, vocabulary_size=rows, name=work.teacher.source
        )
        return exact, None
    if teaching.is_cross_tokenizer:
        crossed = CrossTokenizerTeacher(
            work.teacher.model, work.teacher.tokenizer, work.tokenizer, name=work.teacher.source
        )
        return crossed, None
    usable = shared_vocabulary(work, student, [work.teacher, *teaching.members[1:]])
    if teaching.members:
        live = [LiveTeacher(m.model, name=m.source, entries=entries, vocabulary_size=usable) for m in teaching.members]
        return SeveralTeachers(live, weights=_member_weights(words)), usable
    return LiveTeacher(work.teacher.model, name=work.teacher.source, entries=entries, vocabulary_size=usable), usable


def _member_weights(words: Teacher) -> Any:
    """A weight for each member; by row where some teach certain texts only."""
    assert words.several is not None
    weights = [member.weight for member in words.several]
    texts = [member.texts for member in words.several]
    return weights if all(taught is None for taught in texts) else weights_by_text(weights, texts)


def _stored(work: Run) -> TargetSource:
    if not work.teaching.is_cross_tokenizer:
        return StoredTargets(work.teaching.store)
    from limbeck.models.token_bytes import read_token_bytes

    windows = _store_windows(work)
    assert windows is not None
    return StoredAlignedTargets(windows, tokenizer=work.tokenizer, tokens=read_token_bytes(work.tokenizer))


def shared_vocabulary(work: Run, student: Any, teachers: list[Any]) -> int | None:
    """How many rows of all logits stand for the same tokens; None when every model has equally many.

    Raises: VocabularyError with a table, when they do not.
    """
    sizes = [SplitModel(model).vocabulary_size for model in (student, *(teacher.model for teacher in teachers))]
    if len(set(sizes)) == 1 and work.teaching.comparison is None:
        return None
    usable = min(
        require_same_tokens(
            compare_tokenizers(work.tokenizer, teacher.tokenizer, student_rows=sizes[0], teacher_rows=size),
            asked_for="the objectives of this recipe",
        )
        for teacher, size in zip(teachers, sizes[1:], strict=True)
    )
    if any(usable < size for size in sizes):
        work.say(
            f"vocabularies are padded differently ({', '.join(map(str, sizes))} rows): the first {usable} are used"
        )
    return usable


def build_lesson(work: Run, plan: assembly.StagePlan, student: Any, *, power: Mapping[int, float]) -> Lesson:
    """The lesson of a phase."""
    spec = plan.spec
    if spec.kind == "align":
        return _align_lesson(work, plan, student, power)
    if spec.kind == "tune":
        return DistilLesson(student, None, [Term("cross_entropy")])
    source, usable = target_source(work, student)
    terms, projections = _terms(work, spec, student)
    if spec.on_policy is not None:
        return _on_policy_lesson(work, spec, student, source, terms, projections, usable)
    return DistilLesson(
        student, source, terms, projections=projections, vocabulary_size=usable,
        crosses_tokenizers=work.teaching.is_cross_tokenizer and not isinstance(source, ExactTeacher),
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
    rows = min(_ADAPTIVE_ROWS, work.heldout.windows)
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
    pairs = {term.objective: _pairs(work, term, student) for term in objectives if term.objective in FEATURES}
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
