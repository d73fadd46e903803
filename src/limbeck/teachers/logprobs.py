"""What servers write about tokens and their log-probabilities, in all its shapes, read into one and checked.

Three shapes are known: `{"content": [{token, logprob, top_logprobs}]}` (chat, and llama.cpp's completions), the classic
`{"tokens", "token_logprobs", "top_logprobs"}` (vLLM, SGLang, llama-cpp-python), and vLLM's `prompt_logprobs`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from limbeck.core.errors import TeacherError, VocabularyError
from limbeck.teachers.token_names import TokenNames

# Servers write this for "no probability at all", because JSON has no infinity.
_NEVER = -9999.0
# Rounding of log-probabilities that were computed in half precision and printed.
_ROUNDING_NATS = 2e-3
# What the sum of printed single-precision probabilities is known to.
_LEAST_TAIL = 1e-7


@dataclass(frozen=True)
class TokenScores:
    """N consecutive tokens and the distribution that each was drawn from.

    ids: N token ids. log_probs: the log-probability of each, None where the server tells none. top_ids, top_log_probs:
    for each, the likeliest tokens there, descending, in nats at temperature 1; empty where the server tells none (the
    first token of a text). is_cut: the server put the tokens after these into one entry, so nothing from there on is
    known for certain.
    """

    ids: list[int]
    log_probs: list[float | None]
    top_ids: list[list[int]]
    top_log_probs: list[list[float]]
    is_cut: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> TokenScores:
        """The first ones alone."""
        return replace(
            self, ids=self.ids[:count], log_probs=self.log_probs[:count], top_ids=self.top_ids[:count],
            top_log_probs=self.top_log_probs[:count],
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """What is kept on disk."""
        return dict(vars(self))

    def top(self, place: int) -> dict[int, float]:
        """The distribution at one place, by id."""
        return dict(zip(self.top_ids[place], self.top_log_probs[place], strict=True))


def read_scores(choice: Mapping[str, Any], names: TokenNames, *, k: int, may_lack_first: bool = False) -> TokenScores:
    """Read `logprobs` of a choice: one entry for every token that was written (or echoed).

    k: how many the server was asked for. may_lack_first: an echoed text's first token has no distribution.

    Raises: TeacherError when there are none, fewer than asked, or they are no log-probabilities; VocabularyError for
    tokens that the tokenizer does not have. The message names the token.
    """
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise TeacherError(
            "the server gives no log-probabilities. Use one that does (vLLM, SGLang, llama.cpp's server), or take "
            "its text alone as a `closed` teacher."
        )
    if isinstance(logprobs.get("content"), list):
        entries = [_chat_entry(entry) for entry in logprobs["content"]]
    elif isinstance(logprobs.get("tokens"), list):
        entries = _classic_entries(logprobs)
    else:
        raise TeacherError(f"the server's `logprobs` have an unknown shape ({', '.join(map(str, logprobs))[:100]}).")
    return _gather(entries, names, k=k, may_lack_first=may_lack_first)


def read_prompt_scores(
    choice: Mapping[str, Any], ids: Sequence[int], names: TokenNames, *, k: int
) -> TokenScores | None:
    """Read vLLM's `prompt_logprobs` of the prompt `ids`; None when the server gives none.

    Raises: as `read_scores`.
    """
    places = choice.get("prompt_logprobs")
    if not isinstance(places, list):
        return None
    if len(places) != len(ids):
        raise TeacherError(f"the server scored {len(places)} tokens of a prompt of {len(ids)}.")
    entries: list[_Entry] = []
    for number, place in zip(ids, places, strict=True):
        tops = [] if place is None else [({"id": _whole(name)}, _field(one, "logprob")) for name, one in _items(place)]
        own = next((value for name, value in tops if name["id"] == number), None)
        entries.append(_Entry({"id": number}, own, tops or None))
    return _gather(entries, names, k=k, may_lack_first=True)


def row_arrays(scores: TokenScores, *, k: int, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays (ids [N, k] int64, log_probs [N, k] float32, tail [N] float32) of N tokens' distributions.

    Unused places hold -1 and -inf. tail: log of the mass of all other tokens; 0 where nothing is known, -inf where all
    `vocabulary_size` are listed. Where rounding leaves nothing of it (or less), it is put at 1e-7, or at what the other
    tokens could hold if all were as likely as the last one listed, whichever is less: they never have no mass at all.
    """
    count = len(scores)
    ids = np.full((count, k), -1, dtype=np.int64)
    log_probs = np.full((count, k), -np.inf, dtype=np.float32)
    tail = np.zeros(count, dtype=np.float32)
    for place, (top_ids, top) in enumerate(zip(scores.top_ids, scores.top_log_probs, strict=True)):
        ids[place, : len(top_ids)] = top_ids
        log_probs[place, : len(top)] = top
        tail[place] = _tail_log_prob(top, others=vocabulary_size - len(top))
    return ids, log_probs, tail


def _tail_log_prob(top: Sequence[float], *, others: int) -> float:
    if not top:
        return 0.0
    if others <= 0:
        return -math.inf
    least = min(_LEAST_TAIL, others * math.exp(top[-1]))
    return math.log(max(1.0 - math.fsum(map(math.exp, top)), least, sys.float_info.min))


def mean_difference_nats(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """How far two lists of top log-probabilities are apart: the mean absolute difference over the ids that both hold.

    Weighted by probability. Infinite when they share less than half of the probability that either holds, as lists of
    different places do.
    """
    shared = one.keys() & other.keys()
    for listed in (one, other):
        mass = sum(map(math.exp, listed.values()))
        if sum(math.exp(listed[number]) for number in shared) < 0.5 * mass or not mass:
            return math.inf
    weights = {number: math.exp(one[number]) + math.exp(other[number]) for number in shared}
    return sum(weight * abs(one[number] - other[number]) for number, weight in weights.items()) / sum(weights.values())


@dataclass(frozen=True)
class _Entry:
    """One token as a server tells it: its name, its own value, and the named values listed at its place."""

    name: Mapping[str, Any]
    own: Any
    tops: Sequence[tuple[Mapping[str, Any], Any]] | None


def _chat_entry(entry: Any) -> _Entry:
    if not isinstance(entry, dict) or not isinstance(entry.get("top_logprobs") or [], list):
        raise TeacherError(f"the server's `logprobs` have an unknown shape ({str(entry)[:100]}).")
    tops = [(top, _field(top, "logprob")) for top in entry.get("top_logprobs") or []]
    return _Entry(entry, entry.get("logprob"), tops or None)


def _classic_entries(logprobs: Mapping[str, Any]) -> list[_Entry]:
    tokens, owns, tops = (logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not len(tokens) == len(owns) == len(tops):
        raise TeacherError(
            f"the server tells {len(tokens)} tokens, {len(owns)} log-probabilities of them, and the likeliest tokens at "
            f"{len(tops)} places; these should be equally many. Ask for `top_logprobs` that the server allows."
        )
    return [
        _Entry({"token": token}, own, None if not top else [({"token": name}, value) for name, value in _items(top)])
        for token, own, top in zip(tokens, owns, tops, strict=True)
    ]


def _gather(entries: Iterable[_Entry], names: TokenNames, *, k: int, may_lack_first: bool) -> TokenScores:
    scores = TokenScores([], [], [], [])
    for place, entry in enumerate(entries):
        if names.is_merged(entry.name):
            return replace(scores, is_cut=True)
        number = names.find(entry.name)
        where = f"token {place}, {names.spell(number)}"
        top = _read_top(entry.tops, names, k=k, where=where, may_lack=may_lack_first and place == 0)
        own = None if entry.own is None else _value(entry.own, where=where)
        _compare(number, own, top, k=k, names=names, where=where)
        scores.ids.append(number)
        scores.log_probs.append(own if own is None or own > _NEVER else None)
        scores.top_ids.append([one for one, _ in top])
        scores.top_log_probs.append([value for _, value in top])
    return scores


def _read_top(
    tops: Sequence[tuple[Mapping[str, Any], Any]] | None, names: TokenNames, *, k: int, where: str, may_lack: bool
) -> list[tuple[int, float]]:
    if tops is None and may_lack:
        return []
    wanted = min(k, names.vocabulary_size)
    if len(tops or []) < wanted:
        raise TeacherError(
            f"{where}: the server gives {len(tops or [])} log-probabilities, and {wanted} were asked for. Set "
            f"top_logprobs to what it allows, or raise its own limit (vLLM: --max-logprobs)."
        )
    values: dict[int, float] = {}
    for name, value in tops or []:
        number = names.find(name)
        if number in values:
            raise VocabularyError(
                f"{where}: the server lists the token {names.spell(number)} twice. Use a server that gives token ids."
            )
        values[number] = _value(value, where=where)
    listed = sorted(((one, value) for one, value in values.items() if value > _NEVER), key=lambda pair: -pair[1])[:k]
    mass = math.fsum(math.exp(value) for _, value in listed)
    if not listed:
        raise TeacherError(f"{where}: the server gives no token any probability. The server is at fault.")
    if mass > 1 + _ROUNDING_NATS:
        raise TeacherError(f"{where}: the probabilities listed sum to {mass:.4f}, more than 1. The server is at fault.")
    return listed


def _compare(
    number: int, own: float | None, top: list[tuple[int, float]], *, k: int, names: TokenNames, where: str
) -> None:
    """A token's own value and the list at its place must speak of one distribution; where they are shifted, they do not."""
    if own is None or own <= _NEVER or not top:
        return
    listed = dict(top).get(number)
    if listed is not None and abs(listed - own) <= _ROUNDING_NATS:
        return
    if listed is None and len(top) == min(k, names.vocabulary_size) and own <= top[-1][1] + _ROUNDING_NATS:
        return
    told = f"lists it with {listed:.4f}" if listed is not None else f"does not list it, down to {top[-1][1]:.4f}"
    raise TeacherError(
        f"{where}: the server gives its log-probability as {own:.4f} but {told}: tokens and distributions are not "
        "aligned (shifted?). Its log-probabilities cannot be used."
    )


def _value(value: Any, *, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TeacherError(f"{where}: the server gives the log-probability {value!r}, which is no number.")
    if value > _ROUNDING_NATS:
        raise TeacherError(f"{where}: the server gives the log-probability {value:.4f}; none is above 0.")
    return float(max(_NEVER, min(0.0, value)))


def _items(listed: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(listed, dict):
        raise TeacherError(f"the server's `logprobs` have an unknown shape ({str(listed)[:100]}).")
    return listed.items()


def _field(entry: Any, name: str) -> Any:
    if not isinstance(entry, dict):
        raise TeacherError(f"the server's `logprobs` have an unknown shape ({str(entry)[:100]}).")
    return entry.get(name)


def _whole(name: str) -> int:
    if not (isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 10):
        raise TeacherError(f"the server names a token {str(name)[:60]!r} where its id belongs.")
    return int(name)
