"""The schema of report.json: everything a report says, as plain numbers and words.

`ReportFacts` is what the pipeline fills and what report.html and report.md are made from; `report_schema()` gives its
JSON schema. A number that was not measured is null, and so is one that is not finite.
"""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from limbeck.core.errors import CheckpointError
from limbeck.core.files import read_json

if TYPE_CHECKING:
    from limbeck.evaluate.quality import ModelComparison, PairedDifference, TextScore

SCHEMA_VERSION: Literal[1] = 1


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _printable(value: Any) -> Any:
    """Replace what no text file can hold (half characters, control codes): models write such things."""
    if not isinstance(value, str):
        return value
    whole = value.encode("utf-8", errors="replace").decode("utf-8")
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in whole)


Printable = Annotated[str, BeforeValidator(_printable)]
Measured = Annotated[float | None, BeforeValidator(_finite_or_none)]


class Facts(BaseModel):
    """Base of every part of a report: unknown keys are refused, assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class RunFacts(Facts):
    """Which run this is, and what would be needed to repeat it."""

    name: str = Field(description="Name of the run")
    date: str = Field(description="When the report was made, ISO 8601")
    seeds: list[int] = Field(description="Seeds of the runs these figures rest on; one seed means no spread is known")
    limbeck_version: str = ""
    torch_version: str = ""
    transformers_version: str = ""
    machine: dict[str, str | int | float | None] = Field(
        default_factory=dict, description="Facts of the machine: processor, cores, memory, device, system"
    )
    recipe: Printable = Field(default="", description="The resolved recipe, as text")
    teacher_source: str | None = Field(default=None, description="Where the teacher came from")
    wall_seconds: dict[str, Measured] = Field(default_factory=dict, description="Wall time of each part, in seconds")
    energy_joules: Measured = Field(
        default=None, description="What training took, all arms and seeds; null when a part of it was not measured"
    )
    energy_note: Printable = Field(default="", description="What reported the energy, or why there is no figure")


class TextFacts(Facts):
    """One model on one text."""

    name: str
    tokens: int
    words: int
    bytes: int
    nats_per_token: Measured
    standard_error_nats: Measured = Field(default=None, description="Of nats_per_token; the protocol says how")
    perplexity: Measured
    word_perplexity: Measured
    bits_per_byte: Measured

    @classmethod
    def from_score(cls, name: str, score: TextScore) -> TextFacts:
        """The facts of a measured score."""
        return cls(
            name=name,
            tokens=score.tokens,
            words=score.words,
            bytes=score.bytes,
            nats_per_token=score.nats_per_token,
            standard_error_nats=score.standard_error_nats,
            perplexity=score.perplexity,
            word_perplexity=score.word_perplexity,
            bits_per_byte=score.bits_per_byte,
        )


class StageFacts(Facts):
    """One training stage of one model."""

    name: str
    kind: str
    tokens: int = 0
    flops: Measured = None
    seconds: Measured = None
    final_loss: Measured = None
    loss_curve: list[tuple[float, Measured]] = Field(default_factory=list, description="[tokens seen, loss], in order")
    warnings: list[str] = Field(default_factory=list, description="What the diagnoses of the loss gave reason to say")
    energy_joules: Measured = Field(default=None, description="By the machine's own counters")
    energy_note: Printable = Field(default="", description="What reported it, or why there is no figure")


class Sample(Facts):
    """What a model wrote after a prompt."""

    prompt: Printable
    text: Printable


class Versus(Facts):
    """Mean nats per token of this model minus the student's, on the same tokens, block by block."""

    nats: Measured
    standard_error: Measured = None

    @classmethod
    def from_difference(cls, difference: PairedDifference) -> Versus:
        """The facts of a measured difference `paired_difference(this model's score, student's score)`."""
        return cls(nats=difference.nats, standard_error=difference.standard_error)


class ModelFacts(Facts):
    """One model: its size, what it cost, how well it predicts, how near it is to the teacher."""

    parameters: int = Field(description="Parameters, tied ones counted once")
    parameter_bytes: int
    perplexity: Measured = Field(default=None, description="Over all texts, per token")
    word_perplexity: Measured = None
    bits_per_byte: Measured = None
    standard_error_nats: Measured = Field(default=None, description="Of the mean nats per token (log perplexity)")
    tokens_scored: int = 0
    texts: list[TextFacts] = Field(default_factory=list, description="The same, text by text")
    versus_student: Versus | None = None
    kl_to_teacher: Measured = Field(default=None, description="KL(teacher || model), nats per token")
    kl_standard_error: Measured = None
    top1_agreement: Measured = Field(default=None, description="Share of positions with the teacher's first choice")
    top1_standard_error: Measured = None
    tokens_spent: int = Field(default=0, description="Training tokens of this run, all stages")
    flops_spent: Measured = Field(default=None, description="Training operations of this run, all stages, counted")
    energy_joules: Measured = Field(default=None, description="Of the training of this run, all stages")
    stages: list[StageFacts] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)

    def take_score(self, score: TextScore) -> None:
        """Fill in the overall quality from a measured score."""
        self.perplexity = score.perplexity
        self.word_perplexity = score.word_perplexity
        self.bits_per_byte = score.bits_per_byte
        self.standard_error_nats = score.standard_error_nats
        self.tokens_scored = score.tokens

    def take_comparison(self, comparison: ModelComparison) -> None:
        """Fill in the nearness to the teacher from a measured comparison."""
        self.kl_to_teacher, self.kl_standard_error = comparison.kl_nats, comparison.kl_standard_error
        self.top1_agreement, self.top1_standard_error = comparison.top1_agreement, comparison.top1_standard_error


class Controls(Facts):
    """What the student is held against; each is null when it was switched off."""

    from_scratch: ModelFacts | None = Field(default=None, description="The student's shape, trained without a teacher")
    copied: ModelFacts | None = Field(default=None, description="Teacher's weights copied, no align stage")
    teacher_more: ModelFacts | None = Field(default=None, description="The teacher, trained on the student's tokens")
    without_teacher: ModelFacts | None = Field(
        default=None, description="The student's own start, trained on the text alone for as many tokens"
    )
    equal_flops: ModelFacts | None = Field(
        default=None, description="The control without a teacher, with as many operations as student and teacher took"
    )


class TeacherWorth(Facts):
    """The student against the control without a teacher, over all seeds, with a 95 % interval."""

    control: str = Field(description="Which control")
    nats: Measured = Field(description="Control minus student, nats per token; above 0: the teacher helped")
    low: Measured
    high: Measured
    seeds: int
    method: str = Field(description="What the interval is over")
    answer: Literal["yes", "no", "unclear"]


class FloorFacts(Facts):
    """The teacher with the attention outputs that the student replaces set to zero, and nothing trained."""

    perplexity: Measured
    bits_per_byte: Measured = None
    ratio_to_teacher: Measured = Field(
        description="Floor perplexity over the teacher's; near 1: attention hardly counts"
    )


class LayerFacts(Facts):
    """One layer's mixer and how well it imitates the teacher's attention.

    NMSE: held-out squared error over the target's own mean square; 0 is exact, 1 no better than silence.
    """

    index: int
    mixer: str
    nmse_initial: Measured = None
    nmse_calibrated: Measured = None
    nmse_after_align: Measured = None
    replaced: bool
    note: Printable = ""


class SpeedMeasurement(Facts):
    """One model at one context length and batch. `skipped` says why there is no number."""

    context: int
    batch: int = Field(default=1, description="Rows that are read and continued at once")
    prefill_seconds: Measured = Field(default=None, description="Median over the repeats")
    prefill_seconds_range: tuple[Measured, Measured] | None = Field(default=None, description="Fastest, slowest repeat")
    prefill_tokens_per_second: Measured = Field(default=None, description="Of all rows together")
    decode_seconds_per_token: Measured = Field(
        default=None, description="Median over repeats of the mean per token of a row"
    )
    decode_seconds_per_token_range: tuple[Measured, Measured] | None = Field(
        default=None, description="Fastest, slowest repeat"
    )
    decode_tokens_per_second: Measured = Field(default=None, description="Of all rows together")
    decode_worst_seconds: Measured = Field(default=None, description="The slowest single token of all repeats")
    cache_bytes: int | None = Field(default=None, description="Tensors of the cache after the last token")
    peak_memory_bytes: int | None = Field(default=None, description="Highest use above the start; see memory_method")
    prefill_peak_memory_bytes: int | None = Field(default=None, description="The same, of the prefill alone")
    decode_peak_memory_bytes: int | None = Field(default=None, description="The same, of decoding, cache included")
    memory_method: str = ""
    prefill_joules_per_token: Measured = None
    decode_joules_per_token: Measured = None
    energy_method: str = Field(default="", description="What reported the energy, or why there is no figure")
    skipped: str | None = None


class SpeedRow(Facts):
    """Teacher and student at one context length. A speed-up above 1 means the student is faster."""

    context: int
    teacher: SpeedMeasurement | None
    student: SpeedMeasurement
    prefill_speedup: Measured = None
    decode_speedup: Measured = None
    cache_ratio: Measured = Field(default=None, description="Student's cache bytes over the teacher's")
    memory_ratio: Measured = Field(default=None, description="Student's peak memory over the teacher's")


class SpeedFacts(Facts):
    """Measured cost by context length, and where the student is slower."""

    rows: list[SpeedRow]
    slower_prefill_at: list[int] = Field(default_factory=list, description="Context lengths with a slower prefill")
    slower_decode_at: list[int] = Field(default_factory=list, description="Context lengths with slower decoding")
    note: str = ""


class TeacherNeeded(Facts):
    """Was the teacher worth it? The answer rests on the controls alone."""

    answer: Literal["yes", "no", "unclear", "not measured"]
    statements: list[str] = Field(default_factory=list)
    student_over_from_scratch: Measured = Field(default=None, description="Perplexity ratio; below 1: teacher helped")
    student_over_copied: Measured = Field(default=None, description="Perplexity ratio; below 1: aligning helped")
    teacher_more_over_teacher: Measured = Field(default=None, description="What the extra tokens alone give a teacher")
    gap_closed: Measured = Field(default=None, description="Share of the nats from floor to teacher that came back")


class Verdict(Facts):
    """The report in sentences."""

    headline: str
    gained: list[str] = Field(default_factory=list)
    lost: list[str] = Field(default_factory=list)
    teacher_needed: TeacherNeeded
    warnings: list[str] = Field(default_factory=list)


class ReportFacts(Facts):
    """The whole of report.json."""

    schema_version: Literal[1] = Field(default=SCHEMA_VERSION, description="Raised when a field changes its meaning")
    run: RunFacts
    teacher: ModelFacts | None = Field(default=None, description="Null when a model was trained without a teacher")
    student: ModelFacts
    controls: Controls = Field(default_factory=Controls)
    worth: TeacherWorth | None = Field(default=None, description="Null when there is no control to compare with")
    teaching: dict[str, Any] = Field(default_factory=dict, description="Which kind of teacher, its store, usage, cost")
    floor: FloorFacts | None = None
    layers: list[LayerFacts] = Field(default_factory=list)
    speed: SpeedFacts | None = Field(default=None, description="Null when switched off")
    protocol: dict[str, Any] = Field(default_factory=dict, description="How quality was measured (see score_text)")
    verdict: Verdict | None = Field(default=None, description="Filled in when the report is written")

    def models(self) -> dict[str, ModelFacts]:
        """Every model that was measured, by its name in the report, teacher first."""
        named = {
            "teacher": self.teacher,
            "student": self.student,
            "copied": self.controls.copied,
            "from_scratch": self.controls.from_scratch,
            "without_teacher": self.controls.without_teacher,
            "equal_flops": self.controls.equal_flops,
            "teacher_more": self.controls.teacher_more,
        }
        return {name: model for name, model in named.items() if model is not None}


def report_schema() -> dict[str, Any]:
    """The JSON schema of report.json."""
    return ReportFacts.model_json_schema()


def read_facts(path: Path) -> ReportFacts:
    """Read a report.json.

    Raises: CheckpointError when the file is missing, damaged, or of another schema.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist. Give a run folder in which a run has finished its evaluation.")
    content = read_json(path)
    try:
        return ReportFacts.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise CheckpointError(
            f"{path} is not a report this version can read: {where}: {first['msg']}. Expected schema version "
            f"{SCHEMA_VERSION}; evaluate the run folder again to write a new one."
        ) from error
