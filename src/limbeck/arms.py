"""The arms of a run, as stages: what the student goes through, and what each control does with the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck import assembly, stage_costs
from limbeck.core.runtime import derive_seed
from limbeck.recipe import Recipe
from limbeck.recipe_stages import Stage, TuneStage
from limbeck.train.metrics import PlannedStage

EQUAL_FLOPS = "equal_flops"
WITHOUT_TEACHER = frozenset({"from_scratch", "without_teacher", EQUAL_FLOPS})


def arm_stages(recipe: Recipe) -> dict[str, list[Any]]:
    """The student's stages, then those of the controls asked for, all with equal tokens.

    `equal_flops` is not among them: its tokens depend on what the student cost (see `equal_flops_stages`).
    """
    stages, total = list(recipe.stages), recipe.total_tokens
    arms = {"student": stages}
    if recipe.teacher is None:
        return arms
    controls = recipe.controls
    logit_stages = [stage for stage in stages if stage.kind != "align"]
    if controls.from_scratch:
        arms["from_scratch"] = [as_tune(stages, total, is_new=True)]
    if has_without_teacher(recipe):
        arms["without_teacher"] = [as_tune(stages, total, is_new=False)]
    if controls.copied and 0 < len(logit_stages) < len(stages):
        arms["copied"] = stretch(logit_stages, total)
    if controls.teacher_more and recipe.teacher.start is not None and recipe.teacher.quantise is None:
        arms["teacher_more"] = [as_tune(stages, total, is_new=False)]
    return arms


def has_without_teacher(recipe: Recipe) -> bool:
    """Whether the student's own start is trained without the teacher too."""
    wanted = recipe.controls.without_teacher
    return wanted if wanted is not None else bool(recipe.student.source or recipe.student.shrink)


def compared_control(recipe: Recipe) -> str | None:
    """The control that says whether the teacher was worth it: the student's own start where there is one."""
    if recipe.teacher is None:
        return None
    if has_without_teacher(recipe):
        return "without_teacher"
    return "from_scratch" if recipe.controls.from_scratch else None


def seeds(recipe: Recipe) -> list[int]:
    """The seeds under which the student and the compared control are trained, the recipe's own first."""
    further = range(1, recipe.controls.seeds if compared_control(recipe) else 1)
    return [recipe.seed, *(derive_seed(recipe.seed, "replica", number) % 2**32 for number in further)]


def planned_stages(recipe: Recipe, folder: Path) -> list[PlannedStage]:
    """Every stage of every arm in the order in which they are trained, and which are done already: for the display.

    The tokens of `equal_flops` are a guess, the student's: they are known when the student is trained.
    """
    own = arm_stages(recipe)
    control = compared_control(recipe)
    tuned = [as_tune(recipe.stages, recipe.total_tokens, is_new=False)]
    places = [(folder, own | ({EQUAL_FLOPS: tuned} if recipe.controls.equal_flops and control else {}))]
    again = {name: stages for name, stages in own.items() if name in ("student", control)}
    places += [(folder / "seeds" / str(number), again) for number in range(1, len(seeds(recipe)))]
    return [
        PlannedStage(name, stage.name, stage.steps * stage.batch_tokens, (place / "arms" / name / "done.json").exists())
        for place, trained in places
        for name, stages in trained.items()
        for stage in stages
    ]


def equal_flops_stages(recipe: Recipe, student: Any, *, spent: float) -> list[Any]:
    """The compared control's one stage, with as many operations as the student's stages took, the teacher's included.

    spent: those operations: what was counted while the student was trained, or what is foretold of it.
    """
    control = compared_control(recipe)
    assert control is not None
    alike = as_tune(recipe.stages, recipe.total_tokens, is_new=control == "from_scratch")
    (plan,) = assembly.stage_plans(recipe, [alike], student)
    batch = alike.batch_tokens
    a_batch = stage_costs.stage_flops(recipe, plan, student, ()) / plan.settings.steps
    whole = max(1, round(spent / a_batch)) * batch
    return [as_tune(recipe.stages, whole, is_new=control == "from_scratch")]


def as_tune(stages: Sequence[Any], total_tokens: int, *, is_new: bool) -> Any:
    """One plain training stage with the last stage's settings and all of the tokens: what a control without a teacher gets.

    A new model (`is_new`) learns at the highest rate of any stage, mixers' included, since nothing in it needs care; a
    trained one at the last stage's own.
    """
    last = stages[-1]
    rates = [rate for stage in stages for rate in (stage.learning_rate, stage.mixer_learning_rate) if rate is not None]
    kept = {name: getattr(last, name) for name in Stage.model_fields if name not in ("kind", "name", "tokens")}
    rate = {"learning_rate": max(rates) if is_new else last.learning_rate, "mixer_learning_rate": None}
    return TuneStage(**kept | rate, kind="tune", name="tune", tokens=total_tokens)


def stretch(stages: Sequence[Any], total_tokens: int) -> list[Any]:
    """The same stages with their tokens scaled up to a total, the last one taking what rounding leaves."""
    own = sum(stage.steps * stage.batch_tokens for stage in stages)
    longer = [
        stage.model_copy(update={"tokens": max(1, round(stage.steps * total_tokens / own)) * stage.batch_tokens})
        for stage in stages
    ]
    rest = total_tokens - sum(stage.tokens for stage in longer[:-1])
    longer[-1] = longer[-1].model_copy(update={"tokens": max(longer[-1].batch_tokens, rest)})
    return longer
