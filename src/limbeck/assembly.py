"""From the words of a recipe to objects. The pipeline and this file alone know what a recipe is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.core.errors import CheckpointError, RecipeError
from limbeck.core.files import read_json, write_atomic, write_json
from limbeck.core.runtime import is_main
from limbeck.core.types import Batch
from limbeck.data.order import Mixture
from limbeck.models.surgery import find_attention, head_shape
from limbeck.models.teacher import LoadedTeacher
from limbeck.plugins import plugin_files
from limbeck.recipe import Recipe
from limbeck.recipe_io import dump_recipe
from limbeck.store.store import TargetStore
from limbeck.train.stages import DropoutSchedule
from limbeck.train.trainer import StageSettings


@dataclass(frozen=True)
class StagePlan:
    """One training phase: its recipe stage, its settings, and the layers an `align` phase trains (None = all)."""

    spec: Any
    settings: StageSettings
    layers: tuple[int, ...] | None = None


def claim_run_folder(folder: Path, recipe: Recipe) -> None:
    """Make a run folder this recipe's own, or see that it already is.

    A folder in which nothing was trained or fetched yet (a first start that failed) may be taken by another recipe; a
    student that was only prepared goes.

    Raises: CheckpointError when the folder holds a run of another recipe, naming what differs.
    """
    content = recipe.model_dump(mode="json")
    content["runtime"] = {key: value for key, value in content["runtime"].items() if key in _BINDING_RUNTIME}
    for kind in ("served", "closed"):
        endpoint = (content["teacher"] or {}).get(kind) or {}
        for name in _PASSING_ENDPOINT & endpoint.keys():
            del endpoint[name]
    plugins = plugin_files()
    content |= {"plugins": plugins} if plugins else {}
    marker = folder / "recipe.json"
    if marker.exists():
        before = read_json(marker)
        if before != content and not _is_begun(folder):
            _take(folder, recipe, content)
        elif before != content:
            changed = ", ".join(sorted(_differences(before, content)))
            advice = "Choose another folder with --run-folder, or remove this one to start anew."
            if before.get("plugins", {}) != plugins:
                advice = f"`plugins` are your own files: give the same ones, unchanged, with --plugin. {advice}"
            raise CheckpointError(
                f"{folder} holds a run of another recipe (different: {changed}). Nothing was touched. {advice}"
            )
        return
    if is_main():
        if folder.exists() and any(folder.iterdir()) and not (folder / "data").exists():
            raise CheckpointError(f"{folder} is not empty and is not a run folder. Choose another with --run-folder.")
        _take(folder, recipe, content)


def _take(folder: Path, recipe: Recipe, content: dict[str, Any]) -> None:
    """Write whose folder it is. What another recipe made in it before it trained is not this one's."""
    if is_main():
        for name in _MADE:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "layers.json").unlink(missing_ok=True)
        write_json(folder / "recipe.json", content)
        write_atomic(folder / "recipe.yaml", dump_recipe(recipe))


def _is_begun(folder: Path) -> bool:
    trained = (part for part in folder.glob("arms/*/*") if part != folder / _START)
    return any(trained) or any((folder / name).exists() for name in _BEGUN)


# What a run leaves once it has trained, or asked a teacher; and what it makes before that.
_BEGUN = ("seeds", "store", "report.json", "store.answers.jsonl")
_START = Path("arms") / "student" / "initial"
_MADE = ("tokenizer", "borders", _START)
# What of `runtime` a continued run may not change; where it runs and how often it saves may.
_BINDING_RUNTIME = frozenset({"gradient_checkpointing"})
# How an endpoint is reached is not what it says: a server may move while a run is stopped.
_PASSING_ENDPOINT = frozenset(
    {"url", "api_key_variable", "concurrency", "requests_per_minute", "retries", "timeout_seconds"}
)


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = set(one) | set(other)
        return [d for key in keys for d in _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in _differences(a, b, f"{path}[{i}]")]
    return [] if one == other else [path]


def open_teacher(recipe: Recipe, device: torch.device) -> LoadedTeacher | None:
    """The recipe's teacher as a model; None when the recipe pre-trains, or the teacher is no model that can be loaded.

    Raises: StoreError when the recipe's target store is missing, unfinished or damaged; TeacherError.
    """
    if recipe.teacher is not None and recipe.teacher.store is not None:
        TargetStore(Path(recipe.teacher.store).expanduser())
    if recipe.teacher is None or recipe.teacher.start is None:
        return None
    from limbeck.teachers.live import load_live_model

    words = recipe.teacher
    loaded = load_live_model(
        recipe.teacher.start, revision=words.revision, dtype=words.dtype, device=words.device or device,
        quantise=words.quantise, offload=words.offload,
    )  # fmt: skip
    loaded.model.eval().requires_grad_(False)
    return loaded


def mixer_list(recipe: Recipe, layers: int, *, errors: Mapping[int, float] | None = None) -> list[str]:
    """Which layers keep attention, as one word per layer (`attention` or `hyena`).

    errors: held-out fit errors by layer, needed by the rule `measured`.
    Raises: RecipeError when more layers are to be kept than there are.
    """
    wanted = recipe.student.keep_attention
    if isinstance(wanted, list):
        kept = set(wanted)
        if kept and max(kept) >= layers:
            raise RecipeError(
                f"student.keep_attention: layer {max(kept)} does not exist; the teacher's layers are 0 to {layers - 1}."
            )
    else:
        count = round(wanted * layers) if isinstance(wanted, float) else wanted
        if isinstance(wanted, float) and wanted > 0:
            count = max(1, count)
        if count > layers:
            raise RecipeError(f"student.keep_attention: {count} layers are to be kept but the teacher has {layers}.")
        kept = _KEEP_RULES[recipe.student.keep_rule](count, layers, errors or {})
    return ["attention" if layer in kept else "hyena" for layer in range(layers)]


def _keep_even(count: int, layers: int, _errors: Mapping[int, float]) -> set[int]:
    return {round((i + 0.5) * layers / count - 0.5) for i in range(count)} if count else set()


def _keep_measured(count: int, layers: int, errors: Mapping[int, float]) -> set[int]:
    return set(sorted(range(layers), key=lambda layer: (-errors.get(layer, 0.0), layer))[:count])


_KEEP_RULES: dict[str, Callable[[int, int, Mapping[int, float]], set[int]]] = {
    "even": _keep_even,
    "first": lambda count, layers, errors: set(range(count)),
    "last": lambda count, layers, errors: set(range(layers - count, layers)),
    "measured": _keep_measured,
}


def mixer_parameter_names(student: Any) -> frozenset[str]:
    """Names of the parameters that belong to replaced mixers."""
    mixers: dict[int, Any] = getattr(student, "mixers", dict)()
    own = {id(parameter) for mixer in mixers.values() for parameter in mixer.parameters()}
    return frozenset(name for name, parameter in student.named_parameters() if id(parameter) in own)


def stage_plans(recipe: Recipe, stages: Sequence[Any], student: Any) -> list[StagePlan]:
    """Settings for each phase; a progressive `align` becomes one phase per replaced layer, its budget shared equally."""
    names = mixer_parameter_names(student)
    layers = sorted(getattr(student, "mixers", dict)())
    plans = []
    for spec in stages:
        if spec.kind == "align" and spec.order == "progressive":
            share = max(spec.batch_tokens, spec.tokens // max(1, len(layers)))
            for layer in layers:
                name = f"{spec.name}-layer{layer:02d}"
                settings = _settings(recipe, spec, name=name, tokens=share, mixer_names=names)
                plans.append(StagePlan(spec, settings, (layer,)))
        else:
            chosen = tuple(layers) if spec.kind == "align" else None
            settings = _settings(recipe, spec, name=spec.name, tokens=spec.tokens, mixer_names=names)
            plans.append(StagePlan(spec, settings, chosen))
    return plans


def _settings(recipe: Recipe, spec: Any, *, name: str, tokens: int, mixer_names: frozenset[str]) -> StageSettings:
    rate = recipe.runtime
    return StageSettings(
        name=name, tokens=tokens, batch_tokens=spec.batch_tokens, micro_batch_sequences=spec.micro_batch_sequences, optimizer=spec.optimizer,
        learning_rate=spec.learning_rate, mixer_learning_rate=spec.mixer_learning_rate, weight_decay=spec.weight_decay,
        betas=tuple(spec.betas), schedule=spec.schedule, warmup_share=spec.warmup_share, decay_share=spec.decay_share,
        final_share=spec.final_share, clip_norm=spec.clip_norm, ema_decay=spec.ema_decay,
        diagnoses=rate.diagnoses if spec.kind == "distil" else 0,
        checkpoint_every_tokens=rate.checkpoint_every_tokens, keep_checkpoints=rate.keep_checkpoints,
        mixer_names=mixer_names, embedding_learning_rate=spec.embedding_learning_rate,
        scalar_learning_rate=spec.scalar_learning_rate, cautious_decay=spec.cautious_decay, decay_schedule=spec.decay_schedule,
        dropout=_dropout(spec.dropout),
        length_curriculum=tuple((part.share, part.divisor) for part in spec.length_curriculum),
        patch_curriculum=tuple((part.share, part.symbols) for part in spec.patch_curriculum),
    )  # fmt: skip


def _dropout(words: Any) -> float | DropoutSchedule | None:
    return words if words is None or isinstance(words, float) else DropoutSchedule(**words.model_dump())


def freeze(student: Any, plan: StagePlan) -> None:
    """Let only what the phase trains have gradients."""
    names = mixer_parameter_names(student)
    mixers: dict[int, Any] = getattr(student, "mixers", dict)()
    chosen = None if plan.layers is None else {id(p) for layer in plan.layers for p in mixers[layer].parameters()}
    for name, parameter in student.named_parameters():
        if chosen is not None:
            parameter.requires_grad_(id(parameter) in chosen)
        else:
            parameter.requires_grad_(getattr(plan.spec, "train", "all") == "all" or name in names)


def calibration_batches(data: Mixture, *, tokens: int, device: torch.device, rows: int = 8) -> list[Batch]:
    """The first training windows, in batches of a few rows: what calibration looks at."""
    count = max(1, tokens // (rows * data.context_tokens))
    return [data.batch(i * rows, rows).to(device) for i in range(count)]


def hyena_options(recipe: Recipe, teacher: Any) -> dict[str, Any]:
    """Options of the student's operators: the recipe's, with `expand` turned into channels by the teacher's heads."""
    options = recipe.student.hyena.model_dump()
    options["inner_width"] = options.pop("expand") * math.prod(head_shape(find_attention(teacher)[0]))
    return options
