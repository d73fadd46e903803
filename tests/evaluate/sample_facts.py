"""Made-up facts with every part of a report filled in, for tests and for looking at a page."""

from __future__ import annotations

import math

from limbeck.evaluate.facts import (
    Controls,
    FloorFacts,
    LayerFacts,
    ModelFacts,
    ReportFacts,
    RunFacts,
    Sample,
    SpeedFacts,
    SpeedMeasurement,
    SpeedRow,
    StageFacts,
    TextFacts,
    Versus,
)

BYTES_PER_TOKEN = 4.1
WORDS_PER_TOKEN = 0.72
TOKENS = 65_536
RECIPE = """name: made-up
seed: 0
teacher:
  source: embedded   # <- a comment with <tags> & "quotes"
student:
  keep_attention: 0
  hyena: {order: 2, short_conv: 3, filter: modal}
stages:
- {kind: align, tokens: 300000, batch_tokens: 2048, learning_rate: 3e-3}
- {kind: distil, tokens: 900000, kl: 1.0, ce: 0.0, temperature: 1.0, learning_rate: 1e-3, mixer_learning_rate: 3e-3}
"""


def curve(start: float, end: float, tokens: int) -> list[tuple[float, float | None]]:
    """A loss that falls in a plausible way, with a little ripple."""
    steps = 120
    return [
        (tokens * step / steps, end + (start - end) * math.exp(-5 * step / steps) * (1 + 0.03 * math.sin(7 * step)))
        for step in range(1, steps + 1)
    ]


def text(name: str, perplexity: float, *, tokens: int = TOKENS) -> TextFacts:
    """One model on one text, all figures in agreement."""
    nats = math.log(perplexity)
    return TextFacts(
        name=name,
        tokens=tokens,
        words=int(tokens * WORDS_PER_TOKEN),
        bytes=int(tokens * BYTES_PER_TOKEN),
        nats_per_token=nats,
        standard_error_nats=0.011,
        perplexity=perplexity,
        word_perplexity=math.exp(nats / WORDS_PER_TOKEN),
        bits_per_byte=nats / math.log(2) / BYTES_PER_TOKEN,
    )


def model(
    perplexity: float, *, student_perplexity: float, tokens_spent: int, wrote: str, stages: list[StageFacts]
) -> ModelFacts:
    """One measured model."""
    overall = text("all", perplexity)
    return ModelFacts(
        parameters=3_412_992,
        parameter_bytes=13_651_968,
        perplexity=perplexity,
        word_perplexity=overall.word_perplexity,
        bits_per_byte=overall.bits_per_byte,
        standard_error_nats=0.011,
        tokens_scored=TOKENS,
        texts=[
            text("factbook", perplexity * 0.98, tokens=50_000),
            text("wiki <raw>", perplexity * 1.07, tokens=15_536),
        ],
        versus_student=Versus(nats=math.log(perplexity / student_perplexity), standard_error=0.004),
        tokens_spent=tokens_spent,
        flops_spent=6.0 * 3_412_992 * tokens_spent,
        stages=stages,
        samples=[
            Sample(prompt="The capital of", text=wrote),
            Sample(prompt="Coastline:\n", text=f"{len(wrote) * 7} km, note: {wrote}"),
        ],
    )


def stage(name: str, kind: str, tokens: int, start: float, end: float) -> StageFacts:
    """One training stage with its curve."""
    points = curve(start, end, tokens)
    return StageFacts(
        name=name,
        kind=kind,
        tokens=tokens,
        flops=2.1e7 * tokens,
        seconds=tokens / 4200,
        final_loss=end,
        loss_curve=points,
    )


def speed() -> SpeedFacts:
    """A student that is slower at short and faster at long contexts; the teacher's positions end before the last."""
    rows = []
    for context in (256, 512, 2048, 8192, 16384):
        teacher = measurement(
            context, prefill=1.4e-6 * context**1.3, decode=4e-4 + 1.4e-7 * context, cache=1536 * context
        )
        student = measurement(context, prefill=1.1e-5 * context**1.02, decode=7.2e-4, cache=262_144)
        if context == 16384:
            teacher = SpeedMeasurement(context=context, skipped="its learned positions end at 8192 tokens")
            rows.append(SpeedRow(context=context, teacher=teacher, student=student))
            continue
        rows.append(
            SpeedRow(
                context=context,
                teacher=teacher,
                student=student,
                prefill_speedup=teacher.prefill_seconds / student.prefill_seconds,
                decode_speedup=teacher.decode_seconds_per_token / student.decode_seconds_per_token,
                cache_ratio=student.cache_bytes / teacher.cache_bytes,
                memory_ratio=student.peak_memory_bytes / teacher.peak_memory_bytes,
            )
        )
    return SpeedFacts(
        rows=rows,
        slower_prefill_at=[row.context for row in rows if row.prefill_speedup and row.prefill_speedup < 0.95],
        slower_decode_at=[row.context for row in rows if row.decode_speedup and row.decode_speedup < 0.95],
        note="Batch 1 on cpu, 1 thread(s); medians of 3 repeats, 16 tokens decoded in each, models in alternation.",
    )


def measurement(context: int, *, prefill: float, decode: float, cache: int) -> SpeedMeasurement:
    """One model at one context length."""
    return SpeedMeasurement(
        context=context,
        prefill_seconds=prefill,
        prefill_tokens_per_second=context / prefill,
        decode_seconds_per_token=decode,
        decode_worst_seconds=decode * 2.7,
        cache_bytes=cache,
        peak_memory_bytes=cache * 4 + 3_000_000,
        memory_method="resident set, sampled every millisecond, above the start",
    )


def layers() -> list[LayerFacts]:
    """Eight layers, all replaced."""
    found = []
    for index in range(8):
        error = 0.12 + 0.06 * math.sin(2.2 * index) + 0.01 * index
        found.append(
            LayerFacts(
                index=index,
                mixer="hyena",
                nmse_initial=1.02 + 0.1 * index % 0.3,
                nmse_calibrated=3.1 * error,
                nmse_after_align=error,
                replaced=True,
            )
        )
    return found


def sample_facts(
    *, teacher: float = 19.6, student: float = 24.1, scratch: float = 35.2, floor: float = 124.8
) -> ReportFacts:
    """A whole report with the perplexities given."""

    def one(perplexity: float, tokens: int, wrote: str, *stages: StageFacts) -> ModelFacts:
        return model(perplexity, student_perplexity=student, tokens_spent=tokens, wrote=wrote, stages=list(stages))

    align = stage("align", "align", 300_000, 1.1, 0.14)
    total = 1_200_000
    facts = ReportFacts(
        run=RunFacts(
            name="made-up: Pythia to Hyena",
            date="2025-01-02T03:04:05Z",
            seeds=[0],
            limbeck_version="0.1.0",
            torch_version="2.13.0",
            transformers_version="5.23.0",
            machine={
                "processor": "an imaginary processor",
                "cores": 2,
                "memory": "24 GB",
                "device": "cpu",
                "threads": 1,
            },
            recipe=RECIPE,
            teacher_source="embedded",
            wall_seconds={"teacher": 2.1, "calibrate": 31.5, "student": 412.0, "controls": 3900.0, "evaluation": 71.2},
        ),
        teacher=one(teacher, 0, "Norway is Oslo, a city at the head of a fjord in the south of the country."),
        student=one(
            student,
            total,
            "Norway is Oslo, which is a city in the south of the country and the country of the south.",
            align,
            stage("distil", "distil", 900_000, 1.6, 0.31),
        ),
        controls=Controls(
            copied=one(25.3, total, "Norway is the city of the city.", stage("distil", "distil", total, 2.6, 0.36)),
            from_scratch=one(scratch, total, "the the of and area: 12 sq km", stage("tune", "tune", total, 6.9, 3.56)),
            teacher_more=one(18.7, total, "Norway is Oslo, on the Oslofjord.", stage("tune", "tune", total, 3.1, 2.93)),
        ),
        floor=FloorFacts(
            perplexity=floor, bits_per_byte=math.log2(floor) / BYTES_PER_TOKEN, ratio_to_teacher=floor / teacher
        ),
        layers=layers(),
        speed=speed(),
        protocol={
            "context_tokens": 256,
            "stride_tokens": 128,
            "max_tokens": 65536,
            "documents_scored": 212,
            "documents": "scored separately, no context across documents",
            "standard_error": "between 212 documents",
        },
    )
    for which, nats, share in ((facts.student, 0.31, 0.713), (facts.controls.from_scratch, 0.94, 0.512)):
        which.kl_to_teacher, which.kl_standard_error, which.top1_agreement = nats, 0.006, share
    return facts
