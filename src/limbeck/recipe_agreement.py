"""Whether the parts of a recipe agree: what this teacher, this student and these stages can do together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.models.sizes import SIZES
from limbeck.recipe_objectives import BYTE_TRIE, CROSS_TOKENIZER, FEATURES, HIDDEN_STATES, STRETCHES
from limbeck.recipe_student import Student
from limbeck.recipe_tokenizer import TEACHER_BORDERS
from limbeck.recipe_values import Problems

if TYPE_CHECKING:
    from limbeck.recipe import Recipe
    from limbeck.recipe_objectives import Objective

BYTE_POOL = "limbeck_bytepool"
OWN_FAMILIES = frozenset({BYTE_POOL, "limbeck_compact"})
# What has no finite value where the teacher rules a symbol out that the student does not.
_NEEDS_ALL_POSSIBLE = frozenset({"reverse_kl", "symmetric_kl", "adaptive_kl", "logit_mse"})
_HYENA_KEYS = ("keep_attention", "keep_rule", "hyena", "failed_layers")


def teacher_problems(recipe: Recipe) -> Problems:
    """What a recipe with a teacher cannot ask for."""
    assert recipe.teacher is not None
    student, teacher = recipe.student, recipe.teacher
    problems: Problems = {}
    for name in ("train_vocab_size", "segmenter"):
        if getattr(recipe.tokenizer, name) is not None and not student.is_new:
            problems[f"tokenizer.{name}"] = (
                "only a student of a new size or architecture can have new tokens. Remove it"
            )
    origins = [name for name in ("source", "size", "architecture", "shrink") if getattr(student, name) is not None]
    if origins[:2] == ["size", "architecture"]:
        del origins[1]
    if len(origins) > 1:
        problems[f"student.{origins[1]}"] = f"student.{origins[0]} is given too; the student has one origin"
    elif origins:
        problems |= _own_student_problems(recipe, origins[0])
    elif teacher.start is None:
        problems["student"] = (
            f"teacher.{teacher.kind} brings no weights to start from. Name the student: source, architecture, "
            "or give teacher.source beside teacher.store"
        )
    if teacher.exact and recipe.tokenizer.segmenter is not None:
        problems["teacher.exact"] = (
            "for bytes in patches write tokenizer.segmenter: teacher, which is exact and costs one pass. Remove it"
        )
    if student.shrink is not None and teacher.start is None:
        problems["student.shrink"] = f"teacher.{teacher.kind} brings no weights that could be shrunk"
    if teacher.itself is not None and any(stage.kind == "align" for stage in recipe.stages):
        problems["teacher.itself"] = "align needs a teacher with attention of its own. Remove the align stages"
    return problems | _teaching_problems(recipe)


def _own_student_problems(recipe: Recipe, origin: str) -> Problems:
    problems: Problems = {}
    for name in _HYENA_KEYS:
        if getattr(recipe.student, name) != Student.model_fields[name].default:
            problems[f"student.{name}"] = (
                f"a student from student.{origin} keeps its own mixers. Remove it, or remove student.{origin}"
            )
    for index, stage in enumerate(recipe.stages):
        if stage.kind == "align":
            problems[f"stages.{index}.kind"] = f"a student from student.{origin} has no replaced mixers to align"
        elif getattr(stage, "train", "all") == "mixers":
            problems[f"stages.{index}.train"] = f"a student from student.{origin} has no new mixers. Use all"
    if recipe.student.is_new:
        problems |= _new_student_problems(recipe)
    return problems


def _new_student_problems(recipe: Recipe) -> Problems:
    """What a student of its own architecture must say, and how its input must fit."""
    family = recipe.student.configuration.get("model_type")
    if not isinstance(family, str):
        return {"student.architecture": "model_type is missing: the name transformers gives it, such as gpt_neox"}
    if recipe.student.size is not None and family != SIZES[recipe.student.size]["model_type"]:
        return {"student.architecture.model_type": f"{recipe.student.size} is no {family}. Remove it, or student.size"}
    limit = recipe.student.configuration.get("patch_bytes", 2)
    if family == BYTE_POOL and (type(limit) is not int or not 2 <= limit <= 256):
        return {"student.architecture.patch_bytes": f"expected a whole number from 2 to 256, got {limit!r}"}
    if family in OWN_FAMILIES and recipe.runtime.gradient_checkpointing:
        return {
            "runtime.gradient_checkpointing": "models of this family do not have it. Set stages' micro_batch_sequences lower"
        }
    if family == BYTE_POOL and recipe.tokenizer.segmenter is None:
        return {"tokenizer.segmenter": "this student reads bytes: say how they are cut, such as space or teacher"}
    if recipe.tokenizer.segmenter == TEACHER_BORDERS and recipe.teacher is None:
        return {"tokenizer.segmenter": "there is no teacher whose borders could be used. Use space, or trained"}
    return {}


def _teaching_problems(recipe: Recipe) -> Problems:
    assert recipe.teacher is not None
    problems: Problems = {}
    texts = len(recipe.data.train)
    for index, member in enumerate(recipe.teacher.several or []):
        if member.texts is not None and any(text >= texts for text in member.texts):
            problems[f"teacher.several.{index}.texts"] = f"data.train has {texts} sources; places count from 0"
    taught = [member.texts for member in recipe.teacher.several or []]
    if taught and None not in taught:
        alone = sorted(set(range(texts)) - {text for places in taught for text in places or []})
        if alone:
            problems["teacher.several"] = f"nobody teaches data.train[{alone[0]}]. Name it in some member's texts"
    kind = recipe.teacher.kind
    if reads_teachers_trie(recipe):
        if kind == "several":
            problems["teacher.several"] = (
                "bytes are taught through the trie of one tokenizer. Name one teacher as source"
            )
        if recipe.teacher.targets == "sampled":
            problems["teacher.targets"] = "of 260 symbols all are handed over, or the top_k; draws are for vocabularies"
    for index, stage in enumerate(recipe.stages):
        place = f"stages.{index}"
        if stage.kind == "align" and recipe.teacher.start is None:
            problems[f"{place}.kind"] = f"align needs the teacher's weights, and teacher.{kind} has none"
        if stage.kind != "distil":
            continue
        if kind == "closed":
            problems[f"{place}.kind"] = "a closed teacher gives text alone. Use tune: it learns from what was written"
        for number, term in enumerate(stage.terms()):
            told = _term_problem(recipe, term)
            if told is not None:
                problems[f"{place}.objectives.{number}.objective"] = told
        if stage.on_policy is not None and kind in ("store", "served", "closed"):
            problems[f"{place}.on_policy"] = f"what the student writes has to be judged anew, and teacher.{kind} cannot"
        across = any(term.objective in CROSS_TOKENIZER - {"cross_entropy"} for term in stage.terms())
        if stage.on_policy is not None and (across or reads_teachers_trie(recipe)):
            problems[f"{place}.on_policy"] = "it needs a teacher with the student's tokens"
    return problems


def _term_problem(recipe: Recipe, term: Objective) -> str | None:
    """Why a term of a distil stage cannot be had from this teacher; None when it can."""
    teacher = recipe.teacher
    assert teacher is not None
    name = term.objective
    is_trie = reads_teachers_trie(recipe)
    if name == BYTE_TRIE and not is_trie:
        return "byte_trie needs a student that reads bytes, cut at the teacher's borders: tokenizer.segmenter: teacher"
    if name in _NEEDS_ALL_POSSIBLE and is_trie:
        return (
            f"the teacher gives most symbols no probability at all, and {name} of that is infinite. Use forward_kl, "
            "skewed_reverse_kl or jensen_shannon"
        )
    if name not in FEATURES:
        is_other = name not in ("forward_kl", "cross_entropy") or term.temperature != 1
        if teacher.targets == "sampled" and is_other:
            return "random draws estimate forward_kl at temperature 1 without bias, and nothing else. Use that, or targets: top_k"
        return None
    if recipe.student.configuration.get("model_type") == BYTE_POOL:
        return "this student's hidden states are of patches, its teacher's of tokens. Use forward_kl, or byte_trie"
    if teacher.kind in ("served", "several") or (teacher.kind == "store" and name not in HIDDEN_STATES):
        return f"teacher.{teacher.kind} hands over no such thing; a live teacher (source) does"
    return None


def curriculum_problems(recipe: Recipe, index: int) -> Problems:
    """Rows and patches that grow over a stage: whether they can with this data, this student and this teacher."""
    stage = recipe.stages[index]
    problems: Problems = {}
    context = recipe.data.context_tokens
    for number, part in enumerate(stage.length_curriculum):
        if context % part.divisor or context // part.divisor < 8:
            problems[f"stages.{index}.length_curriculum.{number}.divisor"] = (
                f"{part.divisor} does not divide data.context_tokens ({context}) into rows of 8 tokens or more"
            )
    if stage.patch_curriculum and recipe.tokenizer.segmenter is None:
        problems[f"stages.{index}.patch_curriculum"] = (
            "this student reads no bytes. Give tokenizer.segmenter, or remove it"
        )
    for number, cut in enumerate(stage.patch_curriculum):
        if recipe.tokenizer.segmenter is not None and cut.symbols >= recipe.patch_bytes:
            problems[f"stages.{index}.patch_curriculum.{number}.symbols"] = (
                f"patches have {recipe.patch_bytes} symbols at most as it is: this would cut none. Give fewer"
            )
    stored = recipe.teacher is not None and recipe.teacher.kind in ("store", "served")
    for name in ("length_curriculum", "patch_curriculum"):
        if getattr(stage, name) and (stage.kind == "align" or (stored and stage.kind == "distil")):
            problems[f"stages.{index}.{name}"] = (
                "targets were written down for whole windows, and layers are aligned on them. Remove it"
            )
    return problems


def reads_teachers_trie(recipe: Recipe) -> bool:
    """Whether the student reads bytes in patches that are the teacher's tokens, and learns from predictions, not stretches."""
    if recipe.teacher is None or recipe.tokenizer.segmenter is None:
        return False
    named = {term.objective for stage in recipe.stages if stage.kind == "distil" for term in stage.terms()}
    return not named & STRETCHES and recipe.tokenizer.segmenter in (TEACHER_BORDERS, f"bpe:{recipe.teacher.start}")


def scratch_problems(recipe: Recipe) -> Problems:
    """What a recipe without a teacher cannot ask for."""
    problems: Problems = {}
    student = recipe.student
    if student.shrink is not None:
        problems["student.shrink"] = "without a teacher there is nothing to shrink"
    if student.source is not None and student.is_new:
        problems["student.source"] = "student.size or architecture is given too; the student has one origin"
    elif student.source is None and not student.is_new:
        problems["teacher"] = (
            "no teacher, no student.size and no student.architecture: there is nothing to build. Give one"
        )
    elif student.is_new:
        problems |= _new_student_problems(recipe)
    words = recipe.tokenizer
    if student.source is None and words.source is None and words.train_vocab_size is None and words.segmenter is None:
        problems["tokenizer"] = "without a teacher, give tokenizer.source, train_vocab_size or segmenter"
    if student.initialisation != "random" and student.source is None:
        problems["student.initialisation"] = (
            f"{student.initialisation} needs a teacher's weights. Without one write random"
        )
    for name in _HYENA_KEYS:
        if getattr(student, name) != Student.model_fields[name].default:
            problems[f"student.{name}"] = (
                "without a teacher no attention is replaced: say it all in student.architecture"
            )
    for index, stage in enumerate(recipe.stages):
        if stage.kind != "tune":
            problems[f"stages.{index}.kind"] = f"{stage.kind} needs a teacher. Use tune, or give a teacher"
    controls = recipe.controls
    wanted = [name for name in ("from_scratch", "copied", "teacher_more", "floor") if getattr(controls, name)]
    if wanted:
        off = ", ".join(f"{name}: false" for name in wanted)
        problems["controls"] = f"without a teacher there is nothing to compare with. Write controls: {{{off}}}"
    return problems
