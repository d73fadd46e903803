"""One recipe, from teacher to report. Read this first.

    recipe -> teacher + student + data -> stages -> trainer -> checkpoints -> evaluation beside the controls -> report

A run is made of *arms*: the student, and the controls that tell what it owes to whom. Every arm goes through its
stages in the same loop, over the same samples in the same order. Whatever is finished is on disk, so the same command
continues a run that was stopped anywhere.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from limbeck import arms, assembly, capturing, judging, lessons, reading, students, teaching
from limbeck.core.files import read_json, write_json
from limbeck.core.runtime import (
    StopRequest,
    agreed,
    derive_seed,
    is_main,
    pick_device,
    process_group,
    set_threads,
    stop_on_signals,
    wait_for_all,
)
from limbeck.data.order import Mixture
from limbeck.evaluate.energy import find_meter
from limbeck.evaluate.quality import PairedDifference
from limbeck.places import STAGE_END
from limbeck.recipe import Recipe, with_budget
from limbeck.train.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from limbeck.train.metrics import MetricsLog, Progress, choose_progress
from limbeck.train.tracking import open_trackers
from limbeck.train.trainer import StageResult, load_weights, train_stage, weights_of


@dataclass
class Run:
    """What all parts of one run share."""

    recipe: Recipe
    folder: Path
    device: torch.device
    teacher: Any
    tokenizer: Any
    data: Mixture
    heldout: Mixture
    log: MetricsLog
    progress: Progress
    stop: StopRequest
    own_text: Mixture
    teaching: Any = None
    notes: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Tell the person something once, and keep it for the report."""
        if text not in self.notes:
            self.notes.append(text)
            if is_main():
                self.progress.note(text)


@dataclass(frozen=True)
class Arm:
    """One model to train: how it starts, and the stages it goes through."""

    name: str
    build: Callable[[], Any]
    stages: list[Any]


@dataclass
class ArmResult:
    """A trained arm: its model and its books."""

    model: Any
    stages: list[StageResult]
    seconds: float


def run(
    recipe: Recipe, *, run_folder: Path | None = None, budget: float = 1.0, progress: bool = True
) -> dict[str, Any]:
    """Carry one recipe from teacher to report, continuing it if it was begun. Returns the report's facts."""
    recipe = with_budget(recipe, budget)
    folder = Path(run_folder or recipe.run_folder)
    assembly.claim_run_folder(folder, recipe)
    if (folder / "report.json").exists():
        return read_json(folder / "report.json")
    device = pick_device(recipe.runtime.device)
    set_threads(recipe.runtime.threads)
    tracked = open_trackers(recipe.runtime.tracking, folder, run=recipe.name, config=recipe.model_dump(mode="json"))
    with process_group(device), stop_on_signals() as stop, tracked as trackers:
        work = open_run(recipe, folder, device, stop, show_progress=progress)
        work.log.trackers = trackers
        work.progress.plan(recipe.name, arms.planned_stages(recipe, folder))
        results: dict[str, ArmResult] = {}
        for arm in arms_of(work, results):
            results[arm.name] = train_arm(work, arm)
        differences: list[PairedDifference] = []
        further: list[StageResult] = []
        for again in replicas(work):
            trained = train_replica(again)
            differences.append(judging.replica_difference(again, trained))
            further += [stage for result in trained.values() for stage in result.stages]
        facts = judging.report(work, results, differences, further) if is_main() else {}
        trackers.report(facts)
        wait_for_all()
        return facts


def open_run(recipe: Recipe, folder: Path, device: torch.device, stop: StopRequest, *, show_progress: bool) -> Run:
    """Load teacher, tokenizer and text; whatever a served teacher has to say is fetched first."""
    progress = choose_progress(show_progress and is_main())
    if recipe.teacher is not None:
        progress.opening("loading the teacher ...")
    teacher = assembly.open_teacher(recipe, device)
    progress.opening("reading the text ...")
    tokenizer = reading.open_tokenizer(recipe, teacher, folder)
    judging.evaluation_texts(recipe)  # a text that cannot be read is told of now, not when all is trained
    captured = capturing.fetch(recipe, tokenizer, folder, progress, stop)
    enough = int(1.1 * recipe.total_tokens) + 2 * recipe.student.calibration_tokens
    sources = recipe.data.train if captured is None else [captured]
    data = reading.open_data(recipe, tokenizer, folder / "data", sources=sources, max_tokens=enough)
    own_text = data
    if captured is not None and arms.compared_control(recipe):
        own_text = reading.open_data(recipe, tokenizer, folder / "data", sources=recipe.data.train, max_tokens=enough)
    few = students.HELDOUT_WINDOWS * recipe.data.context_tokens
    heldout = reading.open_data(recipe, tokenizer, folder / "data", sources=recipe.data.heldout, max_tokens=few)
    log = MetricsLog(folder / "metrics.jsonl" if is_main() else None)
    work = Run(recipe, folder, device, teacher, tokenizer, data, heldout, log, progress, stop, own_text)
    work.teaching = teaching.open_teaching(work)
    return work


def arms_of(work: Run, results: dict[str, ArmResult]) -> Iterator[Arm]:
    """The student first, then the controls that the recipe asks for. Each spends the student's tokens.

    Controls are built after the student is trained, so that they have its final layout (`results` is read then).
    """
    recipe = work.recipe

    def layout() -> list[str]:
        return list(getattr(results["student"].model.config, "mixers", []))

    starts: dict[str, Callable[[], Any]] = {
        "student": lambda: students.initial_student(work),
        "from_scratch": lambda: students.random_student(work, layout()),
        "without_teacher": lambda: students.student_with_layout(work, layout()),
        "copied": lambda: students.student_with_layout(work, layout()),
        "teacher_more": lambda: students.copy_of_teacher(work),
    }
    for name, stages in arms.arm_stages(recipe).items():
        yield Arm(name, starts[name], stages)
    control = arms.compared_control(recipe)
    if recipe.controls.equal_flops and control is not None:
        spent = sum(stage.flops for stage in results["student"].stages)
        stages = arms.equal_flops_stages(recipe, results["student"].model, spent=spent)
        yield Arm(arms.EQUAL_FLOPS, starts[control], stages)


def replicas(work: Run) -> Iterator[Run]:
    """The run once more for each further seed, in folders of their own: another start, another order of the text."""
    for number, seed in enumerate(arms.seeds(work.recipe)[1:], start=1):
        recipe = work.recipe.model_copy(update={"seed": seed})
        folder = work.folder / "seeds" / str(number)
        log = MetricsLog(folder / "metrics.jsonl" if is_main() else None, work.log.trackers.under(f"seeds/{number}"))
        data = work.data.reseeded(derive_seed(seed, "data"))
        own_text = work.own_text.reseeded(derive_seed(seed, "data"))
        yield replace(work, recipe=recipe, folder=folder, data=data, log=log, own_text=own_text)


def train_replica(work: Run) -> dict[str, ArmResult]:
    """The student and the control it is compared with, for one more seed."""
    results: dict[str, ArmResult] = {}
    for arm in arms_of(work, results):
        if arm.name in ("student", arms.compared_control(work.recipe)):
            results[arm.name] = train_arm(work, arm)
    return results


def train_arm(work: Run, arm: Arm) -> ArmResult:
    """Take one arm through its stages, or read it back when that was done before."""
    folder = work.folder / "arms" / arm.name
    done = folder / "done.json"
    if agreed(done.exists()):
        return read_arm(work, arm, folder)
    begun = time.monotonic()
    model = arm.build().to(work.device)
    if work.recipe.runtime.gradient_checkpointing:
        # Reentrant checkpointing would hide the gradient of recorded hidden states, and that of adapters.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    results: list[StageResult] = []
    sample = 0
    for spec in arm.stages:
        for plan in assembly.stage_plans(work.recipe, [spec], model):
            results.append(train_plan(work, arm, model, plan, sample, folder))
            sample += results[-1].tokens // work.data.context_tokens
        if spec.kind == "align":
            model = students.keep_failed_layers(work, arm.name, model)
        if work.recipe.runtime.keep_stages and is_main():
            save_weights(folder / spec.name / STAGE_END, model)
    if is_main():
        save_weights(folder / "final", model)
        mixers = list(getattr(model.config, "mixers", []))
        books = {
            "stages": [asdict(result) for result in results],
            "mixers": mixers,
            "wall_seconds": time.monotonic() - begun,
        }
        write_json(done, books)
        for finished in folder.glob("*/checkpoints"):
            shutil.rmtree(finished)
    wait_for_all()
    return ArmResult(model.eval(), results, sum(result.seconds for result in results))


def save_weights(folder: Path, model: Any) -> None:
    """Keep a model as it is: its weights, and the mixers they fit."""
    facts = {"mixers": list(getattr(model.config, "mixers", []))}
    save_checkpoint(folder, Checkpoint(0, {"model": dict(weights_of(model))}, facts), keep=1)


def read_arm(work: Run, arm: Arm, folder: Path) -> ArmResult:
    """An arm that was finished before."""
    books = read_json(folder / "done.json")
    model = students.student_with_layout(work, books["mixers"]) if books["mixers"] else arm.build()
    saved = newest_checkpoint(folder / "final")
    assert saved is not None, "done.json is written after the weights"
    load_weights(model, saved.tensors["model"])
    stages = [StageResult(**stage) for stage in books["stages"]]
    return ArmResult(model.to(work.device).eval(), stages, sum(stage.seconds for stage in stages))


def train_plan(
    work: Run, arm: Arm, model: Any, plan: assembly.StagePlan, first_sample: int, folder: Path
) -> StageResult:
    """Train one phase of one arm."""
    assembly.freeze(model, plan)
    power = students.target_power(work, plan.layers) if plan.layers is not None else {}
    lesson = lessons.build_lesson(work, plan, model, power=power)
    # What a served or closed teacher wrote is the teacher's: an arm without one reads the recipe's own text.
    data = work.own_text if arm.name in arms.WITHOUT_TEACHER else work.data
    result = train_stage(
        lesson, data, plan.settings, folder=folder / plan.settings.name / "checkpoints", log=work.log, arm=arm.name,
        seed=work.recipe.seed, device=work.device, first_sample=first_sample, progress=work.progress, stop=work.stop,
        energy=find_meter(work.device),
    )  # fmt: skip
    for warning in result.warnings:
        work.say(f"{arm.name}, {plan.settings.name}: {warning}")
    return result


def teacher_model(work: Run) -> Any:
    """The teacher's model, if the run has a teacher."""
    return None if work.teacher is None else work.teacher.model
