"""Pieces of your own: an objective, a filter, a segmenter or a mixer in one Python file, added to the shipped ones.

    limbeck --plugin FILE.py run recipe.yaml        from the command line
    import my_file                                  from Python, before the recipe is read

The file calls one of the `add_*` functions. Each puts a row into the table of its family and makes the name one that
recipes may use. A recipe names pieces, never files: what code is run is said on the command line or in Python alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck.core.errors import LimbeckError, PluginError
from limbeck.core.files import sha256_file
from limbeck.models.segmenters import SEGMENTERS
from limbeck.nn.filters import FILTERS, LongFilter
from limbeck.nn.mixers import ATTENTION, MIXERS, StatefulMixer
from limbeck.objectives.catalogue import OBJECTIVES, Entry
from limbeck.objectives.divergences import Comparison
from limbeck.objectives.sparse import COMPARISONS
from limbeck.objectives.terms import LOGIT_OBJECTIVES, LogitObjective
from limbeck.recipe_tokenizer import TEACHER_BORDERS, TRAINED_BORDERS
from limbeck.recipe_values import ADDED

_FILES: dict[str, str] = {}
_NAMED: dict[str, str] = {}
_ORIGINS: dict[tuple[str, str], str] = {}


def add_objective(
    name: str, comparison: Callable[..., Tensor], *, title: str, source: str, is_divergence: bool = True
) -> None:
    """Add an objective on predictions, which recipes then name in `stages[].objectives`.

    comparison: of log-probabilities [..., V] of student and teacher, to one number for each position [...]; its options
    are keyword-only, with defaults. title: what it is, in a few words. source: where it comes from. is_divergence: it is
    zero on equals, and is multiplied by the square of the temperature.

    Raises: PluginError for a name that is taken or no identifier, or an option without a default.
    """
    whole = comparison if isinstance(comparison, Comparison) else Comparison(comparison)
    for option, default in whole.options.items():
        if default is inspect.Parameter.empty:
            raise PluginError(f'objective "{name}": its option {option} has no default. Give it one.')
    _claim("objective", name, whole.of_log_probs, OBJECTIVES)
    COMPARISONS[name] = whole
    LOGIT_OBJECTIVES[name] = LogitObjective(title, source, is_divergence, options=whole.options)
    OBJECTIVES[name] = Entry("predictions", title, source, is_divergence, whole.options)


def add_filter(name: str, cls: type[LongFilter]) -> None:
    """Add a filter of Hyena operators, which recipes then name in `student.hyena.filter`.

    Raises: PluginError for a name that is taken or no identifier, or a class that is no `LongFilter`.
    """
    if not (isinstance(cls, type) and issubclass(cls, LongFilter)):
        raise PluginError(f'filter "{name}": {cls!r} is no class that extends limbeck.nn.filters.LongFilter.')
    _claim("filter", name, cls, FILTERS)
    FILTERS[name] = cls


def add_segmenter(name: str, cls: type) -> None:
    """Add a rule that cuts bytes into pieces, which recipes then name in `tokenizer.segmenter`, as `name` or `name:argument`.

    cls: as `limbeck.models.segmenters.Segmenter`, with `from_words` and `from_facts` to make one.

    Raises: PluginError for a name that is taken or no identifier, or a class that lacks a method.
    """
    _need("segmenter", name, cls, ("from_words", "from_facts", "facts", "split"))
    _claim("segmenter", name, cls, {*SEGMENTERS, TEACHER_BORDERS, TRAINED_BORDERS})
    SEGMENTERS[name] = cls


def add_mixer(name: str, cls: Callable[..., StatefulMixer]) -> None:
    """Add a mixer of trunks, which recipes then name in `student.architecture.trunk.mixers`.

    cls: as `limbeck.nn.mixers.StatefulMixer`.

    Raises: PluginError for a name that is taken or no identifier, or a class that lacks a method.
    """
    _need("mixer", name, cls, ("forward", "init_state", "advance", "flops_per_token"))
    _claim("mixer", name, cls, {ATTENTION, *MIXERS})
    MIXERS[name] = cls


def load_plugin(file: Path) -> None:
    """Import a Python file under the name it has, so that what it adds is there.

    Raises: PluginError when it is missing, is no Python, fails, or has the name of another module.
    """
    path, where = file.expanduser().resolve(), f"--plugin {file}"
    if not path.is_file():
        raise PluginError(f"{where}: there is no such file. Give the path of a Python file.")
    name = path.stem
    if path.suffix != ".py" or not name.isidentifier():
        raise PluginError(f"{where}: a plug-in is a Python file with a plain name, such as my_loss.py.")
    if _is_module(name) and _file_of(name) != path:
        raise PluginError(f"{where}: a module {name} exists already. Give the file another name.")
    _NAMED[path.name] = str(file)
    if name in sys.modules:
        _FILES.setdefault(path.name, sha256_file(path))
        return
    _FILES[path.name] = sha256_file(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, LimbeckError):
            raise PluginError(f"{where}: {error}") from error
        raise PluginError(f"{where}{_line_in(path, error)}: {type(error).__name__}: {error}") from error


def plugin_files() -> dict[str, str]:
    """The files that have added pieces, or were named with `--plugin`: their names, each with its SHA-256."""
    return dict(sorted(_FILES.items()))


def plugin_words() -> list[str]:
    """The words of a command that name the files of `--plugin` again."""
    return [word for file in _NAMED.values() for word in ("--plugin", file)]


def _claim(family: str, name: str, piece: Any, known: Container[str]) -> None:
    """Take a name, or refuse: a file that is read again may take what it took before."""
    if not re.fullmatch("[a-z_][a-z0-9_]*", name):
        raise PluginError(f'{family} "{name}": a name is a word of a-z, 0-9 and _ that does not begin with a digit.')
    module = getattr(piece, "__module__", "")
    origin = f"{module}.{getattr(piece, '__qualname__', piece)}"
    if name in known and _ORIGINS.get((family, name)) != origin:
        raise PluginError(f'{family} "{name}": the name is taken. Choose another.')
    _ORIGINS[family, name] = origin
    ADDED[family].add(name)
    path = _file_of(module)
    if path is not None and not module.startswith("limbeck."):
        _FILES[path.name] = sha256_file(path)


def _need(family: str, name: str, cls: Any, methods: Iterable[str]) -> None:
    missing = [method for method in methods if not callable(getattr(cls, method, None))]
    if missing:
        raise PluginError(f'{family} "{name}": {getattr(cls, "__name__", cls)!s} has no {", ".join(missing)}.')


def _is_module(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _file_of(name: str) -> Path | None:
    """The file of a module that is loaded, or that would be."""
    spec = None if name in sys.modules or not name else importlib.util.find_spec(name)
    origin = getattr(sys.modules.get(name), "__file__", None) or getattr(spec, "origin", None)
    return Path(origin).resolve() if origin else None


def _line_in(path: Path, error: BaseException) -> str:
    """Where in the file it failed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    return f", line {lines[-1]}" if lines and lines[-1] else ""
