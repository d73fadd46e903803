"""What a model costs at inference: seconds, tokens per second, memory and energy, by context length and batch.

Measured, never derived, and alternating between the models so that a slow moment of the machine hits all.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import DataError, LimbeckError, TeacherError
from limbeck.evaluate import energy
from limbeck.evaluate.facts import SpeedFacts, SpeedMeasurement, SpeedRow
from limbeck.evaluate.memory import cache_bytes, watch_memory
from limbeck.evaluate.readings import Prompt, Reading, prompts_of, random_prompt
from limbeck.evaluate.windows import position_limit

SPEED_TIE = 0.05
_TOO_LITTLE = "not enough memory"
_SAME_TEXT = ", each reading the same text in its own tokens (context: the student's; decoding compared by the byte)"


@dataclass(frozen=True)
class _Sample:
    """One prefill and the single-token steps after it."""

    prefill_seconds: float
    decode_seconds: list[float]
    cache_bytes: int


def parameter_facts(model: nn.Module) -> dict[str, int]:
    """Count parameters and their bytes; tied ones once. Keys as in `ModelFacts`."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "parameter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }


def measure_speed(
    model: nn.Module,
    *,
    context_lengths: Sequence[int],
    decode_tokens: int = 16,
    repeats: int = 3,
    device: str | torch.device = "cpu",
    vocab_size: int | None = None,
) -> list[SpeedMeasurement]:
    """Measure one model at batch 1: prefill of `context` random tokens, then `decode_tokens` single steps.

    A first, untimed run at each length warms caches up and measures memory. Lengths that the model's learned
    positions do not cover, or for which memory is short, come back with `skipped` set.

    Raises: DataError when a length or a count is not positive.
    """
    _check_counts(context_lengths, decode_tokens, repeats)
    vocabulary = _vocabulary(model, vocab_size)
    place = torch.device(device)
    return [
        _measure_together([model], [random_prompt(vocabulary, context, decode_tokens)], repeats, place)[0]
        for context in context_lengths
    ]


def compare_speed(
    teacher: nn.Module | None,
    student: nn.Module,
    *,
    context_lengths: Sequence[int],
    decode_tokens: int = 16,
    repeats: int = 3,
    device: str | torch.device = "cpu",
    vocab_size: int | None = None,
    readings: Sequence[Reading] | None = None,
) -> SpeedFacts:
    """Measure teacher and student in turn (see `measure_speed`) and set them side by side.

    Without a teacher the student stands alone. A length counts as slower when the student needs more than 5 % more
    time there. readings: one text in the tokens of each model, where those differ: lengths are then the student's, the
    teacher reads as many bytes, and decoding is compared by the byte.
    """
    _check_counts(context_lengths, decode_tokens, repeats)
    place = torch.device(device)
    models = [student] if teacher is None else [teacher, student]
    vocabulary = None if readings else _vocabulary(student, vocab_size)
    weight = readings[-1].bytes_per_token / readings[0].bytes_per_token if readings else 1.0
    rows = []
    for context in sorted(set(context_lengths)):
        if vocabulary is None:
            assert readings is not None
            prompts = prompts_of(readings, context, decode_tokens)
        else:
            prompts = [random_prompt(vocabulary, context, decode_tokens)] * len(models)
        measured = _measure_together(models, prompts, repeats, place)
        rows.append(_side_by_side(None if teacher is None else measured[0], measured[-1], bytes_ratio=weight))
    threads = f", {torch.get_num_threads()} thread(s)" if place.type == "cpu" else ""
    return SpeedFacts(
        rows=rows,
        slower_prefill_at=[row.context for row in rows if _is_slower(row.prefill_speedup)],
        slower_decode_at=[row.context for row in rows if _is_slower(row.decode_speedup)],
        note=f"Batch 1 on {place.type}{threads}; medians of {repeats} repeats, {decode_tokens} tokens decoded in each, "
        f"models in alternation{_SAME_TEXT if readings else ''}. Differences under {SPEED_TIE:.0%} are not called faster or slower.",
    )


def measure_costs(
    models: Sequence[nn.Module],
    readings: Sequence[Reading],
    *,
    context: int,
    batch: int = 1,
    decode_tokens: int = 16,
    repeats: int = 3,
    device: str | torch.device = "cpu",
    meter: energy.EnergyMeter | None = None,
) -> list[SpeedMeasurement]:
    """Measure several models in turn at one context length and batch, all reading the same text in their own tokens.

    context: tokens of the first model; the others read as many bytes (their own `context` says how many tokens these
    are). meter: where energy is read from, after the times, in passes of their own.

    Raises: DataError when a count is not positive.
    """
    _check_counts([context, batch], decode_tokens, repeats)
    try:
        prompts = prompts_of(readings, context, decode_tokens, batch=batch, reference=0)
    except (RuntimeError, MemoryError) as error:
        if not _is_memory_short(error):
            raise
        return [SpeedMeasurement(context=context, batch=batch, skipped=_TOO_LITTLE) for _ in models]
    return _measure_together(models, prompts, repeats, torch.device(device), meter)


def _is_slower(speedup: float | None) -> bool:
    return speedup is not None and speedup < 1 / (1 + SPEED_TIE)


def _check_counts(context_lengths: Sequence[int], decode_tokens: int, repeats: int) -> None:
    if not context_lengths or min(*context_lengths, decode_tokens, repeats) < 1:
        raise DataError(
            f"speed: context_lengths {list(context_lengths)}, decode_tokens {decode_tokens}, repeats {repeats}: "
            "expected at least one length, and every number to be 1 or more."
        )


def _vocabulary(model: nn.Module, given: int | None) -> int:
    """How many token ids may be drawn."""
    if given is not None:
        return given
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if callable(getter) else None
    if not isinstance(embeddings, nn.Embedding):
        raise DataError(f"{type(model).__name__} does not say how many tokens it knows: give vocab_size.")
    return embeddings.num_embeddings


def _measure_together(
    models: Sequence[nn.Module],
    prompts: Sequence[Prompt],
    repeats: int,
    device: torch.device,
    meter: energy.EnergyMeter | None = None,
) -> list[SpeedMeasurement]:
    """Measure several models at one length, taking turns; the order is reversed in every other repeat."""
    prompts = [Prompt(prompt.ids_BT.to(device), prompt.context) for prompt in prompts]
    results = [SpeedMeasurement(context=prompt.context, batch=len(prompt.ids_BT)) for prompt in prompts]
    samples: list[list[_Sample]] = [[] for _ in models]
    was_training = [model.training for model in models]
    try:
        for model, result, prompt in zip(models, results, prompts, strict=True):
            model.eval()
            result.skipped = _reason_to_skip(model, prompt.ids_BT.shape[1]) or _warm_up(model, prompt, result)
        for repeat in range(repeats):
            places = range(len(models)) if repeat % 2 == 0 else reversed(range(len(models)))
            for place in places:
                if results[place].skipped is None:
                    samples[place].append(_run_once(models[place], prompts[place]))
        for model, result, prompt in zip(models, results, prompts, strict=True):
            if meter is not None and result.skipped is None:
                _measure_energy(model, prompt, result, meter)
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)
    for result, own in zip(results, samples, strict=True):
        _summarise(result, own)
    return results


def _reason_to_skip(model: nn.Module, tokens: int) -> str | None:
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        return f"its learned positions end at {limit} tokens"
    return None


def _warm_up(model: nn.Module, prompt: Prompt, result: SpeedMeasurement) -> str | None:
    """The untimed run: fills in the memory; returns the reason when the model cannot be run at this length."""
    try:
        with watch_memory(prompt.ids_BT.device) as watch:
            _, cache = _prefill(model, prompt)
            prefill_peak = watch.lap()
            _, cache = _decode(model, prompt, cache)
            decode_peak = watch.lap()
    except LimbeckError as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not _is_memory_short(error):
            raise
        return _TOO_LITTLE
    result.cache_bytes = cache_bytes(cache)
    result.peak_memory_bytes, result.memory_method = watch.peak_bytes, watch.method
    result.prefill_peak_memory_bytes, result.decode_peak_memory_bytes = prefill_peak, decode_peak
    return None


def _is_memory_short(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _run_once(model: nn.Module, prompt: Prompt) -> _Sample:
    prefill_seconds, cache = _prefill(model, prompt)
    decode_seconds, cache = _decode(model, prompt, cache)
    return _Sample(prefill_seconds, decode_seconds, cache_bytes(cache))


@torch.no_grad()
def _prefill(model: nn.Module, prompt: Prompt) -> tuple[float, Any]:
    """Read the context at once: seconds, and the cache."""
    ids_BT = prompt.ids_BT[:, : prompt.context]
    options = _options(model)
    start = _now(ids_BT.device)
    cache = model(input_ids=ids_BT, **options).past_key_values
    seconds = _now(ids_BT.device) - start
    if cache is None:
        raise TeacherError(f"{type(model).__name__} keeps no cache, so decoding cannot be measured")
    return seconds, cache


@torch.no_grad()
def _decode(model: nn.Module, prompt: Prompt, cache: Any) -> tuple[list[float], Any]:
    """Read on one token at a time: seconds of each, and the cache."""
    options, decode_seconds = _options(model), []
    for ids_B in prompt.ids_BT[:, prompt.context :].unbind(1):
        start = _now(ids_B.device)
        cache = model(input_ids=ids_B[:, None], past_key_values=cache, **options).past_key_values
        decode_seconds.append(_now(ids_B.device) - start)
    return decode_seconds, cache


def _options(model: nn.Module) -> dict[str, Any]:
    options: dict[str, Any] = {"use_cache": True}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        options["logits_to_keep"] = 1
    return options


def _measure_energy(model: nn.Module, prompt: Prompt, result: SpeedMeasurement, meter: energy.EnergyMeter) -> None:
    """Joules a token, of prefills one after another until the counter can tell, and of decoding once."""
    batch, tokens = prompt.ids_BT.shape
    device = prompt.ids_BT.device
    runs = 0

    def prefills() -> None:
        nonlocal runs
        begun = _now(device)
        while runs == 0 or _now(device) - begun < meter.shortest_seconds:
            _prefill(model, prompt)
            runs += 1

    prefilled = energy.measure(meter, prefills, clock=lambda: _now(device))
    _, cache = _prefill(model, prompt)
    decoded = energy.measure(meter, lambda: _decode(model, prompt, cache), clock=lambda: _now(device))
    if prefilled.joules is not None:
        result.prefill_joules_per_token = prefilled.joules / (runs * batch * prompt.context)
    if decoded.joules is not None:
        result.decode_joules_per_token = decoded.joules / (batch * (tokens - prompt.context))
    notes = [f"{what}: {one.note}" for what, one in (("prefill", prefilled), ("decode", decoded)) if one.note]
    result.energy_method = "; ".join([meter.method, *notes])


def _now(device: torch.device) -> float:
    """Seconds of a steady clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _summarise(result: SpeedMeasurement, samples: Sequence[_Sample]) -> None:
    if not samples:
        return
    prefills = [sample.prefill_seconds for sample in samples]
    decodes = [statistics.fmean(sample.decode_seconds) for sample in samples]
    result.prefill_seconds, result.prefill_seconds_range = statistics.median(prefills), (min(prefills), max(prefills))
    result.prefill_tokens_per_second = result.batch * result.context / result.prefill_seconds
    result.decode_seconds_per_token = statistics.median(decodes)
    result.decode_seconds_per_token_range = min(decodes), max(decodes)
    result.decode_tokens_per_second = result.batch / result.decode_seconds_per_token
    result.decode_worst_seconds = max(max(sample.decode_seconds) for sample in samples)


def _side_by_side(teacher: SpeedMeasurement | None, student: SpeedMeasurement, *, bytes_ratio: float = 1.0) -> SpeedRow:
    """bytes_ratio: bytes that a token of the student stands for, over a token of the teacher's."""
    row = SpeedRow(context=student.context, teacher=teacher, student=student)
    if teacher is not None:
        row.prefill_speedup = _ratio(teacher.prefill_seconds, student.prefill_seconds)
        by_token = _ratio(teacher.decode_seconds_per_token, student.decode_seconds_per_token)
        row.decode_speedup = None if by_token is None else by_token * bytes_ratio
        row.cache_ratio = _ratio(student.cache_bytes, teacher.cache_bytes)
        row.memory_ratio = _ratio(student.peak_memory_bytes, teacher.peak_memory_bytes)
    return row


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
