"""What spoilt text costs a model: bits per byte under noise, typos, other casing and scripts, beside the clean text.

Every model is scored on the very same documents, whole, so that models with other tokenizers and models of bytes can be
compared. A text that a tokenizer cannot take losslessly gets no figure from its model, and the reason instead.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import DataError, VocabularyError, unknown_name
from limbeck.evaluate.perturbations import PERTURBATIONS, perturb
from limbeck.evaluate.quality import TextScore, score_text
from limbeck.evaluate.scoring import NonFiniteLogits, ratio_standard_error
from limbeck.evaluate.windows import position_limit
from limbeck.models.symbol_streams import text_to_bytes
from limbeck.models.token_bytes import TokenBytes, read_token_bytes

LEVELS = (1, 2, 3)
_Scored = tuple[TextScore, Sequence[str]]


@dataclass(frozen=True)
class JudgedModel:
    """A model, its tokenizer, and how many tokens it sees at once (None: as many as hold `context_bytes` of clean text)."""

    model: nn.Module
    tokenizer: Any
    context_tokens: int | None = None


def score_robustness(
    models: Mapping[str, JudgedModel],
    documents: Iterable[str],
    *,
    perturbations: Sequence[str] = (),
    levels: Sequence[int] = LEVELS,
    seeds: Sequence[int] = (0, 1, 2),
    max_bytes: int = 32_768,
    context_bytes: int = 2048,
    batch_sequences: int = 8,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Score every model on clean and on perturbed text.

    perturbations: names of `PERTURBATIONS` (none: all). levels: of 1 (light), 2, 3 (heavy). seeds: of the perturbations.
    max_bytes: clean text to use, in the order of the documents; the last one is cut. A document that a model cannot
    read even clean is left out for all, and counted in the protocol.

    Returns facts: `clean` by model, `rows` (one for each perturbation and level, with each model's `bits_per_byte`, mean
    over seeds; `standard_error` of the text; `seed_spread`, the standard deviation over seeds; `ratio` to the clean bits
    per byte; `bits_ratio`, the same for the bits of the whole text; or `unreadable`, the reason why there are none),
    `mean_ratio` by model over the rows that all could read, and `protocol`.

    Raises: DataError for an unknown perturbation or level, no seeds, or no text that all models can read;
    NonFiniteLogits, naming the model.
    """
    names = list(perturbations) or list(PERTURBATIONS)
    _check(models, names, levels, seeds, max_bytes, context_bytes)
    judges = {
        name: _Judge(name, judged, batch_sequences=batch_sequences, device=device) for name, judged in models.items()
    }
    chosen, left_out = _prepare(judges, documents, max_bytes, context_bytes)
    clean = {name: _facts([(judge.score(chosen), chosen)]) for name, judge in judges.items()}
    rows = [_row(judges, chosen, clean, name, level, seeds) for name in names for level in levels]
    return {
        "clean": {
            name: {key: clean[name][key] for key in ("bits_per_byte", "standard_error")} | judge.window(chosen)
            for name, judge in judges.items()
        },
        "rows": rows,
        "mean_ratio": _mean_ratios(rows, list(judges)),
        "protocol": {
            "documents": len(chosen), "documents_left_out": left_out, "bytes": sum(len(text_to_bytes(text)) for text in chosen),
            "seeds": list(seeds), "max_bytes": max_bytes, "context_bytes": context_bytes,
            "text": "the same documents for every model, whole; documents do not see each other",
            "standard_error": "of the text; seed_spread is the standard deviation over perturbation seeds",
        },
    }  # fmt: skip


def score_clean(
    models: Mapping[str, JudgedModel],
    documents: Iterable[str],
    *,
    max_bytes: int = 32_768,
    context_bytes: int = 2048,
    batch_sequences: int = 8,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """The clean part of `score_robustness`: `models`, bits per byte and its standard error by name, on the very same bytes.

    Beside it `documents`, `documents_left_out` and `bytes`. Raises: as `score_robustness`.
    """
    _check(models, [], LEVELS, [0], max_bytes, context_bytes)
    judges = {
        name: _Judge(name, judged, batch_sequences=batch_sequences, device=device) for name, judged in models.items()
    }
    chosen, left_out = _prepare(judges, documents, max_bytes, context_bytes)
    found = {name: _facts([(judge.score(chosen), chosen)]) for name, judge in judges.items()}
    return {
        "models": {
            name: {key: of[key] for key in ("bits_per_byte", "standard_error")} | {"context_tokens": judges[name].context_tokens}
            for name, of in found.items()
        },
        "documents": len(chosen), "documents_left_out": left_out, "bytes": sum(len(text_to_bytes(text)) for text in chosen),
    }  # fmt: skip


def unreadable_reason(tokenizer: Any, text: str, *, pieces: TokenBytes | None = None) -> str | None:
    """Why a tokenizer does not take this text losslessly; None when it does.

    pieces: the tokenizer's `read_token_bytes`, to save reading them again.
    """
    data = text_to_bytes(text)
    if hasattr(tokenizer, "decode_bytes"):
        given_back = tokenizer.decode_bytes(tokenizer(text, add_special_tokens=False)["input_ids"])
        return None if given_back == data else "its tokens do not give the bytes back"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8, and its tokenizer takes nothing else"
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if pieces is None:
        given_back = tokenizer.decode(ids, skip_special_tokens=True)
        return None if given_back == text else "its tokens do not give the text back"
    joined = pieces.join(ids)
    if joined == data or (pieces.adds_space and joined == b" " + data):
        return None
    return "its tokens do not give the text back"


class _Judge:
    """One model on trial: what it can read, and what it pays; the same text is scored once."""

    def __init__(self, name: str, judged: JudgedModel, *, batch_sequences: int, device: str | torch.device):
        self.name, self.judged = name, judged
        self.batch_sequences, self.device = batch_sequences, device
        self.context_tokens = judged.context_tokens or 0
        self._scores: dict[tuple[str, ...], TextScore] = {}
        try:
            self._pieces = None if hasattr(judged.tokenizer, "decode_bytes") else read_token_bytes(judged.tokenizer)
        except VocabularyError:
            self._pieces = None

    def refusal(self, documents: Sequence[str]) -> str | None:
        """The first reason why these documents cannot be read."""
        reasons = (unreadable_reason(self.judged.tokenizer, text, pieces=self._pieces) for text in documents)
        return next((reason for reason in reasons if reason is not None), None)

    def fix_context(self, documents: Sequence[str], context_bytes: int) -> None:
        """Choose the window so that all models see about the same stretch of clean text."""
        if not self.context_tokens:
            wanted = max(2, round(context_bytes * self._tokens_per_byte(documents)))
            table = position_limit(self.judged.model)
            trained = getattr(getattr(self.judged.model, "config", None), "max_position_embeddings", None)
            self.context_tokens = min(wanted, *(limit for limit in (table, trained) if limit), wanted)

    def window(self, documents: Sequence[str]) -> dict[str, float]:
        """How much the model sees at once."""
        return {"context_tokens": self.context_tokens, "tokens_per_byte": self._tokens_per_byte(documents)}

    def _tokens_per_byte(self, documents: Sequence[str]) -> float:
        ids = self.judged.tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return sum(map(len, ids)) / sum(len(text_to_bytes(text)) for text in documents)

    def score(self, documents: Sequence[str]) -> TextScore:
        """What the model pays for these documents."""
        key = tuple(documents)
        if key not in self._scores:
            try:
                self._scores[key] = score_text(
                    self.judged.model, self.judged.tokenizer, list(documents), context_tokens=self.context_tokens,
                    batch_sequences=self.batch_sequences, device=self.device,
                )  # fmt: skip
            except NonFiniteLogits as error:
                raise NonFiniteLogits(f"model {self.name}", document=error.document, token=error.token) from error
        return self._scores[key]


def _check(
    models: Mapping[str, JudgedModel],
    names: Sequence[str],
    levels: Sequence[int],
    seeds: Sequence[int],
    max_bytes: int,
    context_bytes: int,
) -> None:
    for name in names:
        if name not in PERTURBATIONS:
            raise DataError(unknown_name("perturbation", name, PERTURBATIONS))
    for level in levels:
        if level not in LEVELS:
            raise DataError(f"level {level} of a perturbation: expected 1 (light), 2 or 3 (heavy).")
    if not models or not levels or not seeds:
        raise DataError(
            f"robustness needs a model, a level and a seed, one of each at least; given {len(models)}, {len(levels)} and {len(seeds)}."
        )
    if max_bytes < 1 or context_bytes < 2:
        raise DataError(
            f"max_bytes is {max_bytes} and context_bytes {context_bytes}: expected at least 1 byte of text and 2 of context."
        )


def _prepare(
    judges: Mapping[str, _Judge], documents: Iterable[str], max_bytes: int, context_bytes: int
) -> tuple[list[str], int]:
    """Choose the documents, and every model's window."""
    chosen, left_out = _choose(documents, judges, max_bytes)
    for judge in judges.values():
        judge.fix_context(chosen, context_bytes)
    return chosen, left_out


def _choose(documents: Iterable[str], judges: Mapping[str, _Judge], max_bytes: int) -> tuple[list[str], int]:
    """Documents up to the budget of bytes that every model can read, and how many were passed over."""
    chosen: list[str] = []
    left, left_out, reason = max_bytes, 0, ""
    for text in documents:
        if not text:
            continue
        part = text if len(text_to_bytes(text)) <= left else _cut(text, left)
        refusals = [f"{name}: {why}" for name, judge in judges.items() if (why := judge.refusal([part]))]
        if refusals or not part:
            left_out += bool(refusals)
            reason = reason or "".join(refusals[:1])
        else:
            chosen.append(part)
            left -= len(text_to_bytes(part))
        if left <= 0 or part != text:
            break
    if not chosen:
        why = f"no document can be read by all ({reason})" if reason else "the text is empty"
        raise DataError(f"there is no text to score: {why}. Give other text, or other models.")
    return chosen, left_out


def _cut(text: str, most_bytes: int) -> str:
    """The beginning of a text, of at most so many bytes; no character is split."""
    data = text_to_bytes(text[:most_bytes])[:most_bytes]
    kept = data.decode("utf-8", errors="surrogateescape")
    while kept and text[: len(kept)] != kept:
        kept = kept[:-1]
    return kept


def _row(
    judges: Mapping[str, _Judge],
    documents: Sequence[str],
    clean: Mapping[str, dict[str, float | None]],
    name: str,
    level: int,
    seeds: Sequence[int],
) -> dict[str, Any]:
    rate = PERTURBATIONS[name].rates[level - 1]
    texts = [[spoilt for text in documents if (spoilt := perturb(text, name, rate=rate, seed=seed))] for seed in seeds]
    answers: dict[str, Any] = {}
    for judged, judge in judges.items():
        reason = next((why for spoilt in texts if (why := judge.refusal(spoilt))), None)
        if reason is None and not all(texts):
            reason = "nothing is left of the text"
        if reason is not None:
            answers[judged] = {"unreadable": reason}
            continue
        try:
            answers[judged] = _facts([(judge.score(spoilt), spoilt) for spoilt in texts], clean=clean[judged])
        except DataError as error:
            answers[judged] = {"unreadable": str(error)}
    size = statistics.fmean(sum(len(text_to_bytes(text)) for text in spoilt) for spoilt in texts)
    return {"perturbation": name, "level": level, "rate": rate, "bytes": size, "models": answers}


def _facts(scores: Sequence[_Scored], *, clean: Mapping[str, float | None] | None = None) -> dict[str, float | None]:
    """Bits per byte of one text under several seeds."""
    values = [score.bits_per_byte for score, _ in scores]
    errors = [error for score, documents in scores if (error := _standard_error(score, documents)) is not None]
    facts: dict[str, float | None] = {
        "bits_per_byte": statistics.fmean(values),
        "standard_error": statistics.fmean(errors) if errors else None,
        "seed_spread": statistics.stdev(values) if len(values) > 1 else None,
        "bits": statistics.fmean(score.nats / math.log(2) for score, _ in scores),
    }
    if clean is not None:
        facts["ratio"] = _ratio(facts["bits_per_byte"], clean["bits_per_byte"])
        facts["bits_ratio"] = _ratio(facts["bits"], clean["bits"])
    return facts


def _standard_error(score: TextScore, documents: Sequence[str]) -> float | None:
    """Of the bits per byte: between documents where each is a block of the score, else that of the nats per token."""
    if len(score.block_nats) == len(documents) > 1 and "documents" in score.protocol["standard_error"]:
        sizes = torch.tensor([len(text_to_bytes(text)) for text in documents], dtype=torch.float64)
        error = ratio_standard_error(torch.tensor(score.block_nats, dtype=torch.float64), sizes)
    else:
        error = score.standard_error_nats and score.standard_error_nats * score.tokens / score.bytes
    return None if error is None else error / math.log(2)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _mean_ratios(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """Each model's ratio to clean, averaged over the rows that every model could read."""
    common = [row["models"] for row in rows if all(row["models"][name].get("ratio") is not None for name in names)]
    return {name: statistics.fmean(row[name]["ratio"] for row in common) if common else None for name in names}
