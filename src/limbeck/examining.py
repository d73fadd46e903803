"""Examine models on a suite of tasks: `limbeck eval PLACE --suite tiny`, `limbeck compare A B --suite tiny`.

What was answered once is kept, task by task and batch by batch, under the model's fingerprint: the same command continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from limbeck.core.errors import DataError, EnvironmentFault, EvaluationError, LimbeckError
from limbeck.core.files import read_json, write_atomic, write_json
from limbeck.core.runtime import pick_device
from limbeck.data.text import TextSource, read_documents
from limbeck.evaluate import harness
from limbeck.evaluate.contamination import (
    LEAST_WORDS,
    MOST_CHARACTERS,
    RUN_WORDS,
    OverlapIndex,
    Touched,
    contamination_facts,
)  # fmt: skip
from limbeck.evaluate.efficiency import parameter_facts
from limbeck.evaluate.kept_answers import KeptAnswers
from limbeck.evaluate.kept_results import read_result, version_of, write_result
from limbeck.evaluate.suite import choose_tasks, suite_tasks
from limbeck.evaluate.task_folder import OtherItems, ReadyTask, prepare_tasks
from limbeck.evaluate.task_progress import TaskProgress
from limbeck.evaluate.task_results import Item, by_place, compare_items, group_facts, mean_difference, task_facts
from limbeck.evaluate.task_tables import grouped_reasons, markdown
from limbeck.models.teacher import LoadedTeacher
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.places import arm_of, open_place, run_of

_KEPT = 1
_PIECE_ELEMENTS = 2**22
_MOST_ATTEMPTS, _LONGEST_WAIT_SECONDS = 10, 0.5


@dataclass
class _Candidate:
    """A place and what is known of it. home: where its answers are kept. items: of each task that was run. not_kept: why
    something could not be written."""

    place: str
    label: str
    home: Path
    run: Path | None
    loaded: LoadedTeacher
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)
    items: dict[str, list[Item]] = field(default_factory=dict)
    not_kept: list[str] = field(default_factory=list)


def examine(
    places: Sequence[str],
    *,
    suite: str = "tiny",
    tasks: Sequence[str] = (),
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    cache: Path | None = None,
    keep_tasks: Path | None = None,
    device: str | torch.device = "auto",
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Run a suite of tasks on one or more places, and compare the first with the others on the same items.

    tasks: names of tasks or groups; none for the whole suite. data: a folder with the tasks' files; what is not there is
    asked of the hub. limit: only the first so many items of each task. cache: where answers and results are kept (default:
    the run folder's `evaluation/tasks`, else `~/.cache/limbeck/tasks`). keep_tasks: where the descriptions for lm-eval are
    written (default: below the cache). say: told a line now and then.

    Returns facts: `places` (by a short name: per task and group value, standard error, chance, the score corrected for
    chance, number of items; failed tasks with the reason; contamination where a training text is known), `comparison`
    (paired, with win, tie or lose of the first), `not_run` (tasks without data, with the reason), `failed` (what the caller
    should take as a failure: nothing could be run, or something that was asked for by name, or results could not be written),
    `protocol`.

    Raises: EvaluationError for unknown names; EnvironmentFault when lm-eval is missing; whatever a place is refused with.
    """
    chosen = choose_tasks(suite, tasks)
    version = harness.harness_version()
    where = pick_device(device) if isinstance(device, str) else device
    candidates = [_open(place, label, cache, where) for place, label in zip(places, _labels(places), strict=True)]
    folder = keep_tasks or candidates[0].home / "descriptions"
    try:
        ready, missing = prepare_tasks(chosen.values(), data=data, folder=folder)
    except (EnvironmentFault, OSError) as error:
        if isinstance(error, EnvironmentFault) and not isinstance(error.__cause__, OSError):
            raise
        raise EnvironmentFault(f"{error} Another folder for what is kept: --cache DIR.") from error
    for line in grouped_reasons(missing):
        say(f"not run: {line}")
    settings = {"lm_eval": version, "limit": limit, "batch_size": batch_size, "device": where.type}
    progress = TaskProgress(say, {name: of.items for name, of in ready.items()}, limit=limit, places=len(candidates))
    for line in dict.fromkeys(line for candidate in candidates for line in _other_versions(candidate, version)):
        say(line)
    try:
        for candidate in candidates:
            _run_tasks(candidate, ready, settings, progress)
            candidate.facts |= {"groups": _groups(candidate.facts["tasks"], suite)}
    except (KeyboardInterrupt, SystemExit):
        for line in _done_so_far(candidates, len(ready)):
            say(line)
        raise
    searched: dict[Any, tuple[Touched, list[str]]] = {}
    for candidate in candidates:
        if (found := _contamination(candidate, ready, searched)) is not None:
            candidate.facts["contamination"] = found
    facts = {
        "suite": suite, "protocol": settings | {"descriptions": str(folder), "few_shot": 0},
        "places": {candidate.label: candidate.facts for candidate in candidates},
        "comparison": _compare(candidates), "not_run": missing, "failed": [],
    }  # fmt: skip
    failed = facts["failed"] = _failures(facts, tasks, suite)
    failed += _keep_facts(candidates, facts, cache)
    return facts


def _labels(places: Sequence[str]) -> list[str]:
    """A short name for each place: its last part where that is enough to tell them apart."""
    if len(set(places)) != len(places):
        raise EvaluationError("a place is given twice; give each model once.")
    short = [_name_of(place) for place in places]
    return [name if short.count(name) == 1 else place for name, place in zip(short, places, strict=True)]


def _name_of(place: str) -> str:
    """The last part of a place; of `.` and `..` that of the folder they mean."""
    name = Path(place.rstrip("/")).name
    return (Path(place).resolve().name if name in ("", "..") else name) or place


def _open(place: str, label: str, cache: Path | None, device: torch.device) -> _Candidate:
    run = run_of(Path(place))
    loaded = open_place(place, device=device)
    home = cache or (_home_of_run(run) if run else _user_cache())
    fingerprint = model_fingerprint(loaded)
    facts: dict[str, Any] = {
        "place": place,
        "arm": None if run is None else arm_of(run, Path(place)),
        "fingerprint": fingerprint,
    }
    facts |= {**parameter_facts(loaded.model), "tasks": {}, "failed": {}}
    return _Candidate(place, label, home, run, loaded, fingerprint, facts)


def _home_of_run(run: Path) -> Path:
    return run / "evaluation" / "tasks"


def _user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck" / "tasks"
    except RuntimeError as error:
        raise EnvironmentFault(
            "this account has no home folder, so there is no cache for answers to tasks. Say where to keep them: --cache DIR."
        ) from error


def model_fingerprint(loaded: LoadedTeacher) -> str:
    """SHA-256 of every weight, the configuration and the tokenizer, so that kept answers are never another model's."""
    digest = hashlib.sha256(f"{loaded.fingerprint} {tokenizer_fingerprint(loaded.tokenizer)}".encode())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in tensor.detach().reshape(-1).split(_PIECE_ELEMENTS):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _run_tasks(
    candidate: _Candidate, ready: Mapping[str, ReadyTask], settings: Mapping[str, Any], progress: TaskProgress
) -> None:
    """Answers of one model to every task; a task that fails is written down, and the others go on."""
    folder = Path(candidate.facts.setdefault("kept", str(candidate.home / "kept" / candidate.fingerprint[:16])))
    lm, from_before = None, 0
    progress.begin(candidate.label)
    for name, task in ready.items():
        words = json.dumps([_KEPT, candidate.fingerprint, task.sha256, settings], sort_keys=True)
        key = hashlib.sha256(words.encode()).hexdigest()
        file = folder / f"{name}-{key[:16]}.json"
        score = read_result(file, key)
        is_kept = score is not None
        from_before += is_kept
        try:
            if score is None:
                lm = lm or _wrap(candidate, settings)
                score = _ask(lm, task, file, key, settings, progress, candidate.not_kept)
            candidate.facts["tasks"][name] = facts = _facts_of(task, score)
            candidate.items[name] = score["items"]
        except Exception as error:  # whatever a model does, the others' results are kept
            said = str(error) if isinstance(error, LimbeckError | RuntimeError) else f"{type(error).__name__}: {error}"
            candidate.facts["failed"][name] = " ".join(said.split())
            progress.end(name, f"failed: {candidate.facts['failed'][name]}")
            continue
        if is_kept:
            progress.skip()
        else:
            progress.end(name, f"{facts['headline']} {facts['metrics'][facts['headline']]['value']:.4g}")
    if from_before:
        progress.tell(f"{candidate.label}: {from_before} of {len(ready)} tasks are kept from before, in {folder}")


def _other_versions(candidate: _Candidate, version: str) -> list[str]:
    """What is to be said of results that another lm-eval gave: they are neither used nor touched."""
    folder = candidate.home / "kept" / candidate.fingerprint[:16]
    found = {said for file in folder.glob("*.json") if (said := version_of(file)) not in (None, version)}
    return [
        f"{candidate.label}: results of lm-eval {', '.join(sorted(map(str, found)))} are kept as well; they are not mixed with those of "
        f"{version}, which is installed: its tasks are asked anew"
    ] if found else []  # fmt: skip


def _done_so_far(candidates: Sequence[_Candidate], tasks: int) -> list[str]:
    """What an evaluation that is stopped has to show; all of it is kept."""
    lines = []
    for candidate in (one for one in candidates if one.facts["tasks"]):
        found = candidate.facts["tasks"]
        figures = ", ".join(
            f"{name} {of['metrics'][of['headline']]['value']:.4g}" for name, of in list(found.items())[:12]
        )
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        lines.append(f"{candidate.label}: {len(found)} of {tasks} tasks are done and kept: {figures}{more}")
    return lines


def _wrap(candidate: _Candidate, settings: Mapping[str, Any]) -> Any:
    loaded = candidate.loaded
    return harness.wrap_model(
        loaded.model, loaded.tokenizer, device=loaded.model.device, batch_size=settings["batch_size"]
    )


def _ask(
    lm: Any, task: ReadyTask, file: Path, key: str, settings: Mapping[str, Any], progress: TaskProgress,
    not_kept: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The model's score on a task, which is kept; where that cannot be, as on a full disk, it is said and goes on."""
    answers = file.with_suffix(".answers.jsonl")
    try:
        score = asdict(_evaluate(lm, task, settings["limit"], progress.watching(KeptAnswers(answers))))
    except EnvironmentFault as error:
        if not isinstance(error.__cause__, OSError):
            raise
        not_kept.append(str(error))
        score = asdict(_evaluate(lm, task, settings["limit"], None))
    try:
        write_result(file, score, key=key)
        answers.unlink(missing_ok=True)
    except (EnvironmentFault, OSError) as error:
        not_kept.append(str(error))
    return score


def _evaluate(lm: Any, task: ReadyTask, limit: int | None, kept: KeptAnswers | None) -> harness.TaskScore:
    """The folder of descriptions may be shared with other processes: its items are put back until these are read."""
    for attempt in range(_MOST_ATTEMPTS):
        task.write()
        try:
            return harness.evaluate_task(
                lm, task.task.name, folder=task.folder, limit=limit, kept=kept, check=task.check
            )
        except OtherItems:
            if attempt == _MOST_ATTEMPTS - 1:
                raise
            time.sleep(random.SystemRandom().uniform(0, _LONGEST_WAIT_SECONDS))
    raise AssertionError


def _facts_of(task: ReadyTask, score: Mapping[str, Any]) -> dict[str, Any]:
    facts = {
        "group": task.task.group, "shown": list(task.task.metrics), "version": score["version"],
        "seconds": score["seconds"], "data": task.items.source, "data_sha256": task.items.sha256,
    }  # fmt: skip
    facts |= task_facts(
        metrics=task.task.metrics, items=score["items"], said=score["metrics"], said_errors=score["standard_errors"],
        higher_is_better=score["higher_is_better"], chance=task.items.chance(len(score["items"])),
    )  # fmt: skip
    for key in ("depth", "query"):
        if key in task.items.rows[0]:
            facts[f"acc_by_{key}"] = by_place(task.items.rows, score["items"], key)
    return facts


def _groups(tasks: Mapping[str, dict[str, Any]], suite: str) -> dict[str, Any]:
    whole = [task.group for task in suite_tasks(suite).values()]
    members: dict[str, dict[str, Any]] = {}
    for name, facts in tasks.items():
        members.setdefault(facts["group"], {})[name] = facts
    return {group: group_facts(of, whole=whole.count(group)) for group, of in members.items() if len(of) > 1}


def _compare(candidates: Sequence[_Candidate]) -> dict[str, Any]:
    first = candidates[0]
    return {"first": first.label, "others": {other.label: _against(first, other) for other in candidates[1:]}}


def _against(first: _Candidate, other: _Candidate) -> dict[str, Any]:
    """Paired differences on what both were scored on; a group counts once."""
    tasks = {}
    members: dict[str, list[Any]] = {}
    for name, facts in first.facts["tasks"].items():
        if name in other.items:
            found = compare_items(first.items[name], other.items[name], facts["metrics"])
            tasks[name] = {metric: asdict(of) for metric, of in found.items()}
            if facts["group"] in first.facts["groups"]:
                members.setdefault(facts["group"], []).append(found["acc"])
    groups = {group: {"acc": asdict(mean_difference(of)) | {"tasks": len(of)}} for group, of in members.items()}
    alone = [
        of[first.facts["tasks"][name]["headline"]]
        for name, of in tasks.items()
        if first.facts["tasks"][name]["group"] not in groups
    ]
    verdicts = [of["verdict"] for of in [*alone, *(group["acc"] for group in groups.values())]]
    counts = {"wins": verdicts.count("win"), "ties": verdicts.count("tie"), "losses": verdicts.count("lose")}
    return {"tasks": tasks, "groups": groups} | counts


def _contamination(
    candidate: _Candidate, ready: Mapping[str, ReadyTask], searched: dict[Any, tuple[Touched, list[str]]]
) -> dict[str, Any] | None:
    """What of the items stands in the text the run was trained on; None where no training text is known.

    searched: what was found before, so that the arms of a run do not read its text again.
    """
    if candidate.run is None:
        return None
    texts = {name: ready[name].items.texts[: len(items)] for name, items in candidate.items.items()}
    texts = {name: of for name, of in texts.items() if any(map(any, of))}
    if not texts:
        return None
    key = (candidate.run, *((name, len(of)) for name, of in texts.items()))
    try:
        touched, sources = searched[key] = searched.get(key) or _search(candidate.run, texts)
    except (DataError, KeyError, TypeError) as error:
        return {"not_checked": f"the training text cannot be read: {error}"}
    metrics = {name: candidate.facts["tasks"][name]["headline"] for name in texts}
    return {
        "run_words": RUN_WORDS, "least_words": LEAST_WORDS, "characters": touched.characters, "most_characters": MOST_CHARACTERS,
        "is_whole": touched.is_whole, "sources": sources,
        "tasks": {name: contamination_facts(name, candidate.items[name], metrics[name], touched) for name in texts},
    }  # fmt: skip


def _search(run: Path, texts: Mapping[str, Sequence[tuple[str, ...]]]) -> tuple[Touched, list[str]]:
    sources = [TextSource(**words) for words in read_json(run / "recipe.json")["data"]["train"]]
    documents = (document for source in sources for document in read_documents(source))
    return OverlapIndex.build(texts).touched(documents), [source.source for source in sources]


def _failures(facts: Mapping[str, Any], asked: Sequence[str], suite: str) -> list[str]:
    """What makes the command fail: nothing could be run for a place, or nothing of what was asked for by name."""
    failed = []
    for label, of in facts["places"].items():
        reasons = {**facts["not_run"], **of["failed"]}
        if not of["tasks"]:
            failed.append(f"{label}: no task could be run. {next(iter(reasons.values()), '')}".strip())
            continue
        for name in asked:
            members = list(choose_tasks(suite, [name]))
            if not any(member in of["tasks"] for member in members):
                failed.append(f"{label}: {name} was not run. {reasons.get(members[0], '')}".strip())
    return failed


def _keep_facts(candidates: Sequence[_Candidate], facts: Mapping[str, Any], cache: Path | None) -> list[str]:
    """Write the facts, and say what of this or of earlier results could not be written."""
    try:
        _write(candidates, facts, cache)
    except (EnvironmentFault, OSError) as error:
        candidates[0].not_kept.append(str(error))
    return [f"not kept: {line}" for line in dict.fromkeys(line for of in candidates for line in of.not_kept[:1])]


def _write(candidates: Sequence[_Candidate], facts: Mapping[str, Any], cache: Path | None) -> None:
    """Results beside what was kept: one file a place, the comparison, and the tables as Markdown."""
    for home in dict.fromkeys(of.home for of in candidates if cache is not None or of.run is not None):
        for candidate in candidates:
            if candidate.home == home:
                name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in candidate.label)
                name = f"{name}-1" if name == "comparison" else name  # that is the file of the whole comparison
                write_json(home / f"{name}.json", facts["protocol"] | {"not_run": facts["not_run"]} | candidate.facts)
        if len(candidates) > 1:
            write_json(home / "comparison.json", facts)
        is_of_a_run = any(home == _home_of_run(candidate.run) for candidate in candidates if candidate.run)
        write_atomic(home.with_suffix(".md") if is_of_a_run else home / "tasks.md", markdown(facts))
