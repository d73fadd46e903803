"""The kinds of value a recipe holds, and what they refuse."""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from limbeck.core.errors import unknown_piece

Problems = dict[str, str]
"""What cannot work, by the dotted path of the key it is about."""

ADDED: dict[str, set[str]] = {"objective": set(), "filter": set(), "segmenter": set(), "mixer": set()}
"""Names that files of the user's own have added to the shipped ones (see `plugins.py`), by family."""

_SAFE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_DEVICE = r"auto|cpu|mps|cuda(:\d{1,3})?"


class RecipeProblems(ValueError):
    """Several things that cannot work, each under its key (relative to the part that found them)."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{place}: {text}" for place, text in problems.items()))


def refuse_problems(problems: Problems) -> None:
    """Raise them all at once, when there are any."""
    if problems:
        raise RecipeProblems(problems)


def _whole(value: Any) -> Any:
    """Let 3e5 and 300000.0 stand for whole numbers, as they do in conversation."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _safe_name(value: str) -> str:
    if not re.fullmatch(_SAFE_NAME, value) or value.endswith("."):
        raise ValueError(
            f'"{value[:80]}" becomes a folder name: use up to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit'
        )
    return value


def _device(value: str) -> str:
    if not re.fullmatch(_DEVICE, value):
        raise ValueError(f'"{value[:80]}" is not a device. Use auto, cpu, cuda, cuda:0 or mps')
    return value


def _keep_attention(value: Any) -> Any:
    """A number of layers, a share of them, or their indices; anything else is refused in one sentence."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and value >= 0:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, list) and all(isinstance(index, int) and not isinstance(index, bool) for index in value):
        if any(index < 0 for index in value):
            raise ValueError("layer indices count from 0; negative ones are not allowed")
        if len(set(value)) < len(value):
            raise ValueError(f"a layer is listed twice in {value}")
        return sorted(value)
    raise ValueError(
        "expected a number of layers (0 or more), a share between 0 and 1 (such as 0.25), "
        f"or a list of layer indices (such as [3, 11]); got {value!r}"
    )


def shipped_or_added(family: str, shipped: Any) -> BeforeValidator:
    """In an annotation of str: one of the names of a Literal, which the JSON schema shows, or of those added since."""

    def known(value: Any) -> Any:
        names = (*typing.get_args(shipped), *ADDED[family])
        if not isinstance(value, str):
            raise ValueError(f"expected one of {', '.join(names)}, got {str(value)[:80]}")
        if value not in names:
            raise ValueError(unknown_piece(family, value[:80], names))
        return value

    return BeforeValidator(known, json_schema_input_type=shipped)


def bare_source(value: Any) -> Any:
    """Let a bare string stand for a source of that name."""
    return {"source": value} if isinstance(value, str) else value


Whole = BeforeValidator(_whole)
"""Last in an annotation of int (after its limits, so that they reach the JSON schema): 3e5 is a whole number too."""

Count = Annotated[int, Field(gt=0), Whole]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
SafeName = Annotated[str, AfterValidator(_safe_name), Field(json_schema_extra={"pattern": f"^{_SAFE_NAME}$"})]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Device = Annotated[str, AfterValidator(_device), Field(json_schema_extra={"pattern": f"^({_DEVICE})$"})]
KeepAttention = Annotated[int | float | list[int], BeforeValidator(_keep_attention)]


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, text is never taken for a number, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
