"""Who teaches, as a recipe writes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from limbeck.recipe_values import (
    Count,
    Decay,
    NonEmpty,
    Part,
    Problems,
    Share,
    Whole,
    bare_source,
    refuse_problems,
)

Dtype = Literal["float32", "bfloat16", "float16"]
TargetKind = Literal["dense", "top_k", "sampled"]


class Endpoint(Part):
    """A model behind an OpenAI-compatible address (vLLM, SGLang, llama.cpp's server, or a vendor's)."""

    url: NonEmpty = Field(description="Base address, such as http://127.0.0.1:8000/v1.")
    model: NonEmpty = Field(description="The model's name there.")
    api_key_variable: NonEmpty | None = Field(
        default=None, description="Environment variable that holds the key; a key itself never stands in a recipe."
    )
    concurrency: Count = Field(default=4, description="Requests under way at once.")
    requests_per_minute: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Most requests started in a minute; null sets no limit."
    )
    retries: Annotated[int, Field(ge=0, le=100), Whole] = Field(
        default=5, description="Further attempts after a failure that may pass, with growing waits."
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(default=120.0, description="Longest wait for one answer.")
    prompts: NonEmpty | None = Field(
        default=None,
        description="A .jsonl file with a `prompt` (text) or `messages` (chat) on every line; null takes the "
        "beginnings of data.train's documents.",
    )
    prompt_characters: Count = Field(
        default=200, description="Characters of each document that make a prompt, when there is no prompts file."
    )
    max_new_tokens: Count = Field(default=128, description="Most tokens of an answer.")
    temperature: Annotated[float, Field(ge=0, le=5)] = Field(default=1.0, description="Sampling temperature there.")
    answers: Count | None = Field(
        default=None, description="Answers asked for; null asks until the stages' tokens are covered once."
    )


class Served(Endpoint):
    """An endpoint that hands over log-probabilities: its answers are kept in the run's target store and learnt from."""

    mode: Literal["generate", "score"] = Field(
        default="generate",
        description="generate: the teacher writes and every token comes with its top log-probabilities. score: it "
        "scores data.train's text (vLLM's prompt_logprobs, or echo).",
    )
    top_logprobs: Annotated[int, Field(ge=1, le=1000), Whole] = Field(
        default=20, description="Log-probabilities asked for at every token."
    )
    tokenizer: NonEmpty | None = Field(
        default=None, description="The served model's tokenizer (hub id or folder); null: it is the student's."
    )


class Closed(Endpoint):
    """An endpoint that hands over text alone: its answers become the training text."""

    input_price: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Price of a million input tokens, for the total in the report."
    )
    output_price: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Price of a million output tokens."
    )


class Member(Part):
    """One of several teachers."""

    source: NonEmpty = Field(description="A hub id, folder, .gguf file or `embedded`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Its share in the mixture.")
    texts: list[Annotated[int, Field(ge=0), Whole]] | None = Field(
        default=None, description="Which of data.train it teaches, by place from 0; null teaches all."
    )


def _member(value: Any) -> Any:
    return bare_source(value)


AnyMember = Annotated[Member, BeforeValidator(_member, json_schema_input_type=str | Member)]


class Itself(Part):
    """The student as its own teacher."""

    rule: Literal["average", "generation"] = Field(
        default="average",
        description="average: a moving average of its weights (mean teacher); generation: its weights at the start of "
        "the stage.",
    )
    decay: Decay = Field(default=0.999, description="Decay of the moving average, a step.")
    every: Count | None = Field(
        default=None, description="With generation: steps after which the student's weights become the teacher's anew."
    )


class Teacher(Part):
    """The model whose knowledge is transferred: one of source, store, served, closed, several, itself."""

    source: NonEmpty | None = Field(
        default=None,
        description="A hub id, a model folder, a .gguf file, or `embedded` (the one in the package). Beside `store`: "
        "the model that was captured.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub model; null takes the default branch."
    )
    store: NonEmpty | None = Field(
        default=None,
        description="A target store, made by `limbeck capture`, or by `limbeck store convert` from DistillKit's data.",
    )
    served: Served | None = Field(default=None, description="An endpoint with log-probabilities.")
    closed: Closed | None = Field(default=None, description="An endpoint that gives text alone.")
    several: list[AnyMember] | None = Field(
        default=None, min_length=2, description="Several models with one vocabulary; the first also starts the student."
    )
    itself: Itself | None = Field(default=None, description="The student teaches itself.")
    dtype: Dtype = Field(
        default="float32",
        description="Number format of the teacher's weights; float32 is the fast one on most processors.",
    )
    quantise: Literal["int8", "int4"] | None = Field(
        default=None, description="Hold the teacher's weights in fewer bits (bitsandbytes or torchao); null does not."
    )
    device: NonEmpty | None = Field(
        default=None, description="The teacher's own device, such as cuda:1 or cpu; null takes the student's."
    )
    offload: bool = Field(
        default=False, description="Keep weights in main memory and bring layers to the device as they are needed."
    )
    exact: bool = Field(
        default=False,
        description="For a student with other tokens that are bytes, or the teacher's first merges: the teacher's "
        "predictions in the student's tokens, exactly and slowly (arXiv:2512.14954), so that any objective can be used.",
    )
    targets: TargetKind = Field(
        default="dense",
        description="How much of its distribution a live teacher hands over: all, the top k, or random draws "
        "(arXiv:2503.16870).",
    )
    top_k: Count = Field(default=64, description="Entries kept by targets: top_k.")
    draws: Count = Field(default=50, description="Draws taken by targets: sampled.")

    @model_validator(mode="after")
    def _one_kind(self) -> Teacher:
        given = [name for name in ("source", "store", "served", "closed", "several", "itself") if getattr(self, name)]
        problems: Problems = {}
        if not given:
            problems["source"] = "no teacher is named. Give one of source, store, served, closed, several, itself"
        elif len(given) > 1 and given != ["source", "store"]:
            problems[given[1]] = (
                f"{given[0]} is given too; a teacher is one of them (only source may stand beside store)"
            )
        if self.targets != "dense" and not (self.source and not self.store) and not self.several:
            problems["targets"] = "only a live teacher (source or several) can choose what it hands over"
        if self.exact and given != ["source"]:
            problems["exact"] = "only a live teacher (source) can be asked for exact predictions in other tokens"
        refuse_problems(problems)
        return self

    @property
    def start(self) -> str | None:
        """The model that a student made from the teacher's weights starts from."""
        return self.several[0].source if self.several else self.source

    @property
    def kind(self) -> str:
        """source, store, served, closed, several or itself."""
        kinds = ("store", "served", "closed", "several", "itself", "source")
        return next(name for name in kinds if getattr(self, name))


class Ray(Part):
    """Capture on many machines: workers of a Ray cluster score the text, this process writes the store."""

    workers: Count = Field(default=1, description="Workers, each with the teacher loaded once.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Processor cores Ray keeps for each."
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Accelerators Ray keeps for each.")


class Capture(Part):
    """What `limbeck capture` keeps of the teacher, and a run with a served teacher too."""

    folder: NonEmpty | None = Field(default=None, description="Folder of the store; null takes stores/<name>.")
    targets: Literal["top_k", "sampled"] = Field(default="top_k", description="The top entries, or random draws.")
    k: Annotated[int, Field(ge=1, le=65_536), Whole] = Field(default=32, description="Most entries kept a token.")
    mass: Annotated[Share, Field(gt=0)] = Field(
        default=1.0, description="Keep the fewest entries that hold this much probability, at most k; 1 keeps all k."
    )
    draws: Count = Field(default=50, description="Draws a token, for sampled targets.")
    values: Literal["uint8", "float16", "float32"] = Field(
        default="uint8", description="Bits of each log-probability; float32 loses nothing."
    )
    hidden_layers: list[Annotated[int, Field(ge=0), Whole]] = Field(
        default_factory=list, description="Hidden states kept too: 0 after the embeddings, i after block i."
    )
    tokens: Count | None = Field(
        default=None, description="Training tokens captured; null takes what the stages use, at most every window once."
    )
    rows_per_shard: Count = Field(default=128, description="Windows in one file: what a stopped capture does again.")
    ray: Ray | None = Field(default=None, description="Spread a live teacher's work over a Ray cluster; null does not.")
    check_rows: Count = Field(default=8, description="Windows scored again for the store's fidelity report.")
