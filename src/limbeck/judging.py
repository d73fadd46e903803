"""The last stop of a run: every model on the same text, and the report."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import limbeck
from limbeck import arms, reading, teaching
from limbeck.core.files import read_json, write_json
from limbeck.core.runtime import seed_everything
from limbeck.data.text import read_documents
from limbeck.evaluate.efficiency import compare_speed, parameter_facts
from limbeck.evaluate.facts import (
    Controls,
    FloorFacts,
    LayerFacts,
    ModelFacts,
    ReportFacts,
    RunFacts,
    Sample,
    StageFacts,
    TeacherWorth,
    TextFacts,
    Versus,
)
from limbeck.evaluate.quality import (
    PairedDifference,
    TextScore,
    compare_models,
    paired_difference,
    pool_scores,
    score_text,
    zeroed_mixers,
)
from limbeck.evaluate.readings import Reading, read_text
from limbeck.evaluate.report import write_report
from limbeck.evaluate.worth import teacher_worth
from limbeck.models.generation import continue_text
from limbeck.models.teacher import quietly
from limbeck.plugins import plugin_files
from limbeck.recipe import Recipe
from limbeck.recipe_io import dump_recipe
from limbeck.train.books import Energy, joined
from limbeck.train.trainer import StageResult

if TYPE_CHECKING:
    from limbeck.pipeline import ArmResult, Run

# Text read for speed measurements; longer contexts repeat it.
_SPEED_CHARACTERS = 50_000
_SAMPLED = ("teacher", "student", "from_scratch", "without_teacher")


def report(
    work: Run,
    results: dict[str, ArmResult],
    differences: Sequence[PairedDifference] = (),
    further: Sequence[StageResult] = (),
) -> dict[str, Any]:
    """Judge the teacher and every arm, write the report and the student's folder. Returns report.json's content.

    differences: of the compared control and the student under further seeds (see `replica_difference`). further: the
    stages they went through.
    """
    save_student(work, results["student"].model)
    texts = evaluation_texts(work.recipe)
    models: dict[str, Any] = {} if work.teacher is None else {"teacher": work.teacher.model}
    models |= {name: result.model for name, result in results.items()}
    facts, scores = {}, {}
    for name, model in models.items():
        work.say(f"judging {name}")
        facts[name], scores[name] = judge_model(work, name, model, texts)
        if name in results:
            add_books(facts[name], results[name], work)
    for name in facts:
        if name != "student" and tokenizer_of(work, name) is work.tokenizer:
            facts[name].versus_student = Versus.from_difference(paired_difference(scores[name], scores["student"]))
    if tokenizer_of(work, "teacher") is not work.tokenizer:
        restate_per_token(facts["teacher"], scores["student"])
    found = ReportFacts(
        run=run_facts(work, results, further), teacher=facts.get("teacher"), student=facts["student"],
        controls=Controls(**{name: facts.get(name) for name in Controls.model_fields}), worth=worth(work, scores, differences),
        floor=measure_floor(work, results["student"].model, texts, scores), layers=layer_facts(work, results["student"].model),
        speed=measure_speeds(work, results["student"].model), protocol=scores["student"].protocol,
        teaching=work.teaching.facts(),
    )  # fmt: skip
    write_report(work.folder, found)
    return read_json(work.folder / "report.json")


def tokenizer_of(work: Run, name: str) -> Any:
    """The tokenizer a model reads with: the run's, but the teacher's own where that is another one."""
    is_other = name == "teacher" and work.teacher is not None and work.teaching.is_cross_tokenizer
    return work.teacher.tokenizer if is_other else work.tokenizer


def restate_per_token(teacher: ModelFacts, student: TextScore) -> None:
    """Put the perplexity of a teacher with other tokens in the student's: the same bits per byte, a token of theirs.

    Perplexities per token of different tokenizers cannot be compared; bits per byte can, and this is their exponent.
    """
    if teacher.bits_per_byte is not None and student.tokens:
        teacher.perplexity = math.exp(teacher.bits_per_byte * math.log(2) * student.bytes / student.tokens)


def replica_difference(work: Run, results: dict[str, ArmResult]) -> PairedDifference:
    """Control minus student under another seed, on the same text."""
    texts = evaluation_texts(work.recipe)
    pooled = {
        name: pool_scores(list(score_texts(work, name, result.model, texts).values()))
        for name, result in results.items()
    }
    control = arms.compared_control(work.recipe)
    assert control is not None
    return paired_difference(pooled[control], pooled["student"])


def worth(work: Run, scores: dict[str, TextScore], differences: Sequence[PairedDifference]) -> TeacherWorth | None:
    """The student's lead over the control without a teacher, with its interval."""
    control = arms.compared_control(work.recipe)
    if control not in scores:
        return None
    everyone = [paired_difference(scores[control], scores["student"]), *differences]
    return teacher_worth(control, [one.nats for one in everyone], [one.standard_error for one in everyone])


def save_student(work: Run, student: Any) -> None:
    """Write the student as a plain `from_pretrained` folder, tokenizer included."""
    folder = work.folder / "model"
    with quietly():
        student.save_pretrained(folder)
        work.tokenizer.save_pretrained(folder)


def evaluation_texts(recipe: Recipe) -> dict[str, list[str]]:
    """Held-out documents by name of their source. Raises: DataError for a text that is missing, damaged or empty."""
    texts: dict[str, list[str]] = {}
    for words in recipe.evaluation.texts or recipe.data.heldout:
        documents: list[str] = []
        budget = recipe.evaluation.max_tokens * 12
        for document in read_documents(reading.text_source(words)):
            documents.append(document)
            budget -= len(document)
            if budget < 0:
                break
        if not documents:
            raise reading.no_documents(reading.text_source(words))
        texts[f"{words.source} ({words.split})"] = documents
    return texts


def judge_model(work: Run, name: str, model: Any, texts: dict[str, list[str]]) -> tuple[ModelFacts, TextScore]:
    """Quality of one model on all texts, its nearness to the teacher, and samples."""
    facts = ModelFacts.model_validate(parameter_facts(model))
    scores = score_texts(work, name, model, texts)
    pooled = pool_scores(list(scores.values()))
    facts.take_score(pooled)
    facts.texts = [TextFacts.from_score(text, score) for text, score in scores.items()]
    if work.teacher is not None and name != "teacher" and not work.teaching.is_cross_tokenizer:
        documents = [document for found in texts.values() for document in found]
        facts.take_comparison(
            compare_models(
                work.teacher.model,
                model,
                work.tokenizer,
                documents,
                **protocol(work, parts=4),
                vocabulary_size=teaching.shared_vocabulary(work, model, [work.teacher]),
            )
        )
    if name in _SAMPLED:
        facts.samples = [
            Sample(prompt=prompt, text=sample(work, model, tokenizer_of(work, name), prompt))
            for prompt in work.recipe.evaluation.prompts
        ]
    return facts, pooled


def score_texts(work: Run, name: str, model: Any, texts: dict[str, list[str]]) -> dict[str, TextScore]:
    """Score every text, or read the scores back if this was done before the run was stopped."""
    file = work.folder / "evaluation" / f"{name}.json"
    if file.exists():
        kept = read_json(file)
        return {
            text: TextScore(**score | {key: tuple(score[key]) for key in ("block_nats", "block_tokens")})
            for text, score in kept.items()
        }
    scores = {
        text: score_text(model, tokenizer_of(work, name), documents, **protocol(work, parts=len(texts)))
        for text, documents in texts.items()
    }
    write_json(file, {text: asdict(score) for text, score in scores.items()})
    return scores


def protocol(work: Run, *, parts: int) -> dict[str, Any]:
    """The recipe's way of scoring, each of `parts` texts taking its share of the tokens."""
    words = work.recipe.evaluation
    return {
        "context_tokens": words.context_tokens or work.recipe.data.context_tokens, "stride_tokens": words.stride_tokens,
        "max_tokens": max(16, words.max_tokens // parts), "batch_sequences": words.batch_sequences, "device": work.device,
    }  # fmt: skip


def sample(work: Run, model: Any, tokenizer: Any, prompt: str) -> str:
    """A greedy continuation: the same prompt, side by side."""
    seed_everything(work.recipe.seed)
    return continue_text(model, tokenizer, prompt, max_new_tokens=work.recipe.evaluation.sample_tokens, temperature=0.0)


def add_books(facts: ModelFacts, result: ArmResult, work: Run) -> None:
    """What training cost, stage by stage."""
    kinds = {stage.name: stage.kind for stage in work.recipe.stages} | {"tune": "tune"}
    facts.tokens_spent = sum(stage.tokens for stage in result.stages)
    facts.flops_spent = sum(stage.flops for stage in result.stages)
    facts.energy_joules, _ = energy_of(result.stages)
    facts.stages = [
        StageFacts(
            name=stage.name, kind=kinds.get(stage.name.split("-layer")[0], "align"), tokens=stage.tokens, flops=stage.flops,
            seconds=stage.seconds, final_loss=stage.final_loss, loss_curve=[(x, y) for x, y in stage.curve],
            warnings=stage.warnings, energy_joules=stage.joules, energy_note=stage.energy_note,
        )
        for stage in result.stages
    ]  # fmt: skip


def energy_of(stages: Sequence[StageResult]) -> Energy:
    """What several stages took together, and what reported it; None with the reason when one was not measured."""
    nothing: Energy = (0.0, "")
    return reduce(joined, [(stage.joules, stage.energy_note) for stage in stages], nothing)


def measure_floor(
    work: Run, student: Any, texts: dict[str, list[str]], scores: dict[str, TextScore]
) -> FloorFacts | None:
    """The teacher with the mixers zeroed that the student replaces."""
    if work.teacher is None or not work.recipe.controls.floor:
        return None
    replaced = list(getattr(student, "mixers", dict)())
    if not replaced:
        return None
    with zeroed_mixers(work.teacher.model, layers=replaced):
        floor = pool_scores(list(score_texts(work, "floor", work.teacher.model, texts).values()))
    ratio = floor.perplexity / scores["teacher"].perplexity
    return FloorFacts(perplexity=floor.perplexity, bits_per_byte=floor.bits_per_byte, ratio_to_teacher=ratio)


def measure_speeds(work: Run, student: Any) -> Any:
    """Prefill, decode and memory by context length, teacher beside student."""
    words = work.recipe.evaluation.speed
    if words is None:
        return None
    work.say("measuring speed")
    teacher = None if work.teacher is None else work.teacher.model
    return compare_speed(
        teacher,
        student,
        context_lengths=words.context_lengths,
        decode_tokens=words.decode_tokens,
        repeats=words.repeats,
        device=work.device,
        readings=readings(work),
    )


def readings(work: Run) -> list[Reading] | None:
    """One text in the teacher's tokens and in the student's, where those differ; bytes need text, not random symbols."""
    tokenizers = [work.tokenizer]
    if work.teacher is not None and work.teacher.tokenizer is not work.tokenizer:
        tokenizers.insert(0, work.teacher.tokenizer)
    elif work.recipe.tokenizer.segmenter is None:
        return None
    text = "\n".join(document for documents in evaluation_texts(work.recipe).values() for document in documents)[
        :_SPEED_CHARACTERS
    ]
    return [read_text(tokenizer, text) for tokenizer in tokenizers]


def layer_facts(work: Run, student: Any) -> list[LayerFacts]:
    """Each layer's mixer and its held-out errors through the run."""
    file = work.folder / "layers.json"
    if not file.exists():
        return []
    known = read_json(file)
    before = {layer: (first, fitted) for layer, first, fitted in known["initial"]}
    after = dict(known.get("aligned", []))
    failed = set(known.get("failed", []))
    found = []
    for layer, mixer in enumerate(getattr(student.config, "mixers", [])):
        first, fitted = before.get(layer, (None, None))
        note = (
            "fits no better than zero" + (": attention kept" if mixer == "attention" else "") if layer in failed else ""
        )
        found.append(
            LayerFacts(
                index=layer, mixer=mixer, nmse_initial=first, nmse_calibrated=fitted, nmse_after_align=after.get(layer),
                replaced=mixer != "attention", note=note,
            )
        )  # fmt: skip
    return found


def run_facts(work: Run, results: dict[str, ArmResult], further: Sequence[StageResult] = ()) -> RunFacts:
    """Which run this is, on what machine, and what all of its training took."""
    import transformers

    joules, note = energy_of([*(stage for result in results.values() for stage in result.stages), *further])

    environment = machine_facts(work.device)
    write_json(work.folder / "environment.json", environment | {"notes": work.notes})
    return RunFacts(
        name=work.recipe.name, date=datetime.now(UTC).isoformat(timespec="seconds"), seeds=arms.seeds(work.recipe),
        limbeck_version=limbeck.__version__, torch_version=str(torch.__version__), transformers_version=transformers.__version__,
        machine=environment, recipe=dump_recipe(work.recipe),
        teacher_source=work.teaching.name,
        wall_seconds={name: round(result.seconds, 1) for name, result in results.items()},
        energy_joules=joules, energy_note=note,
    )  # fmt: skip


def machine_facts(device: torch.device) -> dict[str, str | int | float | None]:
    """Processor, memory, device, the kernels in use, and the SHA-256 of files that add pieces."""
    import os

    from limbeck.nn.kernels import active_kernels

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts: dict[str, str | int | float | None] = {
        "system": platform.system(), "processor": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_gigabytes": None if pages is None else round(pages / 1e9, 1), "device": name, "python": platform.python_version(),
    }  # fmt: skip
    facts |= {f"plug-in {name}": checksum for name, checksum in plugin_files().items()}
    return facts | {f"kernel {kind}": kernel for kind, kernel in active_kernels().items()}


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
