"""Whether teacher, student and store understand each other, looked at before anything is trained.

No weights are loaded and no endpoint is asked. What cannot be looked at from here is a warning; what cannot work is a
problem, with the way out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck import reading
from limbeck.core.errors import LimbeckError, RecipeError, StoreError, TeacherError, VocabularyError
from limbeck.core.symbols import SYMBOLS
from limbeck.models.anatomy import find_layers
from limbeck.models.layer_maps import layer_map
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.models.vocabulary import TokenizerComparison, compare_tokenizers
from limbeck.recipe import Recipe
from limbeck.recipe_agreement import reads_teachers_trie
from limbeck.recipe_objectives import BYTE_TRIE, CROSS_TOKENIZER, FEATURES, Objective
from limbeck.store.manifest import is_store, is_unfinished
from limbeck.store.store import TargetStore

_TEMPLATE = "chat template"
_ACROSS = (
    "Use chunk_likelihood (ALM) or sorted_earth_mover (ULD), alone or with cross_entropy, or a student with the "
    "teacher's tokens."
)


class PlanError(RecipeError):
    """The recipe cannot be carried out on this machine. `facts`: the plan as far as it was made."""

    def __init__(self, message: str, facts: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


@dataclass
class Findings:
    """What was found. facts: for the plan. warnings: what may not be as hoped. problems: what cannot work."""

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def preflight(recipe: Recipe, *, student: Any, teachers: Sequence[Any]) -> Findings:
    """Look at tokenizers, objectives, layers and named stores. The models may lie on the meta device.

    teachers: those that can be loaded here; none for a store, an endpoint, or the student itself.
    """
    found = Findings()
    words = recipe.teacher
    if words is None:
        return found
    store = _open_stores(recipe, found)
    names = _tokenizer_names(recipe)
    is_other = False
    if words.several is not None:
        is_other = _compare_members(recipe, names[0], student, teachers, found)
    elif names[1] is not None and names[0] != names[1]:
        is_other = _compare(names[0], names[1], student, teachers[0] if teachers else None, found)
    if store is not None:
        is_other = _check_store_tokens(recipe, names[0], store, found)
    found.facts["other_tokens"] = is_other
    _check_objectives(recipe, is_other, found)
    _check_layers(recipe, student, teachers, store, found)
    return found


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model, folder or hub id. Raises: TeacherError when it is not to be had."""
    from limbeck.models.teacher import load_tokenizer as load

    return load(source)


def _tokenizer_names(recipe: Recipe) -> tuple[str | None, str | None]:
    """Where the student's tokenizer and the teacher's come from; None for one that is yet to be trained, or for none."""
    words, teacher = recipe.tokenizer, recipe.teacher
    assert teacher is not None
    theirs = teacher.start
    if teacher.served is not None:
        theirs = teacher.served.tokenizer
    folder = None if teacher.store is None else Path(teacher.store).expanduser() / reading.TOKENIZER_FOLDER
    if theirs is None and folder is not None and folder.is_dir():
        theirs = str(folder)
    if words.train_vocab_size is not None or words.segmenter is not None:
        return None, theirs
    return words.source or recipe.student.source or theirs, theirs


def _compare(mine: str | None, theirs: str, student: Any, teacher: Any | None, found: Findings) -> bool:
    """Compare two tokenizers into the findings. Returns: whether they are different."""
    if mine is None:
        found.facts["tokenizers"] = {"verdict": "different", "student": "made in this run", "teacher": theirs}
        return True
    try:
        pair = load_tokenizer(mine), load_tokenizer(theirs)
    except LimbeckError as error:
        found.warnings.append(
            f"whether student and teacher have the same tokens could not be looked at, and will be when the run starts: {error}"
        )
        found.facts["tokenizers"] = {"verdict": None, "student": mine, "teacher": theirs}
        return False
    rows = [None if model is None else _rows(model) for model in (student, teacher)]
    try:
        comparison = compare_tokenizers(*pair, student_rows=rows[0], teacher_rows=rows[1])
    except VocabularyError as error:
        found.problems.append(str(error))
        return False
    _note_comparison(comparison, mine, theirs, found)
    return not comparison.can_share_logits


def _note_comparison(comparison: TokenizerComparison, mine: str, theirs: str, found: Findings) -> None:
    found.facts["tokenizers"] = {
        "verdict": comparison.verdict,
        "usable_vocabulary": comparison.usable_vocabulary,
        "student": mine,
        "teacher": theirs,
        "told": comparison.explain(),
    }
    found.facts["tokenizer_table"] = [
        dict(zip(("what", "student", "teacher", "verdict"), row, strict=True)) for row in comparison.rows()
    ]
    for fact in comparison.facts:
        if fact.what == _TEMPLATE and not fact.is_same:
            found.warnings.append(
                f"the chat templates differ (student: {fact.student}; teacher: {fact.teacher}): what one model reads as a "
                "conversation is not what the other was trained on. Running text is not concerned."
            )


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _compare_members(recipe: Recipe, mine: str | None, student: Any, teachers: Sequence[Any], found: Findings) -> bool:
    """Compare the student with each of several teachers; all must have its tokens."""
    assert recipe.teacher is not None
    assert recipe.teacher.several is not None
    is_other = False
    for member, teacher in zip(recipe.teacher.several, teachers, strict=True):
        if member.source == mine or not _compare(mine, member.source, student, teacher, found):
            continue
        is_other = True
        found.problems.append(
            f"teacher.several: the tokens of {member.source} are not the student's, so its predictions cannot be mixed "
            f"with the others'. {forbidding(found)}Name teachers with one tokenizer."
        )
    return is_other


def forbidding(found: Findings) -> str:
    """The lines of the table that rule out a comparison token by token, as a sentence; "" when there is no table."""
    rows = [row for row in found.facts.get("tokenizer_table", ()) if row["verdict"] == "forbids"]
    told = "; ".join(f"{row['what']}: {row['student']} / {row['teacher']}" for row in rows)
    return f"What differs (student / teacher): {told}. " if told else ""


def _open_stores(recipe: Recipe, found: Findings) -> TargetStore | None:
    """Open every store that the recipe names; returns the teacher's."""
    assert recipe.teacher is not None
    named = recipe.teacher.store
    folders = [] if named is None else [named]
    sources = [source.source for source in (*recipe.data.train, *recipe.data.heldout)]
    folders += [s for s in sources if s not in folders and (is_store(Path(s)) or is_unfinished(Path(s)))]
    opened, rows = {}, []
    for folder in folders:
        try:
            store = TargetStore(Path(folder).expanduser())
        except StoreError as error:
            found.problems.append(str(error))
            continue
        opened[folder] = store
        manifest = store.manifest
        rows.append(
            {
                "folder": str(folder), "kind": manifest.kind, "teacher": store.teacher_name, "rows": manifest.rows,
                "tokens": manifest.tokens, "entries": (manifest.codec or {}).get("k"), "store_bytes": manifest.bytes,
            }
        )  # fmt: skip
    if rows:
        found.facts["stores"] = rows
    return None if named is None else opened.get(named)


def _check_store_tokens(recipe: Recipe, mine: str | None, store: TargetStore, found: Findings) -> bool:
    """See that the named store can teach this student. Returns: whether it was captured in other tokens."""
    assert recipe.teacher is not None
    if store.manifest.kind != "targets":
        found.problems.append(
            f"teacher.store: {store.folder} holds texts, not targets. Name it under data.train and use tune stages."
        )
        return False
    is_other = False
    if mine is not None and store.tokenizer is not None:
        try:
            is_other = tokenizer_fingerprint(load_tokenizer(mine)) != store.tokenizer
        except LimbeckError as error:
            found.warnings.append(f"whether the store has the student's tokens could not be looked at: {error}")
    elif recipe.tokenizer.segmenter is not None:
        is_other = store.manifest.vocabulary_size != SYMBOLS
    is_text = any(Path(source.source).expanduser() == store.folder for source in recipe.data.train)
    if is_other:
        if not is_text:
            found.problems.append(
                f"data.train: a student with other tokens reads the store's own text. Write data: {{train: [{store.folder}]}}."
            )
        if len(store) and store.row(0, targets=False).text is None:
            found.problems.append(
                f"{store.folder} keeps no text, so only a student with its own tokens can learn from it."
            )
    elif not is_text:
        _look_for_holes(recipe, store, found)
    source = recipe.teacher.source
    if source is not None and store.teacher_name != source:
        found.warnings.append(
            f"the store was captured from {store.teacher_name}, and teacher.source is {source}. Their fingerprints are "
            "compared when the run starts."
        )
    return is_other


def _look_for_holes(recipe: Recipe, store: TargetStore, found: Findings) -> None:
    """What can be said of missing rows without cutting the text: their length and number."""
    context = recipe.data.context_tokens
    if store.context_tokens != context:
        found.problems.append(
            f"{store.folder}: its rows have {store.context_tokens} tokens, and data.context_tokens is {context}, so none of its "
            f"targets fit. Set data.context_tokens={store.context_tokens}, or capture again."
        )
        return
    wanted = -(-recipe.total_tokens // context)
    if len(store) < wanted:
        found.warnings.append(
            f"{store.folder} has {len(store):,} rows, and the stages see {wanted:,}: unless the text has no more windows, rows "
            "are missing, and the run will say so before it trains. Give the capture command again; it adds them."
        )


def _check_objectives(recipe: Recipe, is_other: bool, found: Findings) -> None:
    """Refuse comparisons token by token between different tokens, and likelihoods of text where tokens are the same."""
    if is_other:
        _check_bytes(recipe, found)
    if is_other and recipe.teacher is not None and recipe.teacher.exact:
        _check_exact(recipe, found)
        return
    if is_other and reads_teachers_trie(recipe):
        _check_trie(recipe, found)
        return
    known = found.facts.get("tokenizers", {}).get("verdict", "") is not None
    for stage in recipe.stages:
        names = [term.objective for term in stage.terms()] if stage.kind == "distil" else []
        wrong = [name for name in names if name not in CROSS_TOKENIZER]
        if is_other and wrong:
            found.problems.append(
                f"stages.{stage.name}: {wrong[0]} compares predictions token by token, but the student's tokens are not the "
                f"teacher's. {forbidding(found)}{_ACROSS}"
            )
        elif not is_other and known and "chunk_likelihood" in names:
            found.problems.append(
                f"stages.{stage.name}: chunk_likelihood is for a teacher with other tokens, and these are the student's. "
                "Use forward_kl or another objective on predictions, which tell more."
            )


def _check_trie(recipe: Recipe, found: Findings) -> None:
    """A student whose patches are the teacher's tokens learns predictions; of a store of tokens, those at patch starts."""
    is_stored = recipe.teacher is not None and recipe.teacher.store is not None
    for stage in recipe.stages:
        for term in stage.terms() if stage.kind == "distil" else ():
            if term.objective in FEATURES:
                found.problems.append(
                    f"stages.{stage.name}: the teacher's hidden states stand at tokens, the student's at bytes, so {term.objective} "
                    "has nothing to compare. Use objectives on predictions, such as forward_kl or byte_trie."
                )
            elif is_stored and term.objective not in (BYTE_TRIE, "cross_entropy"):
                found.problems.append(
                    f"stages.{stage.name}: the store holds predictions of tokens, which byte_trie can use and {term.objective} "
                    "cannot. Use byte_trie, or capture with this recipe's tokenizer, which stores predictions of bytes."
                )


def _check_exact(recipe: Recipe, found: Findings) -> None:
    """See that the teacher's exact predictions can be had in the student's tokens, and that nothing else is asked for."""
    from limbeck.models.exact_likelihood import decompose
    from limbeck.models.token_bytes import read_token_bytes

    names = _tokenizer_names(recipe)
    with contextlib.suppress(TeacherError):  # not to be had here, which was said before
        pair = [load_tokenizer(name) for name in names if name is not None]
        try:
            if len(pair) == 2:
                decompose(pair[0], read_token_bytes(pair[0]), pair[1], read_token_bytes(pair[1]))
        except VocabularyError as error:
            found.problems.append(f"teacher.exact: {error}")
    for stage in recipe.stages:
        for term in stage.terms() if stage.kind == "distil" else ():
            if term.objective in FEATURES or term.objective == "chunk_likelihood":
                found.problems.append(
                    f"stages.{stage.name}: with teacher.exact the teacher gives predictions alone, not what {term.objective} "
                    "needs. Use an objective on predictions."
                )
    found.warnings.append(
        "teacher.exact: the teacher reads about one text for every token of the student, which the time below does not count."
    )


def _check_bytes(recipe: Recipe, found: Findings) -> None:
    """Other tokens meet in bytes, so both tokenizers must tell theirs."""
    from limbeck.models.token_bytes import read_token_bytes

    for name in filter(None, dict.fromkeys(_tokenizer_names(recipe))):
        try:
            read_token_bytes(load_tokenizer(name))
        except VocabularyError as error:
            found.problems.append(f"{name}: {error}")
        except TeacherError:
            pass  # not to be had here, which was said before


def _check_layers(
    recipe: Recipe, student: Any, teachers: Sequence[Any], store: TargetStore | None, found: Findings
) -> None:
    """Layers that objectives name must exist, in the store too. Raises: RecipeError when a model does not have them."""
    for stage in recipe.stages:
        for term in stage.terms() if stage.kind == "distil" else ():
            if term.objective not in FEATURES:
                continue
            place = f"stages.{stage.name}: {term.objective}"
            if store is not None:
                found.problems += [f"{place}{problem}" for problem in _missing_layers(term, store)]
                continue
            try:
                layer_pairs(term, student, teachers[0] if teachers else student)
            except RecipeError as error:
                raise RecipeError(f"{place}: {error}") from error


def _missing_layers(term: Objective, store: TargetStore) -> list[str]:
    kept = list(store.hidden_layers)
    if not isinstance(term.layers, list):
        return [f": name its layers as pairs of student and teacher layers; {store.folder} has the teacher's {kept}."]
    if any(pair[1] < 0 for pair in term.layers):
        return [": a store does not say how deep its teacher is. Count the teacher's layers from 0."]
    missing = sorted({pair[1] for pair in term.layers} - set(kept))
    told = f" wants the teacher's layers {missing}, and {store.folder} has {kept}. Capture with hidden_layers, or name these."
    return [told] if missing else []


def layer_pairs(term: Objective, student: Any, teacher: Any) -> list[tuple[int, int]]:
    """Which layers of both meet in an objective on hidden states and the like. Raises: RecipeError as `layer_map`."""
    words: Any = term.layers
    return layer_map(words, len(find_layers(student)), len(find_layers(teacher)))
