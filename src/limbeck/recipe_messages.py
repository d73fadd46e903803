"""Faults of a recipe in words: where, what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from limbeck.core.errors import unknown_name
from limbeck.recipe import Recipe
from limbeck.recipe_stages import STAGE_KINDS
from limbeck.recipe_values import Part, RecipeProblems
from limbeck.recipe_yaml import Place


def show_place(place: Place) -> str:
    """A place as a reader writes it: stages[1].tokens."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".") or "the recipe"


def explain(error: ValidationError, data: Any, origins: Mapping[Place, str]) -> list[str]:
    """One line for every problem, in the order of the file: `origin: place: what is wrong`.

    data: the recipe as it was read. origins: in reading order, where each place came from (file and line, or override).
    """
    problems = [p for details in error.errors() if not _is_other_form(details) for p in _problems(details, data)]
    order = {place: number for number, place in enumerate(origins)}
    guessed = {_near_key(place, data) for place, text in problems if text.startswith("unknown key")}
    lines: list[tuple[int, str]] = []
    for place, text in problems:
        if text.startswith("missing") and place in guessed:
            continue
        known = next(place[:length] for length in range(len(place), -1, -1) if place[:length] in origins)
        lines.append((order[known], f"{origins[known]}: {show_place(place)}: {text}"))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def _problems(details: ErrorDetails, data: Any) -> Iterator[tuple[Place, str]]:
    place = _place_of(details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, RecipeProblems):
        for inner, text in cause.problems.items():
            steps = tuple(int(step) if step.isdecimal() else step for step in inner.split("."))
            yield (*place, *steps), f"{text}."
    elif details["type"] == "extra_forbidden":
        yield place, _unknown_key_text(place, data)
    elif details["type"] == "missing":
        yield place, _missing_text(place, data)
    elif details["type"] == "union_tag_invalid":
        yield (*place, "kind"), unknown_name("kind of stage", str(details["ctx"]["tag"]), STAGE_KINDS)
    elif details["type"] == "union_tag_not_found":
        yield (*place, "kind"), f"missing. What the stage does: {', '.join(STAGE_KINDS)}."
    else:
        yield place, _TEXTS.get(details["type"], _plain_text)(details)


def _place_of(loc: tuple[int | str, ...]) -> Place:
    """Pydantic's location without the names of unions' members, which are no keys of the recipe."""
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGE_KINDS:
        loc = (*loc[:2], *loc[3:])
    return tuple(step for step in loc if step not in (_NUMBER_FORM, *_COURSE_FORMS))


# Pydantic's names for the two forms of what may change over a stage: a number, or its course.
_NUMBER_FORM = "constrained-float"
_COURSE_FORMS = ("Ramp", "DropoutCourse")


def _is_other_form(details: ErrorDetails) -> bool:
    """Whether a fault is of the form that was not meant: a course is no number, a number no course."""
    is_mapping = isinstance(details["input"], Mapping)
    form = details["loc"][-1] if details["loc"] else None
    if form == _NUMBER_FORM:
        return is_mapping
    return form in _COURSE_FORMS and not is_mapping


def _part_at(place: Place, data: Any) -> type[Part]:
    """The class that describes the mapping at a place."""
    if len(place) > 1 and place[0] == "stages":
        part: type[Part] = STAGE_KINDS[data["stages"][place[1]]["kind"]]
        place = place[2:]
    else:
        part = Recipe
    for step in place:
        if isinstance(step, str):
            part = next(_parts_in(part.model_fields[step].annotation))
    return part


def _parts_in(annotation: Any) -> Iterator[type[Part]]:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _parts_in(inner)


def _near_key(place: Place, data: Any) -> Place | None:
    """Where an unknown key was probably meant to be, when a known one beside it is spelt much like it."""
    known = _part_at(place[:-1], data).model_fields
    close = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
    return (*place[:-1], close[0]) if close and not _found_elsewhere(place) else None


def _unknown_key_text(place: Place, data: Any) -> str:
    known = _part_at(place[:-1], data).model_fields
    homes = _found_elsewhere(place)
    if homes:
        return f'unknown key "{place[-1]}" here: it belongs to {" or ".join(homes)}. Known here: {", ".join(known)}.'
    return f"{unknown_name('key', str(place[-1])[:80], known)}."


def _found_elsewhere(place: Place) -> list[str]:
    """Places of a recipe in which a key of exactly this name is at home."""
    return [home for home in _homes(Recipe, "") if home.rpartition(".")[2] == place[-1]]


def _homes(part: type[Part], prefix: str) -> Iterator[str]:
    """Every key of a recipe with the part it belongs to, as people write it: stages[].tokens."""
    for name, field in part.model_fields.items():
        yield f"{prefix}{name}"
        inner = list(_parts_in(field.annotation))
        for kind in inner:
            many = typing.get_origin(field.annotation) is list
            label = f"{name}[]" if many and len(inner) == 1 else f"{name}[kind={_kind(kind)}]" if many else name
            yield from _homes(kind, f"{prefix}{label}.")


def _kind(stage: type[Part]) -> str:
    return next(kind for kind, known in STAGE_KINDS.items() if known is stage)


def _missing_text(place: Place, data: Any) -> str:
    if isinstance(place[-1], int):
        return "missing. Two numbers are expected."
    return f"missing. {_part_at(place[:-1], data).model_fields[place[-1]].description}"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'the text "{value[:40]}"' + ("..." if len(value) > 40 else "")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a mapping ({', '.join(map(str, list(value)[:4]))})"
    return "nothing (null)" if value is None else str(value)[:40]


def _wrong_type(expected: str) -> Callable[[ErrorDetails], str]:
    def text(details: ErrorDetails) -> str:
        given = details["input"]
        hint = ""
        if isinstance(given, str) and re.fullmatch(r"[\d][\d., _]*", given) and "number" in expected:
            hint = " Write it without quotes or commas: 300_000."
        elif expected == "text" and isinstance(given, int | float):
            hint = f' Put it in quotes: "{_show(given)}".'
        return f"expected {expected}, got {_show(given)}.{hint}"

    return text


def _limit(words: str, key: str) -> Callable[[ErrorDetails], str]:
    def text(details: ErrorDetails) -> str:
        limit = details["ctx"][key]
        shown = f"{limit:g}" if isinstance(limit, float) else limit
        return f"must be {words} {shown}, got {_show(details['input'])}."

    return text


def _choice_text(details: ErrorDetails) -> str:
    known = re.findall(r"'([^']*)'", details["ctx"]["expected"])
    given = details["input"]
    if isinstance(given, str):
        return unknown_name("choice", given[:80], known)
    return f"expected one of {', '.join(known)}, got {_show(given)}."


def _plain_text(details: ErrorDetails) -> str:
    return f"{details['msg']}, got {_show(details['input'])}."


_TEXTS: dict[str, Callable[[ErrorDetails], str]] = {
    "int_type": _wrong_type("a whole number"),
    "float_type": _wrong_type("a number"),
    "bool_type": _wrong_type("true or false"),
    "string_type": _wrong_type("text"),
    "list_type": _wrong_type("a list"),
    "tuple_type": _wrong_type("a list of two numbers"),
    "dict_type": _wrong_type("a mapping (key: value)"),
    "model_type": _wrong_type("a mapping (key: value)"),
    "model_attributes_type": _wrong_type("a mapping (key: value)"),
    "greater_than": _limit("greater than", "gt"),
    "greater_than_equal": _limit("at least", "ge"),
    "less_than": _limit("less than", "lt"),
    "less_than_equal": _limit("at most", "le"),
    "literal_error": _choice_text,
    "string_too_short": lambda details: "must not be empty.",
    "too_short": lambda details: f"needs at least {details['ctx']['min_length']} item, got {_show(details['input'])}.",
    "too_long": lambda details: f"takes at most {details['ctx']['max_length']} items, got {_show(details['input'])}.",
    "value_error": lambda details: f"{details['ctx']['error']}.",
}
