"""Every objective that a recipe can name, with what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.core.errors import unknown_name
from limbeck.objectives.features import FEATURE_OBJECTIVES
from limbeck.objectives.terms import LOGIT_OBJECTIVES


@dataclass(frozen=True)
class Entry:
    """One objective. kind: what it looks at: "predictions", "features" or "text". options: its own, with defaults."""

    kind: str
    description: str
    source: str
    is_divergence: bool
    options: Mapping[str, Any] = field(default_factory=dict)


def option_defaults(name: str) -> Mapping[str, Any]:
    """The options of an objective and their defaults. Raises: ValueError for an unknown objective."""
    if name not in OBJECTIVES:
        raise ValueError(unknown_name("objective", name, OBJECTIVES))
    return OBJECTIVES[name].options


OBJECTIVES: dict[str, Entry] = {
    **{
        name: Entry("predictions", about.description, about.source, about.is_divergence, about.options)
        for name, about in LOGIT_OBJECTIVES.items()
    },
    **{
        name: Entry("features", about.description, about.source, about.is_divergence, about.options)
        for name, about in FEATURE_OBJECTIVES.items()
    },
    "chunk_likelihood": Entry(
        "text", "how likely stretches of the text are, whatever the tokens (ALM)", "arXiv:2503.20083", True,
        {"coin_temperature": None},
    ),
    "byte_trie": Entry(
        "predictions", "the teacher's likeliest tokens as whole patches of bytes, and all others as one", "derived here", True,
        {"paths": 8, "divergence": "forward_kl"},
    ),
}  # fmt: skip
