"""From the words of a recipe to a teacher that hands over targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import reading
from limbeck.core.errors import RecipeError, VocabularyError
from limbeck.core.runtime import derive_seed
from limbeck.models.heads import SplitModel
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.models.vocabulary import TokenizerComparison, compare_tokenizers, require_same_tokens
from limbeck.recipe import Recipe
from limbeck.recipe_agreement import reads_teachers_trie
from limbeck.recipe_objectives import CROSS_TOKENIZER
from limbeck.recipe_teachers import Teacher
from limbeck.stage_costs import TRIE_PATHS
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
from limbeck.teachers.stored_trie import StoredTriePaths
from limbeck.teachers.stored_windows import StoreWindows
from limbeck.teachers.trie import TrieTeacher
from limbeck.train.distil import Term

if TYPE_CHECKING:
    from limbeck.pipeline import Run


@dataclass
class Teaching:
    """What all stages of a run share of their teacher.

    kind: as `Teacher.kind`, or "none". comparison: how the student's tokenizer stands to the teacher's; None when they
    are one and the same, or the teacher has none here. is_trie: the student's patches of bytes are the teacher's tokens.
    store: the targets that were captured. members: several teachers.
    """

    kind: str
    name: str | None
    comparison: TokenizerComparison | None = None
    is_cross_tokenizer: bool = False
    is_trie: bool = False
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
    teaching.is_trie = teaching.is_cross_tokenizer and reads_teachers_trie(work.recipe)
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
    if "byte_trie" in named and not teaching.is_cross_tokenizer:
        raise VocabularyError(
            f"byte_trie follows a teacher's tokens byte by byte, and {teaching.name} predicts symbols as this student does: a model "
            "of bytes, or a store of such predictions. Use forward_kl, which is exact here and costs less."
        )
    if not teaching.is_cross_tokenizer or (recipe.teacher is not None and recipe.teacher.exact):
        return
    if teaching.is_trie and (teaching.store is None or named <= {"byte_trie", "cross_entropy"}):
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
    if teaching.is_trie:
        advice = (
            "A store in the teacher's own tokens serves byte_trie, alone or with cross_entropy. For other losses capture "
            "it again with this recipe and teacher.source: predictions of symbols are stored then."
        )
    elif recipe.tokenizer.segmenter is not None:
        advice = (
            "Cut at the teacher's borders (tokenizer.segmenter: teacher), and any loss on predictions is exact. Else: "
            + advice
        )
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


def target_source(work: Run, student: Any, terms: Sequence[Term]) -> tuple[TargetSource | None, int | None]:
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
        return _stored(work, terms), None
    if teaching.is_trie and not isinstance(entries, Sampled):
        trie = TrieTeacher(
            work.teacher.model, work.teacher.tokenizer, work.tokenizer, entries=entries, paths=trie_paths(terms),
            name=work.teacher.source,
        )  # fmt: skip
        return trie, None
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


def trie_paths(terms: Sequence[Term]) -> int:
    """How many of the teacher's tokens a stage follows through the trie; 0 when it does not."""
    return next((int(term.options.get("paths") or TRIE_PATHS) for term in terms if term.objective == "byte_trie"), 0)


def _stored(work: Run, terms: Sequence[Term]) -> TargetSource:
    if not work.teaching.is_cross_tokenizer:
        return StoredTargets(work.teaching.store)
    from limbeck.models.token_bytes import read_token_bytes

    windows = _store_windows(work)
    assert windows is not None
    if work.teaching.is_trie:
        theirs = reading.teachers_tokenizer(work.recipe, work.teacher)
        return StoredTriePaths(windows, tokenizer=theirs, byte_tokenizer=work.tokenizer, paths=trie_paths(terms))
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
