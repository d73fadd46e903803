"""YAML text as plain values, each with the line it came from.

YAML 1.2: `1e-4` is a number and `no` is text. A recipe is data from anywhere, so duplicate keys, tags, aliases
without end, deep nesting and huge files are refused before they cost anything.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from limbeck.core.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_VALUES = 10_000
MAX_ALIASES = 100

Place = tuple[str | int, ...]
_CORE_TAG = "tag:yaml.org,2002:"
# How the value of a key without one is read.
_NOTHING = (f"{_CORE_TAG}null", "")


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises: RecipeError when it is no regular file, larger than a megabyte, unreadable, or not UTF-8.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: not a file. Give a recipe file (YAML), a run folder, or a preset's name.")
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"{path}: larger than {MAX_BYTES:,} bytes; a recipe has a few thousand. Is it the right file?"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: not UTF-8 text ({error.reason}). A recipe is a text file in YAML."
        ) from error


def parse_yaml(text: str, *, name: str) -> tuple[Any, dict[Place, int]]:
    """Plain values (None, bool, int, float, str, list, dict) and the line of every key and list item, counted from 1.

    `name` stands before the line in messages. Raises: RecipeError with `name:line:` and what is wrong there.
    """
    try:
        _check_budget(text, name)
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        raise RecipeError(f"{name}:{_line_of(error)}: not YAML: {_explain(error)}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{name}:{line}: a character that YAML does not allow (code {error.character:#x})."
        ) from error
    except YAMLError as error:
        raise RecipeError(f"{name}:1: not YAML: {str(error).splitlines()[0]}") from error
    lines: dict[Place, int] = {(): 1}
    if node is None:
        return None, lines
    return _Builder(name, lines).build(node, (), 0), lines


def _line_of(error: MarkedYAMLError) -> int:
    """Where to look: what was begun and never ended is at fault where it began."""
    unended = error.context_mark and re.search("could not find expected|end of stream|stream end", str(error.problem))
    mark = error.context_mark if unended else error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


def _explain(error: MarkedYAMLError) -> str:
    parts = [part for part in (error.context, error.problem) if part]
    tab = " Indent with spaces, never with tabs." if r"'\t'" in str(error.problem) else ""
    began = error.context_mark.line + 1 if error.context_mark else None
    since = "" if began in (None, _line_of(error)) else f" (begun on line {began})"
    return ", ".join(parts).replace("\n", " ") + since + "." + tab


def _check_budget(text: str, name: str) -> None:
    """Walk the flat event stream, where neither nesting nor aliases cost anything yet."""
    depth = aliases = 0
    for values, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        if isinstance(event, DocumentStartEvent) and (event.version or (1, 2)) != (1, 2):
            raise RecipeError(f"{name}:1: recipes are YAML 1.2. Remove the %YAML line.")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        aliases += isinstance(event, AliasEvent)
        place = f"{name}:{event.start_mark.line + 1}"
        if depth > MAX_DEPTH:
            raise RecipeError(f"{place}: nested deeper than {MAX_DEPTH} levels. A recipe needs fewer than ten.")
        if aliases > MAX_ALIASES or values > MAX_VALUES:
            raise RecipeError(
                f"{place}: more than {MAX_VALUES:,} values or {MAX_ALIASES} aliases. Is it the right file?"
            )
        if getattr(event, "tag", None) is not None:
            raise RecipeError(f"{place}: the tag {event.tag[:80]} is not allowed. Recipes hold plain values only.")


class _Builder:
    """Turns the node graph into plain values. Aliases are expanded, within a budget of values and depth."""

    def __init__(self, name: str, lines: dict[Place, int]) -> None:
        self.name = name
        self.lines = lines
        self.values = 0
        self.constructor = YAML(typ="safe", pure=True).constructor

    def build(self, node: Node, place: Place, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise self.error(node, "aliases expand to too many values. Write them out.")
        if isinstance(node, MappingNode):
            return self.build_mapping(node, place, depth)
        if isinstance(node, SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*place, index)] = item.start_mark.line + 1
                items.append(self.build(item, (*place, index), depth + 1))
            return items
        return self.build_scalar(node)

    def build_mapping(self, node: MappingNode, place: Place, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.build_scalar(key_node) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                raise self.error(key_node, "a key must be a word.")
            name, colon, rest = key.partition(":")
            if node.flow_style and colon and key_node.style is None and (value_node.tag, value_node.value) == _NOTHING:
                raise self.error(
                    key_node, f"a blank is missing after the colon. Write {{{name}: {rest or '...'}}}, not {{{key}}}."
                )
            if key in mapping:
                first = self.lines[(*place, key)]
                raise self.error(key_node, f'duplicate key "{key}" (first on line {first}). Keep one of them.')
            self.lines[(*place, key)] = key_node.start_mark.line + 1
            mapping[key] = self.build(value_node, (*place, key), depth + 1)
        return mapping

    def build_scalar(self, node: Node) -> Any:
        kind = str(node.tag).removeprefix(_CORE_TAG)
        try:
            if kind == "int":
                return int(self.constructor.construct_yaml_int(node))
            if kind == "float":
                value = float(self.constructor.construct_yaml_float(node))
                if not math.isfinite(value):
                    raise self.error(node, f"{node.value} is not a finite number.")
                return value
        except ValueError as error:
            raise self.error(node, f"{node.value[:40]} is not a usable number ({error}).") from error
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        return node.value

    def error(self, node: Node, text: str) -> RecipeError:
        return RecipeError(f"{self.name}:{node.start_mark.line + 1}: {text}")
