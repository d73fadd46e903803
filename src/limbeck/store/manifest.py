"""The manifest of a store: what is in it, who said it, and the checksum of every shard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError, StoreError
from limbeck.core.files import read_json, write_json

SCHEMA = 1
MANIFEST = "manifest.json"
PROGRESS = "progress"
KINDS = ("targets", "text")
_SHARD_NAME = re.compile(r"shards/\d{5,9}\.parquet")


@dataclass(frozen=True)
class ShardFacts:
    """One Parquet file of a store. scored_tokens: positions that have targets."""

    file: str
    rows: int
    tokens: int
    scored_tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store is.

    kind: `targets`, or `text` (prompts and completions). teacher: its name and fingerprint. tokenizer: fingerprint of
    the one that made the token ids, None when there are none. vocabulary_size: token ids are below it. codec: the words
    of `CodecSettings`. hidden_width: by layer; hidden_values: how those numbers are written. context_tokens: the
    longest row. rows_per_shard: rows of every shard but the last of each capture. captures: number of the first shard
    of each capture, more than one when text was appended. fidelity: how near the stored targets are to the teacher's,
    measured after the last capture.
    """

    kind: str
    teacher: Mapping[str, Any]
    tokenizer: str | None = None
    vocabulary_size: int | None = None
    codec: Mapping[str, Any] | None = None
    hidden_width: Mapping[str, int] = field(default_factory=dict)
    hidden_values: str = "float16"
    context_tokens: int = 0
    rows_per_shard: int = 0
    captures: tuple[int, ...] = (0,)
    shards: tuple[ShardFacts, ...] = ()
    fidelity: Mapping[str, Any] | None = None
    schema: int = SCHEMA

    @property
    def rows(self) -> int:
        """Windows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states are stored."""
        return tuple(int(layer) for layer in self.hidden_width)

    def with_shards(self, shards: tuple[ShardFacts, ...], **changes: Any) -> Manifest:
        """The same store with other shards."""
        return replace(self, shards=shards, **changes)

    def differences(self, other: Manifest) -> list[str]:
        """What keeps rows of two stores from being in one, in words."""
        names = ("kind", "tokenizer", "vocabulary_size", "codec", "hidden_width", "hidden_values")
        # A served teacher shows no weights to take a fingerprint of; its name stands for it.
        pairs = [("teacher", *(who.teacher.get("fingerprint") or who.teacher.get("name") for who in (self, other)))]
        pairs += [(name, _plain(getattr(self, name)), _plain(getattr(other, name))) for name in names]
        return [f"{name} {_short(mine)} against {_short(its)}" for name, mine, its in pairs if mine != its]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def shard_file(number: int) -> str:
    """The name of a shard within its store."""
    return f"shards/{number:05d}.parquet"


def is_store(folder: Path) -> bool:
    """Whether the folder holds a store, finished or not."""
    return (Path(folder) / MANIFEST).exists()


def is_unfinished(folder: Path) -> bool:
    """Whether a capture into this store was stopped before its end."""
    return (Path(folder) / PROGRESS).exists()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, atomically."""
    words = asdict(manifest)
    write_json(Path(folder) / MANIFEST, {"schema": words.pop("schema"), **words})


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises: StoreError when there is none, when it is damaged, or when its schema is newer than this program.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise StoreError(f"{folder}: not a target store (it holds no {MANIFEST}). Make one with `limbeck capture`.")
    try:
        words = read_json(path)
    except LimbeckError as error:
        raise StoreError(str(error)) from error
    if not isinstance(words, dict) or not _is_count(words.get("schema")):
        raise StoreError(f"{path}: not the manifest of a target store (no `schema` number).")
    if words["schema"] > SCHEMA:
        raise StoreError(
            f"{path}: this store has schema {words['schema']}, and this version of limbeck reads up to {SCHEMA}. "
            "Upgrade limbeck to read it."
        )
    try:
        return _from_words(words)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{path}: damaged manifest ({error}). Restore it, or capture again.") from error


def _from_words(words: dict[str, Any]) -> Manifest:
    known = {item.name for item in fields(Manifest)}
    if set(words) - known:
        raise ValueError(f"unknown entries {sorted(set(words) - known)}")
    if words["kind"] not in KINDS:
        raise ValueError(f'kind "{words["kind"]}" is none of {", ".join(KINDS)}')
    shards = tuple(ShardFacts(**shard) for shard in words["shards"])
    for shard in shards:
        if not isinstance(shard.file, str) or not _SHARD_NAME.fullmatch(shard.file):
            raise ValueError(f"shard file {shard.file!r}")
        if not all(map(_is_count, (shard.rows, shard.tokens, shard.scored_tokens, shard.bytes))):
            raise ValueError(f"counts of {shard.file}")
        if not isinstance(shard.sha256, str):
            raise ValueError(f"checksum of {shard.file}")
    if len({shard.file for shard in shards}) != len(shards):
        raise ValueError("a shard is listed twice")
    if not isinstance(words["teacher"], dict) or not isinstance(words["hidden_width"], dict):
        raise ValueError("teacher and hidden_width must be objects")
    if not all(map(_is_count, (words["context_tokens"], words["rows_per_shard"], *words["captures"]))):
        raise ValueError("context_tokens, rows_per_shard and captures must be counts")
    if words["kind"] == "targets" and not (isinstance(words["codec"], dict) and _is_count(words["vocabulary_size"])):
        raise ValueError("a store of targets needs a codec and a vocabulary size")
    [int(layer) for layer in words["hidden_width"]]
    return Manifest(**{**words, "shards": shards, "captures": tuple(words["captures"])})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
