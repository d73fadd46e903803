"""Text of others made harmless: Markdown that says nothing of its own, no paths of this machine, no secrets.

Reports, recipes and cards may come from anyone, and what is written from them is shown to the world.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MOST_CHARACTERS = 2_000
REMOVED = "(removed)"

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&])")
_BEGINS_A_BLOCK = re.compile(r"^(?=#|[-+=:](?:[\s-]|$)|\d+[.)]\s)")
_LINK = re.compile(r"(://|\bwww\.|@)", re.IGNORECASE)
_LOCAL_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".gguf", ".csv", ".yaml", ".yml")
_ABSOLUTE = re.compile(
    r"(?<![\w/.:\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\\"'`,;:()<>|\[\]{}]+[/\\]+)+([^\s/\\\"'`,;:()<>|\[\]{}]+)"
)
_SECRET_KEY = re.compile(
    r"(?:^|_)(?:api_?key|(?:api|auth|access|hf|bearer)_?token|secret|password|passwd|authorization|credentials?)$|^token$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bnvapi-[\w-]{20,}|\bgsk_[A-Za-z0-9]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bBearer\s+[A-Za-z0-9._~+/=-]{16,}|://[^\s/@:]*:[^\s/@]+@"
)


def printable(text: Any, *, most: int = MOST_CHARACTERS, lines: bool = False) -> str:
    """Text without control codes and marks that turn its direction, cut to a length; `lines` keeps line ends."""
    whole = str(text).encode("utf-8", errors="replace").decode("utf-8")
    kept = "".join(
        c
        for c in whole
        if (lines and c in "\n\t") or c in " \n" or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Co")
    )
    kept = kept if lines else " ".join(kept.split())
    return kept if len(kept) <= most else kept[: most - 1] + "…"


def markdown(text: Any, *, most: int = MOST_CHARACTERS) -> str:
    """Text that Markdown shows as it is: one line, no mark-up, no HTML, no link, no mention, no formula."""
    plain = printable(text, most=most)
    # A zero-width space: entities and backslashes do not keep every renderer from making links of addresses.
    plain = _LINK.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", plain)
    return _BEGINS_A_BLOCK.sub(r"\\", _SPECIAL.sub(r"\\\1", plain)) if not plain[:1].isdigit() else _numbered(plain)


def _numbered(plain: str) -> str:
    return re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", _SPECIAL.sub(r"\\\1", plain))


def fenced(text: Any, *, language: str = "", most: int = 60_000) -> str:
    """A code block around any text, with a fence longer than every run of backticks in it."""
    kept = printable(text, most=most, lines=True).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", kept)), default=0))
    return f"{fence}{language}\n{kept}\n{fence}"


def is_local(source: str) -> bool:
    """Whether a source of a recipe is a file or folder of this machine, not a name on the hub or in the package."""
    if source in ("embedded", "factbook", ""):
        return False
    looks_so = source.startswith((".", "/", "~", "\\")) or "\\" in source or source.count("/") > 1
    return (
        looks_so
        or source.lower().endswith(_LOCAL_SUFFIXES)
        or bool(PureWindowsPath(source).drive)
        or Path(source).exists()
    )


def last_name(path: str) -> str:
    """The last part of a path of any system."""
    part = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return part if part not in ("", "..", "~") else "a local folder"


class Cleaner:
    """Takes out of text what belongs to this machine alone: paths become file names, secrets are removed.

    paths: those known to be local, replaced wherever they occur. Absolute paths are shortened everywhere.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        local = {path for path in paths if ("/" in path or "\\" in path) and len(path) > 3}
        self.paths = sorted(local, key=len, reverse=True)

    def text(self, text: str) -> str:
        """One text, cleaned."""
        for path in self.paths:
            text = text.replace(path, last_name(path))
        return _SECRETS.sub(REMOVED, _ABSOLUTE.sub(lambda found: found[1], text))

    def value(self, value: Any, *, key: str = "") -> Any:
        """Plain values of any depth, cleaned; keys stay. A text whose key names a secret goes altogether."""
        if isinstance(value, Mapping):
            return {name: self.value(inner, key=str(name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(inner, key=key) for inner in value]
        if not isinstance(value, str):
            return value
        if _SECRET_KEY.search(key):
            return REMOVED
        if key in ("url", "base_url"):
            return public_address(value)
        return self.text(value)


def public_address(address: str) -> str:
    """The host of a vendor's address; what stands behind an address of one's own is nobody's business."""
    from limbeck.deploy.licences import SERVICES

    host = re.sub(r"^[a-z]+://(?:[^/@]*@)?|[:/].*$", "", address.strip().lower())
    known = any(host == ending or host.endswith("." + ending) for ending in SERVICES)
    return f"https://{host}" if known else "(address left out)"


def local_paths(recipe: Any) -> list[str]:
    """Every text of a recipe that is a path of this machine."""
    keys = ("source", "store", "folder", "prompts", "run_folder", "tokenizer", "teacher_source", "path")
    found: list[str] = []

    def look(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                look(inner, str(name))
        elif isinstance(value, list):
            for inner in value:
                look(inner, key)
        elif (
            isinstance(value, str)
            and (key in keys or key in ("train", "heldout", "texts", "several"))
            and is_local(value)
        ):
            found.append(value)

    look(recipe, "")
    return found


def find_secret(text: str, variables: Mapping[str, str] | None = None) -> str | None:
    """Say what looks like a secret in a text, without repeating it; None when nothing does.

    variables: the environment; values of variables named like keys and tokens must not occur either.
    """
    found = _SECRETS.search(text)
    if found:
        return f"something that looks like a key or token (line {text.count(chr(10), 0, found.start()) + 1})"
    for name, value in (os.environ if variables is None else variables).items():
        if _SECRET_VARIABLE.search(name.upper()) and len(value) >= 8 and value in text:
            return (
                f"the value of the environment variable {name} (line {text.count(chr(10), 0, text.index(value)) + 1})"
            )
    return None
