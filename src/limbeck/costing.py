"""What models cost: size, operations, speed, memory and energy side by side, and who pays least for which quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from limbeck import judging
from limbeck.core.errors import DataError, EvaluationError
from limbeck.core.files import explain_full_disk, write_atomic, write_json
from limbeck.core.runtime import pick_device
from limbeck.data.text import TextSource, read_documents
from limbeck.doctor import embedded_teacher
from limbeck.evaluate import cost_tables
from limbeck.evaluate.efficiency import measure_costs, parameter_facts
from limbeck.evaluate.energy import EnergyMeter, find_meter
from limbeck.evaluate.facts import SpeedMeasurement
from limbeck.evaluate.kept_accuracies import mean_accuracies, read_accuracies
from limbeck.evaluate.readings import Reading, read_text
from limbeck.evaluate.robustness import JudgedModel, score_clean
from limbeck.evaluate.tables import Table
from limbeck.evaluate.trade_offs import TradeOff, to_draw, trade_offs
from limbeck.evaluation import run_settings, text_source
from limbeck.examining import model_fingerprint
from limbeck.models.flops import forward_flops_per_token
from limbeck.models.shipped import folder_bytes, model_costs
from limbeck.models.teacher import LoadedTeacher
from limbeck.places import open_place, run_of

# Text that models are timed on, and that their quality is measured on.
_TIMED_CHARACTERS = 50_000
_SCORED_BYTES = 65_536
_CONTEXT_BYTES = 2048


def measure_places(
    places: Sequence[str],
    *,
    contexts: Sequence[int] = (128, 512, 2048),
    batches: Sequence[int] = (1, 8),
    decode_tokens: int = 16,
    repeats: int = 5,
    texts: Sequence[str] = (),
    device: str = "auto",
    say: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Measure places in turn at every context and batch, on one text; returns plain facts.

    contexts: tokens of the first place; models with other tokens read as many bytes. texts: what quality is measured on,
    and what is read for the times (default: the held-out text of the first run among the places; without one the quality is
    left out, and the factbook is read for the times).

    Raises: DataError for the same place twice, a number below 1, or no text; what loading a place raises.
    """
    _check(places, {"context": contexts, "batch": batches, "decode-tokens": [decode_tokens], "repeats": [repeats]})
    where = pick_device(device)
    settings = next((found for place in places if (found := run_settings(place))), {})
    sources = [text_source(text) for text in texts] or [TextSource(**text) for text in settings.get("texts", [])]
    documents = _read(sources or [text_source("factbook")])
    loaded = {place: open_place(place, device=where) for place in places}
    readings = _readings(loaded, "\n".join(documents)[:_TIMED_CHARACTERS])
    accuracies, tasks = _task_accuracies(loaded)
    quality: dict[str, Any] = {}
    if sources:
        say("measuring quality")
        quality = _score(loaded, documents, readings[0], settings.get("context_tokens"), where)
    rows = _measure(loaded, readings, contexts, batches, decode_tokens, repeats, where, say)
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": judging.machine_facts(where),
        "protocol": {
            "contexts": sorted(set(contexts)), "batches": sorted(set(batches)), "decode_tokens": decode_tokens, "repeats": repeats,
            "text": [f"{source.source} ({source.split})" for source in sources], "by_byte": _needs_bytes(loaded, readings),
            "quality": {key: value for key, value in quality.items() if key != "models"}, "tasks": tasks,
        },
        "models": [
            _model(place, one, reading, max(contexts), quality.get("models", {}).get(place), accuracies.get(place))
            for (place, one), reading in zip(loaded.items(), readings, strict=True)
        ],
        "rows": rows,
    }  # fmt: skip
    facts["notes"] = _notes(facts, loaded, where)
    facts["fronts"] = [one.facts() for one in fronts_of(facts)]
    return facts


def fronts_of(facts: Mapping[str, Any]) -> list[TradeOff]:
    """Who pays least for which quality, at every context and batch."""
    return trade_offs(facts["models"], facts["rows"], by_byte=facts["protocol"]["by_byte"])


def tables_of(facts: Mapping[str, Any]) -> dict[str, Table]:
    """The facts as tables, by their titles; of the fronts those that are drawn."""
    return cost_tables.all_tables(facts, to_draw(fronts_of(facts)))


def prepare_folder(folder: Path) -> None:
    """See that results can be written there, before anything is measured.

    Raises: EvaluationError when there is a file in its place; EnvironmentFault when it cannot be made.
    """
    for one in (folder, *folder.parents):
        if one.exists() and not one.is_dir():
            raise EvaluationError(f"--out {folder}: {one} is a file; expected a folder. Name another one.")
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_costs(folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write efficiency.json, efficiency.md and a figure for each pair of quality and cost; returns the files."""
    from limbeck.evaluate.cost_figures import draw_trade_off

    found = fronts_of(facts)
    names = _short_names([model["place"] for model in facts["models"]])
    drawings = {}
    for one in to_draw(found):
        name = f"{one.quality.name}-vs-{one.cost.name}.svg"
        write_atomic(folder / name, draw_trade_off(one, names))
        drawings[name] = f"{one.quality.words} against {one.cost.words}"
    write_atomic(folder / "efficiency.md", cost_tables.markdown(facts, found, drawings))
    write_json(folder / "efficiency.json", facts)
    return [folder / name for name in ("efficiency.json", "efficiency.md", *drawings)]


def _check(places: Sequence[str], numbers: Mapping[str, Sequence[int]]) -> None:
    twice = [place for place in dict.fromkeys(places) if list(places).count(place) > 1]
    if not places or twice:
        what = f"{twice[0]} is named twice" if twice else "no place is named"
        raise DataError(f"{what}: expected one run folder or model or more, each once.")
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise DataError(f"{name} is {', '.join(map(str, values)) or 'missing'}: expected 1 or more.")


def _read(sources: Sequence[TextSource]) -> list[str]:
    """Documents enough for times and quality. Raises: DataError when there are none."""
    documents: list[str] = []
    left = max(_TIMED_CHARACTERS, _SCORED_BYTES)
    for document in (text for source in sources for text in read_documents(source)):
        documents.append(document[:left])
        left -= len(document)
        if left <= 0:
            break
    if not any(documents):
        names = ", ".join(f"{source.source} ({source.split})" for source in sources)
        raise DataError(f"{names}: there is no text to measure with. Give other text with --text.")
    return documents


def _readings(loaded: Mapping[str, LoadedTeacher], text: str) -> list[Reading]:
    """The text in each model's tokens; models with the same tokens share one."""
    found: list[Reading] = []
    for one in loaded.values():
        reading = read_text(one.tokenizer, text)
        found.append(next((other for other in found if other == reading), reading))
    return found


def _needs_bytes(loaded: Mapping[str, LoadedTeacher], readings: Sequence[Reading]) -> bool:
    """Whether tokens do not compare: they differ between the models, or a model's are bytes and ends of patches."""
    return any(reading is not readings[0] for reading in readings) or any(
        hasattr(one.tokenizer, "decode_bytes") for one in loaded.values()
    )


def _measure(
    loaded: Mapping[str, LoadedTeacher],
    readings: Sequence[Reading],
    contexts: Sequence[int],
    batches: Sequence[int],
    decode_tokens: int,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for every context, batch and model."""
    rows = []
    meter = find_meter(device)
    reports, reason = (meter, "") if isinstance(meter, EnergyMeter) else (None, meter)
    for context in sorted(set(contexts)):
        for batch in sorted(set(batches)):
            say(f"measuring context {context:,}, batch {batch}")
            measured = measure_costs(
                [one.model for one in loaded.values()], readings, context=context, batch=batch,
                decode_tokens=decode_tokens, repeats=repeats, device=device, meter=reports,
            )  # fmt: skip
            for (place, one), reading, found in zip(loaded.items(), readings, measured, strict=True):
                rows.append({"place": place, "context": context} | _row(one.model, reading, found, reason))
    return rows


def _score(
    loaded: Mapping[str, LoadedTeacher], documents: list[str], first: Reading, window: int | None, device: torch.device
) -> dict[str, Any]:
    """Bits per byte of all on the very same bytes, each seeing about as much text at once as the run was judged with."""
    seen = _CONTEXT_BYTES if window is None else max(2, round(window * first.bytes_per_token))
    judged = {place: JudgedModel(one.model, one.tokenizer) for place, one in loaded.items()}
    found = score_clean(judged, documents, max_bytes=_SCORED_BYTES, context_bytes=seen, device=device)
    return found | {"context_bytes": seen}


def _task_accuracies(loaded: Mapping[str, LoadedTeacher]) -> tuple[dict[str, float], list[str]]:
    """Mean accuracies from what the task suite has left in the runs among the places, and over which tasks."""
    runs = {run: None for place in loaded if (run := run_of(Path(place))) is not None}
    kept = read_accuracies(file for run in runs for file in sorted((run / "evaluation" / "tasks").glob("*.json")))
    if not kept:
        return {}, []
    own = {place: kept.get(model_fingerprint(one)) for place, one in loaded.items()}
    return mean_accuracies({place: accuracies for place, accuracies in own.items() if accuracies})


def _model(
    place: str,
    one: LoadedTeacher,
    reading: Reading,
    context: int,
    quality: Mapping[str, Any] | None,
    accuracy: float | None,
) -> dict[str, Any]:
    """Figures of a model that depend on no context."""
    costs = model_costs(one.model, context_tokens=context, bytes_per_token=reading.bytes_per_token)
    source = _shipped(one)
    return {
        "place": place, "kind": one.kind, "fingerprint": one.fingerprint, **parameter_facts(one.model),
        "parameters_run": costs["parameters_run"], "folder_bytes": None if source is None else folder_bytes(source),
        "shipped_bytes": costs["shipped_bytes"], "bytes_per_token": reading.bytes_per_token,
        "bits_per_byte": None, "standard_error": None, **(quality or {}), "accuracy": accuracy,
    }  # fmt: skip


def _shipped(one: LoadedTeacher) -> Path | None:
    """Where a model lies on the disk; None for one of the hub whose files are not found again."""
    if one.kind == "embedded":
        return embedded_teacher()
    if one.kind in ("folder", "gguf"):
        return Path(one.source).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(one.source, local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError):
        return None


def _row(model: Any, reading: Reading, found: SpeedMeasurement, no_energy: str) -> dict[str, Any]:
    """One model at one context and batch: by the token and by the byte of text."""
    width = reading.bytes_per_token
    flops = forward_flops_per_token(model, found.context)
    weights, peak = parameter_facts(model)["parameter_bytes"], found.peak_memory_bytes
    row: dict[str, Any] = {
        "batch": found.batch, "tokens": found.context, "text_bytes": found.context * width,
        "forward_flops_per_token": flops, "forward_flops_per_byte": flops / width,
    }  # fmt: skip
    measured = {
        "prefill": (found.prefill_seconds, found.prefill_seconds_range, found.batch * found.context),
        "decode": (found.decode_seconds_per_token, found.decode_seconds_per_token_range, found.batch),
    }
    for phase, (seconds, ends, tokens) in measured.items():
        row[f"{phase}_seconds"], row[f"{phase}_seconds_range"] = seconds, ends and list(ends)
        for unit, size in (("tokens", 1.0), ("bytes", width)):
            row[f"{phase}_{unit}_per_second"] = seconds and tokens * size / seconds
            row[f"{phase}_{unit}_per_second_range"] = ends and [tokens * size / end for end in reversed(ends) if end]
        joules = getattr(found, f"{phase}_joules_per_token")
        row[f"{phase}_joules_per_token"] = joules
        row[f"{phase}_joules_per_byte"] = None if joules is None else joules / width
        row[f"{phase}_peak_memory_bytes"] = getattr(found, f"{phase}_peak_memory_bytes")
    return row | {
        "decode_worst_seconds": found.decode_worst_seconds, "cache_bytes": found.cache_bytes, "peak_memory_bytes": peak,
        "running_bytes": None if peak is None else weights + peak, "memory_method": found.memory_method,
        "energy": found.energy_method or no_energy, "skipped": found.skipped,
    }  # fmt: skip


def _notes(facts: Mapping[str, Any], loaded: Mapping[str, LoadedTeacher], device: torch.device) -> list[str]:
    protocol = facts["protocol"]
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    types = sorted({str(one.model.dtype).removeprefix("torch.") for one in loaded.values()})
    notes = [
        f"On {device.type}{threads}, weights in {', '.join(types)}; medians of {protocol['repeats']} repeats after one untimed run, "
        f"{protocol['decode_tokens']} tokens decoded in each, models in alternation, all reading the same text."
    ]
    quality = protocol["quality"]
    if quality:
        notes.append(
            f"Bits per byte on the same {quality['bytes']:,} bytes of {', '.join(protocol['text'])} for all, "
            f"{quality['documents']} documents ({quality['documents_left_out']} that not all can read left out), "
            f"about {quality['context_bytes']:,} bytes seen at once."
        )
    else:
        notes.append(
            "Quality: not measured, for want of a text; --text SOURCE names one. The times are for the factbook's."
        )
    if protocol["tasks"]:
        notes.append(
            f"Accuracy: mean over {', '.join(protocol['tasks'])}, as the task suite has left it in the run folders."
        )
    reasons = {row["energy"] for row in facts["rows"] if row["prefill_joules_per_token"] is None and row["energy"]}
    return [*notes, *(f"Energy: {reason}." for reason in sorted(reasons))]


def _short_names(places: Sequence[str]) -> dict[str, str]:
    """The last part of each place where that tells them apart."""
    lasts = {place: Path(place).name or place for place in places}
    return lasts if len(set(lasts.values())) == len(places) else {place: place for place in places}
