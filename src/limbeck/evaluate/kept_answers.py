"""Answers of a model that are kept while a task runs, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.core.errors import EvaluationError
from limbeck.core.files import explain_full_disk

_FORMAT = 1
_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
_WINDOWS = "windows"
MOST_LINE_BYTES = 16 * 2**20


class KeptAnswers:
    """Answers to the harness's requests in a file of JSON lines, appended batch by batch.

        kept = KeptAnswers(folder / "answers.jsonl")
        evaluate_task(lm, "sciq", folder=tasks, kept=kept)

    A run that goes on gives the figures of one that was never interrupted, bit for bit: only whole batches are kept, so the
    others are made up of the same requests. The key of an answer is the SHA-256 of its kind, its arguments, and all requests
    and the batch size of the run: runs over other items may share a file, and do not use each other's answers. One file
    belongs to one model and its settings, which it does not know of. Samples (`do_sample`) are not kept.

    A line that is torn, damaged or of an unknown kind is as if it were not there.
    """

    def __init__(self, path: Path) -> None:
        """path: the file; it is made when there is something to keep.

        Raises: EvaluationError when it is something else than a file.
        """
        self.path = Path(path)
        self._answers: dict[str, Any] = {}
        self._pending: list[tuple[str, Any]] = []
        self._awaited: dict[str, deque[str]] = {}
        if self.path.exists():
            if not self.path.is_file():
                raise EvaluationError(f"{self.path} is no file: expected one to keep answers in. Name another.")
            self._read()

    def __len__(self) -> int:
        """How many answers are known."""
        return len(self._answers)

    @contextmanager
    def serving(self, lm: Any) -> Iterator[None]:
        """Within the `with` block the model is asked only what is not known, and new answers are kept.

        lm: a model of the harness, whose methods are wrapped until the block ends.
        """
        before = lm.cache_hook
        with ExitStack() as stack:
            for kind in _KINDS:
                stack.enter_context(_wrapped(lm, kind, partial(self._serve, kind, lm.batch_size)))
            stack.enter_context(_wrapped(lm, "_loglikelihood_tokens", self._serve_windows))
            for name in ("_model_call", "_model_generate"):
                stack.enter_context(_wrapped(lm, name, self._after_a_batch))
            lm.set_cache_hook(self)
            try:
                yield
            finally:
                lm.set_cache_hook(before)
                self._pending.clear()

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        """One answer, of a batch that may not be whole yet (the harness calls this)."""
        if awaited := self._awaited.get(_digest(kind, arguments)):
            self._pending.append((awaited.popleft(), answer))

    def _serve(
        self, kind: str, batch_size: Any, ask: Callable[..., list[Any]], requests: Sequence[Any], **options: Any
    ) -> list[Any]:
        digests = [_digest(kind, request.args) for request in requests]
        keys = _keys(digests, run=_digest(kind, [batch_size, digests]))
        found = [_read_answer(kind, self._answers.get(key)) for key in keys]
        rest = [number for number, answer in enumerate(found) if answer is None]
        self._awaited = defaultdict(deque)
        for number in rest:
            if not _is_sampled(kind, requests[number].args):
                self._awaited[digests[number]].append(keys[number])
        if rest:
            for number, answer in zip(rest, ask([requests[number] for number in rest], **options), strict=True):
                found[number] = answer
        self._commit()
        return found

    def _serve_windows(self, ask: Callable[..., list[Any]], requests: Sequence[Any], *args: Any, **options: Any) -> Any:
        """Windows of rolling likelihoods come batch by batch, without texts; their own answers are kept."""
        if not requests or requests[0][0] is not None:
            return ask(requests, *args, **options)
        key = _digest(_WINDOWS, [request[1:] for request in requests])
        known = _read_answer(_WINDOWS, self._answers.get(key))
        if known is not None and len(known) == len(requests):
            return known
        answers = ask(requests, *args, **options)
        self._pending.append((key, answers))
        self._commit()
        return answers

    def _after_a_batch(self, ask: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """When the model is asked again, what was answered since the last time is a whole batch."""
        self._commit()
        return ask(*args, **options)

    def _commit(self) -> None:
        lines = [
            json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in self._pending if _is_sound(answer)
        ]
        self._answers.update(self._pending)
        self._pending = []
        if lines:
            with explain_full_disk(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a+b") as stream:
                    if stream.tell():
                        stream.seek(-1, 2)
                        if stream.read(1) != b"\n":
                            stream.write(b"\n")
                    stream.write("".join(lines).encode())

    def _read(self) -> None:
        with open(self.path, "rb") as stream:
            while line := stream.readline(MOST_LINE_BYTES):
                try:
                    row = json.loads(line)
                    key, answer = row["key"], row["answer"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
                if isinstance(key, str):
                    self._answers.setdefault(key, answer)


@contextmanager
def _wrapped(lm: Any, name: str, serve: Callable[..., Any]) -> Iterator[None]:
    """A method of one object, called through `serve(method, ...)`."""
    method = getattr(lm, name, None)
    if method is None:
        yield
        return
    setattr(lm, name, partial(serve, method))
    try:
        yield
    finally:
        delattr(lm, name)


def _digest(kind: str, arguments: Any) -> str:
    text = json.dumps([_FORMAT, kind, arguments], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _keys(digests: Sequence[str], *, run: str) -> list[str]:
    """A key for each request; equal requests are numbered, for they may stand in different batches."""
    seen: Counter[str] = Counter()
    keys = []
    for digest in digests:
        keys.append(_digest(run, [digest, seen[digest]]))
        seen[digest] += 1
    return keys


def _is_sampled(kind: str, arguments: Any) -> bool:
    if kind != "generate_until":
        return False
    settings = arguments[1]
    return bool(settings.get("do_sample", False)) or bool(settings.get("temperature"))


def _is_sound(answer: Any) -> bool:
    """Whether all numbers in it are numbers."""
    if isinstance(answer, (list, tuple)):
        return all(map(_is_sound, answer))
    return not isinstance(answer, float) or math.isfinite(answer)


def _read_answer(kind: str, value: Any) -> Any:
    """A kept answer as the harness knows it; None when it is not one of this kind."""
    if kind == "generate_until":
        return value if isinstance(value, str) else None
    if kind == "loglikelihood_rolling":
        return value if isinstance(value, float) and math.isfinite(value) else None
    if kind == _WINDOWS:
        answers = [_read_answer("loglikelihood", part) for part in value] if isinstance(value, (list, tuple)) else []
        return None if not answers or None in answers else answers
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    nats, greedy = value
    is_sound = isinstance(nats, float) and math.isfinite(nats) and isinstance(greedy, bool)
    return (nats, greedy) if is_sound else None
