"""Errors for the person who made the recipe.

Each message says what was given, where, what was expected, and what to do. The command line prints the message and its
code, about which `limbeck explain CODE` tells more, and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class LimbeckError(Exception):
    """Something the user can mend; a subclass says of which kind. Never raised for a fault of our own.

    code: the kind in one word, the name of its page under `explanations/`.
    """

    code: ClassVar[str]


class RecipeError(LimbeckError):
    """The recipe cannot be read, or asks for what cannot be done."""

    code = "recipe"


class TeacherError(LimbeckError):
    """The teacher is missing, unreadable, or of a kind that is not supported."""

    code = "teacher"


class DataError(LimbeckError):
    """A text source is missing, empty, not text, or too small."""

    code = "data"


class CheckpointError(LimbeckError):
    """A checkpoint or run folder is damaged, or belongs to another recipe."""

    code = "checkpoint"


class StoreError(LimbeckError):
    """A target store is damaged, incomplete, of another teacher or tokenizer, or of a newer schema."""

    code = "store"


class VocabularyError(LimbeckError):
    """Teacher and student do not speak of the same tokens, and what was asked for needs that they do."""

    code = "vocabulary"


class TrainingError(LimbeckError):
    """Training cannot go on: a loss that is not a number, for instance."""

    code = "training"


class EvaluationError(LimbeckError):
    """A task is unknown or lacks its data, or a model gives likelihoods that are no numbers."""

    code = "evaluation"


class PublishError(LimbeckError):
    """A model cannot be published as asked: nothing to publish, a licence in the way, no right to the name."""

    code = "publish"


class PluginError(LimbeckError):
    """A file of the user's own cannot be loaded, or adds what cannot be added."""

    code = "plugin"


class EnvironmentFault(LimbeckError):
    """The machine lacks what was asked of it: a device, disk space, memory, an optional package."""

    code = "environment"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, suggest the nearest known one, and list them all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return f'unknown {kind} "{name}".{hint} Known: {", ".join(names)}'


def unknown_piece(kind: str, name: str, known: Iterable[str]) -> str:
    """The same of a family to which a file of the user's own may add, and how such a file is named."""
    text = unknown_name(kind, name, known)
    return (
        f"{text}. If a file of your own adds it, name the file: limbeck --plugin FILE.py (in Python: import it first)"
    )
