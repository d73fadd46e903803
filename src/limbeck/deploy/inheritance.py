"""Under which licence a student may be handed on, given those of the models it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from limbeck.core.errors import PublishError
from limbeck.deploy.licences import NOT_ADVICE, Licence, find_licence, missing_duties, unlisted_licence
from limbeck.deploy.parents import Parent


@dataclass(frozen=True)
class Decision:
    """What was found about a student's licence.

    licence: the student's, None when none can be said. problems: why it must not be published without a further word
    of the person (`--accept-licence`). needs_licence: why a licence has to be named first (`--licence`). duties: what the
    licences ask of those who hand the student on. notices: texts for a NOTICE file. shows: sentences the card must show.
    """

    licence: Licence | None
    chosen: bool
    problems: list[str] = field(default_factory=list)
    needs_licence: str | None = None
    duties: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    shows: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """Everything to be said aloud."""
        said = [*([self.needs_licence] if self.needs_licence else []), *self.problems]
        return [*said, NOT_ADVICE] if said else []

    def refuse(self, *, accepted: bool) -> None:
        """Raises: PublishError when something stands in the way that was not accepted."""
        if self.needs_licence:
            raise PublishError(self.needs_licence)
        if self.problems and not accepted:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            raise PublishError(
                f"the licence stands in the way:\n{lines}\n{NOT_ADVICE} When you have read it and may publish all the same, "
                "give --accept-licence; --dry-run writes the card without publishing."
            )


def decide_licence(parents: Sequence[Parent], *, chosen: str | None, model_name: str) -> Decision:
    """Weigh the licences of a student's parents, and the one asked for if there is one.

    chosen: an SPDX or hub identifier, or any name of an own licence. model_name: the name after the owner.
    """
    rows = _distinct([row for parent in parents for row in parent.licences])
    wanted = None if chosen is None else find_licence(chosen) or unlisted_licence(chosen)
    problems = [problem for parent in parents for problem in _teaching_problems(parent, parents)]
    if wanted is not None:
        problems += [problem for parent in parents for problem in _permissive_problems(parent, wanted)]
    problems += [
        f'{row.title}: a model made with it has a name that begins with "{row.begins}"; "{model_name}" does not. '
        f"Take a name such as {row.begins.replace(' ', '-')}-{model_name}"
        for row in rows
        if row.begins and not model_name.replace("-", " ").replace("_", " ").lower().startswith(row.begins.lower())
    ]
    inherited, missing = _inherit(parents, rows)
    duties = [f"{row.title}: {row.about} ({row.source})" for row in rows]
    return Decision(
        wanted or inherited, wanted is not None, problems, None if wanted else missing, duties,
        [row.notice for row in rows if row.notice], [row.shows for row in rows if row.shows],
    )  # fmt: skip


def _inherit(parents: Sequence[Parent], rows: list[Licence]) -> tuple[Licence | None, str | None]:
    """The licence the student has from its parents, or why none follows from them."""
    if not parents:
        return (
            None,
            "nobody's weights or words are in this model as far as is known, so its licence is yours to choose: give --licence.",
        )
    unknown = [parent.name for parent in parents if not parent.licences]
    if unknown:
        return None, (
            f"the licence of {', '.join(unknown)} is not known: its card names none, or there is no card here. Look it up, and give "
            "--licence with the one the student may stand under."
        )
    models = [row for row in rows if not row.title.startswith("terms of ")]
    if not models:
        return (
            None,
            f"{rows[0].title} are no licence for a model: give --licence with the one the student shall stand under.",
        )
    for row in models:
        if all(not missing_duties(other, row) for other in models):
            return row, None
    titles = ", ".join(row.title for row in models)
    return (
        None,
        f"the models it comes from stand under licences of which none covers the others ({titles}): give --licence.",
    )


def _teaching_problems(parent: Parent, parents: Sequence[Parent]) -> list[str]:
    found = []
    for row in parent.licences:
        if row.rule not in ("forbidden", "limited", "check"):
            continue
        loud = {"forbidden": "FORBIDS", "limited": "LIMITS", "check": "MAY LIMIT"}[row.rule]
        kin = ""
        if row.own_kind_free and any(other.starts and row in other.licences for other in parents):
            kin = ". The student began with weights of that family, so it may count as derived from it: check"
        found.append(f"{row.title} ({parent.name}) {loud} distillation: it {row.about}{kin} ({row.source})")
    return found


def _permissive_problems(parent: Parent, wanted: Licence) -> list[str]:
    found = []
    for row in parent.licences:
        lost = missing_duties(row, wanted)
        if lost:
            found.append(
                f"{wanted.title} is more permissive than {row.title} of {parent.name}: it does not carry on {', '.join(lost)}"
            )
    return found


def _distinct(rows: list[Licence]) -> list[Licence]:
    return list({row.key: row for row in rows}.values())
