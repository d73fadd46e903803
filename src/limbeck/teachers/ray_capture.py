"""Capture on many machines with Ray Data: workers score and encode shards, this process writes them.

The store is the one that `capture` writes: shards are numbered by the order of the text, whoever scores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.core.errors import EnvironmentFault
from limbeck.core.types import Batch
from limbeck.store.manifest import Manifest
from limbeck.store.shards import RowFormat, ShardBuilder
from limbeck.store.store import TargetStore
from limbeck.store.writing import CaptureSession
from limbeck.teachers.base import TargetSource, Wanted
from limbeck.teachers.capture import (
    CaptureSettings,
    ShardPlan,
    check_vocabulary,
    describe,
    look_at_first,
    plan_shards,
    score_rows,
    summarise,
)
from limbeck.teachers.fidelity import compare_rows, report_fidelity, sample_rows


def import_ray() -> Any:
    """Ray with Ray Data. Raises: EnvironmentFault when it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EnvironmentFault(
            "capture on many machines needs Ray, which is not installed here: pip install 'limbeck[ray]'. "
            "On one machine, `torchrun -m limbeck capture` uses all its devices without Ray."
        ) from error
    return ray


def capture_with_ray(
    make_source: Callable[[], TargetSource],
    batches: Iterable[Batch],
    folder: Path | str,
    *,
    settings: CaptureSettings,
    teacher: Mapping[str, Any],
    tokenizer: str | None,
    token_bytes: Sequence[bytes | None] | None = None,
    hidden_width: Mapping[int, int] | None = None,
    workers: int = 1,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    advance: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """`capture` with the work spread over a Ray cluster; the same facts, and the same command continues a stopped run.

    make_source: loads the teacher; called once on every worker (it must be importable there). hidden_width: width of each
    captured layer. cpus_per_worker, gpus_per_worker: what Ray reserves; with a GPU the teacher gets its batches on it.
    Workers need no common disk: shards come back here. Raises: EnvironmentFault without Ray; else as `capture`.
    """
    ray = import_ray()
    stream, rows_per_shard, example = look_at_first(batches, settings)
    width = {layer: (hidden_width or {})[layer] for layer in settings.hidden}
    manifest = describe(settings, teacher, tokenizer, rows_per_shard, example.input_ids_BT.shape[1], width)
    session = CaptureSession(folder, manifest)
    counts = {"new_rows": 0, "duplicates": 0, "shards": 0, "captured_tokens": 0}
    items = _items(session, stream, counts)
    todo = [item for item in items if item]
    device = "cuda" if gpus_per_worker else "cpu"
    resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
    if todo:
        scored = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            ShardScorer, fn_constructor_args=(make_source, settings, manifest, token_bytes, device), concurrency=workers, **resources
        )  # fmt: skip
        for row in scored.iter_rows():
            session.write_shard(
                int(row["number"]), row["content"], list(row["keys"]), tokens=int(row["tokens"]), scored_tokens=int(row["scored_tokens"])
            )  # fmt: skip
            counts["captured_tokens"] += int(row["tokens"])
            if advance is not None:
                advance(int(row["tokens"]), f"shard {row['number']}")
    if counts["shards"]:
        whole = session.manifest_with(counts["shards"])
        fidelity = None
        if settings.fidelity_tokens:
            store = TargetStore(folder, manifest=whole)
            rows = [store.row(number) for number in sample_rows(store, tokens=settings.fidelity_tokens)]
            compare = ray.remote(_compare).options(**resources)
            compared = ray.get(compare.remote(make_source, rows, settings.codec.vocabulary_size, device))
            fidelity = report_fidelity(compared, store)
        session.finish(session.manifest_with(counts["shards"], fidelity=fidelity))
    return summarise(session, counts, finished=True)


def _items(session: CaptureSession, stream: Iterator[Batch], counts: dict[str, int]) -> Iterator[dict[str, Any] | None]:
    """Shards still to be scored as rows that Ray can carry; None for those that are written."""
    plans = plan_shards(
        stream, known=session.known_keys(), rows_per_shard=session.rows_per_shard, first=session.first_shard, counts=counts
    )  # fmt: skip
    for plan in plans:
        if counts["shards"] == 0:
            session.begin()
        counts["shards"] += 1
        yield None if session.is_written(plan.number, plan.keys) else pack_plan(plan)


def pack_plan(plan: ShardPlan) -> dict[str, Any]:
    """A plan as plain values: its number, keys, and the batches as safetensors."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for place, part in enumerate(plan.parts):
        tensors[f"{place}.ids"] = part.input_ids_BT.to(torch.int32)
        tensors[f"{place}.mask"] = part.loss_mask_BT
        if part.document_ids_BT is not None and part.position_ids_BT is not None:
            tensors[f"{place}.documents"] = part.document_ids_BT.to(torch.int32)
            tensors[f"{place}.positions"] = part.position_ids_BT.to(torch.int32)
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {"number": plan.number, "keys": list(plan.keys), "count": len(plan.parts), "parts": save(packed)}


def unpack_plan(item: Mapping[str, Any]) -> ShardPlan:
    """The plan that `pack_plan` packed."""
    from safetensors.torch import load

    tensors = load(bytes(item["parts"]))

    def part(place: int) -> Batch:
        documents, positions = tensors.get(f"{place}.documents"), tensors.get(f"{place}.positions")
        return Batch(
            tensors[f"{place}.ids"].long(),
            tensors[f"{place}.mask"],
            None if documents is None else documents.long(),
            None if positions is None else positions.long(),
        )

    parts = tuple(part(place) for place in range(int(item["count"])))
    return ShardPlan(int(item["number"]), parts, tuple(item["keys"]))


class ShardScorer:
    """A worker: loads the teacher once, and turns packed plans into the bytes of shards."""

    def __init__(
        self,
        make_source: Callable[[], TargetSource],
        settings: CaptureSettings,
        manifest: Manifest,
        token_bytes: Sequence[bytes | None] | None,
        device: str,
    ):
        self.source, self.form = make_source(), RowFormat.of(manifest)
        self.token_bytes, self.device, self.codec = token_bytes, device, settings.codec
        check_vocabulary(self.source, settings.codec)
        self.source.prepare(Wanted(logits=True, hidden=settings.hidden))

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The shard of one plan."""
        plan, builder = unpack_plan(item), ShardBuilder(self.form)
        for part in plan.parts:
            for row in score_rows(
                self.source, part, codec=self.codec, token_bytes=self.token_bytes, device=self.device
            )():
                builder.add(row)
        return {
            "number": plan.number, "keys": list(plan.keys), "content": builder.to_bytes(),
            "tokens": builder.tokens, "scored_tokens": builder.scored_tokens,
        }  # fmt: skip


def _compare(make_source: Callable[[], TargetSource], rows: list[Any], vocabulary_size: int, device: str) -> Any:
    return compare_rows(make_source(), rows, vocabulary_size=vocabulary_size, device=device)
