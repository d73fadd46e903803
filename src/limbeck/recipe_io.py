"""Recipes in and out: a name or file and overrides become a Recipe, or one error with a line for every problem."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from limbeck.core.errors import RecipeError, unknown_name
from limbeck.presets import preset_names, preset_path
from limbeck.recipe import Recipe
from limbeck.recipe_messages import explain, show_place
from limbeck.recipe_yaml import Place, parse_yaml, read_text


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a YAML file, a run folder (its recipe.yaml), or a preset's name. A file wins over a preset.

    overrides: `key=value` with dotted paths; a list item is named by its index, a stage also by its name
    (`stages.align.tokens=1000`, `stages[0].tokens=1000`). Values are YAML.

    Raises: RecipeError with one line for every problem.
    """
    path = find_recipe(name_or_path)
    name = path.name if path == preset_path(str(name_or_path)) else str(path)
    return parse_recipe(read_text(path), overrides, name=name)


def find_recipe(name_or_path: str | Path) -> Path:
    """The file that a recipe's name or path means.

    Raises: RecipeError that says which files were looked for, and which presets there are.
    """
    path = Path(name_or_path).expanduser()
    candidates = [path, path / "recipe.yaml"]
    for candidate in candidates:
        if os.path.exists(candidate) and not os.path.isdir(candidate):
            return candidate
    if str(name_or_path) in preset_names():
        return preset_path(str(name_or_path))
    looked = " or ".join(str(candidate) for candidate in candidates)
    raise RecipeError(f"no recipe file {looked}, and {unknown_name('preset', str(name_or_path), preset_names())}")


def parse_recipe(text: str, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """Read a recipe from YAML text; `name` stands for the file in messages. Raises: RecipeError, as `load_recipe`."""
    data, lines = parse_yaml(text, name=name)
    if data is None:
        raise RecipeError(f"{name}:1: the recipe is empty. Start from a preset: {', '.join(preset_names())}.")
    if not isinstance(data, dict):
        raise RecipeError(f"{name}:1: a recipe is a mapping (name: ..., teacher: ...), not a list or a single value.")
    origins = {place: f"{name}:{line}" for place, line in lines.items()}
    for override in overrides:
        _apply(override, data, origins)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, data, origins))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text; reading it back gives an equal Recipe."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and for the reference page."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _apply(override: str, data: dict[str, Any], origins: dict[Place, str]) -> None:
    """Put one `key=value` into the data, and remember for messages that its value came from there."""
    where = f'override "{override}"'
    key, equals, value_text = override.partition("=")
    if not equals or not key.strip():
        meant = re.fullmatch(r"([\w.\[\]]+)\s*[:\s]\s*(\S.*)", override.strip())
        told = (
            f"Write {shlex.quote(f'{meant[1]}={meant[2]}')}."
            if meant
            else "For example seed=1 or stages.0.tokens=1000."
        )
        raise RecipeError(f"{where}: expected key=value. {told}")
    if not value_text.strip():
        raise RecipeError(f"{where}: no value after =. Write {key}=null for none.")
    value, _ = parse_yaml(value_text, name=where)
    parent: Any = data
    place: Place = ()
    parts = re.sub(r"\[([^\]]*)\]", r".\1", key.strip()).split(".")
    for part in parts[:-1]:
        step = _resolve(parent, part, place, where)
        place = (*place, step)
        if isinstance(parent, dict) and parent.get(step) is None:
            parent[step] = {}
            origins[place] = where
        parent = parent[step]
    step = _resolve(parent, parts[-1], place, where)
    place = (*place, step)
    parent[step] = value
    for stale in [other for other in origins if other[: len(place)] == place]:
        del origins[stale]
    origins[place] = where


def _resolve(parent: Any, part: str, place: Place, where: str) -> str | int:
    """The key or index that one word of an override means in its parent."""
    if isinstance(parent, dict):
        return part
    if not isinstance(parent, list):
        raise RecipeError(f"{where}: {show_place(place)} is a single value; it has no {part}.")
    if part.isdecimal():
        if int(part) < len(parent):
            return int(part)
        raise RecipeError(f"{where}: {show_place(place)} has {len(parent)} items; indices count from 0.")
    names = [str(item.get("name", item.get("kind"))) if isinstance(item, dict) else "" for item in parent]
    if part in names:
        return names.index(part)
    known = [name for name in names if name and name != "None"]
    if known:
        raise RecipeError(f"{where}: {unknown_name('item', part, known)} (or an index from 0)")
    raise RecipeError(f"{where}: {show_place(place)} is a list; name an item by its index from 0, not {part}.")
