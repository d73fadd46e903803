"""What papers report, as far as it could be confirmed, with the place where it stands.

A figure that nobody here could read at its source is None and says so: a number out of memory is worse than a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

UNREAD = "not confirmed: the paper's table could not be read when this was written"
PYTHIA_RESULTS = "EleutherAI's own zero-shot results of Pythia-70M (v1, step 143000; an older harness, task version 0)"
AUTHORS_PAGE = "a co-author's project page, which rounds to two digits"


@dataclass(frozen=True)
class Published:
    """A figure from the literature. value: as printed, None where it could not be confirmed. source: where it stands."""

    value: float | None
    source: str


@dataclass(frozen=True)
class PaperTask:
    """A task of a paper's table: the harness's name for it and its metric, and what a model that knows nothing scores.

    note: what must be known before the figures are believed.
    """

    task: str
    metric: str
    chance: float | None
    note: str = ""


@dataclass(frozen=True)
class Paper:
    """One paper's tables: rows are models, columns are texts or tasks.

    models: by the name of their role, what the paper calls them. teacher: a hub id of the paper's teacher: with another one
    the published figures are not of the same models. figures: by (role, column).
    """

    title: str
    source: str
    teacher: str
    models: dict[str, str]
    texts: dict[str, str]
    tasks: dict[str, PaperTask]
    figures: dict[tuple[str, str], Published]

    def published(self, role: str, column: str) -> Published:
        """The paper's figure for a model and a text or task."""
        return self.figures.get((role, column), Published(None, UNREAD))


_NEAR_CHANCE = "a model of this size is near chance: differences here are mostly noise"

SCAVENGING_HYENA = Paper(
    title="Scavenging Hyena: Distilling Transformers into Long Convolution Models",
    source="arXiv:2401.17574",
    teacher="EleutherAI/pythia-70m",
    models={
        "teacher": "Pythia-70M, the teacher",
        "pretrained": "Hyena, pre-trained from scratch",
        "matched": "Hyena student after matching the layers (MSE)",
        "tuned": "Hyena student after fine-tuning",
    },
    texts={"wikitext": "WikiText", "openwebtext": "OpenWebText"},
    tasks={
        "arc_easy": PaperTask("arc_easy", "acc", 0.25),
        "arc_challenge": PaperTask("arc_challenge", "acc_norm", 0.25, _NEAR_CHANCE),
        "lambada_openai": PaperTask("lambada_openai", "acc", 0.0),
        "logiqa": PaperTask("logiqa", "acc_norm", 0.25, _NEAR_CHANCE),
        "piqa": PaperTask("piqa", "acc", 0.5),
        "sciq": PaperTask("sciq", "acc", 0.25),
        "winogrande": PaperTask("winogrande", "acc", 0.5, _NEAR_CHANCE),
        "wsc": PaperTask(
            "wsc", "acc", 0.5,
            "104 items, 38 of one answer and 66 of the other: .365 and .635 are what saying always the same scores",
        ),
    },
    figures={
        ("teacher", "arc_easy"): Published(0.3737, PYTHIA_RESULTS),
        ("teacher", "arc_challenge"): Published(0.2210, PYTHIA_RESULTS),
        ("teacher", "lambada_openai"): Published(0.1846, PYTHIA_RESULTS),
        ("teacher", "logiqa"): Published(0.2565, PYTHIA_RESULTS),
        ("teacher", "piqa"): Published(0.5947, PYTHIA_RESULTS),
        ("teacher", "sciq"): Published(0.6010, PYTHIA_RESULTS),
        ("teacher", "winogrande"): Published(0.5280, PYTHIA_RESULTS),
        ("teacher", "wsc"): Published(0.3654, PYTHIA_RESULTS),
        ("tuned", "wsc"): Published(0.59, AUTHORS_PAGE),
    },
)  # fmt: skip

PAPERS = {"scavenging-hyena": SCAVENGING_HYENA}
