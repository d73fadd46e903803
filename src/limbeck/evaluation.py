"""The later commands: judge, compare, continue a prompt, show a report, for a finished run or any model.

What a *place* is: see `places.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.core.errors import DataError, LimbeckError
from limbeck.core.files import read_json
from limbeck.core.runtime import pick_device
from limbeck.data.text import TextSource, read_documents
from limbeck.evaluate.efficiency import parameter_facts
from limbeck.evaluate.facts import read_facts
from limbeck.evaluate.quality import score_text
from limbeck.evaluate.report import write_report
from limbeck.evaluate.robustness import LEVELS, JudgedModel, score_robustness
from limbeck.places import open_place, run_of


def run_settings(place: str) -> dict[str, Any]:
    """How the run that a place lies in was judged, so that later figures are comparable; empty for other places."""
    run = run_of(Path(place))
    if run is None:
        return {}
    recipe = read_json(run / "recipe.json")
    words = recipe["evaluation"]
    return {
        "context_tokens": words["context_tokens"] or recipe["data"]["context_tokens"], "stride_tokens": words["stride_tokens"],
        "max_tokens": words["max_tokens"], "texts": words["texts"] or recipe["data"]["heldout"],
    }  # fmt: skip


def evaluate_place(
    place: str,
    *,
    texts: Sequence[str] = (),
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Score a place on texts: its own run's held-out text unless others are given.

    texts: sources, `factbook`, paths or hub ids, optionally with a split as `source:split` (default: all of a file, the
    held-out part of the factbook).
    """
    known = run_settings(place)
    sources = [text_source(text) for text in texts] or [TextSource(**text) for text in known.get("texts", [])]
    if not sources:
        raise DataError(f"{place} is not a run folder, so say what to score it on: --text FILE, or --text factbook.")
    where = pick_device(device)
    loaded = open_place(place, device=where)
    facts: dict[str, Any] = {"place": place, **parameter_facts(loaded.model), "texts": []}
    for source in sources:
        score = score_text(
            loaded.model, loaded.tokenizer, list(read_documents(source)), device=where,
            context_tokens=context_tokens or known.get("context_tokens") or 512,
            stride_tokens=stride_tokens or known.get("stride_tokens"), max_tokens=max_tokens or known.get("max_tokens") or 65_536,
        )  # fmt: skip
        facts["texts"].append(
            {
                "text": f"{source.source} ({source.split})", "tokens": score.tokens, "bytes": score.bytes, "perplexity": score.perplexity,
                "word_perplexity": score.word_perplexity, "bits_per_byte": score.bits_per_byte,
                "standard_error_nats": score.standard_error_nats, "protocol": score.protocol,
            }
        )  # fmt: skip
    return facts


def text_source(words: str) -> TextSource:
    """`source` or `source:split` as given on the command line."""
    path = Path(words)
    if path.exists():
        return TextSource(words, split="all")
    name, colon, split = words.rpartition(":")
    if colon and name:
        return TextSource(name, split=split)
    return TextSource(words, split="heldout" if words == "factbook" else "train")


def compare_places(places: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """Score several places on the same texts (the first run folder's, unless texts are given).

    Of a place that cannot be scored the facts are `place` and `failed`, the reason; the others go on. When none can, the
    first reason is raised.
    """
    if not options.get("texts"):
        settings = next((found for place in places if (found := run_settings(place))), {})
        options["texts"] = [f"{text['source']}:{text['split']}" for text in settings.get("texts", [])]
        for key in ("context_tokens", "stride_tokens", "max_tokens"):
            options[key] = options.get(key) or settings.get(key)
    scored: list[dict[str, Any]] = []
    errors: list[LimbeckError] = []
    for place in places:
        try:
            scored.append(evaluate_place(place, **options))
        except LimbeckError as error:
            errors.append(error)
            scored.append({"place": place, "failed": str(error)})
    if len(errors) == len(places):
        raise errors[0]
    return scored


def compare_robustness(
    places: Sequence[str],
    *,
    texts: Sequence[str] = (),
    perturbations: Sequence[str] = (),
    levels: Sequence[int] = (),
    seeds: Sequence[int] = (0, 1, 2),
    max_bytes: int = 32_768,
    context_bytes: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Score places on clean and on spoilt text, the very same bytes for all (the first run's text, unless texts are given).

    A run folder's model sees as many tokens at once as when its run was judged, unless `context_bytes` is given.
    Returns the facts of `score_robustness`, by place.
    """
    known = {place: run_settings(place) for place in places}
    own: list[dict[str, Any]] = next((settings["texts"] for settings in known.values() if settings), [])
    sources = [text_source(text) for text in texts] or [TextSource(**text) for text in own]
    if not sources:
        raise DataError(
            f"{places[0]} is not a run folder, so say which text to spoil: --text FILE, or --text factbook."
        )
    where = pick_device(device)
    models: dict[str, JudgedModel] = {}
    for place, settings in known.items():
        loaded = open_place(place, device=where)
        window = settings.get("context_tokens") if context_bytes is None else None
        models[place] = JudgedModel(loaded.model, loaded.tokenizer, window)
    documents = (text for source in sources for text in read_documents(source))
    return score_robustness(
        models, documents, perturbations=perturbations, levels=levels or LEVELS, seeds=seeds, max_bytes=max_bytes,
        context_bytes=context_bytes or 2048, device=where,
    )  # fmt: skip


def render_report(folder: Path) -> dict[str, Any]:
    """Make report.html and report.md again from report.json; returns the facts."""
    write_report(folder, read_facts(folder / "report.json"))
    return read_json(folder / "report.json")
