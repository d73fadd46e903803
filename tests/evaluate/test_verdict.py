import math

import pytest
from tests.evaluate.sample_facts import sample_facts

from limbeck.evaluate.facts import Controls, ModelFacts, ReportFacts, RunFacts, SpeedFacts, Versus
from limbeck.evaluate.verdict import gap_closed, standing, verdict


def said(sentences):
    return " ".join(sentences)


def test_a_teacher_worth_it():
    found = verdict(sample_facts())
    assert "24.10" in found.headline
    assert "1.23 times the teacher's 19.60" in found.headline
    assert "35.20: the teacher was worth it" in found.headline
    assert found.teacher_needed.answer == "yes"
    assert found.teacher_needed.student_over_from_scratch == pytest.approx(24.1 / 35.2)
    assert found.teacher_needed.student_over_copied == pytest.approx(24.1 / 25.3)
    assert found.teacher_needed.teacher_more_over_teacher == pytest.approx(18.7 / 19.6)
    statements = said(found.teacher_needed.statements)
    assert "aligning helped" in statements
    assert "from perplexity 19.60 to 18.70" in statements
    assert "×1.29" in statements
    assert "not worth it" not in said(found.warnings)


def test_a_control_that_beats_the_student_is_the_headline():
    found = verdict(sample_facts(scratch=22.0))
    assert found.headline.startswith("The teacher was not worth it")
    assert "22.00" in found.headline
    assert "24.10" in found.headline
    assert found.teacher_needed.answer == "no"
    assert "the teacher did harm" in said(found.teacher_needed.statements)
    assert "The teacher was not worth it" in said(found.warnings)


@pytest.mark.parametrize("scratch", [24.1, 24.25, 23.95])
def test_a_control_within_one_per_cent_is_no_difference(scratch):
    found = verdict(sample_facts(scratch=scratch))
    assert "no clear difference" in found.headline
    assert found.teacher_needed.answer == "unclear"


def test_a_difference_within_two_standard_errors_is_no_difference():
    facts = sample_facts(scratch=26.0)
    facts.controls.from_scratch.versus_student = Versus(nats=math.log(26.0 / 24.1), standard_error=0.05)
    assert standing(facts.student, facts.controls.from_scratch) == "level"
    facts.controls.from_scratch.versus_student = Versus(nats=math.log(26.0 / 24.1), standard_error=0.03)
    assert standing(facts.student, facts.controls.from_scratch) == "better"


def test_without_the_control_nothing_is_claimed():
    facts = sample_facts()
    facts.controls = Controls()
    found = verdict(facts)
    assert "No control without the teacher" in found.headline
    assert "worth it" not in found.headline
    assert found.teacher_needed.answer == "not measured"
    assert found.teacher_needed.statements == []


def test_an_align_stage_that_does_harm_is_named():
    facts = sample_facts()
    facts.controls.copied.perplexity = 22.9
    facts.controls.copied.versus_student = None
    found = verdict(facts)
    assert "aligning did harm" in said(found.teacher_needed.statements)
    assert "The align stage was not worth it" in said(found.warnings)


def test_unequal_budgets_are_said():
    facts = sample_facts()
    facts.controls.from_scratch.tokens_spent = 600_000
    found = verdict(facts)
    assert "on 600 k tokens (the student had 1.20 M)" in found.headline
    assert "as many tokens" not in found.headline
    assert "not at an equal budget" in said(found.warnings)


def test_a_lead_over_the_teacher_is_put_down_to_the_extra_training():
    facts = sample_facts(teacher=26.0, scratch=30.0)
    facts.teacher.versus_student = Versus(nats=math.log(26.0 / 24.1), standard_error=0.004)
    assert "better than the teacher" in said(verdict(facts).gained)
    assert "lead over the teacher is the extra training" in said(verdict(facts).warnings)
    facts.controls.teacher_more = None
    assert "no teacher was given the same extra tokens" in said(verdict(facts).warnings)


def test_level_with_the_teacher():
    found = verdict(sample_facts(student=19.65))
    assert "level with the teacher's 19.60" in found.headline
    assert "as well as the teacher" in said(found.gained)


@pytest.mark.parametrize(("floor", "warned"), [(19.6 * 3.9, True), (19.6 * 4.1, False)])
def test_a_text_that_hardly_needs_attention(floor, warned):
    warnings = said(verdict(sample_facts(floor=floor)).warnings)
    assert ("The comparison says little" in warnings) is warned
    assert ("3.90 times as high" in warnings) is warned


def test_gap_closed_by_hand():
    facts = sample_facts(teacher=10.0, student=20.0, floor=80.0)
    assert gap_closed(facts) == pytest.approx(2 / 3)
    assert "Keeps 66.7 %" in said(verdict(facts).gained)
    below = sample_facts(teacher=10.0, student=90.0, floor=80.0, scratch=200.0)
    assert "Keeps 0 %" in said(verdict(below).lost)
    assert gap_closed(sample_facts(floor=19.0)) is None


def test_a_missing_floor_is_a_warning():
    facts = sample_facts()
    facts.floor = None
    assert "floor was not measured" in said(verdict(facts).warnings)


def test_speed_both_ways():
    found = verdict(sample_facts())
    assert "Prefill is faster at 2,048 and 8,192 tokens of context, at most ×1.59 (at 8,192)." in found.gained
    assert "Decoding is slower at 256 and 512 tokens of context, at worst ×0.605" in said(found.lost)
    assert "The cache is smaller at 8,192 tokens: 262 kB against 12.6 MB (×0.0208)." in found.gained


@pytest.mark.parametrize("speed", [None, SpeedFacts(rows=[])])
def test_no_speed_no_claim(speed):
    facts = sample_facts()
    facts.speed = speed
    words = said(verdict(facts).gained + verdict(facts).lost)
    assert not any(word in words for word in ("Prefill", "Decoding", "cache", "memory"))


def test_size_both_ways():
    facts = sample_facts()
    facts.student.parameters //= 2
    assert "Smaller: 1.71 M parameters against 3.41 M (×0.500)." in verdict(facts).gained
    facts.student.parameters *= 4
    assert "Larger" in said(verdict(facts).lost)


def test_seeds_and_attention():
    facts = sample_facts()
    warnings = said(verdict(facts).warnings)
    assert "One seed" in warnings
    assert "No attention was kept" in warnings
    facts.run.seeds = [0, 1, 2]
    facts.layers[3].replaced = False
    warnings = said(verdict(facts).warnings)
    assert "One seed" not in warnings
    assert "No attention was kept" not in warnings


def test_small_and_noisy_evaluations():
    facts = sample_facts()
    facts.student.tokens_scored = 900
    facts.student.standard_error_nats = 0.05
    warnings = said(verdict(facts).warnings)
    assert "900 tokens scored" in warnings
    assert "noisy" in warnings
    assert "5.13 %" in warnings


def test_layers_worse_than_silence():
    facts = sample_facts()
    facts.layers[2].nmse_after_align = 1.3
    facts.layers[5].nmse_after_align = 1.0
    assert "Layers 2 and 5: after the align stage" in said(verdict(facts).warnings)


def test_a_student_that_could_not_be_measured():
    facts = sample_facts()
    facts.student.perplexity = float("nan")
    found = verdict(facts)
    assert "could not be measured" in found.headline
    assert found.teacher_needed.answer == "not measured"


def test_training_without_a_teacher():
    student = ModelFacts(parameters=10, parameter_bytes=40, perplexity=30.0, bits_per_byte=1.5, tokens_scored=50_000)
    found = verdict(ReportFacts(run=RunFacts(name="r", date="2025-01-01", seeds=[1, 2]), student=student))
    assert found.headline == "Trained without a teacher: perplexity 30.00, 1.500 bits per byte."
    assert (found.gained, found.lost, found.warnings) == ([], [], [])
