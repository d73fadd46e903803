"""The loop, once: for every stage, on one device or many.

Every random choice is drawn from (seed, stage, update, rank), and data order is a function of the sample number, so a
run stopped anywhere and continued gives the same weights as one that was not, bit for bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from limbeck.core.errors import RecipeError, TrainingError
from limbeck.core.runtime import (
    StopRequest,
    derive_seed,
    highest,
    is_main,
    rank,
    seed_everything,
    wait_for_all,
    world_size,
)
from limbeck.core.types import Batch
from limbeck.data.order import Mixture
from limbeck.train.books import Books, EnergyCounters
from limbeck.train.checkpoint import Checkpoint, newest_for_all, save_checkpoint
from limbeck.train.curriculum import Curriculum, check_curricula, eased
from limbeck.train.diagnostics import warnings_of
from limbeck.train.lesson import Lesson
from limbeck.train.metrics import MetricsLog, Progress, SilentProgress
from limbeck.train.optim import (
    DecaySchedule,
    OptimizerSet,
    Schedule,
    build_optimizer,
    learning_rate_scale,
    weight_decay_scale,
)
from limbeck.train.stages import DropoutSchedule, dropout_put_back, set_dropout


@dataclass(frozen=True)
class StageSettings:
    """How one stage is trained. Meanings and units as in the recipe; `diagnoses`: how often in the stage the terms of the loss
    are weighed against each other. `length_curriculum`: (share of the stage, divisor of the rows' length);
    `patch_curriculum`: (share, most symbols in a patch); see `train.curriculum`."""

    name: str
    tokens: int
    batch_tokens: int
    micro_batch_sequences: int | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    mixer_learning_rate: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Schedule = "cosine"
    warmup_share: float = 0.04
    decay_share: float = 0.2
    final_share: float = 0.05
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    checkpoint_every_tokens: int | None = None
    keep_checkpoints: int = 2
    mixer_names: frozenset[str] = frozenset()
    diagnoses: int = 0
    embedding_learning_rate: float | None = None
    scalar_learning_rate: float | None = None
    cautious_decay: bool = False
    decay_schedule: DecaySchedule = "constant"
    dropout: float | DropoutSchedule | None = None
    length_curriculum: Curriculum = ()
    patch_curriculum: Curriculum = ()

    @property
    def steps(self) -> int:
        """Updates: whole batches that fit into the tokens, one at least."""
        return max(1, self.tokens // self.batch_tokens)


@dataclass
class StageResult:
    """What a stage cost and how its loss went: `curve` is [tokens, loss] pairs. flops: counted while it ran. joules: None
    when they were not measured; energy_note says why, or what reported them."""

    name: str
    tokens: int
    seconds: float
    flops: int
    final_loss: float
    curve: list[list[float]] = field(default_factory=list)
    terms: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    joules: float | None = None
    energy_note: str = ""


def train_stage(
    lesson: Lesson,
    data: Mixture,
    settings: StageSettings,
    *,
    folder: Path,
    log: MetricsLog,
    arm: str,
    seed: int,
    device: torch.device,
    first_sample: int = 0,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
    energy: EnergyCounters | str | None = None,
) -> StageResult:
    """Train one stage to its token budget, from its newest checkpoint if there is one.

    first_sample: the number of the first row in the global order (rows seen by earlier stages lie before it). On
    return the student holds the stage's weights (their moving average where `ema_decay` is set), and its own dropout.
    energy: the machine's counters, or why there are none.

    Raises: TrainingError when the loss or gradient is not finite (the last checkpoint stays as it is); RecipeError when a
    curriculum does not fit the rows; SystemExit after saving when `stop` was set.
    """
    progress, stop = progress or SilentProgress(), stop or StopRequest()
    stage = _Stage(lesson, data, settings, folder=folder, log=log, arm=arm, seed=seed, device=device, energy=energy)
    try:
        stage.resume()
        done = stage.step * settings.batch_tokens
        progress.start(f"{arm} · {settings.name}", stage.steps * settings.batch_tokens, done)
        if done:
            progress.observe(checkpoint_tokens=done)
        with dropout_put_back(lesson.student):
            while stage.step < stage.steps:
                with stage.books.update():
                    loss = stage.update(first_sample)
                progress.observe(terms=stage.last_terms, learning_rate=stage.learning_rate, warnings=stage.warnings)
                progress.advance(settings.batch_tokens, f"loss {loss:.3f}")
                exit_code = highest(stop.exit_code or 0)  # a signal reaches the processes at different steps
                if stage.is_checkpoint_due() or stage.step == stage.steps or exit_code:
                    stage.save()
                    progress.observe(checkpoint_tokens=stage.step * settings.batch_tokens)
                if exit_code and stage.step < stage.steps:
                    raise SystemExit(exit_code)
    finally:
        stage.books.meter.close()
        progress.finish()
    stage.use_average()
    return stage.result()


class _Stage:
    """The state of one stage while it is trained."""

    def __init__(
        self, lesson: Lesson, data: Mixture, settings: StageSettings, *, folder: Path, log: MetricsLog, arm: str, seed: int,
        device: torch.device, energy: EnergyCounters | str | None,
    ):  # fmt: skip
        self.lesson, self.data, self.settings, self.folder = lesson, data, settings, folder
        self.log, self.arm, self.seed, self.device = log, arm, seed, device
        self.rows = settings.batch_tokens // data.context_tokens
        if self.rows % world_size():
            raise RecipeError(
                f"stages.{settings.name}.batch_tokens = {settings.batch_tokens} is {self.rows} windows of {data.context_tokens} tokens, "
                f"which {world_size()} processes cannot share equally. Use a multiple of {world_size() * data.context_tokens}."
            )
        check_curricula(
            settings.name, length=settings.length_curriculum, patch=settings.patch_curriculum,
            context_tokens=data.context_tokens,
        )  # fmt: skip
        self.steps = settings.steps
        self.step, self.learning_rate = 0, 0.0
        self.last_terms: dict[str, float] = {}
        self.warnings: list[str] = []
        self.diagnoses: list[dict[str, float]] = []
        self.trained = {name: p for name, p in lesson.student.named_parameters() if p.requires_grad}
        self.helpers = dict(lesson.helpers())
        self.optimizer: OptimizerSet = build_optimizer(
            (self.trained | self.helpers).items(), kind=settings.optimizer, learning_rate=settings.learning_rate,
            mixer_learning_rate=settings.mixer_learning_rate, mixer_names=settings.mixer_names,
            weight_decay=settings.weight_decay, betas=settings.betas, cautious_decay=settings.cautious_decay,
            embedding_learning_rate=settings.embedding_learning_rate, scalar_learning_rate=settings.scalar_learning_rate,
        )  # fmt: skip
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if settings.ema_decay else {}
        self.books = Books(lesson, device=device, energy=energy)
        self.runner: Any = lesson
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.runner = DistributedDataParallel(
                lesson, device_ids=ids, broadcast_buffers=False, find_unused_parameters=not lesson.reaches_all  # type: ignore[arg-type]
            )  # fmt: skip

    def resume(self) -> None:
        """Go to the newest intact checkpoint, if any."""
        checkpoint = newest_for_all(self.folder)
        if checkpoint is None:
            if is_main():
                self.log.rewind(arm=self.arm, stage=self.settings.name, step=0)
            return
        load_weights(self.lesson.student, checkpoint.tensors["model"])
        self.optimizer.load_state_tensors(checkpoint.tensors.get("optimizer", {}))
        self.lesson.load_state_tensors(checkpoint.tensors.get("lesson", {}))
        for name, value in checkpoint.tensors.get("average", {}).items():
            self.average[name].copy_(value)
        self.step = checkpoint.step
        self.books.load(checkpoint.facts)
        self.last_terms, self.warnings = checkpoint.facts["terms"], list(checkpoint.facts["warnings"])
        self.diagnoses = list(checkpoint.facts["diagnoses"])
        if is_main():
            self.log.rewind(arm=self.arm, stage=self.settings.name, step=self.step)

    def update(self, first_sample: int) -> float:
        """One optimiser update on the next global batch. Returns the mean loss of this process's part."""
        settings = self.settings
        self.lesson.begin_update(self.step, self.steps)
        self._set_dropout()
        whole = self.data.batch(first_sample + self.step * self.rows, self.rows)
        whole = eased(whole, self.step, self.steps, length=settings.length_curriculum, patch=settings.patch_curriculum)
        cuts = len(whole.input_ids_BT) // self.rows
        seed = derive_seed(self.seed, self.arm, settings.name, self.step, rank())
        own, count = self._own_rows(whole, seed)
        parts = list(_rows(own, cuts * settings.micro_batch_sequences if settings.micro_batch_sequences else None))
        diagnosis = self._diagnose(parts[0]) if self._is_logged(settings.diagnoses) else {}
        seed_everything(seed)
        self.lesson.student.train()
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for number, part in enumerate(parts):
            quiet = self.runner.no_sync() if world_size() > 1 and number < len(parts) - 1 else nullcontext()
            with quiet:
                loss, terms = self.runner(part.to(self.device))
                (loss * (world_size() / count)).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + value if name in sums else value
        means = self._means(sums, count)
        limit = math.inf if settings.clip_norm is None else settings.clip_norm
        norm = float(nn.utils.clip_grad_norm_([*self.trained.values(), *self.helpers.values()], limit, foreach=True))
        self._check_finite(means["loss"], norm)
        scale = learning_rate_scale(
            self.step, self.steps, schedule=settings.schedule, warmup_share=settings.warmup_share,
            decay_share=settings.decay_share, final_share=settings.final_share,
        )  # fmt: skip
        decay_scale = weight_decay_scale(self.step, self.steps, schedule=settings.decay_schedule)
        self.optimizer.step(scale=scale, decay_scale=decay_scale)
        self.learning_rate = scale * settings.learning_rate
        is_logged = self._is_logged(200)
        self.step += 1
        self.lesson.end_update(self.step)
        self._move_average()
        self.last_terms = means
        if is_main() and (is_logged or diagnosis):
            tokens = self.step * settings.batch_tokens
            facts = {"arm": self.arm, "stage": settings.name, "step": self.step, "tokens": tokens}
            self.log.write(**facts, gradient_norm=norm, learning_rate=self.learning_rate, **means, **diagnosis)
        return means["loss"]

    def _set_dropout(self) -> None:
        rate = self.settings.dropout
        if isinstance(rate, DropoutSchedule):
            rate = rate.rate(self.step, self.steps)
        if rate is not None:
            set_dropout(self.lesson.student, rate)

    def _own_rows(self, whole: Batch, seed: int) -> tuple[Batch, int]:
        """This process's rows of the global batch, and the tokens that count in all of it."""
        own = _share(whole)
        if not self.lesson.writes_rows:
            return own, max(1, self.lesson.count(whole))
        seed_everything(seed)
        own = self.lesson.prepare(own.to(self.device))
        count = torch.tensor(self.lesson.count(own), device=self.device)
        if world_size() > 1:
            torch.distributed.all_reduce(count)
        return own, max(1, int(count))

    def _is_logged(self, times: int) -> bool:
        """Whether the coming update is one of about `times` that are evenly spread over the stage; the last one is."""
        done = self.step + 1
        return times > 0 and (done % max(1, self.steps // times) == 0 or done == self.steps)

    def _diagnose(self, part: Batch) -> dict[str, float]:
        with self.books.meter.paused():
            found = self.lesson.diagnose(part.to(self.device))
        self.diagnoses.append(found)
        self.warnings += [text for text in warnings_of(self.diagnoses) if text not in self.warnings]
        return found

    def _means(self, sums: dict[str, Tensor], count: int) -> dict[str, float]:
        values = torch.stack([value.float() for value in sums.values()])
        if world_size() > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(sums, (values / count).tolist(), strict=True))

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise TrainingError(
            f"{self.arm}, stage {self.settings.name}, update {self.step + 1} of {self.steps}: the loss is {loss} and the gradient norm {norm}. "
            f"Nothing was overwritten: the last checkpoint is in {self.folder}. Lower this stage's learning_rate "
            f"(it is {self.settings.learning_rate:g}) or clip_norm, and run into a new run folder."
        )

    def _move_average(self) -> None:
        if not self.average:
            return
        decay = min(self.settings.ema_decay or 0.0, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [self.trained[name].detach() for name in self.average], 1 - decay
            )

    def is_checkpoint_due(self) -> bool:
        """Whether the token interval between checkpoints has just been passed."""
        every = self.settings.checkpoint_every_tokens or max(self.settings.batch_tokens, self.settings.tokens // 10)
        return self.step % max(1, every // self.settings.batch_tokens) == 0

    def save(self) -> None:
        """Write a checkpoint (one process writes, all wait)."""
        books = self.books.facts()
        if is_main():
            tensors = {"model": dict(weights_of(self.lesson.student)), "optimizer": self.optimizer.state_tensors()}
            if self.average:
                tensors["average"] = self.average
            lesson = self.lesson.state_tensors()
            if lesson:
                tensors["lesson"] = lesson
            facts = {
                **books, "terms": self.last_terms, "arm": self.arm, "stage": self.settings.name, "warnings": self.warnings,
                "diagnoses": self.diagnoses,
            }  # fmt: skip
            save_checkpoint(self.folder, Checkpoint(self.step, tensors, facts), keep=self.settings.keep_checkpoints)
        wait_for_all()

    def use_average(self) -> None:
        """Put the moving average in the student's weights, if one was kept."""
        with torch.no_grad():
            for name, value in self.average.items():
                self.trained[name].copy_(value)
        self.lesson.student.eval()

    def result(self) -> StageResult:
        """The stage's books."""
        name = self.settings.name
        lines = [line for line in self.log.lines() if (line["arm"], line["stage"]) == (self.arm, name)]
        return StageResult(
            name=name, tokens=self.steps * self.settings.batch_tokens, **self.books.facts(),
            final_loss=self.last_terms.get("loss", math.nan), curve=[[line["tokens"], line["loss"]] for line in lines], terms=self.last_terms,
            warnings=self.warnings + self.books.meter.warnings,
        )  # fmt: skip


def _share(batch: Batch) -> Batch:
    """This process's rows of the global batch."""
    rows = batch.input_ids_BT.shape[0] // world_size()
    return _slice(batch, slice(rank() * rows, (rank() + 1) * rows))


def _rows(batch: Batch, micro_rows: int | None) -> Iterator[Batch]:
    """A batch a few rows at a time."""
    rows = batch.input_ids_BT.shape[0]
    step = micro_rows or rows
    return (_slice(batch, slice(low, min(low + step, rows))) for low in range(0, rows, step))


def _slice(batch: Batch, part: slice) -> Batch:
    documents, positions, keys, sources = batch.document_ids_BT, batch.position_ids_BT, batch.keys, batch.sources
    return Batch(
        batch.input_ids_BT[part], batch.loss_mask_BT[part],
        None if documents is None else documents[part], None if positions is None else positions[part],
        None if keys is None else keys[part], None if sources is None else sources[part],
    )  # fmt: skip


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once (tied ones under their first name) and every buffer that is saved."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy saved weights into a model of the same shape.

    Raises: TrainingError when the names differ: the checkpoint belongs to another model.
    """
    own = dict(weights_of(model))
    if set(own) != set(tensors):
        different = sorted(set(own) ^ set(tensors))[:4]
        raise TrainingError(f"the checkpoint belongs to another model: it differs in {', '.join(different)}.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
