"""What a *place* on the command line means: a run folder, an arm or a stage of one, a model folder, a hub id, a GGUF file.

`runs/x` is a run's student, `runs/x/arms/from_scratch` a control, and `runs/x/arms/student/align` the student as it was
when that stage ended (kept with `runtime.keep_stages`). Everything else is what `load_teacher` takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from limbeck.core.errors import CheckpointError, TrainingError, unknown_name
from limbeck.core.files import read_json
from limbeck.models.teacher import LoadedTeacher, fingerprint, load_teacher
from limbeck.train.checkpoint import newest_checkpoint
from limbeck.train.trainer import load_weights

STAGE_END = "end"


def open_place(place: str, *, device: torch.device) -> LoadedTeacher:
    """Load the model that a place means.

    Raises: CheckpointError when a run folder has no finished student yet, or not the arm or stage that is asked for; or for no path.
    """
    folder = _folder(place)
    if (run := run_of(folder)) is not None and run != folder:
        return _open_arm(run, folder, device)
    if (folder / "recipe.json").exists() and not (folder / "config.json").exists():
        place = str(_finished_model(folder))
    loaded = load_teacher(place, device=device)
    loaded.model.eval()
    return loaded


def _folder(place: str) -> Path:
    """The place as a path. Raises: CheckpointError for what can be none, such as a text in its place."""
    try:
        Path(place).exists()
    except OSError as error:
        short = f"{place[:40]}..." if len(place) > 40 else place
        raise CheckpointError(
            f'"{short}" cannot be opened as the name of a model ({error.strerror}). '
            "Give a run folder, a model folder or a Hub id; of `generate` first that, then the prompt."
        ) from error
    return Path(place)


def run_of(folder: Path) -> Path | None:
    """The run folder that a place lies in: the folder itself, or that of an arm or a stage; None for other places."""
    if (folder / "recipe.json").exists():
        return folder
    for parent in list(folder.parents)[:4]:
        if (parent / "recipe.json").exists() and folder.relative_to(parent).parts[0] == "arms":
            return parent
    return None


def arm_of(run: Path, folder: Path) -> str:
    """Which of a run's models a place in it means: `student`, the name of a control, or `ARM/STAGE`."""
    return "student" if folder == run else "/".join(folder.relative_to(run).parts[1:])


def _finished_model(run: Path) -> Path:
    model = run / "model"
    if not (model / "config.json").exists():
        raise CheckpointError(
            f"{run} is a run that has not finished: give its `limbeck run` command again, or name a model folder."
        )
    return model


def _open_arm(run: Path, folder: Path, device: torch.device) -> LoadedTeacher:
    """A control, or the student at the end of a stage: the saved weights in a model of the saved shape."""
    parts = folder.relative_to(run).parts[1:]
    weights = folder / ("final" if len(parts) == 1 else STAGE_END)
    if not parts or len(parts) > 2 or not weights.is_dir():
        raise CheckpointError(_missing(run, parts))
    saved = newest_checkpoint(weights)
    if saved is None:
        raise CheckpointError(f"{weights} holds no checkpoint. Give the run's command again.")
    student = load_teacher(str(_finished_model(run)), device=device)
    model = _shape(run, parts, student, saved.facts).to(device)
    try:
        load_weights(model, saved.tensors["model"])
    except (TrainingError, KeyError) as error:
        raise CheckpointError(f"{weights} does not hold the weights of {'/'.join(parts)}: {error}") from None
    return LoadedTeacher(model.eval(), student.tokenizer, str(folder), fingerprint(model), "folder")


def _shape(run: Path, parts: tuple[str, ...], student: LoadedTeacher, facts: dict[str, Any]) -> Any:
    """A model that the weights of an arm fit into: the student's, but the teacher's for `teacher_more`."""
    from transformers import AutoModelForCausalLM

    if parts[0] == "teacher_more":
        teacher = read_json(run / "recipe.json")["teacher"]
        return load_teacher(teacher["source"], revision=teacher.get("revision")).model
    config = student.model.config
    if facts.get("mixers"):
        config.mixers = facts["mixers"]
    return AutoModelForCausalLM.from_config(config)


def _missing(run: Path, parts: tuple[str, ...]) -> str:
    arms = [path.parent.name for path in (run / "arms").glob("*/final")]
    if not parts or parts[0] not in arms:
        return f"{run}: {unknown_name('finished arm', parts[0] if parts else '', arms)}."
    stages = [path.parent.name for path in (run / "arms" / parts[0]).glob(f"*/{STAGE_END}")]
    if not stages:
        return (
            f"{run} kept no ends of stages: run the recipe anew with runtime.keep_stages=true, or name the arm alone."
        )
    return f"{run}: {unknown_name(f'stage of {parts[0]}', '/'.join(parts[1:]), stages)}."
