from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from tests.evaluate.small_models import VOCABULARY, build_model
from torch import nn

from limbeck.core.errors import DataError
from limbeck.evaluate import efficiency, memory
from limbeck.evaluate.efficiency import compare_speed, measure_costs, measure_speed, parameter_facts
from limbeck.evaluate.energy import EnergyMeter
from limbeck.evaluate.facts import SpeedMeasurement
from limbeck.evaluate.memory import cache_bytes, watch_memory

FLOAT = torch.float32
KEY_VALUE_BYTES = 2 * 2 * 2 * 8 * 4


class Recorder(nn.Module):
    """A model that keeps the tokens it has read as its cache and notes every call."""

    def __init__(self, name, calls, *, failure=None):
        super().__init__()
        self.name, self.calls, self.failure = name, calls, failure

    def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        if self.failure is not None and input_ids.shape[1] > 4:
            raise self.failure
        assert use_cache
        assert logits_to_keep == 1
        assert not self.training
        self.calls.append((self.name, input_ids.shape[1], 0 if past_key_values is None else past_key_values.shape[1]))
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        return SimpleNamespace(past_key_values=seen)


def test_parameters_are_counted_by_hand_and_tied_ones_once():
    module = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 5, bias=False)})
    assert parameter_facts(module) == {"parameters": 15 + 5 + 15, "parameter_bytes": 4 * 35}
    module["b"].weight = module["a"].weight
    assert parameter_facts(module.to(torch.float16)) == {"parameters": 20, "parameter_bytes": 40}


def test_measured_rows_are_complete_and_agree():
    rows = measure_speed(build_model(dtype=FLOAT), context_lengths=[8, 100], decode_tokens=3, repeats=2)
    assert [row.context for row in rows] == [8, 100]
    for row in rows:
        assert row.skipped is None
        assert row.prefill_tokens_per_second == pytest.approx(row.context / row.prefill_seconds)
        assert 0 < row.decode_seconds_per_token <= row.decode_worst_seconds
        assert row.cache_bytes == (row.context + 3) * KEY_VALUE_BYTES
        assert row.peak_memory_bytes >= 0
        assert "sampled" in row.memory_method or "high-water" in row.memory_method


def test_models_take_turns_and_the_order_is_reversed():
    calls = []
    teacher, student = Recorder("teacher", calls), Recorder("student", calls)
    student.train()
    compare_speed(teacher, student, context_lengths=[5], decode_tokens=2, repeats=3, vocab_size=7)
    assert student.training
    run = {name: [(name, 5, 0), (name, 1, 5), (name, 1, 6)] for name in ("teacher", "student")}
    expected = ["teacher", "student", "teacher", "student", "student", "teacher", "teacher", "student"]
    assert calls == [call for name in expected for call in run[name]]


def test_comparison_says_where_the_student_is_slower(monkeypatch):
    def measured(models, prompts, *_):
        context = prompts[-1].context
        teacher = SpeedMeasurement(
            context=context, prefill_seconds=1.0, decode_seconds_per_token=0.01, cache_bytes=1000, peak_memory_bytes=100
        )
        student = SpeedMeasurement(
            context=context,
            prefill_seconds={10: 2.0, 20: 1.04, 30: 0.5}[context],
            decode_seconds_per_token=0.02,
            cache_bytes=250,
            peak_memory_bytes=300,
        )
        return [teacher, student]

    monkeypatch.setattr(efficiency, "_measure_together", measured)
    found = compare_speed(nn.Linear(1, 1), nn.Linear(1, 1), context_lengths=[30, 10, 20, 10], vocab_size=5)
    assert [row.context for row in found.rows] == [10, 20, 30]
    assert [row.prefill_speedup for row in found.rows] == pytest.approx([0.5, 1 / 1.04, 2.0])
    assert found.rows[0].decode_speedup == pytest.approx(0.5)
    assert (found.rows[0].cache_ratio, found.rows[0].memory_ratio) == (0.25, 3.0)
    assert found.slower_prefill_at == [10]
    assert found.slower_decode_at == [10, 20, 30]


def test_times_are_medians_of_repeats_and_the_worst_token_is_kept():
    samples = [
        efficiency._Sample(prefill_seconds=one, decode_seconds=steps, cache_bytes=0)
        for one, steps in ((4.0, [1.0, 3.0]), (2.0, [1.0, 1.0]), (9.0, [2.0, 8.0]))
    ]
    result = SpeedMeasurement(context=8)
    efficiency._summarise(result, samples)
    assert (result.prefill_seconds, result.prefill_tokens_per_second) == (4.0, 2.0)
    assert (result.decode_seconds_per_token, result.decode_worst_seconds) == (2.0, 8.0)
    assert (result.prefill_seconds_range, result.decode_seconds_per_token_range) == ((2.0, 9.0), (1.0, 5.0))
    assert result.decode_tokens_per_second == 0.5


def test_tokens_a_second_are_of_all_rows():
    result = SpeedMeasurement(context=8, batch=3)
    efficiency._summarise(result, [efficiency._Sample(prefill_seconds=2.0, decode_seconds=[0.5], cache_bytes=0)])
    assert (result.prefill_tokens_per_second, result.decode_tokens_per_second) == (12.0, 6.0)


def test_learned_positions_end_and_rotary_ones_do_not():
    found = compare_speed(
        build_model("gpt2", dtype=FLOAT), build_model(dtype=FLOAT), context_lengths=[16, 63], decode_tokens=2, repeats=1
    )
    short, long = found.rows
    assert short.teacher.skipped is None
    assert "64" in long.teacher.skipped
    assert long.teacher.prefill_seconds is None
    assert long.student.skipped is None
    assert long.prefill_speedup is None


def test_a_hybrid_student_is_measured_with_its_own_cache():
    from limbeck.models.hybrid import build_student

    teacher = build_model(dtype=FLOAT)
    student = build_student(teacher, mixers=["hyena", "hyena"], hyena={"filter": "modal"})
    found = compare_speed(teacher, student, context_lengths=[8, 48], decode_tokens=2, repeats=1)
    assert all(row.student.skipped is None for row in found.rows)
    assert all(row.student.cache_bytes > 0 for row in found.rows)
    assert found.rows[0].student.cache_bytes == found.rows[1].student.cache_bytes


def test_a_student_without_a_teacher_stands_alone():
    found = compare_speed(None, build_model(dtype=FLOAT), context_lengths=[8], decode_tokens=1, repeats=1)
    assert found.rows[0].teacher is None
    assert found.rows[0].prefill_speedup is None
    assert found.slower_prefill_at == []


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), MemoryError(), DataError("too long")],
)
def test_what_does_not_fit_is_skipped_with_a_reason(failure):
    rows = measure_speed(Recorder("one", [], failure=failure), context_lengths=[4, 5], decode_tokens=1, vocab_size=7)
    assert rows[0].skipped is None
    assert rows[1].skipped == ("too long" if isinstance(failure, DataError) else "not enough memory")
    assert rows[1].prefill_seconds is None


def test_other_failures_are_not_hidden():
    with pytest.raises(RuntimeError, match="shape"):
        measure_speed(Recorder("one", [], failure=RuntimeError("shape")), context_lengths=[5], vocab_size=7)


def test_a_model_without_a_cache_is_skipped():
    class Forgetful(nn.Module):
        def forward(self, input_ids, **_):
            return SimpleNamespace(past_key_values=None)

    assert "no cache" in measure_speed(Forgetful(), context_lengths=[4], vocab_size=7)[0].skipped


@pytest.mark.parametrize(
    "wrong", [{"context_lengths": []}, {"context_lengths": [0]}, {"decode_tokens": 0}, {"repeats": 0}]
)
def test_counts_that_are_not_positive_are_refused(wrong):
    with pytest.raises(DataError, match="speed"):
        measure_speed(build_model(dtype=FLOAT), **{"context_lengths": [8]} | wrong)


def test_an_unknown_vocabulary_is_asked_for():
    with pytest.raises(DataError, match="vocab_size"):
        measure_speed(Recorder("one", []), context_lengths=[8])


def test_cache_bytes_by_hand():
    @dataclass
    class State:
        past: torch.Tensor
        more: dict = field(default_factory=dict)

    class Slotted:
        __slots__ = ("tensor",)

    shared = torch.zeros(3, dtype=torch.float64)
    slotted = Slotted()
    slotted.tensor = torch.zeros(2, dtype=torch.int8)
    loop = State(torch.zeros(5), {"a": [shared, (shared, None)], "b": slotted})
    loop.more["itself"] = loop
    loop.more["module"] = nn.Linear(100, 100)
    assert cache_bytes(loop) == 5 * 4 + 3 * 8 + 2
    assert cache_bytes(None) == 0


def test_cache_bytes_of_a_transformers_cache():
    with torch.no_grad():
        cache = build_model(dtype=FLOAT)(input_ids=torch.randint(VOCABULARY, (3, 10)), use_cache=True).past_key_values
    assert cache_bytes(cache) == 3 * 10 * KEY_VALUE_BYTES


@pytest.mark.skipif(not memory.RESIDENT_PAGES.exists(), reason="needs /proc")
def test_memory_watch_sees_what_was_freed_again():
    with watch_memory(torch.device("cpu")) as watch:
        torch.ones(64 * 2**18)
    assert watch.peak_bytes > 48 * 2**20


def test_laps_of_a_memory_watch_are_told_apart():
    with watch_memory(torch.device("cpu")) as watch:
        held = torch.ones(64 * 2**18)
        first = watch.lap()
        del held
        watch.lap()
        second = watch.lap()
    assert first > 48 * 2**20
    assert second < 16 * 2**20
    assert watch.peak_bytes >= first


def test_memory_watch_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "RESIDENT_PAGES", tmp_path / "none")
    with watch_memory(torch.device("cpu")) as watch:
        assert watch.lap() is None
    assert watch.peak_bytes >= 0
    assert "high-water" in watch.method


def test_memory_of_other_devices_is_not_invented():
    with watch_memory(torch.device("meta")) as watch:
        pass
    assert watch.peak_bytes is None
    assert "not measured" in watch.method


def test_models_with_other_tokens_read_the_same_bytes_and_are_compared_by_the_byte():
    calls = []
    teacher, student = Recorder("teacher", calls), Recorder("student", calls)
    words = efficiency.Reading([1, 2, 3, 4], [4, 4, 4, 4])
    bytes_ = efficiency.Reading([5, 6, 7, 8, 9, 5], [1, 1, 1, 1, 0, 4])
    found = compare_speed(teacher, student, context_lengths=[5], decode_tokens=1, repeats=1, readings=[words, bytes_])
    row = found.rows[0]
    assert (row.teacher.context, row.student.context) == (1, 5)
    seconds = row.teacher.decode_seconds_per_token, row.student.decode_seconds_per_token
    assert row.decode_speedup == pytest.approx(seconds[0] / 4 / (seconds[1] / (8 / 6)))
    assert "same text" in found.note


WORDS = efficiency.Reading([1, 2, 3, 4], [4, 4, 4, 4])
SYMBOLS = efficiency.Reading([5, 6, 7, 8, 9, 5], [1, 1, 1, 1, 0, 4])


def test_a_batch_is_read_and_continued_together_and_every_model_takes_its_turn():
    calls = []
    models = [Recorder(name, calls) for name in "abc"]
    rows = measure_costs(models, [WORDS, WORDS, SYMBOLS], context=2, batch=3, decode_tokens=2, repeats=2)
    assert [(row.context, row.batch) for row in rows] == [(2, 3), (2, 3), (6, 3)]
    assert [name for name, tokens, _ in calls if tokens > 1] == list("abc" + "abc" + "cba")
    assert all(row.cache_bytes == 3 * (row.context + 2) * 8 for row in rows)


def test_a_real_batch_takes_a_cache_for_every_row():
    reading = efficiency.Reading(list(range(40)), [1] * 40)
    single, many = (
        measure_costs([build_model(dtype=FLOAT)], [reading], context=24, batch=batch, decode_tokens=2, repeats=1)[0]
        for batch in (1, 3)
    )
    assert many.cache_bytes == 3 * single.cache_bytes == 3 * 26 * KEY_VALUE_BYTES
    assert many.prefill_peak_memory_bytes >= 0
    assert many.peak_memory_bytes >= max(many.prefill_peak_memory_bytes, many.decode_peak_memory_bytes) - 2**20
    assert (many.prefill_joules_per_token, many.decode_joules_per_token, many.energy_method) == (None, None, "")


def test_energy_is_by_the_token_of_all_rows_and_of_every_prefill(monkeypatch):
    moment = iter(range(10**6))
    monkeypatch.setattr(
        efficiency, "_now", lambda _device: float(next(moment))
    )  # each look at the clock takes a second
    spent = iter([0.0, 120.0, 500.0, 512.0])
    meter = EnergyMeter("made up", lambda: [next(spent)], [None], 5.0)
    calls = []
    row = measure_costs([Recorder("a", calls)], [WORDS], context=4, batch=2, decode_tokens=3, repeats=1, meter=meter)[0]
    prefills = sum(tokens == 4 for _, tokens, _ in calls) - 3  # the untimed one, the timed one, the one before decoding
    assert prefills > 1
    assert row.prefill_joules_per_token == pytest.approx(120 / (prefills * 2 * 4))
    assert row.decode_joules_per_token == pytest.approx(12 / (2 * 3))
    assert row.energy_method == "made up"


def test_what_is_too_short_for_the_counter_gets_no_figure(monkeypatch):
    meter = EnergyMeter("made up", lambda: [0.0], [None], 5.0)
    moment = iter(range(10**6))
    monkeypatch.setattr(efficiency, "_now", lambda _device: float(next(moment)))
    row = measure_costs([Recorder("a", [])], [WORDS], context=4, decode_tokens=1, repeats=1, meter=meter)[0]
    assert row.prefill_joules_per_token == 0.0
    assert row.decode_joules_per_token is None
    assert "decode: 3 s is too short" in row.energy_method


def test_a_batch_that_memory_cannot_hold_is_skipped(monkeypatch):
    def too_much(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(efficiency, "prompts_of", too_much)
    rows = measure_costs([Recorder("a", []), Recorder("b", [])], [WORDS, WORDS], context=4, batch=10**6)
    assert [row.skipped for row in rows] == ["not enough memory"] * 2


@pytest.mark.parametrize("wrong", [{"context": 0}, {"batch": 0}, {"decode_tokens": 0}, {"repeats": 0}])
def test_costs_of_nothing_are_refused(wrong):
    with pytest.raises(DataError, match="speed"):
        measure_costs([Recorder("a", [])], [WORDS], **{"context": 4} | wrong)
