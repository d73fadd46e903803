"""Whether the parts of a recipe agree: what this teacher, this student and these stages can do together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.recipe_objectives import CROSS_TOKENIZER, FEATURES, HIDDEN_STATES
from limbeck.recipe_student import Student
from limbeck.recipe_values import Problems

if TYPE_CHECKING:
    from limbeck.recipe import Recipe

_HYENA_KEYS = ("keep_attention", "keep_rule", "hyena", "failed_layers")


def teacher_problems(recipe: Recipe) -> Problems:
    """What a recipe with a teacher cannot ask for."""
    assert recipe.teacher is not None
    student, teacher = recipe.student, recipe.teacher
    problems: Problems = {}
    if recipe.tokenizer.train_vocab_size is not None and student.architecture is None:
        problems["tokenizer.train_vocab_size"] = "only a student of a new architecture can have new tokens. Remove it"
    origins = [name for name in ("source", "architecture", "shrink") if getattr(student, name) is not None]
    if len(origins) > 1:
        problems[f"student.{origins[1]}"] = f"student.{origins[0]} is given too; the student has one origin"
    elif origins:
        problems |= _own_student_problems(recipe, origins[0])
    elif teacher.start is None:
        problems["student"] = (
            f"teacher.{teacher.kind} brings no weights to start from. Name the student: source, architecture, "
            "or give teacher.source beside teacher.store"
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
    if origin == "architecture" and not isinstance((recipe.student.architecture or {}).get("model_type"), str):
        problems["student.architecture"] = "model_type is missing: the name transformers gives it, such as gpt_neox"
    return problems


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
    for index, stage in enumerate(recipe.stages):
        place = f"stages.{index}"
        if stage.kind == "align" and recipe.teacher.start is None:
            problems[f"{place}.kind"] = f"align needs the teacher's weights, and teacher.{kind} has none"
        if stage.kind != "distil":
            continue
        if kind == "closed":
            problems[f"{place}.kind"] = "a closed teacher gives text alone. Use tune: it learns from what was written"
        for number, term in enumerate(stage.terms()):
            is_other = term.objective not in ("forward_kl", "cross_entropy") or term.temperature != 1
            if recipe.teacher.targets == "sampled" and term.objective not in FEATURES and is_other:
                problems[f"{place}.objectives.{number}.objective"] = (
                    "random draws estimate forward_kl at temperature 1 without bias, and nothing else. Use that, or targets: top_k"
                )
            where = f"{place}.objectives.{number}.objective"
            if term.objective in FEATURES and (
                kind in ("served", "several") or (kind == "store" and term.objective not in HIDDEN_STATES)
            ):
                problems[where] = f"teacher.{kind} hands over no such thing; a live teacher (source) does"
        if stage.on_policy is not None and kind in ("store", "served", "closed"):
            problems[f"{place}.on_policy"] = f"what the student writes has to be judged anew, and teacher.{kind} cannot"
        if stage.on_policy is not None and any(
            t.objective in CROSS_TOKENIZER - {"cross_entropy"} for t in stage.terms()
        ):
            problems[f"{place}.on_policy"] = "it needs a teacher with the student's tokens"
    return problems


def scratch_problems(recipe: Recipe) -> Problems:
    """What a recipe without a teacher cannot ask for."""
    problems: Problems = {}
    student, architecture = recipe.student, recipe.student.architecture
    if student.shrink is not None:
        problems["student.shrink"] = "without a teacher there is nothing to shrink"
    if student.source is not None and architecture is not None:
        problems["student.source"] = "student.architecture is given too; the student has one origin"
    elif student.source is None and architecture is None:
        problems["teacher"] = "no teacher and no student.architecture: there is nothing to build. Give one of them"
    elif architecture is not None and not isinstance(architecture.get("model_type"), str):
        problems["student.architecture"] = "model_type is missing: the name transformers gives it, such as gpt_neox"
    if student.source is None and recipe.tokenizer.source is None and recipe.tokenizer.train_vocab_size is None:
        problems["tokenizer"] = "without a teacher, give tokenizer.source or tokenizer.train_vocab_size"
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
