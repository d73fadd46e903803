"""What the benchmarks of tiny models share: text by bytes, small configurations, one training run, figures kept at once.

Training goes through `train_stage`, as in a recipe; a run that was stopped continues from its checkpoint, and a finished
run's figures stand in `results.json` of the work folder before the next run begins.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from limbeck.core.files import read_json, write_json
from limbeck.core.runtime import derive_seed, pick_device, seed_everything, set_threads, stop_on_signals
from limbeck.data.order import Mixture
from limbeck.data.text import TextSource, read_documents
from limbeck.data.windows import cached_windows
from limbeck.evaluate.quality import score_text
from limbeck.evaluate.robustness import JudgedModel, score_robustness
from limbeck.models import byte_pool, compact
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.flops import forward_flops_per_token
from limbeck.models.shipped import model_costs
from limbeck.models.tokenizers import encoder, tokenizer_fingerprint, train_tokenizer
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.lesson import Lesson
from limbeck.train.metrics import MetricsLog, SilentProgress
from limbeck.train.trainer import StageResult, StageSettings, train_stage

byte_pool.register_model()
compact.register_model()

# What a plain run does: the shipped presets' optimiser and schedule. The rate is the best of 3e-3, 1e-2, 2e-2 for bytes on
# 0.5 MB of the factbook (tokens did 2 % better at 2e-2); half the batch did better still, for both.
RECIPE: dict[str, Any] = {
    "optimizer": "muon", "learning_rate": 1e-2, "weight_decay": 0.1, "cautious_decay": True, "decay_schedule": "linear",
    "schedule": "wsd", "warmup_share": 0.02, "decay_share": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Training source, and documents to judge on (whole ones, up to a budget of bytes)."""

    train: TextSource
    valid: list[str]


def add_options(parser: argparse.ArgumentParser, *, folder: str) -> None:
    """Options that every benchmark of tiny models has."""
    parser.add_argument("--train", metavar="FILE", help="text to train on (default: the factbook)")
    parser.add_argument("--valid", metavar="FILE", help="text to judge on (default: the factbook's valid split)")
    parser.add_argument("--valid-bytes", type=int, default=262_144, help="bytes of it to use")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs") / folder, help="work folder; a stopped run continues"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a test-size run that shows the machinery works")
    parser.add_argument("--json", metavar="FILE")


def open_text(chosen: argparse.Namespace) -> Text:
    """The text that the options name."""
    train = TextSource("factbook", "train") if chosen.train is None else TextSource(chosen.train, "all")
    valid = TextSource("factbook", "valid") if chosen.valid is None else TextSource(chosen.valid, "all")
    if chosen.quick:
        train = first_part(train, chosen.folder / "quick.jsonl", max_bytes=60_000)
    return Text(train, take_bytes(read_documents(valid), chosen.valid_bytes))


def take_bytes(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Whole documents until the budget is reached; the last one is cut, not within a character."""
    taken: list[str] = []
    for document in documents:
        data = document.encode()
        taken.append(document if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore"))
        max_bytes -= len(data)
        if max_bytes <= 0:
            break
    return taken


def first_part(source: TextSource, path: Path, *, max_bytes: int) -> TextSource:
    """The first documents of a source as a file of their own, made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = take_bytes(read_documents(source), max_bytes)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return TextSource(str(path), "all")


class Figures:
    """Figures of finished runs by name, on disk at once; those of other settings are refused."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "results.json"
        settings = json.loads(json.dumps(settings))
        self._held: dict[str, Any] = {"settings": settings, "runs": {}}
        if self.path.exists():
            self._held = read_json(self.path)
            if self._held["settings"] != settings:
                different = sorted(
                    key
                    for key in settings.keys() | self._held["settings"].keys()
                    if settings.get(key) != self._held["settings"].get(key)
                )
                raise SystemExit(
                    f"{folder} holds a run of other settings ({', '.join(different)}): choose another --folder"
                )

    @property
    def runs(self) -> dict[str, Any]:
        """All figures, by run."""
        return self._held["runs"]

    def get(self, name: str, make: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
        """The figures of a run; `make(*given)` makes them if they are not there, and they are written down."""
        if name not in self.runs:
            self.runs[name] = make(*given)
            write_json(self.path, self._held)
        return self.runs[name]


def byte_tokenizer(segmenter: str, text: Text, folder: Path, *, vocab_size: int) -> ByteTokenizer:
    """Bytes in patches by a rule; `bpe` stands for the borders of a tokenizer trained on the training text."""
    if segmenter == "bpe":
        return ByteTokenizer.from_tokenizer(bpe_tokenizer(text, folder, vocab_size=vocab_size))
    return ByteTokenizer(segmenter)


def bpe_tokenizer(text: Text, folder: Path, *, vocab_size: int) -> Any:
    """A byte-level BPE trained on the training text, made once."""
    from transformers import AutoTokenizer

    place = folder / f"bpe-{vocab_size}"
    if not place.exists():
        draft = place.with_name(f".{place.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        train_tokenizer(read_documents(text.train), vocab_size=vocab_size).save_pretrained(draft)
        draft.rename(place)
    return AutoTokenizer.from_pretrained(place)


def tokens_per_byte(tokenizer: Any, documents: Sequence[str]) -> float:
    """Symbols or tokens for each byte of these documents, their ends included."""
    rows = encoder(tokenizer)(list(documents))
    return sum(len(row) + 1 for row in rows) / sum(len(document.encode()) for document in documents)


def new_model(config: dict[str, Any], *, seed: int, device: str) -> Any:
    """A new model of plain values (model_type and keys), drawn from the seed."""
    values = dict(config)
    seed_everything(derive_seed(seed, "start"))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).to(device)


def empty_model(config: dict[str, Any]) -> Any:
    """The same without any weights, to count on."""
    values = dict(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def with_trunk(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration with other settings of its trunk."""
    return config | {"trunk": config["trunk"] | changes}


def matched(config: dict[str, Any], target: float, measure: Callable[[Any], float]) -> dict[str, Any]:
    """The configuration whose trunk's feed-forward is as wide (in eights) as brings `measure` of the model to `target`."""
    one, two = (measure(empty_model(with_trunk(config, feed_forward=hidden))) for hidden in (8, 16))
    hidden = 8 * max(1, 1 + round((target - one) / (two - one)))
    return with_trunk(config, feed_forward=hidden)


def parameters_of(model: nn.Module) -> int:
    """Distinct parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_byte(model: nn.Module, context_tokens: int, per_byte: float) -> float:
    """Operations of a forward pass for each byte of text. per_byte: tokens for each."""
    return forward_flops_per_token(model, context_tokens) * per_byte


@dataclass(frozen=True)
class Job:
    """One model to train: sizes in bytes, so that models with other tokens read the same text in as many updates.

    config: of `new_model`. changes: to the recipe's stage settings. packing: of rows. lesson: from the model; None is
    cross entropy on the text.
    """

    name: str
    config: dict[str, Any]
    tokenizer: Any
    train_bytes: int
    batch_bytes: int
    context_bytes: int
    changes: dict[str, Any]
    packing: str = "stream"
    lesson: Callable[[Any], Lesson] | None = None

    def context_tokens(self, per_byte: float) -> int:
        """Tokens of a row, a multiple of 16 so that rows can be cut."""
        return max(16, round(self.context_bytes * per_byte / 16) * 16)


def run_job(
    job: Job, text: Text, *, seed: int, folder: Path, device: str, points: int = 0, judge: Judge | None = None
) -> dict[str, Any]:
    """Train a job's model under a seed and score it: figures in bits per byte of the valid text.

    points: how often to score on the way, evenly spread (with the learning rate still high, so above what a run that ends
    there would reach).
    """
    judge = judge or Judge()
    place = folder / "work" / f"{job.name}-{seed}"
    per_byte = tokens_per_byte(job.tokenizer, text.valid)
    context = job.context_tokens(per_byte)
    rows = max(1, round(job.batch_bytes * per_byte / context))
    where = pick_device(device)
    model = new_model(job.config, seed=seed, device=str(where))
    settings = _settings(job, per_byte, context=context, rows=rows)
    data = Mixture([_windows(job, text, folder, context)], weights=[1.0], seed=derive_seed(seed, "data"))
    lesson = DistilLesson(model, None, [Term("cross_entropy")]) if job.lesson is None else job.lesson(model)

    def bits() -> dict[str, Any]:
        score = score_text(
            model, job.tokenizer, text.valid, context_tokens=context, max_tokens=None, batch_sequences=16, device=where
        )
        return {"bits_per_byte": score.bits_per_byte, "bytes": score.bytes, "tokens": score.tokens}

    watch = _Curve(place / "curve.json", bits, total=settings.steps * settings.batch_tokens, points=points)
    with stop_on_signals() as stop:
        result = train_stage(
            lesson, data, settings, folder=place / "checkpoints", log=MetricsLog(place / "metrics.jsonl"), arm=job.name,
            seed=seed, device=where, progress=watch, stop=stop,
        )  # fmt: skip
    facts = _facts(job, model, result, per_byte=per_byte, context=context) | {
        "curve": watch.with_costs(result, per_byte)
    }
    facts |= bits() | judge.robustness(model, job.tokenizer, text, context=context, device=where)
    if judge.keep_models:
        model.save_pretrained(folder / "models" / f"{job.name}-{seed}")
        job.tokenizer.save_pretrained(folder / "models" / f"{job.name}-{seed}")
    shutil.rmtree(place)
    return facts


def _settings(job: Job, per_byte: float, *, context: int, rows: int) -> StageSettings:
    steps = max(2, round(job.train_bytes / job.batch_bytes))
    base = StageSettings(
        name="train", tokens=steps * rows * context, batch_tokens=rows * context,
        checkpoint_every_tokens=max(1, steps // 20) * rows * context, keep_checkpoints=1, **RECIPE,
    )  # fmt: skip
    return replace(base, **job.changes)


def _windows(job: Job, text: Text, folder: Path, context: int) -> Any:
    return cached_windows(
        text.train, encoder(job.tokenizer), folder=folder / "data", tokenizer_fingerprint=tokenizer_fingerprint(job.tokenizer),
        end_token=job.tokenizer.eos_token_id, context_tokens=context, cross_documents=False, max_tokens=None,
        packing=job.packing,  # type: ignore[arg-type]
    )  # fmt: skip


def _facts(job: Job, model: nn.Module, result: StageResult, *, per_byte: float, context: int) -> dict[str, Any]:
    costs = model_costs(model, context_tokens=context, bytes_per_token=1 / per_byte)
    return {
        "parameters": costs["parameters"], "forward_flops_per_byte": costs["forward_flops_per_byte"],
        "shipped_int8_bytes": costs["shipped_bytes"]["int8"],
        "train_tokens": result.tokens, "train_bytes": round(result.tokens / per_byte), "train_flops": result.flops,
        "seconds": result.seconds, "context_tokens": context, "tokens_per_byte": per_byte, "final_loss": result.final_loss,
    }  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """What is asked of a finished model beside its bits per byte."""

    levels: tuple[int, ...] = ()
    max_bytes: int = 16_384
    seeds: tuple[int, ...] = (0, 1)
    perturbations: tuple[str, ...] = ()
    keep_models: bool = False

    def robustness(
        self, model: Any, tokenizer: Any, text: Text, *, context: int, device: torch.device
    ) -> dict[str, Any]:
        """Bits per byte on spoilt text by "perturbation level", and the ratio to clean; nothing when no level is wanted.

        Each model is asked alone, about the same documents: none may be left out.
        """
        if not self.levels:
            return {}
        facts = score_robustness(
            {"model": JudgedModel(model, tokenizer, context)}, text.valid, perturbations=self.perturbations, levels=self.levels,
            seeds=self.seeds, max_bytes=self.max_bytes, device=device,
        )  # fmt: skip
        assert facts["protocol"]["documents_left_out"] == 0, "models would be compared on different documents"
        found = {f"{row['perturbation']} {row['level']}": row["models"]["model"] for row in facts["rows"]}
        return {"clean": facts["clean"]["model"]["bits_per_byte"], "robustness": found}


class _Curve(SilentProgress):
    """Scores the model at evenly spread moments of its training; what is known is on disk."""

    def __init__(self, path: Path, score: Callable[[], dict[str, Any]], *, total: int, points: int):
        self.path, self.score = path, score
        self.due = [total * number // points for number in range(1, points)]
        self.total, self.done = total, 0
        self.found: list[list[float]] = read_json(path) if path.exists() else []

    def start(self, title: str, total: int, done: int) -> None:
        """Training begins, or continues: what was found past the checkpoint is found again."""
        self.done = done
        self.found = [point for point in self.found if point[0] <= done]
        print(f"  {title}: {done:,} of {total:,} tokens done", flush=True)

    def advance(self, tokens: int, note: str) -> None:
        """An update is done."""
        before, self.done = self.done, self.done + tokens
        if any(before < moment <= self.done for moment in self.due) and self.done < self.total:
            self.found.append([self.done, self.score()["bits_per_byte"]])
            write_json(self.path, self.found)
            print(f"    {self.done / self.total:.0%}: {self.found[-1][1]:.3f} bits per byte, {note}", flush=True)

    def with_costs(self, result: StageResult, per_byte: float) -> list[dict[str, float]]:
        """The curve in tokens, bytes and operations."""
        return [
            {
                "tokens": tokens, "bytes": tokens / per_byte, "flops": result.flops * tokens / result.tokens,
                "bits_per_byte": bits,
            }
            for tokens, bits in self.found
        ]  # fmt: skip


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
    """Mean of values - others (paired by seed) and its standard error over seeds; None for a single seed."""
    differences = [one - other for one, other in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {"mean": statistics.fmean(differences), "standard_error": error}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, as text."""
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def begin(chosen: argparse.Namespace) -> None:
    """Set threads, make the folder."""
    disable_progress_bar()
    set_threads(chosen.threads)
    chosen.folder.mkdir(parents=True, exist_ok=True)


def check_causal_and_cached(model: Any, ids_BT: torch.Tensor) -> None:
    """The gate: later symbols change nothing before them, step by step equals one pass, and probabilities add up."""
    was = model.training
    model.eval().double()
    with torch.no_grad():
        whole = model(input_ids=ids_BT, use_cache=False).logits
        half = ids_BT.shape[1] // 2
        cut = model(input_ids=ids_BT[:, :half], use_cache=False).logits
        torch.testing.assert_close(cut, whole[:, :half], rtol=0, atol=1e-9)
        out = model(input_ids=ids_BT[:, :half], use_cache=True)
        steps, cache = [out.logits[:, -1:]], out.past_key_values
        for place in range(half, ids_BT.shape[1]):
            out = model(input_ids=ids_BT[:, place : place + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits[:, -1:])
            cache = out.past_key_values
        torch.testing.assert_close(torch.cat(steps, 1), whole[:, half - 1 :], rtol=0, atol=1e-8)
        assert whole.isfinite().all()
    model.float().train(was)


def check_lossless(tokenizer: Any, documents: Sequence[str]) -> None:
    """The gate: text comes back from its tokens byte for byte."""
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode_bytes(ids) if hasattr(tokenizer, "decode_bytes") else tokenizer.decode(ids).encode()
        assert back == document.encode(), "the tokenizer loses text"
