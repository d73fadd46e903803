"""A teacher made of two small matrices, its text, and captures of it; also run as a program by the tests that kill it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck.core.types import Batch, DenseTargets, Targets
from limbeck.store.codec import CodecSettings
from limbeck.teachers.base import Wanted
from limbeck.teachers.capture import CaptureSettings, capture

VOCABULARY = 50
TEACHER: Mapping[str, Any] = {"name": "small", "fingerprint": "f00d"}
TOKEN_BYTES = [b"", *(bytes([97 + token % 26]) * (1 + token % 3) for token in range(1, VOCABULARY))]


class SmallTeacher:
    """Logits are a linear map of the sum of embeddings so far; layer n's hidden states are n times that sum."""

    name, vocabulary_size = "small", VOCABULARY

    def __init__(self, *, seed: int = 0, scale: float = 1.0, seconds: float = 0.0):
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCABULARY, 8, generator=generator)
        self.weight = scale * torch.randn(8, VOCABULARY, generator=generator)
        self.seconds, self.calls = seconds, 0

    def prepare(self, wanted: Wanted) -> None:
        self.wanted = wanted

    def targets(self, batch: Batch) -> Targets:
        time.sleep(self.seconds)
        self.calls += 1
        hidden_BTD = self.hidden(batch)
        return Targets(
            DenseTargets(hidden_BTD, lambda hidden: hidden @ self.weight),
            {layer: hidden_BTD * layer for layer in self.wanted.hidden},
        )

    def hidden(self, batch: Batch) -> torch.Tensor:
        return self.embedding[batch.input_ids_BT].cumsum(dim=1) / 3

    def log_probs(self, batch: Batch) -> torch.Tensor:
        return (self.hidden(batch) @ self.weight).log_softmax(dim=-1)


def make_batches(count: int = 6, *, rows: int = 3, width: int = 13, seed: int = 1) -> list[Batch]:
    """Random rows; every second batch is packed from two documents."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
        ids_BT = torch.randint(0, VOCABULARY, (rows, width), generator=generator)
        mask_BT = torch.ones(rows, width, dtype=torch.bool)
        mask_BT[:, 0] = False
        if number % 2 == 0:
            batches.append(Batch(ids_BT, mask_BT))
            continue
        begins_BT = torch.zeros(rows, width, dtype=torch.long)
        begins_BT[torch.arange(rows), torch.randint(1, width, (rows,), generator=generator)] = 1
        last_BT = torch.where(begins_BT == 1, torch.arange(width), 0).cummax(dim=1).values
        batches.append(
            Batch(ids_BT, mask_BT & (begins_BT == 0), begins_BT.cumsum(dim=1), torch.arange(width) - last_BT)
        )
    return batches


def settings(*, k: int = VOCABULARY, values: str = "float32", mass: float = 1.0, **changes: Any) -> CaptureSettings:
    words: dict[str, Any] = {"rows_per_shard": 4, "fidelity_tokens": 64} | changes
    return CaptureSettings(CodecSettings(VOCABULARY, k=k, values=values, mass=mass), **words)


def make_store(folder: Path, batches: list[Batch] | None = None, *, source: Any = None, **words: Any) -> dict[str, Any]:
    """Capture into a folder; words are `settings`' or `capture`'s."""
    own = {
        name: words.pop(name)
        for name in ("advance", "should_stop", "token_bytes", "tokenizer", "teacher")
        if name in words
    }
    given: dict[str, Any] = {"teacher": TEACHER, "tokenizer": "t0", "token_bytes": TOKEN_BYTES} | own
    return capture(source or SmallTeacher(), batches or make_batches(), folder, settings=settings(**words), **given)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    from limbeck.core import runtime

    runtime.start_distributed(torch.device("cpu"))
    make_store(
        Path(sys.argv[1]), make_batches(16), source=SmallTeacher(seconds=float(sys.argv[2])), values="uint8", k=8
    )
    runtime.stop_distributed()
