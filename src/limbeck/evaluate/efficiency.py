"""What a model costs at inference: seconds, tokens per second, cache and memory, by context length.

Measured, never derived, and alternating between the models so that a slow moment of the machine hits both.
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
from limbeck.evaluate.facts import SpeedFacts, SpeedMeasurement, SpeedRow
from limbeck.evaluate.memory import cache_bytes, watch_memory
from limbeck.evaluate.windows import position_limit

SPEED_TIE = 0.05
_SAME_TEXT = ", each reading the same text in its own tokens (context: the student's; decoding compared by the byte)"


@dataclass(frozen=True)
class Reading:
    """A text in one model's tokens. lengths: bytes of each token, 0 for those that stand for no text."""

    ids: Sequence[int]
    lengths: Sequence[int]

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token stands for on average."""
        return sum(self.lengths) / len(self.ids)

    def tokens_of(self, count: int) -> int:
        """How many tokens it takes to hold so many bytes, one at least."""
        total = 0
        for place, length in enumerate(self.lengths):
            total += length
            if total >= count:
                return place + 1
        return len(self.ids)


@dataclass(frozen=True)
class _Prompt:
    """Tokens for one model: so many of them are read at once, the others one by one."""

    ids_BT: torch.Tensor
    context: int


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
        _measure_together([model], [_random_prompt(vocabulary, context, decode_tokens)], repeats, place)[0]
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
            prompts = _prompts_of(readings, context, decode_tokens)
        else:
            prompts = [_random_prompt(vocabulary, context, decode_tokens)] * len(models)
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


def _random_prompt(vocabulary: int, context: int, decode_tokens: int) -> _Prompt:
    generator = torch.Generator().manual_seed(context)
    return _Prompt(torch.randint(vocabulary, (1, context + decode_tokens), generator=generator), context)


def _prompts_of(readings: Sequence[Reading], context: int, decode_tokens: int) -> list[_Prompt]:
    """As many bytes for each model as `context` tokens of the last one hold; the text is repeated where it is short."""
    last = readings[-1]
    repeats = -(-(context + decode_tokens) // len(last.ids)) + 1
    held = sum((list(last.lengths) * repeats)[:context])
    prompts = []
    for reading in readings:
        ids, lengths = list(reading.ids) * repeats, list(reading.lengths) * repeats
        count = context if reading is last else Reading(ids, lengths).tokens_of(held)
        prompts.append(_Prompt(torch.tensor([ids[: count + decode_tokens]]), count))
    return prompts


def _measure_together(
    models: Sequence[nn.Module], prompts: Sequence[_Prompt], repeats: int, device: torch.device
) -> list[SpeedMeasurement]:
    """Measure several models at one length, taking turns; the order is reversed in every other repeat."""
    prompts = [_Prompt(prompt.ids_BT.to(device), prompt.context) for prompt in prompts]
    results = [SpeedMeasurement(context=prompt.context) for prompt in prompts]
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
                    samples[place].append(_run_once(models[place], prompts[place].ids_BT, prompts[place].context))
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


def _warm_up(model: nn.Module, prompt: _Prompt, result: SpeedMeasurement) -> str | None:
    """The untimed run: fills in the memory; returns the reason when the model cannot be run at this length."""
    try:
        with watch_memory(prompt.ids_BT.device) as watch:
            result.cache_bytes = _run_once(model, prompt.ids_BT, prompt.context).cache_bytes
    except LimbeckError as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        return "not enough memory"
    result.peak_memory_bytes, result.memory_method = watch.peak_bytes, watch.method
    return None


@torch.no_grad()
def _run_once(model: nn.Module, ids_BT: torch.Tensor, context: int) -> _Sample:
    options: dict[str, Any] = {"use_cache": True}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        options["logits_to_keep"] = 1
    start = _now(ids_BT.device)
    cache = model(input_ids=ids_BT[:, :context], **options).past_key_values
    prefill_seconds = _now(ids_BT.device) - start
    if cache is None:
        raise TeacherError(f"{type(model).__name__} keeps no cache, so decoding cannot be measured")
    decode_seconds = []
    for position in range(context, ids_BT.shape[1]):
        start = _now(ids_BT.device)
        cache = model(input_ids=ids_BT[:, position : position + 1], past_key_values=cache, **options).past_key_values
        decode_seconds.append(_now(ids_BT.device) - start)
    return _Sample(prefill_seconds, decode_seconds, cache_bytes(cache))


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
    result.prefill_seconds = statistics.median(sample.prefill_seconds for sample in samples)
    result.prefill_tokens_per_second = result.context / result.prefill_seconds
    result.decode_seconds_per_token = statistics.median(statistics.fmean(sample.decode_seconds) for sample in samples)
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
