"""`limbeck push`: a finished run or a model folder becomes a folder with a card, and goes to the hub.

run -> what its models' licences allow -> card, recipe and report without this machine's paths -> folder -> hub
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.errors import PublishError
from limbeck.deploy import hub
from limbeck.deploy.card import CardContent, write_card
from limbeck.deploy.folder import Upload, build_folder, choose_files
from limbeck.deploy.inheritance import Decision, decide_licence
from limbeck.deploy.parents import Parent, front_matter, languages_of, licence_files, licences_of, parents_of
from limbeck.deploy.plain import Cleaner, local_paths
from limbeck.evaluate.facts import ReportFacts, read_facts
from limbeck.publishing_words import card_content
from limbeck.recipe_yaml import parse_yaml, read_text

_MOST_REPORT_BYTES = 50_000_000
_MOST_CONFIG_BYTES = 5_000_000


@dataclass(frozen=True)
class Subject:
    """What is to be published: a model folder, and the run it comes from if there is one."""

    model: Path
    run: Path | None
    recipe: dict[str, Any]
    facts: ReportFacts | None


def push(
    place: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    licence: str | None = None,
    accept_licence: bool = False,
    message: str | None = None,
    grid_intensity: float | None = None,
    api: Any = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Publish a run's student, or write what would be published; returns the facts of it.

    place: a run folder, or a model folder. dry_run: write the folder to `out`, and touch no network. licence: the
    student's, when it does not follow from its teacher's. accept_licence: the person has read the licences. grid_intensity:
    grams of CO2 equivalent a kilowatt-hour, for a run whose energy was measured. api: the hub's client (default: the
    person's own). say: is told of warnings.

    Raises: PublishError when there is nothing to publish, a licence stands in the way, a text holds a secret, or the hub
    refuses.
    """
    hub.check_repo_id(repo_id)
    if not dry_run and api is None:
        api = hub.open_hub()
    subject = open_subject(Path(place))
    parents = _parents(subject, api=None if dry_run else api)
    decision = decide_licence(parents, chosen=licence, model_name=repo_id.partition("/")[2])
    beside = licence_files(parents)
    warnings = [*decision.warnings, *_missing_copies(decision, parents, subject, beside)]
    if grid_intensity is not None and _plain(subject).get("run", {}).get("energy_joules") is None:
        warnings.append(
            "--grid-intensity was given, but the energy of this run was not measured: the card states no carbon figure."
        )
    for warning in warnings:
        say(f"warning: {warning}")
    if not dry_run:
        decision.refuse(accepted=accept_licence)
    cleaner = Cleaner(local_paths([subject.recipe, {"run_folder": str(subject.model.absolute().parent)}]))
    cleaned = _cleaned_subject(subject, cleaner)
    content = card_content(
        cleaned,
        repo_id,
        parents=parents,
        decision=decision,
        mark=_mark(subject),
        grid_intensity=grid_intensity,
    )
    with _folder(out, subject, repo_id, dry_run=dry_run) as target:
        upload = build_folder(
            target, model=subject.model, texts=_texts(cleaned, content), beside=beside, cleaner=cleaner
        )
        url = None if dry_run else hub.push_folder(api, upload, repo_id, private=private, message=message)
    return _result(upload, repo_id, decision, parents, warnings, url=url, kept=dry_run or out is not None)


def open_subject(place: Path) -> Subject:
    """A run folder, its `model` folder, or any folder of a saved model.

    Raises: PublishError when it is none of these, or a run that has not finished.
    """
    if not place.is_dir():
        raise PublishError(f"there is no folder {place}. Give the folder of a finished run, or of a saved model.")
    run = place if (place / "recipe.yaml").exists() or (place / "recipe.json").exists() else None
    if run is None and place.absolute().name == "model" and (place.absolute().parent / "recipe.yaml").exists():
        run = place.absolute().parent
    if run is None:
        return Subject(place, None, {}, None)
    if not (run / "report.json").exists() or not (run / "model" / "config.json").exists():
        raise PublishError(
            f"{run} is a run that has not finished: give its `limbeck run` command again, then publish it."
        )
    if (run / "report.json").stat().st_size > _MOST_REPORT_BYTES:
        raise PublishError(
            f"{run / 'report.json'} is larger than {_MOST_REPORT_BYTES:,} bytes; reports have far fewer. Is it the right run?"
        )
    recipe, _ = parse_yaml(read_text(run / "recipe.yaml"), name=str(run / "recipe.yaml"))
    return Subject(run / "model", run, recipe if isinstance(recipe, dict) else {}, read_facts(run / "report.json"))


def _parents(subject: Subject, *, api: Any) -> list[Parent]:
    if subject.run is not None:
        return parents_of(subject.recipe, fetch=lambda name, revision: hub.card_from_hub(name, revision, api=api))
    card = subject.model / "README.md"
    if not card.is_file():
        return [Parent("the model itself", "start")]
    with open(card, "rb") as stream:
        words = front_matter(stream.read(256_000).decode("utf-8", errors="replace"))
    known = "README.md beside its weights" if licences_of(words) else "unknown"
    return [Parent("the model itself", "start", licences_of(words), known, None, languages_of(words), None)]


def _missing_copies(decision: Decision, parents: list[Parent], subject: Subject, beside: list[Path]) -> list[str]:
    """Licences that want a copy of themselves to go with the model, when no licence file is there to go."""
    there = {path.stem.upper()[:7] for path in [*beside, *choose_files(subject.model)[0]]}
    wanted = {row.title for parent in parents for row in parent.licences if row.wants_copy}
    if not wanted or there & {"LICENSE", "LICENCE", "COPYING"}:
        return []
    return [
        f"{', '.join(sorted(wanted))}: a copy of the text goes with the model, and there is none here. Put it as LICENSE into {subject.model}."
    ]


def _plain(subject: Subject) -> dict[str, Any]:
    return {} if subject.facts is None else subject.facts.model_dump(mode="json")


def _cleaned_subject(subject: Subject, cleaner: Cleaner) -> Subject:
    """The same recipe and facts without paths of this machine and without anything like a secret."""
    facts = None
    if subject.facts is not None:
        facts = ReportFacts.model_validate(cleaner.value(_plain(subject)))
        facts.run.recipe = _yaml(cleaner.value(subject.recipe))
    return Subject(subject.model, subject.run, cleaner.value(subject.recipe), facts)


def _texts(subject: Subject, content: CardContent) -> dict[str, str]:
    """What is written into the folder beside the model's own files."""
    texts = {"README.md": write_card(content)}
    if content.recipe:
        texts["recipe.yaml"] = content.recipe
    if content.decision.notices:
        texts["NOTICE.txt"] = "\n".join(content.decision.notices) + "\n"
    if subject.facts is not None:
        from limbeck.evaluate.report import render_html, render_markdown

        texts |= {"report.md": render_markdown(subject.facts), "report.html": render_html(subject.facts)}
    return texts


def _yaml(value: Any) -> str:
    import io

    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def _mark(subject: Subject) -> str:
    """What tells this run from another one on the hub: its name, date and recipe, or the model's configuration."""
    if subject.facts is not None:
        words = f"{subject.facts.run.name}\n{subject.facts.run.date}\n{subject.facts.run.recipe}"
        return hashlib.sha256(words.encode("utf-8", errors="replace")).hexdigest()[:16]
    digest = hashlib.sha256()
    for path in choose_files(subject.model)[0]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.name == "config.json":
            digest.update(path.read_bytes()[:_MOST_CONFIG_BYTES])
    return digest.hexdigest()[:16]


@contextmanager
def _folder(out: Path | None, subject: Subject, repo_id: str, *, dry_run: bool) -> Iterator[Path]:
    """Where the folder is built: where the person says, beside the run when only looked at, else for the moment only."""
    if out is not None:
        yield Path(out)
    elif dry_run:
        yield (subject.run or subject.model.absolute().parent) / f"push-{repo_id.partition('/')[2]}"
    else:
        with tempfile.TemporaryDirectory(prefix="limbeck-push-") as folder:
            yield Path(folder) / "upload"


def _result(
    upload: Upload,
    repo_id: str,
    decision: Decision,
    parents: list[Parent],
    warnings: list[str],
    *,
    url: str | None,
    kept: bool,
) -> dict[str, Any]:
    return {
        "repo_id": repo_id,
        "published": url is not None,
        "url": url,
        "folder": str(upload.folder) if kept else None,
        "licence": None if decision.licence is None else decision.licence.key,
        "licence_chosen": decision.chosen,
        "parents": [
            {
                "name": one.name,
                "role": one.role,
                "licences": ", ".join(row.title for row in one.licences) or "unknown",
                "known_from": one.known_from,
            }
            for one in parents
        ],
        "problems": decision.problems,
        "warnings": warnings,
        "total_bytes": upload.bytes,
        "files": [{"file": name, "bytes": size} for name, size in upload.files.items()],
        "left_out": [{"file": name, "why": why} for name, why in upload.left_out.items()],
    }
