"""A paper's tables again: its figure in one column, ours beside it, and what would be needed where ours is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck import evaluation, examining
from limbeck.core.errors import EvaluationError, LimbeckError, unknown_name
from limbeck.core.files import read_json, write_atomic, write_json
from limbeck.evaluate.published import PAPERS, Paper, Published
from limbeck.places import STAGE_END, run_of

_NEEDED = {
    "matched": "a run of runtime.keep_stages=true (--run FOLDER), or --model matched=PLACE",
    "pretrained": "a run with the control from_scratch (--run FOLDER), or --model pretrained=PLACE",
}


def _model_needed(role: str) -> str:
    return _NEEDED.get(role, f"a finished run (--run FOLDER), or --model {role}=PLACE")


def find_paper(name: str) -> Paper:
    """A paper by its short name. Raises: EvaluationError when it is unknown."""
    if name not in PAPERS:
        raise EvaluationError(f"{unknown_name('paper', name, PAPERS)}.")
    return PAPERS[name]


def places_of_run(run: Path) -> dict[str, str]:
    """Which model of a run stands in which row: the teacher, the control from scratch, the student after `align`, the student.

    Rows that the run does not have are left out. Raises: EvaluationError when the folder is no run.
    """
    if run_of(run) != run:
        raise EvaluationError(f"--run: {run} is not a run folder. Give the folder of a finished `limbeck run`.")
    recipe = read_json(run / "recipe.json")
    matched = [stage["name"] for stage in recipe["stages"] if stage["kind"] == "align"]
    places = {"pretrained": run / "arms" / "from_scratch", "tuned": run}
    if matched:
        places["matched"] = run / "arms" / "student" / matched[-1]
    there = {"pretrained": "final", "matched": STAGE_END, "tuned": "model"}
    found = {role: str(place) for role, place in places.items() if (place / there[role]).is_dir()}
    teacher = (recipe.get("teacher") or {}).get("source")
    return found | ({"teacher": teacher} if isinstance(teacher, str) else {})


def reproduce(
    name: str,
    *,
    models: Mapping[str, str],
    texts: Mapping[str, str],
    data: Path | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    context_tokens: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure what can be measured of a paper's tables.

    models: a place for each role of the paper (see `Paper.models`); texts: a source for each of its texts; data: a folder
    of task files, None for the hub. Roles, texts and tasks that are missing get the words of what they need.

    Returns `paper`, `perplexity` and `tasks`: rows with the role, the column, the published figure with its source, and ours.
    Raises: EvaluationError for names that the paper does not have.
    """
    paper = find_paper(name)
    _check_names("model", models, paper.models)
    _check_names("text", texts, paper.texts)
    perplexity = [
        _row(paper, role, text) | _perplexity(role, models.get(role), text, texts.get(text), max_tokens, context_tokens, device)
        for role in paper.models
        for text in paper.texts
    ]  # fmt: skip
    scores = _task_scores(paper, models, data=data, limit=limit, batch_size=batch_size, device=device, say=say)
    tasks = [
        _row(paper, role, task) | {"metric": about.metric, "chance": about.chance, "note": about.note} | scores[role, task]
        for role in paper.models
        for task, about in paper.tasks.items()
    ]  # fmt: skip
    about = {"name": name, "title": paper.title, "source": paper.source, "models": paper.models}
    notes = [] if _is_papers_teacher(paper, models) else [_other_teacher(paper, models.get("teacher"))]
    return {"paper": about, "places": dict(models), "notes": notes, "perplexity": perplexity, "tasks": tasks}


def _is_papers_teacher(paper: Paper, models: Mapping[str, str]) -> bool:
    return Path(models.get("teacher", "")).name.lower() == Path(paper.teacher).name


def _other_teacher(paper: Paper, place: str | None) -> str:
    ours = "no teacher is given" if place is None else f"the teacher here is {place}"
    return (
        f"The paper's teacher is {paper.teacher}; {ours}. Published and measured figures are of different models: they can be "
        "compared in their order, not in their size."
    )


def _check_names(kind: str, given: Mapping[str, str], known: Mapping[str, str]) -> None:
    for name in given:
        if name not in known:
            raise EvaluationError(f"--{kind}: {unknown_name(kind, name, known)}.")


def _row(paper: Paper, role: str, column: str) -> dict[str, Any]:
    published: Published = paper.published(role, column)
    return {"role": role, "column": column, "published": published.value, "published_source": published.source}


def _perplexity(
    role: str, place: str | None, name: str, text: str | None, max_tokens: int | None, context: int | None, device: str
) -> dict[str, Any]:
    needs = []
    if place is None:
        needs.append(_model_needed(role))
    if text is None:
        needs.append(f"--text {name}=FILE")
    if needs:
        return _missing(" and ".join(needs))
    assert place is not None
    assert text is not None
    try:
        facts = evaluation.evaluate_place(
            place, texts=[text], max_tokens=max_tokens, context_tokens=context, device=device
        )
    except LimbeckError as error:
        return _missing(str(error))
    score = facts["texts"][0]
    return {
        "ours": score["perplexity"], "standard_error": _perplexity_error(score), "bits_per_byte": score["bits_per_byte"],
        "tokens": score["tokens"], "protocol": score["protocol"],
    }  # fmt: skip


def _perplexity_error(score: Mapping[str, Any]) -> float | None:
    nats = score["standard_error_nats"]
    return None if nats is None else nats * score["perplexity"]


def _missing(needs: str) -> dict[str, Any]:
    return {"ours": None, "standard_error": None, "needs": needs}


def _task_scores(
    paper: Paper, models: Mapping[str, str], *, data: Path | None, limit: int | None, batch_size: int, device: str,
    say: Callable[[str], None],
) -> dict[tuple[str, str], dict[str, Any]]:  # fmt: skip
    found = {
        (role, task): _missing(_model_needed(role))
        for role in paper.models if role not in models
        for task in paper.tasks
    }  # fmt: skip
    if models:
        places = list(dict.fromkeys(models.values()))
        facts = examining.examine(
            places, tasks=list(paper.tasks), data=data, limit=limit, batch_size=batch_size, device=device, say=say
        )
        by_place = {of["place"]: of for of in facts["places"].values()}
        for role, place in models.items():
            for task in paper.tasks:
                found[role, task] = _score(by_place[place], facts["not_run"], task, paper.tasks[task].metric)
    return found


def _score(of: Mapping[str, Any], not_run: Mapping[str, str], task: str, metric: str) -> dict[str, Any]:
    if task not in of["tasks"]:
        return _missing(of["failed"].get(task) or not_run.get(task, "the task's data"))
    score = of["tasks"][task]["metrics"][metric]
    return {"ours": score["value"], "standard_error": score["standard_error"], "items": of["tasks"][task]["items"]}


def write_tables(facts: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the tables as JSON and as Markdown. Returns the files."""
    name = facts["paper"]["name"]
    files = [out / f"{name}.json", out / f"{name}.md"]
    out.mkdir(parents=True, exist_ok=True)
    write_json(files[0], dict(facts))
    write_atomic(files[1], as_markdown(facts))
    return files


def as_markdown(facts: Mapping[str, Any]) -> str:
    """The tables as a page: published beside ours, sources and needs as numbered notes."""
    paper = facts["paper"]
    notes: list[str] = []
    lines = [
        f"# {paper['title']}",
        "",
        f"{paper['source']}. Ours are measured by the command that wrote this page.",
        "",
    ]
    lines += [line for note in facts["notes"] for line in (note, "")]
    for title, key in (("Perplexity", "perplexity"), ("Tasks", "tasks")):
        lines += [f"## {title}", "", *_markdown_table(paper["models"], facts[key], notes), ""]
    return "\n".join([*lines, *[f"{number}. {note}" for number, note in enumerate(notes, 1)]]) + "\n"


def _markdown_table(models: Mapping[str, str], rows: Sequence[Mapping[str, Any]], notes: list[str]) -> list[str]:
    columns = list(dict.fromkeys(row["column"] for row in rows))
    head = ["model"] + [f"{column}, {whose}" for column in columns for whose in ("published", "ours")]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for role, called in models.items():
        cells = []
        for row in (row for row in rows if row["role"] == role):
            cells += [_published_cell(row, notes), _our_cell(row, notes)]
        lines.append("| " + " | ".join([called, *cells]) + " |")
    return lines


def _published_cell(row: Mapping[str, Any], notes: list[str]) -> str:
    mark = _note(row["published_source"], notes)
    return f"not confirmed {mark}" if row["published"] is None else f"{row['published']:g} {mark}"


def _our_cell(row: Mapping[str, Any], notes: list[str]) -> str:
    marks = _note(row["note"], notes) if row.get("note") else ""
    if row["ours"] is None:
        return f"not run here {_note('needs ' + row['needs'], notes)}"
    error = row["standard_error"]
    spread = "" if error is None else f" ± {error:.3g}"
    return f"{row['ours']:.4g}{spread} {marks}".strip()


def _note(text: str, notes: list[str]) -> str:
    if text not in notes:
        notes.append(text)
    return f"({notes.index(text) + 1})"
