"""Trackers: the figures of a run, in TensorBoard, Weights & Biases or Trackio beside `metrics.jsonl`.

Each is driven through accelerate's class for it. What a tracker was sent is written down in the run folder, so that a
run that goes on after a stop continues the same tracker run, sends it what it lacks, and nothing twice.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.errors import EnvironmentFault
from limbeck.core.files import explain_full_disk
from limbeck.core.runtime import is_main

FOLDER = "tracking"
# What of a model's facts in the report is sent at the end.
REPORTED = (
    "perplexity", "bits_per_byte", "parameters", "tokens_spent", "flops_spent", "kl_to_teacher", "top1_agreement",
)  # fmt: skip
_PROJECT = "limbeck"


class SentFile:
    """What one tracker has of a run: the id of its run, and how far each stage was sent. JSON lines, appended."""

    def __init__(self, path: Path):
        self.path = path
        self.id = uuid.uuid4().hex[:12]
        self.points = 0
        self._steps: dict[str, int] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = list(_whole_lines(text))
        self.is_new = not lines
        for line in lines:
            self.id = str(line.get("id", self.id))
            if "at" in line:
                self._note(str(line["at"]), int(line["step"]))
        if self.is_new:
            self._append({"id": self.id})
        elif not text.endswith("\n"):  # a kill cut the last line short
            self._append_text("\n")

    def has(self, at: str, step: int) -> bool:
        """Whether this point was sent before."""
        return step <= self._steps.get(at, -1)

    def add(self, at: str, step: int) -> None:
        """A point was sent."""
        self._note(at, step)
        self._append({"at": at, "step": step})

    def _note(self, at: str, step: int) -> None:
        self._steps[at] = max(step, self._steps.get(at, -1))
        self.points += 1

    def _append(self, line: Mapping[str, Any]) -> None:
        self._append_text(json.dumps(line) + "\n")

    def _append_text(self, text: str) -> None:
        with explain_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(text)


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with. `config`: the recipe as nested values; `text`: the same for people."""

    run: str
    folder: Path
    id: str
    is_new: bool
    config: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The recipe as an indented block, which TensorBoard shows as it is."""
        lines = json.dumps(self.config, indent=2, ensure_ascii=False).splitlines()
        return "\n".join("    " + line for line in lines)


@dataclass
class _Tracker:
    name: str
    backend: Any
    sent: SentFile
    is_broken: bool = False


class Trackers:
    """The trackers of a run, told the lines of `metrics.jsonl`. One that fails is told of once and left alone: training
    never stops for it, and the next start of the same run sends it what it missed."""

    def __init__(self, trackers: Iterable[_Tracker] = (), *, say: Callable[[str], None] = print, prefix: str = ""):
        self._trackers, self._say, self._prefix = list(trackers), say, prefix

    def under(self, prefix: str) -> Trackers:
        """The same trackers, with every name under a prefix: for a further seed."""
        return Trackers(self._trackers, say=self._say, prefix=f"{self._prefix}{prefix}/")

    def write(self, *, arm: str, stage: str, step: int, tokens: int, **figures: float) -> None:
        """One logged update, as `arm/stage/figure`; a point that a tracker already has is not sent again."""
        place = f"{self._prefix}{arm}/{stage}"
        self._send(place, step, tokens, {f"{place}/{name}": value for name, value in figures.items()})

    def report(self, facts: Mapping[str, Any]) -> None:
        """The main figures of the finished report, as `report/student/perplexity` and so on; nothing without facts."""
        if facts:
            figures = report_figures(facts)
            self._send(f"{self._prefix}report", 0, 0, figures)

    def finish(self) -> None:
        """Have the trackers write out what they still hold, and close them."""
        for tracker in self._trackers:
            with self._forgiving(tracker):
                tracker.backend.finish()
        self._trackers = []

    def _send(self, place: str, step: int, tokens: int, values: dict[str, Any]) -> None:
        for tracker in self._trackers:
            if tracker.is_broken or tracker.sent.has(place, step):
                continue
            with self._forgiving(tracker):
                tracker.backend.log(place, tokens, values, point=tracker.sent.points)
                tracker.sent.add(place, step)

    @contextlib.contextmanager
    def _forgiving(self, tracker: _Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a foreign package raises: its figures are in metrics.jsonl all the same
            if not tracker.is_broken:
                detail = (str(error).strip().splitlines() or [""])[0][:200]
                self._say(
                    f"{tracker.name} failed ({type(error).__name__}: {detail}) and gets nothing more from this process. The run goes on; "
                    "metrics.jsonl has every figure."
                )
            tracker.is_broken = True


NO_TRACKERS = Trackers()


@contextlib.contextmanager
def open_trackers(
    names: Iterable[str],
    folder: Path,
    *,
    run: str,
    config: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> Iterator[Trackers]:
    """Trackers for a run folder, on the main rank; closed however the run ends (a request to stop included).

    config: the resolved recipe; what an address in it holds of names, keys and queries is left out. Of the lines that the
    folder's `metrics.jsonl` already has, each tracker is sent those it lacks.
    Raises: EnvironmentFault when a package is missing, or a tracker cannot begin.
    """
    names = list(dict.fromkeys(names))
    if "trackio" in names:  # which reads this when it is imported, and never again
        os.environ.setdefault("TRACKIO_DIR", str((folder / FOLDER / "trackio").absolute()))
    for name in names:
        _import(name)
    trackers = Trackers(say=say)
    try:
        if names and is_main():
            _prepare_accelerate()
            for name in names:
                sent = SentFile(folder / FOLDER / f"{name}.jsonl")
                opening = Opening(run, folder / FOLDER, sent.id, sent.is_new, without_secrets(config))
                trackers._trackers.append(_Tracker(name, _begin(name, opening), sent))
            for prefix, line in _logged(folder):
                (trackers.under(prefix) if prefix else trackers).write(**line)
        yield trackers
    finally:
        trackers.finish()


def report_figures(facts: Mapping[str, Any]) -> dict[str, float | str]:
    """The main figures of a report by name: of the student, the teacher and the controls, and the headline."""
    models = {"student": facts.get("student"), "teacher": facts.get("teacher")}
    models |= {f"controls/{name}": control for name, control in (facts.get("controls") or {}).items()}
    found: dict[str, float | str] = {
        f"report/{name}/{figure}": float(model[figure])
        for name, model in models.items()
        if model
        for figure in REPORTED
        if model.get(figure) is not None
    }
    headline = (facts.get("verdict") or {}).get("headline")
    return found | ({"report/headline": headline} if headline else {})


def without_secrets(value: Any) -> Any:
    """The same nested values with addresses bare: without user, password and query."""
    if isinstance(value, Mapping):
        return {str(key): without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    bare = re.sub(r"//[^/?#]*@", "//", value)
    return re.sub(r"[?#].*", "", bare, flags=re.DOTALL)


def _logged(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a run folder's logs, its further seeds' under a prefix; what is no line of a log is passed over."""
    for path in [folder / "metrics.jsonl", *sorted(folder.glob("seeds/*/metrics.jsonl"))]:
        prefix = path.parent.relative_to(folder).as_posix().strip(".")
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        yield from ((prefix, line) for line in _whole_lines(text) if line.keys() >= {"arm", "stage", "step", "tokens"})


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lacking = f"{error.name} is missing" if error.name else str(error)
        raise EnvironmentFault(
            f'runtime.tracking: {name} was asked for but cannot be loaded ({lacking}). Install it: pip install "limbeck[trackers]", '
            "or take it out of runtime.tracking. metrics.jsonl is written in any case."
        ) from error


def _begin(name: str, opening: Opening) -> Any:
    try:
        return TRACKERS[name](opening)
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise EnvironmentFault(
            f"runtime.tracking: {name} could not begin ({detail}). Nothing was trained yet. Mend that "
            f"(WANDB_MODE=offline keeps wandb off the network), or take {name} out of runtime.tracking."
        ) from error


def _prepare_accelerate() -> None:
    """accelerate's trackers ask its state who is the main process; the state is made without a word to the devices."""
    import torch
    from accelerate.state import PartialState

    threads = torch.get_num_threads()
    PartialState(cpu=True)
    torch.set_num_threads(threads)


class _TensorBoard:
    def __init__(self, opening: Opening):
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker(opening.run, opening.folder / "tensorboard")
        self._tracker.start()
        if opening.is_new:
            self._tracker.log({"recipe": opening.text}, step=0)

    def log(self, place: str, tokens: int, values: dict[str, Any], *, point: int) -> None:
        self._tracker.log(values, step=tokens)

    def finish(self) -> None:
        self._tracker.finish()


class _Wandb:
    """Without the network unless WANDB_MODE says otherwise."""

    def __init__(self, opening: Opening):
        import wandb
        from accelerate.tracking import WandBTracker

        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, finish_timeout=60.0)
        mode = os.environ.get("WANDB_MODE", "offline")
        opening.folder.mkdir(parents=True, exist_ok=True)
        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", _PROJECT), name=opening.run, id=opening.id, dir=str(opening.folder), mode=mode,
            resume="allow" if mode == "online" else None, config=dict(opening.config), settings=settings,
        )  # fmt: skip
        self._tracker.start()
        self._places: set[str] = set()

    def log(self, place: str, tokens: int, values: dict[str, Any], *, point: int) -> None:
        # wandb takes no step twice and none that lies back; each stage is drawn over its own tokens all the same.
        if place not in self._places:
            self._places.add(place)
            self._tracker.tracker.define_metric(f"{place}/*", step_metric=f"{place}/tokens")
        self._tracker.log(values | {f"{place}/tokens": tokens}, step=point)

    def finish(self) -> None:
        self._tracker.finish()


class _Trackio:
    """In the run folder, unless Trackio's own variables name another folder or a server."""

    def __init__(self, opening: Opening):
        from accelerate.tracking import TrackioTracker

        # The name finds the run again, so it holds the id: several runs may share a folder.
        self._tracker = TrackioTracker(
            _PROJECT, name=f"{opening.run}-{opening.id}", resume="allow", config=dict(opening.config), embed=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            self._tracker.start()

    def log(self, place: str, tokens: int, values: dict[str, Any], *, point: int) -> None:
        self._tracker.log(values, step=tokens)

    def finish(self) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # the module's own, which accelerate's leaves out: it would print again when Python ends


TRACKERS: dict[str, Callable[[Opening], Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
