"""Results of tasks as people read them: one row a task, one column a model, and who wins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from limbeck.evaluate.task_results import LEAST_ITEMS

_NAMES = {"acc_norm": "normed", "exact_match": "greedy", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
_LISTED_GROUPS = ("mqar", "passkey")
MEANING = (
    "accuracies in %, ± one standard error; perplexity and bits per byte: lower is better",
    "win, tie, lose: of the first model against that one, on the same items; a win is more than two standard errors of the "
    f"paired difference; with fewer than {LEAST_ITEMS} items always a tie",
)


def table_rows(facts: Mapping[str, Any], *, whole: bool = False) -> list[dict[str, str]]:
    """The table of an examination: task, chance, items, and a cell for each place.

    whole: every task of a group too, not only its average and the sizes of the probes.
    """
    rows = []
    for name, of in _wanted(facts, whole=whole):
        kind = "groups" if of.get("tasks") else "tasks"
        for metric in of["shown"]:
            cells = {place: _cell(facts, place, kind, name, metric) for place in facts["places"]}
            if metric == of["headline"] or any(cell != "-" for cell in cells.values()):
                rows.append(
                    {
                        "task": _title(name, of, metric),
                        "chance": _chance(of["metrics"][metric]),
                        "items": f"{of['items']:,}",
                    }
                    | cells
                )
    return rows


def _wanted(facts: Mapping[str, Any], *, whole: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and facts of the rows in the suite's order; a group stands before its tasks."""
    said: set[str] = set()
    for place in facts["places"].values():
        for name, of in place["tasks"].items():
            group = of["group"]
            if group != name and group in place["groups"] and group not in said:
                said.add(group)
                yield group, place["groups"][group] | {"shown": ["acc"]}
            is_listed = group == name or group not in place["groups"] or group in _LISTED_GROUPS or whole
            if is_listed and name not in said:
                said.add(name)
                yield name, of


def _title(name: str, of: Mapping[str, Any], metric: str) -> str:
    if of.get("tasks"):
        part = "" if of["tasks"] == of["tasks_of_the_group"] else f" of {of['tasks_of_the_group']}"
        return f"{name} (mean of {of['tasks']}{part})"
    indent = "  " if of["group"] in _LISTED_GROUPS else ""
    return f"{indent}{name} {_NAMES[metric]}" if metric in _NAMES else f"{indent}{name}"


def _chance(metric: Mapping[str, Any]) -> str:
    chance = metric["chance"]
    return "-" if chance is None else f"{100 * chance:.1f}"


def _cell(facts: Mapping[str, Any], place: str, kind: str, name: str, metric: str) -> str:
    found = facts["places"][place][kind].get(name, {}).get("metrics", {}).get(metric)
    if found is None:
        return "-"
    value, error = found["value"], found["standard_error"]
    if found["chance"] is not None:
        words = f"{100 * value:.1f}" + ("" if error is None else f" ±{100 * error:.1f}")
    else:
        words = f"{value:.4g}" + ("" if error is None else f" ±{error:.2g}")
    other = facts["comparison"]["others"].get(place, {})
    verdict = other.get(kind, {}).get(name, {}).get(metric, {}).get("verdict", "")
    return f"{words} {verdict}".rstrip()


def score_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How often the first place wins, ties and loses against each other one; a group counts once."""
    first = facts["comparison"]["first"]
    return [
        {"first": first, "against": place} | {key: of[key] for key in ("wins", "ties", "losses")}
        for place, of in facts["comparison"]["others"].items()
    ]


def contamination_rows(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Tasks of which the training text holds pieces: how much, and the score without those items."""
    rows = []
    for place, of in facts["places"].items():
        for task, found in of.get("contamination", {}).get("tasks", {}).items():
            if found["touched"]:
                clean = found["clean_value"]
                rows.append(
                    {
                        "place": place, "task": task, "touched": f"{found['touched']} of {found['items']}",
                        "all": _plain(of["tasks"][task]["metrics"][found["metric"]]["value"]), "clean": "-" if clean is None else _plain(clean),
                    }
                )  # fmt: skip
    return rows


def _plain(value: float) -> str:
    return f"{value:.4g}"


def notes(facts: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know: meaning, limits, contamination, what was not run and why."""
    protocol = facts["protocol"]
    lines = [*MEANING[: 1 + bool(facts["comparison"]["others"])]]
    lines.append(f"lm-eval {protocol['lm_eval']}, no examples in the prompt; descriptions: {protocol['descriptions']}")
    if protocol["limit"]:
        lines.append(f"only the first {protocol['limit']} items of each task (--limit): a try, no result")
    lines += [
        _contamination_note(place, of["contamination"])
        for place, of in facts["places"].items()
        if "contamination" in of
    ]
    lines += [f"not run: {line}" for line in grouped_reasons(facts["not_run"])]
    return lines + [
        f"failed: {place}: {line}" for place, of in facts["places"].items() for line in grouped_reasons(of["failed"])
    ]


def grouped_reasons(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the tasks it keeps from being run."""
    tasks: dict[str, list[str]] = {}
    for task, reason in reasons.items():
        tasks.setdefault(reason, []).append(task)
    return [f"{_some(names)}: {reason}" for reason, names in tasks.items()]


def _contamination_note(place: str, of: Mapping[str, Any]) -> str:
    if "not_checked" in of:
        return f"{place}: contamination was not checked: {of['not_checked']}"
    touched = sum(task["touched"] > 0 for task in of["tasks"].values())
    part = "" if of["is_whole"] else " (the beginning of it)"
    return (
        f"{place}: {of['characters']:,} characters of its training text{part} were searched for the items' runs of "
        f"{of['run_words']} words: {touched} of {len(of['tasks'])} tasks are touched"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def markdown(facts: Mapping[str, Any]) -> str:
    """The tables and notes as a page of Markdown."""
    parts = ["# Tasks", _table(table_rows(facts))]
    if scores := score_rows(facts):
        parts.append(_table([{key: str(value) for key, value in row.items()} for row in scores]))
    parts.append("\n".join(f"- {line}" for line in notes(facts)))
    if touched := contamination_rows(facts):
        parts += ["## Items that the training text touches", _table(touched)]
    parts += ["## Every task", _table(table_rows(facts, whole=True))]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The tables and notes of an examination, for a terminal."""
    shown: dict[str, Any] = {"tasks": table_rows(facts)}
    if scores := score_rows(facts):
        shown["first against the others"] = scores
    if touched := contamination_rows(facts):
        shown["touched by the training text"] = touched
    return shown | {"notes": notes(facts)}


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([row.get(column, "-").replace("|", "\\|") for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
