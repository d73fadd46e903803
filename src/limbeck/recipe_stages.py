"""The stages of training, as a recipe writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from limbeck.recipe_objectives import Objective, ObjectiveName, OnPolicy, objective_problems
from limbeck.recipe_values import (
    Count,
    Decay,
    Part,
    Problems,
    Rate,
    RecipeProblems,
    SafeName,
    Share,
    Whole,
    refuse_problems,
)


class DropoutCourse(Part):
    """Dropout that changes over the stage (arXiv:2409.05423)."""

    kind: Literal["linear", "triangular"] = Field(
        default="linear", description="From start to end once, or there and back `cycles` times."
    )
    start: Decay = Field(description="Dropout at the first step.")
    end: Decay = Field(description="Dropout at the last step, or at the height of a cycle.")
    cycles: Count = Field(default=4, description="Cycles of triangular.")


class ShorterRows(Part):
    """A part of the stage in which windows are cut into shorter rows."""

    share: Annotated[Share, Field(gt=0)] = Field(description="Share of the stage's steps.")
    divisor: Annotated[int, Field(ge=2), Whole] = Field(
        description="Rows of a window of data.context_tokens, which it must divide; a step's tokens stay."
    )


class ShorterPatches(Part):
    """A part of the stage in which long patches are cut (for a student that reads bytes)."""

    share: Annotated[Share, Field(gt=0)] = Field(description="Share of the stage's steps.")
    symbols: Annotated[int, Field(ge=2), Whole] = Field(
        description="Most symbols in a patch, its closing one included."
    )


class Stage(Part):
    """What every stage of training says."""

    kind: str = Field(description="What the stage does: align, distil or tune.")
    name: SafeName = Field(
        default_factory=lambda data: data["kind"],
        description="Name of the stage and of its folder; its kind by default.",
    )
    tokens: Count = Field(description="Training tokens of the stage; 300_000 and 3e5 are both understood.")
    batch_tokens: Count = Field(description="Tokens in one optimiser step, a multiple of data.context_tokens.")
    micro_batch_sequences: Count | None = Field(
        default=None,
        description="Windows computed at a time (memory, not the result, depends on it); null takes all of a step.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="AdamW, or Muon for matrices with AdamW for the rest."
    )
    learning_rate: Rate = Field(description="Peak learning rate.")
    mixer_learning_rate: Rate | None = Field(
        default=None, description="Peak learning rate of the new mixers; null takes learning_rate."
    )
    embedding_learning_rate: Rate | None = Field(
        default=None,
        description="Peak learning rate of embeddings and head, which then have no weight decay; null takes learning_rate.",
    )
    scalar_learning_rate: Rate | None = Field(
        default=None,
        description="Peak learning rate of vectors and scalars (norms, residual scales); null takes learning_rate.",
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Decoupled weight decay on matrices; filters, norms and biases have none."
    )
    cautious_decay: bool = Field(
        default=False, description="Decay a weight only where the step shrinks it too (arXiv:2510.12402)."
    )
    decay_schedule: Literal["constant", "linear"] = Field(
        default="constant", description="Weight decay over the stage: as it is, or falling to zero."
    )
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="AdamW's decay rates of the two moments (GPT-3 and Pythia use 0.9 and 0.95)."
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="Learning rate after the warm-up: cosine, stable then decaying (wsd), or constant.",
    )
    warmup_share: Share = Field(default=0.04, description="Share of the steps over which the rate rises from zero.")
    decay_share: Share = Field(default=0.2, description="Share of the steps, at the end, over which wsd decays.")
    final_share: Share = Field(default=0.05, description="Learning rate at the end, as a share of the peak.")
    clip_norm: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Largest norm of the gradient, as in the Hyena and Pythia papers."
    )
    ema_decay: Annotated[Decay, Field(gt=0)] | None = Field(
        default=None, description="Keep an exponential average of the weights with this decay a step; null keeps none."
    )
    dropout: Decay | DropoutCourse | None = Field(
        default=None,
        description="Dropout while training, in place of the model's own: a number, or a course over the stage; null leaves "
        "the model's.",
    )
    length_curriculum: list[ShorterRows] = Field(
        default_factory=list,
        description="Parts of the stage, in order, that train on shorter rows; what is left trains on whole windows "
        "(arXiv:2108.06084).",
    )
    patch_curriculum: list[ShorterPatches] = Field(
        default_factory=list,
        description="Parts of the stage, in order, that train on shorter patches: less pooling first (arXiv:2605.30080).",
    )

    @property
    def steps(self) -> int:
        """Optimiser steps: whole batches that fit into the stage's tokens."""
        return self.tokens // self.batch_tokens

    @model_validator(mode="after")
    def _numbers_agree(self) -> Stage:
        problems: Problems = {}
        if self.tokens < self.batch_tokens:
            problems["tokens"] = f"{self.tokens} is less than one step of {self.batch_tokens}: nothing would train"
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            problems["decay_share"] = "warmup_share and decay_share together exceed the whole stage"
        for name in ("length_curriculum", "patch_curriculum"):
            if sum(part.share for part in getattr(self, name)) > 1:
                problems[name] = "its shares together exceed the whole stage"
        refuse_problems(problems)
        return self


class AlignStage(Stage):
    """Each new mixer learns to give what the teacher's attention gave; only mixers train (MOHAWK, RADLADS)."""

    kind: Literal["align"] = Field(description="Match the teacher's mixer outputs, layer by layer.")
    order: Literal["joint", "progressive"] = Field(
        default="joint", description="All layers at once, or one after the other from the first (arXiv:2401.17574)."
    )
    inputs: Literal["teacher", "student"] = Field(
        default="teacher", description="What a mixer is fed: the teacher's activations, or the student's own so far."
    )


class DistilStage(Stage):
    """The student learns the teacher's distribution over the next token."""

    kind: Literal["distil"] = Field(description="Match the teacher's next-token distribution.")
    kl: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Weight of KL(teacher || student), nats a token; short for an objective "
        "forward_kl (reverse_kl with minillm).",
    )
    ce: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Weight of the cross entropy with the text, nats a token; short for cross_entropy."
    )
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(
        default=1.0, description="Both distributions are softened by it for kl; 1 is usual for language models."
    )
    objectives: list[Objective] | None = Field(
        default=None, min_length=1, description="Any list of terms, in place of kl, ce and temperature."
    )
    on_policy: OnPolicy | None = Field(default=None, description="Learn on the student's own writing too; null: never.")
    train: Literal["all", "mixers"] = Field(
        default="all", description="Which parameters train: all, or only the new mixers."
    )

    @model_validator(mode="after")
    def _has_an_objective(self) -> DistilStage:
        if self.objectives is None and self.kl == 0 and self.ce == 0:
            raise RecipeProblems({"kl": "kl and ce are both 0: there is nothing to learn from"})
        if self.on_policy is not None and self.on_policy.method == "minillm" and self.on_policy.top_p < 1:
            raise RecipeProblems(
                {"on_policy.top_p": "minillm weighs every token that could have been written: write 1"}
            )
        if self.objectives is not None:
            problems = objective_problems(self.objectives)
            for name in ("kl", "ce", "temperature"):
                if name in self.model_fields_set and getattr(self, name) != DistilStage.model_fields[name].default:
                    problems[name] = "objectives are listed too: write it as one of them, or remove the list"
            refuse_problems(problems)
        return self

    def terms(self) -> list[Objective]:
        """The terms of the loss, whichever way they were written."""
        if self.objectives is not None:
            return self.objectives
        short = []
        if self.kl:
            is_minillm = self.on_policy is not None and self.on_policy.method == "minillm"
            name: ObjectiveName = "reverse_kl" if is_minillm else "forward_kl"
            short.append(Objective(objective=name, weight=self.kl, temperature=self.temperature))
        if self.ce:
            short.append(Objective(objective="cross_entropy", weight=self.ce))
        return short


class TuneStage(Stage):
    """Ordinary language-model training on the text, without the teacher."""

    kind: Literal["tune"] = Field(description="Cross entropy with the text; needs no teacher.")
    train: Literal["all", "mixers"] = Field(
        default="all", description="Which parameters train: all, or only the new mixers."
    )


STAGE_KINDS: dict[str, type[Stage]] = {"align": AlignStage, "distil": DistilStage, "tune": TuneStage}
AnyStage = Annotated[AlignStage | DistilStage | TuneStage, Field(discriminator="kind")]
