"""Token windows: text tokenised once into a flat file, cut into rows of equal length.

Documents follow each other, each closed by the end-of-text token. A window may hold the end of one document and the
start of the next; `Batch.document_ids_BT` then keeps attention and convolution from looking across, and the first
token of a document is never a target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from limbeck.core.errors import DataError
from limbeck.core.files import read_json, sha256_file, write_atomic, write_json
from limbeck.core.types import Batch
from limbeck.data.packing import PackedWindows, packed_batch
from limbeck.data.text import TextSource, read_documents

Encode = Callable[[list[str]], list[list[int]]]
Packing = Literal["stream", "documents"]


class TokenWindows:
    """Rows of `context_tokens` tokens from one flat token array.

    tokens: [total] token ids. starts: sorted offsets at which documents begin. Windows do not overlap; a remainder
    shorter than a window is left out.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, *, context_tokens: int, cross_documents: bool = False):
        self.tokens, self.starts = tokens, starts
        self.context_tokens, self.cross_documents = context_tokens, cross_documents
        if len(self) == 0:
            raise DataError(
                f"the text holds {len(tokens)} tokens, fewer than one window of {context_tokens}. "
                "Give more text or set data.context_tokens lower."
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.context_tokens

    def rows(self, indices: Sequence[int]) -> Batch:
        """The windows with these numbers as one batch [B, T]."""
        width = self.context_tokens
        spans = [(index * width, (index + 1) * width) for index in indices]
        ids_BT = torch.from_numpy(np.stack([self.tokens[low:high] for low, high in spans]).astype(np.int64))
        begins_BT = torch.zeros_like(ids_BT)
        for row, (low, high) in enumerate([] if self.cross_documents else spans):
            first, last = np.searchsorted(self.starts, [low + 1, high])
            begins_BT[row, torch.from_numpy(self.starts[first:last] - low)] = 1
        return packed_batch(ids_BT, begins_BT)


def tokenise(
    documents: Iterable[str], encode: Encode, *, end_token: int | None, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise documents into (tokens [total] int32, starts [documents] int64), stopping once `max_tokens` are reached.

    Raises: DataError when there is no text at all.
    """
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    total = 0
    for chunk in _in_chunks(documents, 64):
        for ids in encode(chunk):
            if not ids:
                continue
            closed = ids if end_token is None else [*ids, end_token]
            starts.append(total)
            pieces.append(np.asarray(closed, dtype=np.int32))
            total += len(closed)
        if max_tokens is not None and total >= max_tokens:
            break
    if not pieces:
        raise DataError("the text is empty: no document with at least one token was found.")
    return np.concatenate(pieces), np.asarray(starts, dtype=np.int64)


def _in_chunks(items: Iterable[str], size: int) -> Iterable[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def cached_windows(
    source: TextSource,
    encode: Encode,
    *,
    folder: Path,
    tokenizer_fingerprint: str,
    end_token: int | None,
    context_tokens: int,
    cross_documents: bool,
    max_tokens: int | None,
    packing: Packing = "stream",
) -> TokenWindows | PackedWindows:
    """Tokenise a source once and keep the tokens in `folder`, named by everything they depend on.

    packing: how rows are made of them: `stream` cuts the running text, `documents` fills rows with documents (see
    `PackedWindows`). A cache whose checksum does not match is made anew.
    """
    key_facts: dict[str, Any] = {
        "source": vars(source), "tokenizer": tokenizer_fingerprint, "end_token": end_token, "max_tokens": max_tokens, "files": _file_facts(source),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(key_facts, sort_keys=True).encode()).hexdigest()[:16]
    token_file, start_file, manifest = (
        folder / f"{key}.tokens.npy",
        folder / f"{key}.starts.npy",
        folder / f"{key}.json",
    )
    if not _is_intact(manifest, token_file, start_file):
        try:
            tokens, starts = tokenise(read_documents(source), encode, end_token=end_token, max_tokens=max_tokens)
        except DataError as error:
            raise DataError(f"text source {source.source} ({source.split}): {error}") from error
        write_atomic(token_file, _npy_bytes(tokens))
        write_atomic(start_file, _npy_bytes(starts))
        write_json(manifest, key_facts | {"sha256": [sha256_file(token_file), sha256_file(start_file)]})
    tokens = np.load(token_file, mmap_mode="r", allow_pickle=False)
    starts = np.load(start_file, allow_pickle=False)
    try:
        return _PACKINGS[packing](tokens, starts, context_tokens=context_tokens, cross_documents=cross_documents)
    except DataError as error:
        raise DataError(f"text source {source.source} ({source.split}): {error}") from error


def _file_facts(source: TextSource) -> list[list[Any]]:
    path = Path(source.source).expanduser()
    if source.source == "factbook" or not path.exists():
        return []
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _is_intact(manifest: Path, *files: Path) -> bool:
    if not manifest.exists() or not all(file.exists() for file in files):
        return False
    return read_json(manifest).get("sha256") == [sha256_file(file) for file in files]


def _npy_bytes(array: np.ndarray) -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


_PACKINGS: dict[str, Callable[..., TokenWindows | PackedWindows]] = {
    "stream": TokenWindows,
    "documents": PackedWindows,
}
