import json
import math

import pytest
from pydantic import ValidationError
from tests.evaluate.sample_facts import sample_facts

from limbeck.core.errors import CheckpointError
from limbeck.evaluate.facts import (
    ModelFacts,
    ReportFacts,
    Sample,
    StageFacts,
    TextFacts,
    Versus,
    read_facts,
    report_schema,
)
from limbeck.evaluate.quality import ModelComparison, PairedDifference, TextScore


def test_round_trip_through_json():
    facts = sample_facts()
    assert ReportFacts.model_validate_json(facts.model_dump_json()) == facts
    assert ReportFacts.model_validate(json.loads(json.dumps(facts.model_dump(mode="json"), allow_nan=False))) == facts


def test_unknown_keys_and_other_versions_are_refused():
    content = sample_facts().model_dump(mode="json")
    with pytest.raises(ValidationError, match="perplexitty"):
        ReportFacts.model_validate(content | {"student": content["student"] | {"perplexitty": 1.0}})
    with pytest.raises(ValidationError, match="schema_version"):
        ReportFacts.model_validate(content | {"schema_version": 2})
    with pytest.raises(ValidationError):
        sample_facts().student.perplexity = "good"


def test_numbers_that_are_not_finite_become_null():
    stage = StageFacts(name="a", kind="tune", final_loss=math.inf, loss_curve=[(1, 2.0), (2, math.nan)])
    assert stage.final_loss is None
    assert stage.loss_curve == [(1, 2.0), (2, None)]
    assert ModelFacts(parameters=1, parameter_bytes=4, perplexity=math.inf).perplexity is None


def test_samples_hold_only_what_a_file_can_hold():
    sample = Sample(prompt="a\x00b\n\tc", text="half \ud83d of a pair, é\x1b[31m")
    assert sample.prompt == "a\ufffdb\n\tc"
    assert sample.text == "half ? of a pair, é\ufffd[31m"
    sample.text.encode("utf-8")


def test_schema_names_and_describes_the_parts():
    schema = report_schema()
    assert set(schema["required"]) == {"run", "student"}
    assert schema["properties"]["schema_version"]["const"] == 1
    assert "Median" in schema["$defs"]["SpeedMeasurement"]["properties"]["prefill_seconds"]["description"]
    json.dumps(schema)


def test_measurements_become_facts():
    score = TextScore(
        nats=20.0,
        tokens=10,
        words=4,
        bytes=30,
        standard_error_nats=0.5,
        protocol={},
        block_nats=(20.0,),
        block_tokens=(10,),
    )
    text = TextFacts.from_score("book", score)
    assert (text.nats_per_token, text.perplexity) == (2.0, pytest.approx(math.exp(2)))
    facts = ModelFacts(parameters=1, parameter_bytes=4)
    facts.take_score(score)
    assert (facts.perplexity, facts.tokens_scored) == (text.perplexity, 10)
    assert (facts.word_perplexity, facts.bits_per_byte) == (text.word_perplexity, text.bits_per_byte)
    facts.take_comparison(ModelComparison(0.3, 0.01, 0.7, 0.02, 10, {}))
    assert (facts.kl_to_teacher, facts.kl_standard_error) == (0.3, 0.01)
    assert (facts.top1_agreement, facts.top1_standard_error) == (0.7, 0.02)
    assert Versus.from_difference(PairedDifference(0.1, None)) == Versus(nats=0.1)


def test_models_in_the_reports_order_without_those_that_are_off():
    facts = sample_facts()
    assert list(facts.models()) == ["teacher", "student", "copied", "from_scratch", "teacher_more"]
    facts.controls.copied = facts.teacher = None
    assert list(facts.models()) == ["student", "from_scratch", "teacher_more"]


def test_reading_a_report_back(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(sample_facts().model_dump_json())
    assert read_facts(path) == sample_facts()


@pytest.mark.parametrize(
    ("content", "words"), [(None, "does not exist"), ("{", "JSON"), ('{"run": 3}', "run"), ("[]", "the whole file")]
)
def test_a_report_that_cannot_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_facts(path)
    assert str(path) in str(caught.value)
