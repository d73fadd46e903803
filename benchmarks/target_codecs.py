"""What teacher targets cost on disk and lose in value: limbeck's codec beside raw top-k and DistillKit's two codecs.

Gates before anything is measured: float32 values come back bit for bit, and both of DistillKit's codecs give back its ids. Every
codec gets the same positions of the same teacher. Loss is the KL from true to decoded targets over k + 1 buckets (the kept
entries and the tail); size is that of a Parquet file with zstd, and beside it the bytes before compression.

    python -m benchmarks target_codecs --teacher model-folder --text train.txt
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._kept import keep
from limbeck.core.runtime import set_threads
from limbeck.models.teacher import load_teacher
from limbeck.store.codec import CodecSettings, SparseRows, bucket_kl_nats, decode_targets, encode_targets
from limbeck.store.distillkit import decode_distillkit, decode_legacy, encode_distillkit, encode_legacy
from limbeck.store.distillkit_settings import DistillKitSettings, LegacySettings

WIDEST = 128
ZSTD_LEVEL = 9
LEAST_TAIL = np.float32(np.log(1e-7))  # what float32 sums can still tell from nothing
RECOMMENDED = {
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": (0, 1, 2, 3, 4, "sqrt"),
    "delta_encoding": False,
}
BUDGET = {"exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": (0, 1, "sqrt"), "delta_encoding": False}
QWEN = {"exact_k": 32, "polynomial_terms": (0, 1, 2), "delta_encoding": True}

Blocks = list[dict[str, bytes]]


def capture(teacher: str, text: Path, *, tokens: int, context: int) -> dict[str, Any]:
    """The teacher's 128 largest log-probabilities at every position, and how fast its bare forward pass was."""
    loaded = load_teacher(teacher)
    ids = loaded.tokenizer(text.read_text(encoding="utf-8")[: 8 * tokens])["input_ids"]
    rows = torch.tensor(ids[: tokens // context * context]).view(-1, context)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    seconds = 0.0
    with torch.no_grad():
        for row in rows:
            start = time.perf_counter()
            logits = loaded.model(row[None]).logits[0]
            seconds += time.perf_counter() - start
            log_probs, indices = logits.float().log_softmax(-1).topk(WIDEST, dim=-1)
            kept.append((indices.numpy(), log_probs.numpy()))
    return {
        "ids": np.concatenate([indices for indices, _ in kept]), "vocabulary_size": logits.shape[-1],
        "log_probs": np.concatenate([log_probs for _, log_probs in kept]), "forward_seconds": seconds,
    }  # fmt: skip


def parquet_bytes(blocks: Blocks) -> bytes:
    """The blocks as a Parquet file: a binary column for each name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array([block[name] for block in blocks], pa.binary()) for name in blocks[0]})
    stream = io.BytesIO()
    pq.write_table(
        table, stream, compression="zstd", compression_level=ZSTD_LEVEL, use_dictionary=False, write_statistics=False
    )
    return stream.getvalue()


def ours(codec: CodecSettings) -> tuple[Callable[..., dict[str, bytes]], Callable[..., SparseRows]]:
    """Encoder and decoder of one block with limbeck's codec."""
    return (
        lambda ids, log_probs, tail: encode_targets(ids, log_probs, tail, codec=codec),
        lambda columns, n: decode_targets(columns, n, codec),
    )


def distillkit(settings: Any) -> tuple[Callable[..., dict[str, bytes]], Callable[..., SparseRows]]:
    """Encoder and decoder of one block with a codec of DistillKit's."""
    new = isinstance(settings, DistillKitSettings)
    encode, decode = (encode_distillkit, decode_distillkit) if new else (encode_legacy, decode_legacy)
    shapes: dict[str, Any] = {}

    def encoded(ids: np.ndarray, log_probs: np.ndarray, _: np.ndarray) -> dict[str, bytes]:
        arrays = encode(ids, log_probs, settings=settings)
        shapes.update({name: (array.dtype, array.shape[1]) for name, array in arrays.items()})
        return {name: array.tobytes() for name, array in arrays.items()}

    def decoded(columns: dict[str, bytes], n: int) -> SparseRows:
        arrays = {name: np.frombuffer(columns[name], kind).reshape(n, w) for name, (kind, w) in shapes.items()}
        return decode(**arrays, settings=settings)

    return encoded, decoded


def raw(kind: torch.dtype, k: int) -> tuple[Callable[..., dict[str, bytes]], Callable[..., SparseRows]]:
    """Plain float16 or bfloat16 values and 32-bit ids, without a tail: what most tools write."""

    def encoded(ids: np.ndarray, log_probs: np.ndarray, _: np.ndarray) -> dict[str, bytes]:
        values = torch.from_numpy(np.ascontiguousarray(log_probs)).to(kind)
        return {"ids": ids.astype("<i4").tobytes(), "values": values.view(torch.uint8).numpy().tobytes()}

    def decoded(columns: dict[str, bytes], n: int) -> SparseRows:
        values = torch.frombuffer(bytearray(columns["values"]), dtype=kind).float().numpy().reshape(n, k)
        ids = np.frombuffer(columns["ids"], "<i4").reshape(n, k).astype(np.int64)
        total = np.exp(values.astype(np.float64)).sum(axis=1)
        with np.errstate(divide="ignore"):
            tail = np.log1p(-np.minimum(total, 1.0))
        return SparseRows(ids, values - np.log(np.maximum(total, 1))[:, None], tail.astype(np.float32), None)

    return encoded, decoded


def measure(coder: Any, captured: dict[str, Any], k: int, block: int) -> dict[str, float]:
    """Bytes and loss of one codec over all positions, and tokens per second both ways (compression of the file apart)."""
    encode, decode = coder
    ids, log_probs = captured["ids"][:, :k], captured["log_probs"][:, :k]
    tail = tail_of(log_probs)
    n = len(ids)
    pieces = [slice(start, min(start + block, n)) for start in range(0, n, block)]
    start = time.perf_counter()
    blocks = [encode(ids[piece], log_probs[piece], tail[piece]) for piece in pieces]
    encoded = time.perf_counter()
    rows = [decode(columns, piece.stop - piece.start) for columns, piece in zip(blocks, pieces)]
    finished = time.perf_counter()
    decoded_ids, decoded_log_probs, decoded_tail = (np.concatenate([item[i] for item in rows]) for i in range(3))
    true_log_probs, true_tail = true_of(captured, decoded_ids)
    # A codec without a tail may leave it nothing, and one such position would make its mean infinite.
    kl = bucket_kl_nats(true_log_probs, true_tail, decoded_log_probs, np.maximum(decoded_tail, LEAST_TAIL))
    return {
        "bytes_per_token": len(parquet_bytes(blocks)) / n,
        "uncompressed_bytes_per_token": sum(len(item) for columns in blocks for item in columns.values()) / n,
        "mean_kl_nats": float(kl.mean()), "p99_kl_nats": float(np.quantile(kl, 0.99)), "max_kl_nats": float(kl.max()),
        "top1_agreement": float((decoded_ids[:, 0] == ids[:, 0]).mean()),
        "entries": float((decoded_ids >= 0).sum() / n), "mass": float(np.exp(true_log_probs.astype(float)).sum(1).mean()),
        "encode_tokens_per_second": n / (encoded - start), "decode_tokens_per_second": n / (finished - encoded),
    }  # fmt: skip


def tail_of(log_probs: np.ndarray) -> np.ndarray:
    """Log of the mass that entries leave."""
    mass = np.exp(log_probs.astype(np.float64)).sum(axis=1)
    return np.maximum(np.log(np.maximum(1 - mass, 1e-300)), LEAST_TAIL).astype(np.float32)


def true_of(captured: dict[str, Any], decoded_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's own log-probabilities of decoded ids, and of the tail beyond them."""
    order = np.argsort(captured["ids"], axis=1)
    ordered = np.take_along_axis(captured["ids"], order, axis=1)
    width = int(ordered.max()) + 2
    offset = np.arange(len(ordered))[:, None] * width
    place = np.searchsorted((ordered + offset).ravel(), (np.maximum(decoded_ids, 0) + offset).ravel())
    known = np.take_along_axis(captured["log_probs"], order, axis=1).ravel()[np.minimum(place, order.size - 1)]
    log_probs = np.where(decoded_ids >= 0, known.reshape(decoded_ids.shape), -np.inf)
    return log_probs, tail_of(log_probs)


def codecs(vocabulary_size: int) -> dict[str, tuple[int, Any]]:
    """Name to (k, encoder and decoder)."""
    d = vocabulary_size

    def kit(k: int, words: dict[str, Any]) -> Any:
        return distillkit(DistillKitSettings(d=d, k=k, **words))

    return {
        "limbeck k=32": (32, ours(CodecSettings(d, k=32))),
        "limbeck k=32, mass 0.95": (32, ours(CodecSettings(d, k=32, mass=0.95))),
        "limbeck k=50": (50, ours(CodecSettings(d, k=50))),
        "limbeck k=128": (128, ours(CodecSettings(d, k=128))),
        "limbeck k=32, float16": (32, ours(CodecSettings(d, "float16", k=32))),
        "limbeck k=32, float32": (32, ours(CodecSettings(d, "float32", k=32))),
        "raw float16 k=32": (32, raw(torch.float16, 32)),
        "raw bfloat16 k=32": (32, raw(torch.bfloat16, 32)),
        "raw float16 k=128": (128, raw(torch.float16, 128)),
        "DistillKit budget k=50": (50, kit(50, BUDGET)),
        "DistillKit recommended k=128": (128, kit(128, RECOMMENDED)),
        "DistillKit Qwen3-235B k=128": (128, kit(128, QWEN)),
        "DistillKit legacy k=128": (128, distillkit(LegacySettings(128, 32, 8, d))),
    }


def check_exactness(captured: dict[str, Any]) -> None:
    """The gate: lossless values are lossless, and every codec gives back the ids."""
    ids, log_probs = captured["ids"][:256, :32], captured["log_probs"][:256, :32]
    order = np.lexsort((ids, -log_probs), axis=1)
    expected = [np.take_along_axis(array, order, axis=1) for array in (ids, log_probs)]
    encode, decode = ours(CodecSettings(captured["vocabulary_size"], "float32", k=32))
    found = decode(encode(ids, log_probs, tail_of(log_probs)), 256)
    assert np.array_equal(found.ids, expected[0]), "ids changed"
    assert found.log_probs.tobytes() == expected[1].tobytes(), "float32 values changed"
    for name, (k, (encode, decode)) in codecs(captured["vocabulary_size"]).items():
        given = [captured[key][:64, :k] for key in ("ids", "log_probs")]
        rows = decode(encode(*given, tail_of(given[1])), 64)
        for kept, true in zip(rows.ids, given[0]):
            assert set(kept[kept >= 0].tolist()) <= set(true.tolist()), f"{name}: ids changed"


def main(arguments: list[str]) -> None:
    """Capture, check, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="folder, GGUF or hub id")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--block", type=int, default=256, help="positions encoded at a time, as in one row of a store")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    set_threads(chosen.threads)
    captured = capture(chosen.teacher, chosen.text, tokens=chosen.tokens, context=chosen.context)
    check_exactness(captured)
    forward = len(captured["ids"]) / captured["forward_seconds"]
    found = {
        name: measure(coder, captured, k, chosen.block)
        for name, (k, coder) in codecs(captured["vocabulary_size"]).items()
    }
    print(
        f"{len(captured['ids'])} positions, vocabulary {captured['vocabulary_size']}; bare forward pass {forward:.0f} tokens/s\n"
    )
    print(
        f"{'codec':<30}{'bytes/token':>12}{'before zstd':>12}{'mean KL':>10}{'p99 KL':>10}{'top-1':>8}{'mass':>7}{'enc tok/s':>11}{'dec tok/s':>11}"
    )
    for name, row in found.items():
        print(
            f"{name:<30}{row['bytes_per_token']:>12.1f}{row['uncompressed_bytes_per_token']:>12.1f}"
            f"{row['mean_kl_nats']:>10.1e}{row['p99_kl_nats']:>10.1e}{row['top1_agreement']:>8.4f}{row['mass']:>7.3f}"
            f"{row['encode_tokens_per_second']:>11,.0f}{row['decode_tokens_per_second']:>11,.0f}"
        )
    facts = {
        "teacher": Path(chosen.teacher).name,
        "text": chosen.text.name,
        "positions": len(captured["ids"]),
        "block": chosen.block,
    }
    keep(chosen.json, {**facts, "forward_tokens_per_second": forward, "codecs": found})
