"""What a recipe would cost, before it is run: parameters, operations, memory, disk, time.

Models are built on the meta device from their configurations: no weight is loaded, and nothing is trained. Operations
and parameters are counted; memory and time are estimates, and say so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from limbeck import arms, assembly, doctor, new_models, planning_texts, stage_costs, teaching_costs
from limbeck.core.errors import TeacherError
from limbeck.core.runtime import pick_device, set_threads
from limbeck.models.config import HybridConfig
from limbeck.models.costs import (
    EFFICIENCY,
    FLOAT_BYTES,
    RUNTIME_BYTES,
    Phase,
    activation_bytes_per_token,
    calibration_bytes,
    disk_bytes,
    seconds,
    training_bytes,
)
from limbeck.models.flops import forward_flops_per_token
from limbeck.models.hybrid import HyenaMixer
from limbeck.models.surgery import find_attention
from limbeck.models.teacher_errors import explain_loading
from limbeck.nn.blocks import SelfAttention
from limbeck.preflight import PlanError as PlanError
from limbeck.preflight import load_tokenizer, preflight
from limbeck.recipe import Recipe


@dataclass(frozen=True)
class Machine:
    """What there is to spend. `matmul_flops_per_second` is measured, in float32."""

    device: str
    memory_bytes: int | None
    free_disk_bytes: int
    matmul_flops_per_second: float

    def seconds(self, flops: float) -> float:
        """How long some operations take here."""
        return seconds(flops, matmul_flops_per_second=self.matmul_flops_per_second, device=self.device)


def plan(recipe: Recipe, *, machine: Machine | None = None) -> dict[str, Any]:
    """The costs of a recipe as plain facts; `machine` stands in for this one in tests.

    Raises: PlanError when memory or disk cannot suffice, or teacher and student do not understand each other, with the
    facts in it; TeacherError when a configuration cannot be read; RecipeError when the recipe does not fit the teacher.
    """
    machine = machine or measure_machine(recipe)
    teacher, student = build_models(recipe)
    teachers = [model for model in (teacher, *build_members(recipe)) if model is not None]
    found = preflight(recipe, student=student, teachers=teachers)
    texts = planning_texts.look_at_texts(recipe)
    phases = list(plan_phases(recipe, student, teachers))
    memory = estimate_memory(recipe, student, teachers, phases, device=machine.device)
    store = teaching_costs.written_store(recipe, teachers=teachers)
    written = {name: store[name] for name in ("store_bytes", "answers_bytes")} if store and store["in_this_run"] else {}
    disk = disk_bytes(
        phases, parameters=parameter_count(student), keep_checkpoints=recipe.runtime.keep_checkpoints,
        token_files=round(1.1 * recipe.total_tokens) * len(recipe.data.train) * FLOAT_BYTES, further=written,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "teacher": describe(teacher, recipe) if teacher is not None else None,
        "student": describe(student, recipe),
        **found.facts,
        "texts": texts.rows,
        "training": training_rows(phases, machine),
        "memory": memory | {"available_bytes": machine.memory_bytes},
        "disk": disk | {"free_bytes": machine.free_disk_bytes},
    }  # fmt: skip
    facts |= {"store": store} if store is not None else {}
    facts |= {"asking": asked} if (asked := teaching_costs.asking(recipe)) else {}
    facts["time"] = estimate_time(recipe, student, teachers, phases, machine)
    elsewhere = teaching_costs.teacher_bytes(recipe, student=student, teachers=teachers, device=machine.device)[1]
    warnings = [*warnings_of(recipe, student, teacher, machine), *found.warnings, *texts.warnings]
    facts["warnings"] = [*warnings, *filter(None, [elsewhere])]
    refuse_impossible(facts, [*found.problems, *texts.problems])
    return facts


def measure_machine(recipe: Recipe) -> Machine:
    """This machine, with the speed of a matrix product on the recipe's device and threads (a fraction of a second)."""
    device = pick_device(recipe.runtime.device)
    set_threads(recipe.runtime.threads)
    memory = doctor.memory_bytes()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    disk = doctor.free_disk_bytes(Path(recipe.run_folder))
    return Machine(device.type, memory, disk, measure_matmul(device))


def measure_matmul(device: torch.device, *, seconds: float = 0.3) -> float:
    """Operations a second of a float32 matrix product: the best of as many as fit into the time."""
    size = 768 if device.type == "cpu" else 4096
    matrix = torch.randn(size, size, device=device)
    best, begun = 0.0, time.perf_counter()
    while best == 0.0 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def build_models(recipe: Recipe) -> tuple[Any | None, Any]:
    """Teacher (None when it is no model that can be loaded here) and student on the meta device, from configurations."""
    words, student = recipe.teacher, recipe.student
    start = None if words is None else words.start
    teacher = None if words is None or start is None else _build_meta(teacher_config(start, revision=words.revision))
    if student.source is not None:
        return teacher, _build_meta(teacher_config(student.source))
    if student.is_new or teacher is None:
        return teacher, _build_meta(_scratch_config(recipe, teacher))
    if student.shrink is not None:
        from limbeck.models.shrink import shrunk_config

        shrink = student.shrink
        return teacher, _build_meta(
            shrunk_config(teacher.config, layers=shrink.layers, intermediate=shrink.intermediate)
        )
    sites = find_attention(teacher)
    hyena = assembly.hyena_options(recipe, teacher)
    hybrid = HybridConfig(backbone=teacher.config, mixers=assembly.mixer_list(recipe, len(sites)), hyena=hyena)
    return teacher, _build_meta(hybrid)


def build_members(recipe: Recipe) -> list[Any]:
    """All but the first of several teachers, on the meta device."""
    several = None if recipe.teacher is None else recipe.teacher.several
    return [_build_meta(teacher_config(one.source, revision=one.revision)) for one in (several or ())[1:]]


def _build_meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _scratch_config(recipe: Recipe, teacher: Any | None) -> PreTrainedConfig:
    vocabulary = {}
    if recipe.tokenizer.train_vocab_size:
        vocabulary = {"vocab_size": recipe.tokenizer.train_vocab_size}
    elif recipe.tokenizer.source is not None:
        with contextlib.suppress(TeacherError):  # not to be had here: the family's own size stands for it
            vocabulary = {"vocab_size": len(load_tokenizer(recipe.tokenizer.source))}
    elif teacher is not None:
        vocabulary = {"vocab_size": teacher.config.get_text_config().vocab_size}
    return new_models.scratch_config(recipe, **vocabulary)


def teacher_config(source: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a teacher, without its weights: from the package, a folder, a GGUF file or the hub.

    Raises: TeacherError or PlanError saying what is missing.
    """
    path = Path(source).expanduser()
    options: dict[str, Any] = {"trust_remote_code": False}
    kind, name = "hub", source
    if source == "embedded":
        folder = doctor.embedded_teacher()
        if folder is None:
            raise PlanError(
                'the teacher "embedded" is missing from this installation. Name a folder, GGUF file or hub id.'
            )
        kind, name = "embedded", str(folder)
    elif path.suffix == ".gguf" and path.is_file():
        kind, name, options["gguf_file"] = "gguf", str(path.parent), path.name
    elif path.is_dir():
        kind, name = "folder", str(path)
    with explain_loading(name, kind):
        return AutoConfig.from_pretrained(name, revision=revision, **options)


def plan_phases(recipe: Recipe, student: Any, teachers: Sequence[Any]) -> Iterator[Phase]:
    """Every stretch of training of every arm, in the order of the run, further seeds at the end."""
    teacher = teachers[0] if teachers else None
    everything = arms.arm_stages(recipe)
    control = arms.compared_control(recipe)
    if recipe.controls.equal_flops and control is not None:
        plans = assembly.stage_plans(recipe, recipe.stages, student)
        spent = stage_costs.stages_flops(recipe, plans, student, teachers)
        everything[arms.EQUAL_FLOPS] = arms.equal_flops_stages(recipe, student, spent=spent)
    for number in range(1, len(arms.seeds(recipe))):
        everything |= {f"{arm}{_AGAIN}{number}": everything[arm] for arm in ("student", str(control))}
    for arm, stages in everything.items():
        model: Any = teacher if arm == "teacher_more" else student
        for phase in assembly.stage_plans(recipe, stages, model):
            settings = phase.settings
            flops = stage_costs.stage_flops(recipe, phase, model, teachers)
            steps = max(1, settings.tokens // settings.batch_tokens)
            tokens = steps * settings.batch_tokens
            windows = settings.batch_tokens // recipe.data.context_tokens
            head = model.get_output_embeddings()
            yield Phase(
                arm=arm, stage=phase.spec.name, kind=phase.spec.kind, tokens=tokens, steps=steps,
                flops=flops,
                trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                optimizer=settings.optimizer, keeps_average=settings.ema_decay is not None,
                trains_through=phase.spec.kind != "align" or phase.spec.inputs == "student",
                trains_head=head is None or head.weight.requires_grad,
                micro_batch_tokens=min(windows, settings.micro_batch_sequences or windows) * recipe.data.context_tokens,
                target_bytes_per_token=teaching_costs.target_bytes_per_token(
                    recipe, phase.spec, student=student, teachers=teachers
                ),
            )  # fmt: skip


# How the arms of further seeds are called; they are trained after the others, one pair at a time.
_AGAIN = ", seed "


def training_rows(phases: list[Phase], machine: Machine) -> list[dict[str, Any]]:
    """A row for every stage of every arm; the phases of a progressive stage are added up."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for phase in phases:
        row = rows.setdefault(
            (phase.arm, phase.stage), {"arm": phase.arm, "stage": phase.stage, "tokens": 0, "steps": 0, "flops": 0.0}
        )
        for key in ("tokens", "steps", "flops"):
            row[key] += getattr(phase, key)
    return [row | {"seconds": machine.seconds(row["flops"])} for row in rows.values()]


def describe(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Size and cost of a model: parameters by part, and operations of a forward pass."""
    parts = parameter_parts(model)
    words = list(getattr(model.config, "mixers", None) or [])
    mixers = {"hyena_layers": words.count("hyena"), "attention_layers": words.count("attention")} if words else {}
    context = recipe.data.context_tokens
    forward = forward_flops_per_token(model, context)
    return {"parameters": sum(parts.values()), **mixers, "parts": parts, "forward_flops_per_token": forward}


def parameter_count(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_parts(model: Any) -> dict[str, int]:
    """Parameters of embeddings and head, attention, Hyena mixers, and all the rest (mostly feed-forward)."""
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    hyena = [module for module in model.modules() if isinstance(module, HyenaMixer)]
    attention = attention_modules(model)
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for part, modules in {"embeddings": heads, "attention": attention, "hyena": hyena, "rest": [model]}.items():
        own = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
        counts[part] = sum(size for key, size in own.items() if key not in seen)
        seen |= set(own)
    return counts


def attention_modules(model: Any) -> list[Any]:
    """The modules that attend: as transformers knows them, or Limbeck's own."""
    own = [module for module in model.modules() if isinstance(module, SelfAttention)]
    return own or [site.module for site in find_attention(model)]


def estimate_memory(
    recipe: Recipe, student: Any, teachers: Sequence[Any], phases: list[Phase], *, device: str
) -> dict[str, Any]:
    """Bytes at the fullest moment of the run, by what they hold. Weights of all arms stay in memory to the end."""
    names = {phase.arm for phase in phases}
    arms = {name for name in names if _AGAIN not in name}
    students = len(arms - {"teacher_more"}) + 2 * (names != arms)
    teacher = teachers[0] if teachers else None
    weights = parameter_count(student) * FLOAT_BYTES * students
    weights += parameter_count(teacher) * FLOAT_BYTES if "teacher_more" in arms else 0
    held, _ = teaching_costs.teacher_bytes(recipe, student=student, teachers=teachers, device=device)
    moments = {
        f"{phase.arm}, {phase.stage}": training_bytes(
            phase,
            activations_per_token=_activations_per_token(recipe, student, phase),
            vocabulary=student.config.vocab_size,
            width=student.config.hidden_size,
            device=device,
        )
        for phase in phases
    }
    is_calibrated = recipe.student.initialisation == "calibrated" and getattr(student.config, "mixers", None)
    if teacher is not None and is_calibrated:
        shape = teacher.config
        held = calibration_bytes(
            tokens=recipe.student.calibration_tokens, context_tokens=recipe.data.context_tokens,
            width=shape.hidden_size, heads=shape.num_attention_heads, layers=shape.num_hidden_layers,
        )  # fmt: skip
        moments["calibration"] = {"activations_bytes": held}
    judged = recipe.evaluation.batch_sequences * (recipe.evaluation.context_tokens or recipe.data.context_tokens)
    beside = min(2, 1 + len(teachers))  # the teacher answers beside each model
    moments["judging"] = {"logits_bytes": judged * student.config.vocab_size * FLOAT_BYTES * beside}
    fullest, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    total = weights + held + sum(parts.values()) + RUNTIME_BYTES
    facts = {"weights_bytes": weights, "teacher_bytes": held, **parts}
    facts |= {"runtime_bytes": RUNTIME_BYTES, "total_bytes": total}
    return facts | {"fullest_at": fullest}


def _activations_per_token(recipe: Recipe, student: Any, phase: Phase) -> float:
    config = student.config
    if not phase.trains_through:
        mixers = [module for module in student.modules() if isinstance(module, HyenaMixer)]
        recorded = 2 * config.hidden_size * FLOAT_BYTES
        return sum(activation_bytes_per_token(mixer) + recorded for mixer in mixers)
    whole = activation_bytes_per_token(student)
    if recipe.runtime.gradient_checkpointing:
        return whole / config.num_hidden_layers + config.num_hidden_layers * config.hidden_size * FLOAT_BYTES
    return whole


def estimate_time(
    recipe: Recipe, student: Any, teachers: Sequence[Any], phases: list[Phase], machine: Machine
) -> dict[str, Any]:
    """Seconds of training and of scoring text, from a measured matrix product and a stated efficiency."""
    context = recipe.evaluation.context_tokens or recipe.data.context_tokens
    overlap = context / (recipe.evaluation.stride_tokens or context)
    models = len({phase.arm for phase in phases}) + 2 * bool(teachers)
    forward = max(forward_flops_per_token(model, context) for model in (student, *teachers[:1]))
    training = machine.seconds(sum(phase.flops for phase in phases))
    scoring = machine.seconds(recipe.evaluation.max_tokens * overlap * models * forward)
    apart = "calibration, speed measurements and downloads"
    if any(getattr(stage, "on_policy", None) is not None for stage in recipe.stages):
        apart += ", and what the student writes in training (a token at a time: often the longest part)"
    if recipe.teacher is not None and recipe.teacher.kind in ("served", "closed"):
        apart += ", and the endpoint's answers"
    return {
        "matmul_flops_per_second": machine.matmul_flops_per_second,
        "assumed_efficiency": EFFICIENCY.get(machine.device),
        "training_seconds": training,
        "scoring_seconds": scoring,
        "total_seconds": training + scoring,
        "note": f"an estimate for one process; {apart} come on top",
    }


def warnings_of(recipe: Recipe, student: Any, teacher: Any | None, machine: Machine) -> list[str]:
    """What will work, but perhaps not as hoped."""
    found = []
    mixers = list(getattr(student.config, "mixers", None) or [])
    if mixers and "attention" not in mixers:
        found.append(
            "no layer keeps attention: exact recall of names and numbers from the context suffers most. "
            "student.keep_attention: 0.25 is the usual remedy."
        )
    limit = getattr((teacher or student).config, "max_position_embeddings", None)
    if limit and recipe.data.context_tokens > limit:
        found.append(f"data.context_tokens ({recipe.data.context_tokens}) exceeds the teacher's {limit} positions.")
    if recipe.teacher is not None and recipe.teacher.dtype != "float32" and machine.device == "cpu":
        found.append(f"teacher.dtype {recipe.teacher.dtype} is slow on most processors; float32 is not.")
    controls = recipe.controls
    any_wanted = controls.from_scratch or controls.copied or controls.teacher_more or controls.floor
    if recipe.teacher is not None and not any_wanted and not arms.has_without_teacher(recipe):
        found.append("all controls are off: the report cannot say whether the teacher was worth it.")
    if (
        recipe.teacher is not None
        and arms.compared_control(recipe) is None
        and (controls.equal_flops or controls.seeds > 1)
    ):
        found.append(
            "controls.equal_flops and controls.seeds do nothing without controls.from_scratch or without_teacher."
        )
    return found


def refuse_impossible(facts: dict[str, Any], misfits: Sequence[str] = ()) -> None:
    """Raise PlanError when teacher and student do not fit (`misfits`), or memory or disk cannot suffice."""
    if misfits:
        raise PlanError("\n".join(misfits), facts)
    memory, disk = facts["memory"], facts["disk"]
    problems = []
    needed, available = memory["total_bytes"], memory["available_bytes"]
    if available is not None and needed > available:
        problems.append(
            f"about {needed / 1e9:.1f} GB of memory are needed (at {memory['fullest_at']}), and there are "
            f"{available / 1e9:.1f} GB. Set that stage's micro_batch_sequences (for judging, evaluation.batch_sequences) or "
            "data.context_tokens lower, switch controls off, or set runtime.gradient_checkpointing: true. A large teacher "
            "takes less with teacher.dtype: bfloat16, quantise or offload."
        )
    needed, free = disk["total_bytes"], disk["free_bytes"]
    if needed > free:
        problems.append(
            f"about {needed / 1e9:.1f} GB of disk are needed, and {free / 1e9:.1f} GB are free. "
            "Set runtime.keep_checkpoints: 1, or runtime.run_folder to another disk."
        )
    if problems:
        raise PlanError("this recipe does not fit this machine: " + " Also, ".join(problems), facts)
