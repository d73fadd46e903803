"""How each arm's model starts, and which layers may be swapped."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from limbeck import assembly, new_models
from limbeck.core.files import read_json, write_json
from limbeck.core.runtime import derive_seed, is_main, seed_everything, wait_for_all
from limbeck.models.hybrid import HybridForCausalLM, build_student
from limbeck.models.initialise import LayerFit, calibrate, capture, copy_projections, normalised_error, stack_documents
from limbeck.models.surgery import find_attention
from limbeck.train.checkpoint import Checkpoint, newest_checkpoint, newest_for_all, save_checkpoint
from limbeck.train.trainer import load_weights, weights_of

if TYPE_CHECKING:
    from limbeck.pipeline import Run

# Windows of held-out text on which layer errors are measured.
HELDOUT_WINDOWS = 64
_ROWS = 8


def initial_student(work: Run) -> Any:
    """The student before any training, as `student` in the recipe says.

    By default the teacher with mixers in place of attention; or a trained model of any family (`source`), a new one
    (`architecture`), or a smaller copy of the teacher (`shrink`). What took work is made once; a continued run and the
    controls read the same weights back.
    """
    words = work.recipe.student
    if words.source is not None:
        return _trained_student(work, words.source)
    if words.is_new:
        seed = derive_seed(work.recipe.seed, "student")
        return new_models.scratch_model(work.recipe, work.tokenizer, work.data, seed=seed).to(work.device)
    folder = work.folder / "arms" / "student" / "initial"
    saved = newest_for_all(folder)
    if words.shrink is not None:
        return _shrunk_student(work, folder, saved)
    if saved is not None:
        student: Any = _blank(work, saved.facts["mixers"])
        load_weights(student, saved.tensors["model"])
        _note_layers(work, saved.facts)
        return student
    mixers, fits, student = _prepare(work)
    facts = {"mixers": mixers, "fits": [[fit.layer, fit.before, fit.after] for fit in fits]}
    if is_main():
        save_checkpoint(folder, Checkpoint(0, {"model": dict(weights_of(student))}, facts), keep=1)
    _note_layers(work, facts)
    wait_for_all()
    return student


def _trained_student(work: Run, source: str) -> Any:
    from limbeck.models.teacher import load_teacher

    return load_teacher(source, device=work.device).model.requires_grad_(True)


def _shrunk_student(work: Run, folder: Path, saved: Checkpoint | None) -> Any:
    """A smaller copy of the teacher; which parts were kept is in the checkpoint, so that it is chosen once."""
    from limbeck.models.shrink import ShrinkPlan, plan_shrinking, shrink_model

    shrink = work.recipe.student.shrink
    assert shrink is not None
    if saved is not None:
        student = shrink_model(work.teacher.model, ShrinkPlan.from_json(saved.facts["plan"]))
        load_weights(student, saved.tensors["model"])
        return student.to(work.device)
    if is_main():  # one process chooses, so that a near tie cannot fall out differently on another
        tokens = work.recipe.student.calibration_tokens
        work.say(f"measuring on {tokens:,} tokens which parts of the teacher matter least")
        batches = assembly.calibration_batches(work.data, tokens=tokens, device=work.device)
        plan = plan_shrinking(
            work.teacher.model, batches, layers=shrink.layers, intermediate=shrink.intermediate,
            layer_rule=shrink.layer_rule,
        )  # fmt: skip
        student = shrink_model(work.teacher.model, plan)
        save_checkpoint(folder, Checkpoint(0, {"model": dict(weights_of(student))}, {"plan": plan.to_json()}), keep=1)
    wait_for_all()
    return _shrunk_student(work, folder, newest_checkpoint(folder))


def _note_layers(work: Run, facts: dict[str, Any]) -> None:
    """Keep the fits of the start for the report, unless a run that was stopped has done so."""
    file = work.folder / "layers.json"
    if is_main() and not file.exists():
        write_json(file, {"initial": facts["fits"], "mixers": facts["mixers"]})


def _prepare(work: Run) -> tuple[list[str], list[LayerFit], HybridForCausalLM]:
    words = work.recipe.student
    teacher = work.teacher.model
    layers = len(find_attention(teacher))
    if words.keep_rule == "measured" and not isinstance(words.keep_attention, list) and words.keep_attention:
        trial = _blank(work, ["hyena"] * layers)
        fits = _initialise(work, trial)
        mixers = assembly.mixer_list(work.recipe, layers, errors={fit.layer: fit.after for fit in fits})
        student = _blank(work, mixers)
        for layer, mixer in student.mixers().items():
            mixer.load_state_dict(trial.mixers()[layer].state_dict())
        return mixers, [fit for fit in fits if fit.layer in student.mixers()], student
    mixers = assembly.mixer_list(work.recipe, layers)
    student = _blank(work, mixers)
    return mixers, _initialise(work, student), student


def _blank(work: Run, mixers: Sequence[str]) -> HybridForCausalLM:
    seed_everything(derive_seed(work.recipe.seed, "student"))
    hyena = assembly.hyena_options(work.recipe, work.teacher.model)
    student: Any = build_student(work.teacher.model, mixers=list(mixers), hyena=hyena)
    return student.to(work.device)


def _initialise(work: Run, student: HybridForCausalLM) -> list[LayerFit]:
    words = work.recipe.student
    operators = {layer: mixer.operator for layer, mixer in student.mixers().items()}
    if words.initialisation == "calibrated" and operators:
        work.say(f"calibrating {len(operators)} mixers on {words.calibration_tokens:,} tokens")
        batches = assembly.calibration_batches(work.data, tokens=words.calibration_tokens, device=work.device)
        return calibrate(work.teacher.model, operators, batches, heldout_batches(work))
    if words.initialisation == "copied":
        sites = {site.layer_index: site for site in find_attention(work.teacher.model)}
        for layer, operator in operators.items():
            copy_projections(operator, sites[layer])
    return _measure_fits(work, student)


def _measure_fits(work: Run, student: HybridForCausalLM) -> list[LayerFit]:
    errors = layer_errors(work, student)
    return [LayerFit(layer, error, error) for layer, error in errors.items()]


def random_student(work: Run, mixers: Sequence[str]) -> Any:
    """The student's architecture with nothing of the teacher in it: every weight drawn anew."""
    from transformers import AutoModelForCausalLM

    seed_everything(derive_seed(work.recipe.seed, "from_scratch"))
    config = _blank(work, mixers).config if mixers else initial_student(work).config
    seed_everything(derive_seed(work.recipe.seed, "from_scratch"))
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(work.device)


def student_with_layout(work: Run, mixers: Sequence[str], like: Any = None) -> Any:
    """A student with these mixers; layers that `like` (or the saved start) has too take their weights from it."""
    source = like if like is not None else initial_student(work)
    if list(getattr(source.config, "mixers", [])) == list(mixers):
        return source
    student = _blank(work, mixers)
    own = dict(weights_of(student))
    with torch.no_grad():
        for name, value in weights_of(source):
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
    return student


def heldout_batches(work: Run) -> list[Any]:
    """A few held-out windows for layer errors (never for training, nor for choosing settings of a run)."""
    rows = min(_ROWS, work.heldout.windows)
    count = max(1, min(HELDOUT_WINDOWS, work.heldout.windows) // rows)
    return [work.heldout.batch(i * rows, rows).to(work.device) for i in range(count)]


def layer_errors(work: Run, student: Any) -> dict[int, float]:
    """Held-out normalised MSE of every replaced layer, each fed the teacher's inputs."""
    mixers: dict[int, Any] = getattr(student, "mixers", dict)()
    if not mixers:
        return {}
    batches = heldout_batches(work)
    modules = {
        site.layer_index: site.module for site in find_attention(work.teacher.model) if site.layer_index in mixers
    }
    seen = capture(work.teacher.model, batches, modules)
    documents_BT = stack_documents(batches)
    return {
        layer: normalised_error(mixer.operator, *seen[layer], document_ids_BT=documents_BT)
        for layer, mixer in mixers.items()
    }


def target_power(work: Run, layers: Sequence[int]) -> dict[int, float]:
    """Mean square of the teacher's attention outputs by layer, on the first training windows: the scale of `align`."""
    batches = [work.data.batch(i * 8, 8).to(work.device) for i in range(2)]
    modules = {
        site.layer_index: site.module for site in find_attention(work.teacher.model) if site.layer_index in layers
    }
    seen = capture(work.teacher.model, batches, modules)
    return {layer: max(float(outputs.float().square().mean()), 1e-12) for layer, (_inputs, outputs) in seen.items()}


def keep_failed_layers(work: Run, arm: str, student: Any) -> Any:
    """After alignment: a layer whose held-out normalised MSE is 1 or more keeps its attention, and that is said.

    With `student.failed_layers: swap` it is swapped all the same, and that is said too.
    """
    errors = layer_errors(work, student)
    failed = sorted(layer for layer, error in errors.items() if not error < 1)
    file = work.folder / "layers.json"
    known = read_json(file) if file.exists() else {}
    if arm == "student" and is_main():
        write_json(file, known | {"aligned": [[layer, error] for layer, error in errors.items()], "failed": failed})
    wait_for_all()
    if not failed:
        return student
    listed = ", ".join(f"{layer} ({errors[layer]:.2f})" for layer in failed)
    fitted = [layer for layer, _, error in known.get("initial", []) if layer in failed and error < 1]
    blame = (
        f". Before `align` {len(fitted)} of these {len(failed)} did fit, so it did harm: lower its learning_rate or give it more tokens"
        if arm == "student" and fitted
        else ""
    )
    if work.recipe.student.failed_layers == "swap":
        work.say(
            f"{arm}: layers {listed} fit no better than zero (normalised MSE >= 1) and are swapped in as the recipe asks{blame}"
        )
        return student
    work.say(f"{arm}: layers {listed} fit no better than zero (normalised MSE >= 1): they keep their attention{blame}")
    mixers = ["attention" if layer in failed else word for layer, word in enumerate(student.config.mixers)]
    return student_with_layout(work, mixers, like=student)


def copy_of_teacher(work: Run) -> Any:
    """The teacher itself, to be trained further."""
    return copy.deepcopy(work.teacher.model).requires_grad_(True)
