"""Writing down what a teacher says about a text, at the speed of its forward pass.

Rows are numbered in the order of the batches, each once however often it comes; shard s holds rows s * n .. (s + 1) * n - 1.
So the files do not depend on how many processes share the work, nor on how often it was stopped.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core import runtime
from limbeck.core.errors import DataError, StoreError, TeacherError
from limbeck.core.types import Batch, DenseTargets, SparseTargets, Targets
from limbeck.store.codec import CodecSettings
from limbeck.store.manifest import Manifest, is_store, read_manifest
from limbeck.store.records import RowRecord, batch_rows
from limbeck.store.shards import RowFormat, ShardBuilder
from limbeck.store.store import TargetStore
from limbeck.store.writing import BackgroundWriter, CaptureSession, ShardWriter
from limbeck.teachers.base import TargetSource, Wanted
from limbeck.teachers.fidelity import measure_fidelity
from limbeck.teachers.largest import keep_largest

NEXT_LOG_PROB = "next_log_prob"
_SHARD_TOKENS = 2**18
_LOGIT_BYTES = {"cpu": 2**26, "cuda": 2**29}


@dataclass(frozen=True)
class CaptureSettings:
    """What is kept of each row.

    codec: values, k, mass, sampled. hidden: layers whose hidden states are kept, hidden_values: how. rows_per_shard: None takes
    whole batches of about 262,144 tokens; what a kill can cost is one shard. fidelity_tokens: how many are scored again
    when all is written, to measure how near the store is to the teacher; 0 leaves that out.
    """

    codec: CodecSettings
    hidden: tuple[int, ...] = ()
    hidden_values: str = "float16"
    rows_per_shard: int | None = None
    fidelity_tokens: int = 8192


@dataclass(frozen=True)
class ShardPlan:
    """The rows of one shard, in the batches in which the teacher sees them."""

    number: int
    parts: tuple[Batch, ...]
    keys: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(part.input_ids_BT.numel() for part in self.parts)


def capture(
    source: TargetSource,
    batches: Iterable[Batch],
    folder: Path | str,
    *,
    settings: CaptureSettings,
    teacher: Mapping[str, Any],
    tokenizer: str | None,
    token_bytes: Sequence[bytes | None] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Write what `source` says about every distinct row into a store, new or appended to; go on where a stop left it.

    teacher: {"name", "fingerprint"}. tokenizer: fingerprint of the one that made the ids. token_bytes: the bytes of each
    token id (empty for special ones); with them the store serves students with other tokenizers. device: where the
    teacher gets its batches. advance: told (tokens, note) after each batch. should_stop: asked before each batch. With
    several processes (torchrun) each takes its share of the shards; all must be given the same batches.
    Returns facts: folder, finished, rows, tokens, new_rows, duplicates, shards, bytes_per_token, seconds,
    tokens_per_second, fidelity.
    Raises: StoreError, TeacherError (a teacher whose vocabulary is another, or whose logits are not numbers).
    """
    begun = time.monotonic()
    source.prepare(Wanted(logits=True, hidden=settings.hidden))
    stream, rows_per_shard, example = look_at_first(batches, settings)
    width = _hidden_widths(source, example.to(device), settings)
    manifest = describe(settings, teacher, tokenizer, rows_per_shard, example.input_ids_BT.shape[1], width)
    check_vocabulary(source, settings.codec)
    session = CaptureSession(folder, manifest, main=runtime.is_main())
    counts = {"new_rows": 0, "duplicates": 0, "shards": 0, "captured_tokens": 0}
    stopped = False
    plans = plan_shards(
        stream, known=session.known_keys(), rows_per_shard=rows_per_shard, first=session.first_shard, counts=counts
    )
    form = RowFormat.of(manifest)
    with BackgroundWriter() as writer:
        for plan in plans:
            if counts["shards"] == 0:
                runtime.wait_for_all()
                session.begin()
                runtime.wait_for_all()
            counts["shards"] += 1
            if (plan.number - session.first_shard) % runtime.world_size() != runtime.rank():
                continue
            if session.is_written(plan.number, plan.keys):
                _tell(advance, plan.tokens, "written before")
                continue
            stopped = not _capture_shard(
                source, plan, writer, session, ShardBuilder(form), token_bytes, device, advance, should_stop
            )
            if stopped:
                break
            counts["captured_tokens"] += plan.tokens
    seconds = time.monotonic() - begun
    stopped = bool(runtime.highest(stopped))
    if not stopped and counts["shards"]:
        runtime.wait_for_all()
        if runtime.is_main():
            finish_capture(session, source, counts["shards"], settings=settings, device=device)
        runtime.wait_for_all()
    return summarise(session, counts, finished=not stopped, seconds=seconds)


def describe(
    settings: CaptureSettings,
    teacher: Mapping[str, Any],
    tokenizer: str | None,
    rows_per_shard: int,
    context_tokens: int,
    hidden_width: Mapping[int, int],
) -> Manifest:
    """The manifest of a capture before it has any shard."""
    return Manifest(
        "targets", dict(teacher), tokenizer, settings.codec.vocabulary_size, settings.codec.to_json(),
        {str(layer): width for layer, width in hidden_width.items()}, settings.hidden_values, context_tokens, rows_per_shard,
    )  # fmt: skip


def finish_capture(
    session: CaptureSession, source: TargetSource, shards: int, *, settings: CaptureSettings, device: torch.device | str
) -> None:
    """Measure the store against the teacher and make the capture part of it."""
    manifest = session.manifest_with(shards)
    fidelity = None
    if settings.fidelity_tokens:
        store = TargetStore(session.folder, manifest=manifest)
        fidelity = measure_fidelity(source, store, tokens=settings.fidelity_tokens, device=device)
    session.finish(session.manifest_with(shards, fidelity=fidelity))


def summarise(
    session: CaptureSession, counts: dict[str, int], *, finished: bool, seconds: float | None = None
) -> dict[str, Any]:
    """The facts that `capture` returns."""
    manifest = read_manifest(session.folder) if is_store(session.folder) else session.before
    captured = counts["captured_tokens"]
    return {
        "folder": str(session.folder), "finished": finished, "rows": manifest.rows, "tokens": manifest.tokens,
        "new_rows": counts["new_rows"], "duplicates": counts["duplicates"], "shards": len(manifest.shards),
        "bytes_per_token": manifest.bytes / manifest.tokens if manifest.tokens else None, "seconds": seconds,
        "tokens_per_second": captured / seconds if captured and seconds else None, "fidelity": manifest.fidelity,
    }  # fmt: skip


def look_at_first(batches: Iterable[Batch], settings: CaptureSettings) -> tuple[Iterator[Batch], int, Batch]:
    """The batches again, rows per shard, and one row as an example. Raises: DataError when there is no batch."""
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError("there is nothing to capture: the text gave no batch. Check data.train.")
    rows, width = first.input_ids_BT.shape
    in_shard = settings.rows_per_shard or max(rows, _SHARD_TOKENS // width // rows * rows)
    return itertools.chain([first], stream), in_shard, take_rows(first, [0])


def _hidden_widths(source: TargetSource, example: Batch, settings: CaptureSettings) -> dict[int, int]:
    if not settings.hidden:
        return {}
    found = source.targets(example).hidden
    missing = [layer for layer in settings.hidden if layer not in found]
    if missing:
        raise TeacherError(f"the teacher {source.name} gives no hidden states of layers {missing}; ask for others.")
    return {layer: found[layer].shape[-1] for layer in settings.hidden}


def check_vocabulary(source: TargetSource, codec: CodecSettings) -> None:
    """Raises: TeacherError when the store is made for another vocabulary than the teacher's."""
    if source.vocabulary_size != codec.vocabulary_size:
        raise TeacherError(
            f"the teacher {source.name} has a vocabulary of {source.vocabulary_size}, but the store is for {codec.vocabulary_size}. "
            "Set the codec's vocabulary_size to the teacher's."
        )


def plan_shards(
    batches: Iterable[Batch], *, known: set[str], rows_per_shard: int, first: int, counts: dict[str, int]
) -> Iterator[ShardPlan]:
    """Cut distinct rows into shards. known: keys the store has already; it grows. counts: new_rows and duplicates are added to."""
    number, keys, parts = first, list[str](), list[Batch]()
    for batch in batches:
        new = []
        for row, record in enumerate(batch_rows(batch)):
            if record.key in known:
                counts["duplicates"] += 1
                continue
            known.add(record.key)
            new.append((row, record.key))
        counts["new_rows"] += len(new)
        while new:
            taken, new = new[: rows_per_shard - len(keys)], new[rows_per_shard - len(keys) :]
            parts.append(take_rows(batch, [row for row, _ in taken]))
            keys += [key for _, key in taken]
            if len(keys) == rows_per_shard:
                yield ShardPlan(number, tuple(parts), tuple(keys))
                number, keys, parts = number + 1, [], []
    if keys:
        yield ShardPlan(number, tuple(parts), tuple(keys))


def take_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch."""
    index = torch.as_tensor(list(rows))
    documents_BT, positions_BT = batch.document_ids_BT, batch.position_ids_BT
    return Batch(
        batch.input_ids_BT[index],
        batch.loss_mask_BT[index],
        None if documents_BT is None else documents_BT[index],
        None if positions_BT is None else positions_BT[index],
    )


def _capture_shard(
    source: TargetSource, plan: ShardPlan, writer: BackgroundWriter, session: CaptureSession, builder: ShardBuilder,
    token_bytes: Sequence[bytes | None] | None, device: torch.device | str, advance: Callable[[int, str], None] | None,
    should_stop: Callable[[], bool] | None,
) -> bool:  # fmt: skip
    """Score a shard's rows here and have them encoded and written there. False when it was asked to stop before the end."""
    for part in plan.parts:
        if should_stop is not None and should_stop():
            return False
        rows = score_rows(source, part, codec=builder.form.codec, token_bytes=token_bytes, device=device)
        writer.submit(partial(_add_rows, builder, rows))
        _tell(advance, part.input_ids_BT.numel(), f"shard {plan.number}")
    writer.submit(ShardWriter(session, plan.number, builder).write)
    return True


def _add_rows(builder: ShardBuilder, rows: Callable[[], list[RowRecord]]) -> None:
    for row in rows():
        builder.add(row)


def _tell(advance: Callable[[int, str], None] | None, tokens: int, note: str) -> None:
    if advance is not None:
        advance(tokens, note)


def score_rows(
    source: TargetSource,
    batch: Batch,
    *,
    codec: CodecSettings | None,
    token_bytes: Sequence[bytes | None] | None,
    device: torch.device | str,
) -> Callable[[], list[RowRecord]]:
    """Have the teacher score a batch. The function that comes back gathers the rows' records; call it on another thread.

    Raises: TeacherError when logits are not numbers, or fewer than the vocabulary.
    """
    assert codec is not None
    with torch.no_grad():
        placed = batch.to(device)
        targets = source.targets(placed)
        said_BT = torch.zeros_like(placed.loss_mask_BT)
        said_BT[:, :-1] = placed.loss_mask_BT[:, 1:]
        next_ids_N = placed.input_ids_BT.roll(-1, dims=1)[said_BT]
        kept = _kept(targets, said_BT, next_ids_N, codec, source.name)
        hidden = {layer: tensor.float() for layer, tensor in targets.hidden.items()}
        fetched = _Fetched({**kept, **{f"hidden {layer}": tensor for layer, tensor in hidden.items()}})

    def records() -> list[RowRecord]:
        return _records(batch, fetched.arrays(), tuple(hidden), token_bytes)

    return records


def _kept(targets: Targets, said_BT: Tensor, next_ids_N: Tensor, codec: CodecSettings, name: str) -> dict[str, Tensor]:
    """What is kept at the scored positions: ids, log_probs, tail, and where known weights and next_log_prob."""
    if isinstance(targets.logits, DenseTargets):
        if codec.sampled:
            raise StoreError(f"the store is for sampled targets, but the teacher {name} gives whole distributions.")
        return _largest(targets.logits, said_BT, next_ids_N, codec, name)
    if not isinstance(targets.logits, SparseTargets):
        raise TeacherError(f"the teacher {name} gave no logits, which a store of targets is made of.")
    sparse = targets.logits
    kept = {"ids": sparse.ids_BTK[said_BT], "log_probs": sparse.log_probs_BTK[said_BT].float()}
    kept["tail"] = sparse.tail_log_prob_BT[said_BT].float()
    if sparse.weights_BTK is not None:
        kept["weights"] = sparse.weights_BTK[said_BT].float()
    if NEXT_LOG_PROB in targets.features:
        kept["next_log_prob"] = targets.features[NEXT_LOG_PROB][said_BT].float()
    return kept


def _largest(
    dense: DenseTargets, said_BT: Tensor, next_ids_N: Tensor, codec: CodecSettings, name: str
) -> dict[str, Tensor]:
    hidden_ND = dense.hidden_BTD[said_BT]
    size = max(1, _LOGIT_BYTES.get(hidden_ND.device.type, 2**26) // (4 * codec.vocabulary_size))
    pieces: list[dict[str, Tensor]] = []
    for first in range(0, max(len(hidden_ND), 1), size):
        logits_NV = dense.head(hidden_ND[first : first + size]).float()
        if logits_NV.shape[-1] != codec.vocabulary_size:
            raise TeacherError(
                f"the teacher {name} gave {logits_NV.shape[-1]} logits where its vocabulary is {codec.vocabulary_size}."
            )
        pieces.append(keep_largest(logits_NV, next_ids_N[first : first + size], k=codec.k))
    kept = {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}
    if not kept.pop("is_finite").all():
        raise TeacherError(
            f"the teacher {name} gave logits that are not numbers (NaN or infinity). Load it in float32 or bfloat16."
        )
    return kept


class _Fetched:
    """Tensors on their way to the host; an accelerator goes on computing meanwhile."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._event: Any = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            pinned = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}
            for name, tensor in tensors.items():
                pinned[name].copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            # The device's memory may not be given to others before the copies are done.
            self._held, self._host = tensors, pinned
        else:
            self._host = {name: tensor.cpu() for name, tensor in tensors.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as arrays, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
            self._held = {}
        return {name: tensor.numpy() for name, tensor in self._host.items()}


def _records(
    batch: Batch, arrays: dict[str, np.ndarray], layers: tuple[int, ...], token_bytes: Sequence[bytes | None] | None
) -> list[RowRecord]:
    """Flat arrays of scored positions spread over the rows they belong to."""
    rows = batch_rows(batch)
    empty = {"ids": -1, "log_probs": -np.inf, "tail": 0.0, "weights": 0.0, "next_log_prob": np.nan}
    done = 0
    for number, row in enumerate(rows):
        said = np.append(np.asarray(row.scored)[1:], False)
        count = int(said.sum())
        for name, nothing in empty.items():
            if name in arrays:
                flat = arrays[name]
                full = np.full((len(said), *flat.shape[1:]), nothing, dtype=flat.dtype)
                full[said] = flat[done : done + count]
                setattr(row, name, full)
        done += count
        row.hidden = {layer: arrays[f"hidden {layer}"][number] for layer in layers}
        if token_bytes is not None:
            pieces = [token_bytes[token] or b"" for token in row.input_ids]
            row.text, row.token_bytes = b"".join(pieces), np.array([len(piece) for piece in pieces])
    return rows
