"""The folder that is uploaded: which files of a model go into it, and none that tell of this machine or hold pickles."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.core.errors import PublishError
from limbeck.core.files import explain_full_disk, write_atomic
from limbeck.deploy.card import MARK
from limbeck.deploy.parents import LICENCE_FILE
from limbeck.deploy.plain import Cleaner, find_secret, is_local, last_name

SUFFIXES = (".safetensors", ".json", ".txt", ".md", ".yaml", ".html", ".model", ".jinja")
_TRAINING = re.compile(
    r"optim|scheduler|rng[_-]?state|trainer[_-]state|training[_-]args|checkpoint|grad", re.IGNORECASE
)
_SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,150}")
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_MOST_CONFIG_BYTES, _MOST_TEXT_BYTES = 5_000_000, 20_000_000
_OWN = ("README.md", "recipe.yaml", "report.md", "report.html", "NOTICE.txt")


@dataclass(frozen=True)
class Upload:
    """What goes up. files: name -> bytes. left_out: name -> why it stays."""

    folder: Path
    files: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


def choose_files(model: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a model folder that may go up, and why others stay.

    Only the top of the folder is looked at. Raises: PublishError when there is no model in it that can go up.
    """
    chosen: list[Path] = []
    left: dict[str, str] = {}
    for path in sorted(model.iterdir()):
        why = _reason_to_stay(path, model)
        if why is None:
            chosen.append(path)
        else:
            left[path.name] = why
    names = {path.name for path in chosen}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise PublishError(
            f"{model} holds no model that can be published: expected config.json and *.safetensors. "
            "Give the folder of a finished run, or one written by save_pretrained."
        )
    return chosen, left


def _reason_to_stay(path: Path, model: Path) -> str | None:
    if path.is_symlink() and not _is_own_link(path, model):
        return "a link that leads out of the folder"
    if not path.is_file():
        return "not a file"
    if path.name in _OWN:
        return "its place is taken by what is written anew"
    if not _SAFE_NAME.fullmatch(path.name):
        return "a name with odd characters"
    if _TRAINING.search(path.name):
        return "state of training"
    is_licence = LICENCE_FILE.fullmatch(path.name) is not None
    return None if is_licence or path.suffix in SUFFIXES else "not among the kinds of files that are published"


def _is_own_link(path: Path, model: Path) -> bool:
    """A link within the folder, or into the blobs beside a snapshot of the hub's cache."""
    target = path.resolve()
    blobs = model.absolute().parent.parent / "blobs"
    return target.is_relative_to(model.resolve()) or (
        model.absolute().parent.name == "snapshots" and target.parent == blobs.resolve()
    )


def build_folder(
    out: Path, *, model: Path, texts: Mapping[str, str], beside: Sequence[Path] = (), cleaner: Cleaner | None = None
) -> Upload:
    """Write the folder that is uploaded, whole or not at all; one that an earlier call wrote is replaced.

    model: whose files are linked (configurations are copied without this machine's paths). texts: name -> content of
    files that are written: the card, the recipe, the report, notices. beside: licence files of the teachers.

    Raises: PublishError when `out` holds something else, the model cannot be published, or a text holds a secret.
    """
    chosen, left = choose_files(model)
    _refuse_foreign(out)
    cleaner = cleaner or Cleaner()
    draft = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    with explain_full_disk(out):
        draft.mkdir(parents=True)
        try:
            for path in chosen:
                _place(path, draft / path.name, cleaner)
            for path in beside:
                if not (draft / path.name).exists():
                    shutil.copyfile(path, draft / path.name)
            for name, text in texts.items():
                write_atomic(draft / name, text)
            _refuse_secrets(draft)
            if out.exists():
                shutil.rmtree(out)
            os.replace(draft, out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return Upload(out, {path.name: path.stat().st_size for path in sorted(out.iterdir())}, left)


def _place(source: Path, target: Path, cleaner: Cleaner) -> None:
    """A small configuration is copied and cleaned; everything else is linked, or copied where links cannot be made."""
    if source.name in _CONFIGS:
        write_atomic(target, _cleaned_config(source, cleaner))
        return
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        try:
            target.symlink_to(real)
        except OSError:
            shutil.copyfile(real, target)


def _cleaned_config(path: Path, cleaner: Cleaner) -> str:
    """A configuration without local paths, and without a pointer to code that does not go up with it."""
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise PublishError(
            f"{path} has {path.stat().st_size:,} bytes; a configuration has a few thousand. Is it the right file?"
        )
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PublishError(f"{path} is not readable JSON ({error}). Save the model again.") from error
    return json.dumps(_without_paths(words, cleaner), indent=2, ensure_ascii=False) + "\n"


def _without_paths(value: Any, cleaner: Cleaner) -> Any:
    if isinstance(value, dict):
        return {
            key: (last_name(inner) if isinstance(inner, str) and is_local(inner) else inner)
            if key in ("_name_or_path", "name_or_path")
            else _without_paths(inner, cleaner)
            for key, inner in value.items()
            if key != "auto_map"
        }
    if isinstance(value, list):
        return [_without_paths(inner, cleaner) for inner in value]
    return cleaner.text(value) if isinstance(value, str) and len(value) > 8 and "{" not in value else value


def _refuse_foreign(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    card = out / "README.md"
    if out.is_dir() and card.is_file():
        with open(card, encoding="utf-8", errors="replace") as stream:
            if MARK.search(stream.read(_MOST_CONFIG_BYTES)):
                return
    raise PublishError(f"{out} already exists and was not written by `limbeck push`. Name another folder with --out.")


def _refuse_secrets(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        # A tokenizer's words are of all kinds, and weights are no text.
        if path.suffix in (".safetensors", ".model") or path.name in (
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "vocab.txt",
        ):
            continue
        if path.stat().st_size > _MOST_TEXT_BYTES:
            raise PublishError(
                f"{path.name} has {path.stat().st_size:,} bytes, too many for a text that goes up. Take it out of the folder."
            )
        found = find_secret(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            raise PublishError(
                f"{path.name} holds {found}. Nothing was published: take it out, and change it where it is valid."
            )
