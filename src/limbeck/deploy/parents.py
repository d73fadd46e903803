"""The models a student comes from, and under which licences they stand: teachers, and the weights it began with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from limbeck.core.errors import LimbeckError
from limbeck.deploy.gguf_words import read_gguf_words
from limbeck.deploy.licences import Licence, find_licence, find_service, unlisted_licence
from limbeck.deploy.plain import is_local, last_name, printable
from limbeck.store.manifest import read_manifest

FetchCard = Callable[[str, str | None], str | None]
"""The text of a hub model's card by its id and revision, or None when it cannot be had."""

_MOST_CARD_BYTES = 256_000
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_WANTED_KEY = re.compile(r"(?:license|license_name|license_link|language)[ \t]*:")
_MOST_LINES, _MOST_LINE_CHARACTERS = 400, 300
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
LICENCE_FILE = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([._-][\w.-]{1,40})?(\.(txt|md))?", re.IGNORECASE)


@dataclass(frozen=True)
class Parent:
    """A model that a student comes from.

    name: as the public may know it (a path of this machine is its last part). role: "teacher" (what it says is learnt),
    "start" (its weights are where the student began) or "teacher and start". hub_id: its name on the hub, when it is
    there. licences: rows that hold for it, empty when unknown. known_from: where that was read. languages: as its card
    has them. folder: where its own licence files may lie.
    """

    name: str
    role: str
    licences: tuple[Licence, ...] = ()
    known_from: str = "unknown"
    hub_id: str | None = None
    languages: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def starts(self) -> bool:
        """Whether the student's weights come from it."""
        return "start" in self.role


def parents_of(recipe: Mapping[str, Any], *, fetch: FetchCard) -> list[Parent]:
    """Every model a recipe's student comes from, its licences read from cards beside the weights or from `fetch`."""
    teacher, student = _mapping(recipe.get("teacher")), _mapping(recipe.get("student"))
    own_start = student.get("source") if isinstance(student.get("source"), str) else None
    begins_anew = own_start is not None or bool(student.get("architecture")) or bool(student.get("size"))
    taught = "teacher" if begins_anew else "teacher and start"
    found: list[Parent] = []
    if isinstance(teacher.get("source"), str):
        found.append(read_parent(teacher["source"], taught, revision=_text(teacher.get("revision")), fetch=fetch))
    elif isinstance(teacher.get("store"), str):
        found.append(_of_store(teacher["store"], fetch))
    several = teacher.get("several") if isinstance(teacher.get("several"), list) else []
    for number, member in enumerate(several or []):
        words = {"source": member} if isinstance(member, str) else _mapping(member)
        if isinstance(words.get("source"), str):
            role = taught if number == 0 else "teacher"
            found.append(read_parent(words["source"], role, revision=_text(words.get("revision")), fetch=fetch))
    for kind in ("served", "closed"):
        if isinstance(teacher.get(kind), Mapping):
            found.append(_of_endpoint(teacher[kind], kind, fetch))
    if own_start is not None:
        found.append(read_parent(own_start, "start", fetch=fetch))
    return found


def read_parent(source: str, role: str, *, revision: str | None = None, fetch: FetchCard) -> Parent:
    """One model by its source: the one in the package, a folder, a GGUF file, or a hub id."""
    if source == "embedded":
        folder = Path(str(files("limbeck"))) / "embedded_teacher"
        card = _card_of(folder)
        return Parent(
            "the small teacher that comes with the package",
            role,
            licences_of(card),
            "its card in the package",
            None,
            languages_of(card),
        )
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        card = _gguf_card(path)
        return Parent(
            path.name, role, licences_of(card), "the head of the GGUF file", None, languages_of(card), path.parent
        )
    if path.is_dir():
        card = _card_of(path)
        known = "README.md beside its weights" if licences_of(card) else "unknown"
        return Parent(last_name(str(path.resolve())), role, licences_of(card), known, None, languages_of(card), path)
    if is_local(source) or not _HUB_ID.fullmatch(source):
        return Parent(last_name(source), role)
    text = fetch(source, revision)
    card = front_matter(text) if text else {}
    known = "its card on the hub" if licences_of(card) else "unknown"
    return Parent(source, role, licences_of(card), known, source, languages_of(card))


def front_matter(text: str) -> dict[str, Any]:
    """What the metadata at the head of a card says of licence and language; empty when it cannot be read.

    Only those keys are parsed: a card may hold thousands of results, or be made to be slow to read.
    """
    found = _FRONT.match(text[:_MOST_CARD_BYTES].lstrip("\ufeff"))
    if not found:
        return {}
    kept: list[str] = []
    wanted = False
    for line in found[1].splitlines():
        wanted = _WANTED_KEY.match(line) is not None or (wanted and (not line.strip() or line[0] in " -"))
        if wanted:
            kept.append(line[:_MOST_LINE_CHARACTERS])
    lines = "\n".join(kept[:_MOST_LINES])
    if re.search(r"(?m)(?:^|[\s\[,:-])[&*][A-Za-z0-9]+(?:\s|$)", lines):  # no anchors: they may grow without end
        return {}
    try:
        data = YAML(typ="safe", pure=True).load(lines)
    except (YAMLError, ValueError, RecursionError, TypeError):
        return {}
    return data if isinstance(data, dict) else {}


def licences_of(card: Mapping[str, Any]) -> tuple[Licence, ...]:
    """The rows for a card's licence; `other` is looked up by the name the card gives it."""
    given = card.get("license")
    names = [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str) and name.strip()]
    rows: list[Licence] = []
    for name in names[:8]:
        if name.strip().lower() == "unknown":
            continue
        named = _text(card.get("license_name")) if name.strip().lower() == "other" else name
        row = find_licence(named) if named else None
        link = _text(card.get("license_link"))
        safe = link if link and re.fullmatch(r"https://[\w./%~?=&#-]{1,300}", link) else None
        rows.append(row or unlisted_licence(printable(named or "other", most=80), safe))
    return tuple(rows)


def languages_of(card: Mapping[str, Any]) -> tuple[str, ...]:
    """The language codes of a card."""
    given = card.get("language")
    codes = given if isinstance(given, list) else [given]
    return tuple(
        code for code in codes[:200] if isinstance(code, str) and re.fullmatch(r"[a-z]{2,3}|code|multilingual", code)
    )


def licence_files(parents: list[Parent]) -> list[Path]:
    """Licence and notice files that lie beside the weights of local parents."""
    found: dict[str, Path] = {}
    for parent in parents:
        for path in sorted(parent.folder.iterdir()) if parent.folder is not None else []:
            if LICENCE_FILE.fullmatch(path.name) and path.is_file() and path.stat().st_size <= 1_000_000:
                found.setdefault(path.name, path)
    return list(found.values())


def _of_endpoint(words: Mapping[str, Any], kind: str, fetch: FetchCard) -> Parent:
    """A served or closed teacher: a vendor's terms by the address; the model's own licence by its name otherwise."""
    name = printable(words.get("model") or "a model", most=120)
    service = find_service(_text(words.get("url")) or "")
    if service is not None:
        return Parent(name, "teacher", (service,), f"the address it was asked at ({kind})")
    if _HUB_ID.fullmatch(name) and "/" in name:
        return read_parent(name, "teacher", fetch=fetch)
    return Parent(last_name(name), "teacher")


def _of_store(folder: str, fetch: FetchCard) -> Parent:
    """The teacher whose words a store keeps, by the store's manifest."""
    try:
        teacher = read_manifest(Path(folder).expanduser()).teacher
    except (LimbeckError, OSError):
        return Parent(last_name(folder), "teacher")
    name = teacher.get("name") or teacher.get("source")
    return read_parent(str(name), "teacher", fetch=fetch) if name else Parent(last_name(folder), "teacher")


def _card_of(folder: Path) -> dict[str, Any]:
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with open(path, "rb") as stream:
        return front_matter(stream.read(_MOST_CARD_BYTES).decode("utf-8", errors="replace"))


def _gguf_card(path: Path) -> dict[str, Any]:
    words = read_gguf_words(path)
    return {
        "license": words.get("general.license"),
        "license_name": words.get("general.license.name"),
        "license_link": words.get("general.license.link"),
        "language": words.get("general.languages"),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
