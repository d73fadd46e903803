"""Benchmark tasks, run by lm-evaluation-harness: Limbeck's models on one side, its task descriptions on the other.

Nothing of the harness is done over here. A model of tokens goes through the harness's own class for transformers, so that
its figures are those of `lm_eval --model hf` to the last digit; only logits that are no numbers stop the run. Models of
bytes have a class of their own (`byte_harness.ByteLM`).
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.core.errors import EnvironmentFault, EvaluationError, unknown_name
from limbeck.evaluate.byte_harness import ByteLM, check_answer, refuse_spoiled
from limbeck.evaluate.kept_answers import KeptAnswers
from limbeck.evaluate.scoring import ratio_standard_error

LOWEST_VERSION = (0, 4, 11)
FIRST_UNKNOWN_VERSION = (0, 6)
TRIED_VERSION = "0.4.13"
MOST_LOGIT_BYTES = 2**31
_INSTALL = 'pip install "limbeck[eval]"'
_ENDS_OF_WEIGHTED = ("weighted_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task.

    metrics, standard_errors: by the harness's names (`acc`, `acc_norm`, `word_perplexity`); where a task filters answers
    in several ways, a comma and the filter's name follow. standard_errors: of means the sample's, equal to the harness's;
    of perplexities and bits per byte from the spread between items by the delta method (the harness draws random samples
    for the first and has none for the others); None for a single item and for what is neither.
    higher_is_better: without those of which the task does not say it. items: of each item in the task's order its own
    values under the same names; what is aggregated to a perplexity or to bits per byte stands as `nats`, with `bytes` and
    `words` where they are counted. notes: what a reader of the figures should know.
    """

    task: str
    version: str
    metrics: dict[str, float]
    standard_errors: dict[str, float | None]
    higher_is_better: dict[str, bool]
    items: list[dict[str, float]]
    harness_version: str
    seconds: float
    notes: tuple[str, ...] = ()


def harness_version() -> str:
    """The version of lm-evaluation-harness that is installed.

    Raises: EnvironmentFault when there is none, or one whose interface is not known here.
    """
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault(
            f"benchmark tasks are run by lm-evaluation-harness, which is not installed. Install it: {_INSTALL}"
        ) from error
    if not LOWEST_VERSION <= _numbers(version) < FIRST_UNKNOWN_VERSION:
        lowest, unknown = (".".join(map(str, numbers)) for numbers in (LOWEST_VERSION, FIRST_UNKNOWN_VERSION))
        raise EnvironmentFault(
            f"lm-evaluation-harness {version} is installed; expected {lowest} or newer, and older than {unknown}. "
            f'Install one of these: pip install "lm-eval>={lowest},<{unknown}"'
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.4.13.dev1 is (0, 4, 13)."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def wrap_model(
    model: Any, tokenizer: Any, *, device: str | torch.device, batch_size: int = 8, max_length: int | None = None
) -> Any:
    """A model that the harness can ask. The model is moved to the device and no longer trains dropout.

    Tokens: the harness's own class for transformers (`backend="causal"`). Bytes (`ByteTokenizer`): `ByteLM`.
    batch_size: requests the model reads at a time. max_length: most tokens (symbols) it reads at a time; by default what
    its configuration says.

    Raises: EnvironmentFault when the harness is missing or of an unknown version; EvaluationError for sizes that cannot be,
    and for a tokenizer that has no token to begin a text with.
    """
    harness_version()
    if batch_size < 1 or (max_length is not None and max_length < 2):
        raise EvaluationError(
            f"batch_size is {batch_size} and max_length {max_length}: expected at least 1, and at least 2 or none."
        )
    model.eval()
    if model.device != torch.device(device):
        model.to(device)
    if hasattr(tokenizer, "encode_bytes"):
        from lm_eval.api.model import LM

        LM.register(ByteLM)
        return ByteLM(model, tokenizer, batch_size=batch_size, max_length=max_length)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise EvaluationError(
            "the tokenizer has neither a BOS nor an EOS token; lm-eval needs one to stand before a text. Set bos_token in "
            "its tokenizer_config.json, or eos_token."
        )
    with _silence():
        return _token_class()(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size, max_length=max_length
        )  # fmt: skip


def evaluate_task(
    lm: Any, task: str, *, folder: Path, limit: int | None = None, kept: KeptAnswers | None = None,
    check: Callable[[Any], None] = lambda _task: None,
) -> TaskScore:  # fmt: skip
    """Run one task that a YAML file in `folder` describes.

    lm: what `wrap_model` gave. limit: only the first so many items. kept: answers of an interrupted run, which goes on.
    check: is shown the harness's task before the model is asked, and may refuse it.
    Random choices (few-shot examples) use the harness's own fixed seeds; the caller's generators are left as they were.
    A description may name Python code beside it: give only folders you trust.

    Raises: EvaluationError for an unknown task, one whose data cannot be loaded, one this model cannot answer, and for
    logits that are no numbers; EnvironmentFault as `wrap_model`, and when a batch does not fit into memory.
    """
    version = harness_version()
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit is {limit}; expected at least 1 item, or none for all.")
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(_same_generators_after())
        manager, found = _load_task(task, Path(folder))
        check(found)
        if kept is not None:
            stack.enter_context(kept.serving(lm))
        results = _run(lm, manager, found, limit=limit)
    samples = results["samples"][task]
    _check_answers(task, samples)
    metrics, errors, better = _read_results(results, task, found, samples)
    is_known = _numbers(version)[:2] == _numbers(TRIED_VERSION)[:2]
    note = f"run by lm-evaluation-harness {version}; tried with {TRIED_VERSION}: figures may differ from older ones"
    return TaskScore(
        task=task,
        version=str(results["versions"].get(task, "")),
        metrics=metrics,
        standard_errors=errors,
        higher_is_better=better,
        items=_read_items(samples, found),
        harness_version=version,
        seconds=time.perf_counter() - started,
        notes=() if is_known else (note,),
    )


def _load_task(task: str, folder: Path) -> tuple[Any, Any]:
    """The folder's tasks, and the one that is asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if task not in manager.all_subtasks:
        known = manager.all_subtasks or ["none"]
        raise EvaluationError(f"{folder}: {unknown_name('task', task, known)}")
    load: Callable[[list[str]], Any] = getattr(manager, "load", None) or manager.load_task_or_group
    try:
        loaded = load([task])
    except Exception as error:
        raise EvaluationError(
            f'task "{task}" of {folder} cannot be loaded: {_first_line(error)}. Its data must lie where the description '
            "says; without a network they must be on this machine."
        ) from error
    return manager, loaded.get("tasks", loaded)[task]


def _run(lm: Any, manager: Any, found: Any, *, limit: int | None) -> Any:
    from lm_eval import evaluator

    task = found.config.task
    if getattr(found, "UNSAFE_CODE", False):
        raise EvaluationError(f'task "{task}" runs code that the model writes, which is not done here. Leave it out.')
    try:
        # What the harness writes down about the machine takes seconds a task, and nobody reads it here.
        with (
            _replaced(evaluator, "add_env_info", lambda _results: None),
            _replaced(evaluator, "get_git_commit_hash", lambda: None),
        ):
            return evaluator.simple_evaluate(
                model=lm, tasks=[found], limit=limit, bootstrap_iters=0, log_samples=True, batch_size=lm.batch_size,
                task_manager=manager,  # by default it reads thousands of descriptions again
            )  # fmt: skip
    except EvaluationError as error:
        raise EvaluationError(f'task "{task}": {error}') from error
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f'task "{task}": a batch of {lm.batch_size} requests does not fit into memory. Give a smaller batch size.'
        ) from error
    except AssertionError as error:
        raise EvaluationError(
            f'task "{task}" cannot be asked of this model: {_first_line(error) or "a request does not fit"}. Its context '
            f"holds {lm.max_length} tokens; give a longer max_length, or leave the task out."
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _check_answers(task: str, samples: Sequence[dict[str, Any]]) -> None:
    """Refuse likelihoods that are no numbers, whatever class the model was asked through."""
    for sample in samples:
        for answer in _flat(sample["resps"]):
            if isinstance(answer, float) and not math.isfinite(answer):
                raise EvaluationError(
                    f'task "{task}": the model gives a likelihood that is {answer} for item {sample["doc_id"]}. Its weights '
                    "hold NaN or infinity, or its number type overflows: load it in float32."
                )


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _read_results(
    results: Any, task: str, found: Any, samples: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, float | None], dict[str, bool]]:
    metrics: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    better: dict[str, bool] = {}
    directions = results["higher_is_better"].get(task) or {}
    for key, value in results["results"][task].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        name = _name(metric, chosen)
        metrics[name] = float(value)
        values = [sample[metric] for sample in samples if sample["filter"] == chosen and metric in sample["metrics"]]
        errors[name] = _standard_error(_aggregation(found, metric), values, float(value))
        if directions.get(metric) is not None:
            better[name] = bool(directions[metric])
    return metrics, errors, better


def _name(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric},{chosen}"


def _aggregation(found: Any, metric: str) -> str:
    """The name of the function that makes one figure of the items' values; the harness takes the mean by default."""
    return str(getattr(found.aggregation().get(metric), "__name__", "mean"))


def _standard_error(aggregation: str, values: Sequence[Any], figure: float) -> float | None:
    if len(values) < 2:
        return None
    if aggregation == "mean":
        return _mean_error(values)
    if aggregation == "perplexity":
        return figure * _mean_error(values)
    if aggregation in _ENDS_OF_WEIGHTED:
        sums, counts = torch.tensor(values, dtype=torch.float64).unbind(1)
        error = ratio_standard_error(sums, counts)
        assert error is not None
        return error / math.log(2) if aggregation == "bits_per_byte" else figure * error
    return None


def _mean_error(values: Sequence[float]) -> float:
    """Of a mean, in the harness's order of operations."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) / math.sqrt(len(values))


def _read_items(samples: Sequence[dict[str, Any]], found: Any) -> list[dict[str, float]]:
    items: dict[int, dict[str, float]] = {}
    for sample in samples:
        item = items.setdefault(sample["doc_id"], {})
        for metric in sample["metrics"]:
            value, aggregation = sample[metric], _aggregation(found, metric)
            if aggregation in _ENDS_OF_WEIGHTED:
                item["nats"] = -float(value[0])
                item["words" if metric.startswith("word") else "bytes"] = float(value[1])
            elif aggregation == "perplexity":
                item["nats"] = -float(value)
            elif isinstance(value, (int, float, np.number)):
                item[_name(metric, sample["filter"])] = float(value)
    return [items[number] for number in sorted(items)]


@functools.cache
def _token_class() -> Any:
    from lm_eval.models.huggingface import HFLM

    class TokenLM(HFLM):
        """The harness's own class, which stops at logits that are no numbers."""

        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._read_BT, self._row = inps, -1
            return super()._model_call(inps, *args, **kwargs)

        def _select_cont_toks(
            self, logits: torch.Tensor, contlen: int | None = None, inplen: int | None = None
        ) -> torch.Tensor:
            """The scored positions of one request. Those of a batch are asked for in the order of its rows."""
            selected_TV = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
            self._row += 1
            first = 0 if inplen is None or contlen is None else inplen - contlen
            check_answer(selected_TV, lambda: self.tokenizer.decode(self._read_BT[self._row, :inplen]), first=first)
            return selected_TV

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            """Windows are as long as the model's context: fewer at a time where the logits of a batch would be too large."""
            asked: int = self.batch_size  # wrap_model takes whole numbers only
            self.batch_size_per_gpu = min(asked, max(1, MOST_LOGIT_BYTES // (4 * self.max_length * self.vocab_size)))
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            finally:
                self.batch_size_per_gpu = asked

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            kwargs["logits_processor"] = refuse_spoiled(self.tokenizer.decode)
            return super()._model_generate(context, *args, **kwargs)

    return TokenLM


@contextmanager
def _silence() -> Iterator[None]:
    """The harness and its libraries neither log below errors nor draw progress bars. What others print is still seen."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            stack.enter_context(_replaced(module, "tqdm", lambda *args, **_options: tqdm(*args, disable=True)))
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if had_bars:
                datasets.enable_progress_bars()


@contextmanager
def _same_generators_after() -> Iterator[None]:
    """The harness seeds the generators of all libraries; afterwards they stand where they stood."""
    python, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name, None)
    if before is None:
        yield
        return
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
