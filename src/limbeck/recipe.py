"""Every option of a run, once.

A recipe is data: what the teacher is, what the student looks like, which text, which stages, how it is judged. The
models refuse unknown keys and values that cannot work; `recipe_io` reads them from YAML with line numbers. The
descriptions become the JSON schema and the reference page.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from limbeck.recipe_agreement import curriculum_problems, scratch_problems, teacher_problems
from limbeck.recipe_stages import AnyStage
from limbeck.recipe_student import Student
from limbeck.recipe_teachers import Capture, Teacher
from limbeck.recipe_tokenizer import Tokenizer
from limbeck.recipe_values import (
    Count,
    Device,
    NonEmpty,
    Part,
    Problems,
    SafeName,
    Whole,
    bare_source,
    refuse_problems,
)


class Source(Part):
    """A source of training text. A bare string is short for {source: that string}."""

    source: NonEmpty = Field(
        description="`factbook`, a path (.txt, .md, .jsonl, .parquet, or a folder of them), or a hub data set id."
    )
    split: NonEmpty = Field(
        default="train",
        description="train, heldout (every 50th document) or all; a hub data set may have its own, the factbook valid.",
    )
    field: NonEmpty = Field(default="text", description="The column or key that holds the text.")
    config: str | None = Field(default=None, description="Configuration of a hub data set.")
    rows: Literal["documents", "lines"] = Field(
        default="documents",
        description="Each row is a document, or rows are lines of running text to be gathered (as WikiText's are).",
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="How often this source's tokens are used, relative to their number."
    )


class HeldoutSource(Source):
    """A source of text that the student is judged on and never trained on."""

    split: NonEmpty = Field(
        default="heldout", description="As for training sources, but `heldout` unless said otherwise."
    )


AnySource = Annotated[Source, BeforeValidator(bare_source, json_schema_input_type=str | Source)]
AnyHeldout = Annotated[HeldoutSource, BeforeValidator(bare_source, json_schema_input_type=str | HeldoutSource)]


class Data(Part):
    """Which text, and how it is cut into windows."""

    train: list[AnySource] = Field(min_length=1, description="Sources of training text.")
    heldout: list[AnyHeldout] = Field(min_length=1, description="Sources of held-out text for measurements.")
    context_tokens: Annotated[int, Field(ge=8), Whole] = Field(description="Tokens in one training window.")
    packing: Literal["stream", "documents"] = Field(
        default="stream",
        description="Cut windows out of the running text (stream: nothing is lost), or begin every window with a document "
        "and fill it with those that fit best (documents: the rest of one that had to be cut begins another window).",
    )
    cross_documents: bool = Field(
        default=False, description="Let attention and convolution look across the documents packed into one window."
    )


class Controls(Part):
    """The comparisons without which a figure proves little."""

    from_scratch: bool = Field(default=True, description="The student from random weights, on as many tokens.")
    copied: bool = Field(
        default=True, description="The student from plainly copied projections, without align stages: what they add."
    )
    teacher_more: bool = Field(
        default=True, description="The teacher itself, trained for the student's tokens on the same text."
    )
    floor: bool = Field(
        default=True, description="The teacher with its attention set to zero: what the mixers are worth at all."
    )
    without_teacher: bool | None = Field(
        default=None,
        description="The student's own start, trained on the text alone for as many tokens; null: when it does not start from the teacher's weights.",
    )
    equal_flops: bool = Field(
        default=False,
        description="The control without the teacher once more, with as many operations as the student and its teacher spent.",
    )
    seeds: Annotated[int, Field(ge=1, le=100), Whole] = Field(
        default=1, description="How often the student and its control are trained, for an interval over seeds."
    )


class Speed(Part):
    """How speed and memory are measured."""

    context_lengths: list[Count] = Field(
        default=[512, 2048, 8192], min_length=1, description="Prompt lengths, in tokens."
    )
    decode_tokens: Count = Field(default=16, description="Tokens decoded after each prompt.")
    repeats: Annotated[int, Field(ge=1, le=1000), Whole] = Field(
        default=3, description="Repetitions; the median counts."
    )


class Evaluation(Part):
    """How student, teacher and controls are judged."""

    texts: list[AnyHeldout] | None = Field(default=None, description="Sources of text; null takes data.heldout.")
    context_tokens: Annotated[int, Field(ge=2), Whole] | None = Field(
        default=None, description="Tokens seen at once; null: data's."
    )
    stride_tokens: Count | None = Field(
        default=None, description="Tokens between windows, at most the context; null takes the context (no overlap)."
    )
    max_tokens: Annotated[int, Field(ge=16), Whole] = Field(default=65_536, description="Most tokens scored in all.")
    batch_sequences: Count = Field(default=8, description="Windows scored at a time.")
    speed: Speed | None = Field(default=Speed(), description="Speed and memory by context; null skips them.")
    prompts: list[NonEmpty] = Field(default=["The capital of"], description="Prompts that the report continues.")
    sample_tokens: Count = Field(default=48, description="Tokens of each continuation.")


class Runtime(Part):
    """Where and how the run happens; none of it changes what is learnt."""

    device: Device = Field(
        default="auto", description="auto (an accelerator when there is one), cpu, cuda, cuda:0 or mps."
    )
    threads: Annotated[int, Field(ge=1, le=4096), Whole] | None = Field(
        default=None, description="Threads; null lets torch choose."
    )
    run_folder: NonEmpty | None = Field(default=None, description="Folder of the run; null takes runs/<name>.")
    checkpoint_every_tokens: Count | None = Field(
        default=None, description="Tokens between checkpoints; null takes a tenth of the stage."
    )
    keep_checkpoints: Count = Field(default=2, description="Checkpoints kept for each stage while it runs.")
    keep_stages: bool = Field(
        default=False,
        description="Keep every arm as it was after each of its stages, to be judged as RUN/arms/student/STAGE.",
    )
    diagnoses: Annotated[int, Field(ge=0, le=1000), Whole] = Field(
        default=10,
        description="How often in a distil stage the terms of the loss are weighed against each other (a pass for each).",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice and store them once: less memory."
    )
    tracking: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[], description="Trackers that get the training's figures beside metrics.jsonl; see docs/tracking.md."
    )


class Recipe(Part):
    """A Limbeck recipe: the whole of a distillation run."""

    name: SafeName = Field(description="Name of the run; its folder is runs/<name>.")
    seed: Annotated[int, Field(ge=0, lt=2**32), Whole] = Field(default=0, description="Seed of all that is random.")
    teacher: Teacher | None = Field(description="The teacher; null pre-trains student.architecture from scratch.")
    tokenizer: Tokenizer = Field(default=Tokenizer(), description="The tokenizer; the teacher's by default.")
    student: Student = Field(default=Student(), description="The student.")
    data: Data = Field(description="The text.")
    stages: list[AnyStage] = Field(min_length=1, max_length=32, description="The stages of training, in order.")
    controls: Controls = Field(default=Controls(), description="The comparisons that run beside the student.")
    evaluation: Evaluation = Field(default=Evaluation(), description="How all of them are judged.")
    capture: Capture = Field(default=Capture(), description="What a target store keeps of the teacher.")
    runtime: Runtime = Field(default=Runtime(), description="Device, folder, checkpoints.")

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        problems = teacher_problems(self) if self.teacher is not None else scratch_problems(self)
        refuse_problems(problems | _stage_problems(self) | _evaluation_problems(self))
        return self

    @property
    def run_folder(self) -> str:
        """Where the run lives unless the caller says otherwise."""
        return self.runtime.run_folder or f"runs/{self.name}"

    @property
    def patch_bytes(self) -> int:
        """Most symbols in a patch of a student that reads bytes."""
        own = self.student.configuration.get("patch_bytes")
        return self.tokenizer.patch_bytes or (own if isinstance(own, int) else 16)

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages, in whole batches: what an equal-budget control may use."""
        return sum(stage.steps * stage.batch_tokens for stage in self.stages)


def with_budget(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with every stage's tokens multiplied, at least one step each, in a run folder of its own.

    1 changes nothing.
    """
    if factor == 1:
        return recipe
    stages = [
        stage.model_copy(update={"tokens": max(stage.batch_tokens, round(stage.tokens * factor))})
        for stage in recipe.stages
    ]
    runtime = recipe.runtime
    if runtime.run_folder is None:
        runtime = runtime.model_copy(update={"run_folder": f"{recipe.run_folder}-{factor:g}x"})
    return recipe.model_copy(update={"stages": stages, "runtime": runtime})


def _stage_problems(recipe: Recipe) -> Problems:
    problems: Problems = {}
    context = recipe.data.context_tokens
    folders = Counter(stage.name.casefold() for stage in recipe.stages)
    for index, stage in enumerate(recipe.stages):
        place = f"stages.{index}"
        if folders[stage.name.casefold()] > 1:
            problems[f"{place}.name"] = f'another stage is named "{stage.name}" too. Give each its own name'
        sequences, rest = divmod(stage.batch_tokens, context)
        if rest:
            near = " or ".join(str(count * context) for count in (sequences, sequences + 1) if count)
            problems[f"{place}.batch_tokens"] = (
                f"{stage.batch_tokens} is not a multiple of data.context_tokens ({context}). Nearest: {near}"
            )
        elif stage.micro_batch_sequences is not None and stage.micro_batch_sequences > sequences:
            problems[f"{place}.micro_batch_sequences"] = (
                f"{stage.micro_batch_sequences} exceeds the {sequences} windows of a step. Set at most {sequences}"
            )
        problems |= curriculum_problems(recipe, index)
    return problems


def _evaluation_problems(recipe: Recipe) -> Problems:
    problems: Problems = {}
    context = recipe.evaluation.context_tokens or recipe.data.context_tokens
    stride = recipe.evaluation.stride_tokens
    if stride is not None and stride > context:
        problems["evaluation.stride_tokens"] = f"{stride} exceeds the context ({context}): text would be left out"
    places = {"data.heldout": recipe.data.heldout, "evaluation.texts": recipe.evaluation.texts or []}
    for place, sources in places.items():
        for index, source in enumerate(sources):
            if any(_overlap(source, trained) for trained in recipe.data.train):
                problems[f"{place}.{index}"] = (
                    f"{source.source} ({source.split}) is also trained on: its figures would mean nothing"
                )
    return problems


def _overlap(one: Source, other: Source) -> bool:
    same_text = (one.source, one.config) == (other.source, other.config)
    return same_text and (one.split == other.split or "all" in (one.split, other.split))
