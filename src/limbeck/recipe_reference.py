"""docs/recipe.md, made from the recipe's own descriptions: `python -m limbeck.recipe_reference > docs/recipe.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from limbeck.recipe_io import json_schema

_INTRODUCTION = """# Recipe reference

Every key of a recipe, with its default. Made from the schema (`limbeck schema`); do not edit by hand.
Unknown keys are refused with the nearest known one and the line they stand on. On the command line any key can be
changed: `limbeck run recipe.yaml stages.align.tokens=1e6`.
"""


def render() -> str:
    """The whole page."""
    schema = json_schema()
    parts = [("Recipe", schema), *sorted(schema["$defs"].items(), key=lambda item: _place(item[0]))]
    return _INTRODUCTION + "".join(_section(name, part) for name, part in parts if part.get("properties"))


_ORDER = (
    "Teacher",
    "Served",
    "Closed",
    "Member",
    "Itself",
    "Capture",
    "Ray",
    "Tokenizer",
    "Student",
    "Hyena",
    "Shrink",
    "Data",
    "Source",
    "HeldoutSource",
    "AlignStage",
    "DistilStage",
    "Objective",
    "Ramp",
    "OnPolicy",
    "TuneStage",
    "DropoutCourse",
    "ShorterRows",
    "ShorterPatches",
)


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _section(name: str, part: dict[str, Any]) -> str:
    rows = "".join(_rows(part))
    return f"\n## {name}\n\n{part.get('description', '')}\n\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n{rows}"


def _rows(part: dict[str, Any]) -> Iterator[str]:
    needed = set(part.get("required", []))
    for key, value in part["properties"].items():
        default = "required" if key in needed else f"`{_plain(value['default'])}`" if "default" in value else ""
        meaning = " ".join(value.get("description", "").split())
        yield f"| `{key}` | {_kind(value)} | {default} | {meaning} |\n".replace(" |  |", " | |")


def _plain(value: Any) -> str:
    return "{...}" if isinstance(value, dict) and value else json.dumps(value)


def _kind(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return value["$ref"].rsplit("/", 1)[-1]
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    for union in ("anyOf", "oneOf", "allOf"):
        if union in value:
            return " or ".join(dict.fromkeys(_kind(choice) for choice in value[union]))
    if value.get("type") == "array":
        return f"list of {_kind(value.get('items', {}))}"
    return str(value.get("type", "any"))


if __name__ == "__main__":
    print(render(), end="")
