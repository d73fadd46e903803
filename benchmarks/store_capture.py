"""What writing a teacher down costs beside its bare forward pass, and what the store then is: bytes a token, KL to the teacher.

Gate: rows that are read back are the rows that were captured. Both routes see the same batches, by turns, in this process; the
bare pass computes logits of every position, as a capture needs them.

    python -m benchmarks store_capture --teacher model-folder --text train.txt
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._kept import keep
from limbeck.core.runtime import set_threads
from limbeck.core.types import Batch
from limbeck.data.text import TextSource, read_documents
from limbeck.data.windows import TokenWindows, tokenise
from limbeck.models.packing import forward_batch
from limbeck.models.teacher import load_teacher
from limbeck.models.token_bytes import read_token_bytes
from limbeck.models.tokenizers import encoder, tokenizer_fingerprint
from limbeck.store.codec import CodecSettings
from limbeck.store.store import TargetStore
from limbeck.teachers.capture import CaptureSettings, capture
from limbeck.teachers.live import LiveTeacher


def windows_of(loaded: Any, text: str, *, tokens: int, context: int, rows: int) -> list[Batch]:
    """Batches of the text's first windows."""
    split = "train" if text == "factbook" else "all"
    ids, starts = tokenise(
        read_documents(TextSource(text, split=split)), encoder(loaded.tokenizer), end_token=loaded.tokenizer.eos_token_id,
        max_tokens=tokens,
    )  # fmt: skip
    windows = TokenWindows(ids, starts, context_tokens=context)
    count = tokens // context
    return [windows.rows(range(first, min(first + rows, count))) for first in range(0, count, rows)]


def bare_seconds(model: Any, batches: list[Batch]) -> float:
    """Seconds of the forward pass alone."""
    begun = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            forward_batch(model, batch)
    return time.perf_counter() - begun


def capture_once(
    loaded: Any, batches: list[Batch], folder: Path, *, k: int, fidelity_tokens: int = 0
) -> dict[str, Any]:
    """Capture the batches and return the facts."""
    source = LiveTeacher(loaded.model, name=loaded.source)
    settings = CaptureSettings(
        CodecSettings(source.vocabulary_size, k=k),
        rows_per_shard=4 * len(batches[0].input_ids_BT),
        fidelity_tokens=fidelity_tokens,
    )
    return capture(
        source, batches, folder, settings=settings, teacher={"name": loaded.source, "fingerprint": loaded.fingerprint},
        tokenizer=tokenizer_fingerprint(loaded.tokenizer), token_bytes=read_token_bytes(loaded.tokenizer).pieces,
    )  # fmt: skip


def check(folder: Path, batches: list[Batch]) -> None:
    """The rows of the store are those of the batches, in order."""
    store = TargetStore(folder)
    number = 0
    for batch in batches:
        for ids in batch.input_ids_BT.numpy():
            if not (store.row(number).input_ids == ids).all():
                raise SystemExit(f"row {number} came back as another one")
            number += 1


def main(arguments: list[str]) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks store_capture", description=__doc__)
    parser.add_argument("--teacher", default="embedded", help="folder, GGUF or hub id")
    parser.add_argument("--text", default="factbook", help="a text source")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="windows at a time")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    set_threads(chosen.threads)
    loaded = load_teacher(chosen.teacher)
    batches = windows_of(loaded, chosen.text, tokens=chosen.tokens, context=chosen.context, rows=chosen.rows)
    tokens = sum(batch.input_ids_BT.numel() for batch in batches)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        facts = capture_once(loaded, batches, Path(scratch) / "checked", k=chosen.k, fidelity_tokens=tokens)
        check(Path(scratch) / "checked", batches)
        for number in range(chosen.repeats):
            bare = bare_seconds(loaded.model, batches)
            captured = capture_once(loaded, batches, Path(scratch) / str(number), k=chosen.k)["seconds"]
            rounds.append({"bare_tokens_per_second": tokens / bare, "capture_tokens_per_second": tokens / captured})
            print(
                f"bare {tokens / bare:,.0f} tokens/s, capture {tokens / captured:,.0f} tokens/s, ratio {bare / captured:.3f}"
            )
    ratios = [one["capture_tokens_per_second"] / one["bare_tokens_per_second"] for one in rounds]
    fidelity = facts["fidelity"]
    print(
        f"capture at {median(ratios):.3f} of the bare forward pass (median); {facts['bytes_per_token']:.1f} bytes a token, mean KL "
        f"{fidelity['mean_kl_nats']:.2e}, p99 {fidelity['p99_kl_nats']:.2e}, top-1 {fidelity['top1_agreement']:.4f}"
    )
    keep(
        chosen.json,
        {
            "teacher": Path(chosen.teacher).name, "text": Path(chosen.text).name, "tokens": tokens, "context": chosen.context,
            "k": chosen.k, "rounds": rounds, "median_ratio": median(ratios), "bytes_per_token": facts["bytes_per_token"],
            "fidelity": fidelity,
        },
    )  # fmt: skip
