"""The report in sentences: what was gained, what was lost, and whether the teacher was needed.

A pure function of the facts. It claims nothing that a control does not carry, and when the controls speak against
distillation, the headline says so.
"""

from __future__ import annotations

import math
from typing import Literal

from limbeck.evaluate.facts import ModelFacts, ReportFacts, SpeedFacts, TeacherNeeded, TeacherWorth, Verdict
from limbeck.evaluate.wording import count, listing, memory, number, percent, ratio

PERPLEXITY_TIE = 1.01
SIZE_TIE = 1.05
TELLING_FLOOR = 4.0
SMALL_EVALUATION_TOKENS = 20_000
LARGE_ERROR_NATS = 0.02

Standing = Literal["better", "worse", "level", "unknown"]


def verdict(facts: ReportFacts) -> Verdict:
    """Judge a run by its own figures.

    Two perplexities are level when they differ by less than 1 %, or by less than two standard errors of their paired
    difference where that was measured.
    """
    gained, lost = _quality(facts)
    for more, less in (_size(facts), _speed(facts.speed), _memory(facts.speed)):
        gained += more
        lost += less
    return Verdict(
        headline=_headline(facts),
        gained=gained,
        lost=lost,
        teacher_needed=_teacher_needed(facts),
        warnings=_warnings(facts),
    )


def standing(student: ModelFacts, other: ModelFacts | None) -> Standing:
    """How the student's perplexity stands against another model's."""
    quotient = perplexity_ratio(student, other)
    if quotient is None or other is None:
        return "unknown"
    versus = other.versus_student
    unclear = (
        versus is not None
        and versus.nats is not None
        and versus.standard_error is not None
        and abs(versus.nats) < 2 * versus.standard_error
    )
    if unclear or 1 / PERPLEXITY_TIE <= quotient <= PERPLEXITY_TIE:
        return "level"
    return "better" if quotient < 1 else "worse"


def perplexity_ratio(above: ModelFacts | None, below: ModelFacts | None) -> float | None:
    """One model's perplexity over another's; None when either was not measured."""
    if above is None or below is None or not above.perplexity or not below.perplexity:
        return None
    return above.perplexity / below.perplexity


def gap_closed(facts: ReportFacts) -> float | None:
    """Share of the nats per token between floor and teacher that the student has; 1 is the teacher, 0 the floor."""
    if facts.teacher is None or facts.floor is None:
        return None
    floor, teacher, student = facts.floor.perplexity, facts.teacher.perplexity, facts.student.perplexity
    if not (floor and teacher and student) or floor <= teacher:
        return None
    return math.log(floor / student) / math.log(floor / teacher)


def _headline(facts: ReportFacts) -> str:
    student, teacher, scratch = facts.student, facts.teacher, compared(facts)
    how = _how(facts)
    own = number(student.perplexity)
    if student.perplexity is None:
        return "The student's perplexity could not be measured, so nothing can be said about its quality."
    if teacher is None and not facts.teaching:
        return f"Trained without a teacher: perplexity {own}, {number(student.bits_per_byte)} bits per byte."
    of_teacher = f"the teacher's is {number(teacher.perplexity)}" if teacher else "the teacher's own was not measured"
    against = standing(student, scratch)
    if scratch is not None and against == "worse":
        return (
            f"The teacher was not worth it: {how} {_budget(student, scratch)} the student reaches "
            f"perplexity {number(scratch.perplexity)}, distilled only {own} ({of_teacher})."
        )
    if scratch is not None and against == "level":
        return (
            f"Distillation made no clear difference: perplexity {own} distilled, {number(scratch.perplexity)} {how} "
            f"{_budget(student, scratch)} ({of_teacher})."
        )
    start = f"The student's perplexity is {own}"
    start += f", {_times(perplexity_ratio(student, teacher), teacher)}" if teacher is not None else f" ({of_teacher})"
    if scratch is None or against == "unknown":
        return f"{start}. No control without the teacher was measured, so whether it was needed is not known."
    return f"{start}; {how} {_budget(student, scratch)} it is {number(scratch.perplexity)}: the teacher was worth it."


def compared(facts: ReportFacts) -> ModelFacts | None:
    """The control that had no teacher: the student's own start if there is one, else the one from scratch."""
    return facts.controls.without_teacher or facts.controls.from_scratch


def _how(facts: ReportFacts) -> str:
    return "trained from the same start without it" if facts.controls.without_teacher else "trained from scratch"


def _times(quotient: float | None, teacher: ModelFacts) -> str:
    if quotient is None:
        return "and the teacher's was not measured"
    if 1 / PERPLEXITY_TIE <= quotient <= PERPLEXITY_TIE:
        return f"level with the teacher's {number(teacher.perplexity)}"
    return f"{number(quotient, 3)} times the teacher's {number(teacher.perplexity)}"


def _budget(student: ModelFacts, control: ModelFacts) -> str:
    if _equal_budget(student, control):
        return "on as many tokens"
    return f"on {count(control.tokens_spent)} tokens (the student had {count(student.tokens_spent)})"


def _equal_budget(student: ModelFacts, control: ModelFacts) -> bool:
    return abs(student.tokens_spent - control.tokens_spent) <= 0.01 * max(student.tokens_spent, control.tokens_spent)


def _quality(facts: ReportFacts) -> tuple[list[str], list[str]]:
    student, teacher = facts.student, facts.teacher
    gained: list[str] = []
    lost: list[str] = []
    quotient = perplexity_ratio(student, teacher)
    if teacher is not None and quotient is not None:
        figures = (
            f"perplexity {number(student.perplexity)} against {number(teacher.perplexity)} ({ratio(quotient)}), "
            f"{number(student.bits_per_byte)} against {number(teacher.bits_per_byte)} bits per byte"
        )
        side = standing(student, teacher)
        if side == "worse":
            lost.append(f"Predicts worse than the teacher: {figures}.")
        else:
            how = "better than" if side == "better" else "as well as"
            gained.append(f"Predicts {how} the teacher: {figures}.")
    if (closed := gap_closed(facts)) is not None:
        kept = f"Keeps {percent(max(closed, 0.0))} of the nats per token that attention is worth on this text."
        (gained if closed > 0 else lost).append(kept)
    if student.kl_to_teacher is not None and student.kl_to_teacher > 0.005:
        agreement = f", the same first choice at {percent(student.top1_agreement)} of positions"
        lost.append(
            f"Differs from the teacher by {number(student.kl_to_teacher, 3)} nats per token (KL)"
            + (agreement if student.top1_agreement is not None else "")
            + "."
        )
    return gained, lost


def _size(facts: ReportFacts) -> tuple[list[str], list[str]]:
    if facts.teacher is None or not facts.teacher.parameters:
        return [], []
    student, teacher = facts.student, facts.teacher
    quotient = student.parameters / teacher.parameters
    figures = f"{count(student.parameters)} parameters against {count(teacher.parameters)} ({ratio(quotient)})"
    if quotient < 1 / SIZE_TIE:
        return [f"Smaller: {figures}."], []
    return ([], [f"Larger: {figures}."]) if quotient > SIZE_TIE else ([], [])


def _speed(speed: SpeedFacts | None) -> tuple[list[str], list[str]]:
    gained: list[str] = []
    lost: list[str] = []
    for name, slower_at, speedups in _speedups(speed):
        faster = {context: speedup for context, speedup in speedups.items() if speedup > SIZE_TIE}
        if faster:
            best = max(faster, key=lambda context: faster[context])
            gained.append(
                f"{name} is faster at {listing(list(faster))} tokens of context, at most {ratio(faster[best])} "
                f"(at {best:,})."
            )
        if slower_at:
            worst = min(slower_at, key=lambda context: speedups.get(context, 1.0))
            lost.append(
                f"{name} is slower at {listing(slower_at)} tokens of context, at worst {ratio(speedups.get(worst))} "
                f"of the teacher's speed (at {worst:,})."
            )
    return gained, lost


def _speedups(speed: SpeedFacts | None) -> list[tuple[str, list[int], dict[int, float]]]:
    if speed is None:
        return []
    prefill = {row.context: row.prefill_speedup for row in speed.rows if row.prefill_speedup is not None}
    decode = {row.context: row.decode_speedup for row in speed.rows if row.decode_speedup is not None}
    return [("Prefill", speed.slower_prefill_at, prefill), ("Decoding", speed.slower_decode_at, decode)]


def _memory(speed: SpeedFacts | None) -> tuple[list[str], list[str]]:
    gained: list[str] = []
    lost: list[str] = []
    for name, quotient_of, bytes_of in (
        ("The cache", "cache_ratio", "cache_bytes"),
        ("Working memory", "memory_ratio", "peak_memory_bytes"),
    ):
        rows = [row for row in speed.rows if getattr(row, quotient_of) is not None] if speed else []
        if not rows:
            continue
        row = rows[-1]
        quotient = getattr(row, quotient_of)
        sizes = f"{memory(getattr(row.student, bytes_of))} against {memory(getattr(row.teacher, bytes_of))}"
        figures = f"at {row.context:,} tokens: {sizes} ({ratio(quotient)})."
        if quotient < 1 / SIZE_TIE:
            gained.append(f"{name} is smaller {figures}")
        elif quotient > SIZE_TIE:
            lost.append(f"{name} is larger {figures}")
    return gained, lost


def _teacher_needed(facts: ReportFacts) -> TeacherNeeded:
    student, controls, teacher = facts.student, facts.controls, facts.teacher
    statements = []
    if controls.from_scratch is not None:
        statements.append(_against(student, controls.from_scratch, "trained from scratch", "the teacher"))
    if controls.without_teacher is not None:
        statements.append(
            _against(student, controls.without_teacher, "from the same start, on the text alone", "the teacher")
        )
    if controls.equal_flops is not None:
        statements.append(
            _against(student, controls.equal_flops, "without the teacher and with as many operations", "the teacher")
        )
    if facts.worth is not None:
        statements.append(_interval(facts.worth))
    if controls.copied is not None:
        statements.append(
            _against(student, controls.copied, "with the teacher's weights copied and no align stage", "aligning")
        )
    more = perplexity_ratio(controls.teacher_more, teacher)
    if controls.teacher_more is not None and more is not None and teacher is not None:
        statements.append(
            f"The teacher itself, given {count(controls.teacher_more.tokens_spent)} tokens more, goes from perplexity "
            f"{number(teacher.perplexity)} to {number(controls.teacher_more.perplexity)} ({ratio(more)}); against that "
            f"teacher the student stands at {ratio(perplexity_ratio(student, controls.teacher_more))}."
        )
    return TeacherNeeded(
        answer=_answer(facts),
        statements=statements,
        student_over_from_scratch=perplexity_ratio(student, controls.from_scratch),
        student_over_copied=perplexity_ratio(student, controls.copied),
        teacher_more_over_teacher=more,
        gap_closed=gap_closed(facts),
    )


def _answer(facts: ReportFacts) -> Literal["yes", "no", "unclear", "not measured"]:
    """By the interval over seeds where there is one, else by the compared control's standing."""
    if facts.worth is not None and facts.worth.seeds > 1:
        return facts.worth.answer
    return ANSWERS[standing(facts.student, compared(facts))]


def _interval(worth: TeacherWorth) -> str:
    seeds = "1 seed" if worth.seeds == 1 else f"{worth.seeds} seeds"
    conclusion = {"yes": "the teacher was worth it", "no": "the teacher did harm", "unclear": "that may be chance"}
    return (
        f"Over {seeds} the student is {number(worth.nats, 3)} nats per token ahead of that control, with a 95 % interval "
        f"from {number(worth.low, 3)} to {number(worth.high, 3)} ({worth.method}): {conclusion[worth.answer]}."
    )


def _against(student: ModelFacts, control: ModelFacts, how: str, what: str) -> str:
    """One sentence on the student against one control."""
    side = standing(student, control)
    if side == "unknown":
        return f"The student {how} could not be measured."
    conclusion = {
        "better": f"{what} helped",
        "worse": f"{what} did harm",
        "level": f"{what} made no clear difference",
    }[side]
    return (
        f"The same student {how}, {_budget(student, control)}, reaches perplexity {number(control.perplexity)}; this "
        f"student {number(student.perplexity)} ({ratio(perplexity_ratio(student, control))} of that): {conclusion}."
    )


def _warnings(facts: ReportFacts) -> list[str]:
    found = [*_doubts_about_controls(facts), *_doubts_about_text(facts), *_doubts_about_layers(facts)]
    found += [f"{stage.name}: {text}" for stage in facts.student.stages for text in stage.warnings]
    if len(set(facts.run.seeds)) < 2:
        found.append("One seed: no spread is known, so a difference of a few per cent may be chance.")
    return found


def _doubts_about_controls(facts: ReportFacts) -> list[str]:
    student, teacher, controls = facts.student, facts.teacher, facts.controls
    found = []
    if standing(student, compared(facts)) == "worse":
        found.append(f"The teacher was not worth it: the same student, {_how(facts)}, predicts better.")
    if standing(student, controls.equal_flops) == "worse":
        found.append(
            "With as many operations as student and teacher took, training on the text alone predicts better: the "
            "teacher saves tokens, not compute."
        )
    if standing(student, controls.copied) == "worse":
        found.append(
            "The align stage was not worth it: copying the teacher's weights and going on from there is better."
        )
    for name, control in (("from-scratch", controls.from_scratch), ("copied", controls.copied)):
        if control is not None and not _equal_budget(student, control):
            found.append(
                f"The {name} control is not at an equal budget: {count(control.tokens_spent)} training tokens against "
                f"the student's {count(student.tokens_spent)}."
            )
    if standing(student, teacher) == "better":
        more = controls.teacher_more
        if more is None:
            found.append(
                "The student is better than its teacher, but no teacher was given the same extra tokens: the lead may "
                "be the extra training alone."
            )
        elif standing(student, more) != "better":
            found.append(
                "The student's lead over the teacher is the extra training, not the new mixers: the teacher with the "
                f"same extra tokens reaches {number(more.perplexity)}."
            )
    return found


def _doubts_about_text(facts: ReportFacts) -> list[str]:
    found = []
    student = facts.student
    if facts.teacher is not None and facts.floor is None and facts.layers:
        found.append("The floor was not measured: how much this text needs attention at all is not known.")
    elif facts.floor is not None and (floor := facts.floor.ratio_to_teacher) is not None and floor < TELLING_FLOOR:
        found.append(
            f"This text hardly needs attention: with all of it set to zero the teacher's perplexity is only "
            f"{number(floor, 3)} times as high (expected {number(TELLING_FLOOR)} or more). The comparison says little."
        )
    if student.perplexity is not None and student.tokens_scored < SMALL_EVALUATION_TOKENS:
        found.append(
            f"The evaluation is small: {student.tokens_scored:,} tokens scored "
            f"(expected {SMALL_EVALUATION_TOKENS:,} or more)."
        )
    if (error := student.standard_error_nats) is not None and error > LARGE_ERROR_NATS:
        found.append(
            f"The evaluation is noisy: one standard error of the student's perplexity is {percent(math.expm1(error))}."
        )
    return found


def _doubts_about_layers(facts: ReportFacts) -> list[str]:
    found = []
    if facts.teacher is not None and facts.layers and all(layer.replaced for layer in facts.layers):
        found.append(
            "No attention was kept. Perplexity does not show what such students lose first: looking up an earlier "
            "passage (names, numbers, copying). Test recall before relying on it."
        )
    failed = [
        layer.index for layer in facts.layers if layer.nmse_after_align is not None and layer.nmse_after_align >= 1
    ]
    if failed:
        found.append(
            f"{'Layer' if len(failed) == 1 else 'Layers'} {listing(failed)}: after the align stage the mixer imitates "
            "the teacher's attention no better than silence would (held-out NMSE of 1 or more)."
        )
    return found


ANSWERS: dict[Standing, Literal["yes", "no", "unclear", "not measured"]] = {
    "better": "yes",
    "worse": "no",
    "level": "unclear",
    "unknown": "not measured",
}
