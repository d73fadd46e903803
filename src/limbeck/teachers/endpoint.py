"""An OpenAI-compatible endpoint: many questions at once, tried again where that may help, each paid for once."""

from __future__ import annotations

import email.utils
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from limbeck.core.errors import EnvironmentFault, TeacherError
from limbeck.teachers.answers import AnswerFile, KeptAnswer, Question, Usage, read_usage

if TYPE_CHECKING:
    import httpx2
    import tenacity

_MOST_ANSWER_BYTES = 1 << 28
_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
# Fields that some servers refuse, and what is sent to them instead; None leaves the field out.
_INSTEAD: dict[str, str | None] = {
    "return_tokens_as_token_ids": None,
    "seed": None,
    "max_tokens": "max_completion_tokens",
}


@dataclass(frozen=True)
class EndpointSettings:
    """Where the endpoint is and how it is asked.

    url: base address, such as http://127.0.0.1:8000/v1. api_key_variable: the environment variable that holds the key;
    None sends none. concurrency: questions under way at once. requests_per_minute: most requests started in a minute.
    retries: further attempts after a failure that may pass, waiting about backoff_seconds, then twice that, and so on
    up to a minute, or as long as the endpoint asks, if no longer than longest_wait_seconds. timeout_seconds: longest
    wait for one whole answer.
    """

    url: str
    model: str
    api_key_variable: str | None = None
    concurrency: int = 4
    requests_per_minute: float | None = None
    retries: int = 5
    timeout_seconds: float = 120.0
    backoff_seconds: float = 1.0
    longest_wait_seconds: float = 600.0


class RefusedQuestion(TeacherError):
    """The endpoint will not answer this question, however often it is asked. status: its HTTP status."""

    def __init__(self, message: str, *, status: int):
        super().__init__(message)
        self.status = status


class _MayPass(Exception):
    """A failure after which the same question may succeed. wait_seconds: how long the endpoint asks to wait."""

    def __init__(self, reason: str, *, wait_seconds: float | None = None):
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class Endpoint:
    """A client of one endpoint. Use it as a context manager, or `close` it.

    kept: where answers are kept; None keeps none. usage: cost of what was asked now. usage_before: cost of the answers
    that came from `kept`. retried: attempts that failed and were made again. adaptations: fields that the server did
    not know and that were left out or renamed.

    Raises: TeacherError for an address that is none; EnvironmentFault when the key's variable is not set, or the
    packages of the extra `served` are missing.
    """

    def __init__(self, settings: EndpointSettings, *, kept: AnswerFile | None = None):
        self.settings = settings
        self.kept = kept
        self.usage, self.usage_before = Usage(), Usage()
        self.retried = 0
        self.adaptations: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._pace = _Pace(settings.requests_per_minute)
        self._key = _read_key(settings.api_key_variable)
        self._client = _make_client(settings, self._key)

    def __repr__(self) -> str:
        return f"Endpoint({self.settings.url}, model={self.settings.model})"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def ask(self, question: Question) -> dict[str, Any]:
        """Ask now, whatever is kept, and keep nothing. Raises: TeacherError as `ask_all` does."""
        return self._ask(question, threading.Event())

    def ask_all(
        self, questions: Iterable[Question], read: Callable[[Question, dict[str, Any]], Any]
    ) -> Generator[tuple[Question, Any], None, None]:
        """Yield every question with its answer, in the order of the questions, several being under way at once.

        read: turns the endpoint's JSON into what is kept and yielded (itself JSON), and raises when it is not usable;
        it runs in several threads. When the caller stops, or anything is raised, what is under way is finished and
        kept, and nothing more is asked.

        Raises: TeacherError when a question is refused or still fails after all attempts; what `read` raises.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="endpoint")
        under_way: deque[tuple[Question, Future[Any]]] = deque()
        try:
            for question in questions:
                under_way.append((question, pool.submit(self._answer, question, read, stop)))
                if len(under_way) >= 2 * self.settings.concurrency:
                    first, future = under_way.popleft()
                    yield first, future.result()
            for question, future in under_way:
                yield question, future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(
        self, question: Question, read: Callable[[Question, dict[str, Any]], Any], stop: threading.Event
    ) -> Any:
        kept = self.kept.get(question) if self.kept is not None else None
        if kept is not None:
            with self._lock:
                self.usage_before += kept.usage
            return kept.content
        raw = self._ask(question, stop)
        content = read(question, raw)
        if self.kept is not None:
            self.kept.put(question, KeptAnswer(content, read_usage(raw)))
        return content

    def _ask(self, question: Question, stop: threading.Event) -> dict[str, Any]:
        import tenacity

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_MayPass),
            stop=tenacity.stop_after_attempt(self.settings.retries + 1) | tenacity.stop_when_event_set(stop),
            wait=self._wait_seconds,
            sleep=tenacity.sleep_using_event(stop),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            answer = attempts(self._attempt, question, stop)
        except _MayPass as error:
            kept = f" {len(self.kept)} answers are kept in {self.kept.path}." if self.kept else ""
            raise TeacherError(
                f"{self._where(question)}: no answer after {attempts.statistics.get('attempt_number', 1)} attempts; the last failed: {error}."
                f"{kept} Check the server (or lower `concurrency`), and give the same command again."
            ) from None
        with self._lock:
            self.usage += read_usage(answer)
        return answer

    def _wait_seconds(self, state: tenacity.RetryCallState) -> float:
        import tenacity

        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _MayPass) and error.wait_seconds is not None:
            self._pace.hold(error.wait_seconds)
            return 0.0
        base = self.settings.backoff_seconds
        return tenacity.wait_exponential_jitter(initial=base, max=60, jitter=base)(state)

    def _count_retry(self, _: tenacity.RetryCallState) -> None:
        with self._lock:
            self.retried += 1

    def _attempt(self, question: Question, stop: threading.Event) -> dict[str, Any]:
        while True:
            body = self._adapted(question.body)
            self._pace.wait(stop)
            if stop.is_set():
                raise _MayPass("stopped")
            status, headers, content = self._send(question.path, body)
            if status == 200:
                return self._parse(content, question)
            reason = self._clean(_error_message(content))
            if status in (400, 422) and self._adapt(reason, body):
                continue
            self._refuse(status, headers, reason, question)

    def _send(self, path: str, body: Mapping[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        import httpx2

        limit = self.settings.timeout_seconds
        deadline = time.monotonic() + limit
        content = bytearray()
        try:
            with self._client.stream("POST", self.settings.url.rstrip("/") + path, json=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    # The client's own limit is for each piece, so that a trickle of them would never end.
                    if time.monotonic() > deadline:
                        raise _MayPass(f"the answer was not complete within {limit:g} s")
                    if len(content) > _MOST_ANSWER_BYTES:
                        raise TeacherError(f"{self.settings.url}: an answer of more than {_MOST_ANSWER_BYTES} bytes.")
                return response.status_code, response.headers, bytes(content)
        except httpx2.ConnectTimeout:
            raise _MayPass(f"no connection within {limit:g} s") from None
        except httpx2.TimeoutException:
            raise _MayPass(f"no answer within {limit:g} s") from None
        except httpx2.ConnectError as error:
            raise _MayPass(f"cannot connect ({self._clean(str(error))})") from None
        except httpx2.RequestError as error:
            raise _MayPass(f"the connection broke ({self._clean(str(error)) or type(error).__name__})") from None

    def _parse(self, content: bytes, question: Question) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            start = self._clean(content[:2000].decode("utf-8", "replace"))[:80]
            raise _MayPass(f"the answer is not JSON; it begins with {start!r}") from None
        if not isinstance(answer, dict):
            raise _MayPass(f"the answer is {type(answer).__name__}, not a JSON object")
        if answer.get("error"):
            raise _MayPass(self._clean(_error_message(content)))
        if not isinstance(answer.get("choices"), list) or not all(isinstance(one, dict) for one in answer["choices"]):
            raise TeacherError(
                f"{self._where(question)}: the answer has no `choices` (it has: {self._clean(', '.join(answer))}). "
                "Is this an OpenAI-compatible address? It usually ends in /v1."
            )
        return answer

    def _refuse(self, status: int, headers: Mapping[str, str], reason: str, question: Question) -> NoReturn:
        wait = _retry_after(headers.get("retry-after"))
        if status in _MAY_PASS and "insufficient_quota" not in reason:
            if wait is not None and wait > self.settings.longest_wait_seconds:
                raise RefusedQuestion(
                    f"{self._where(question)}: it asks to wait {wait:g} s (status {status}: {reason}). Give the same "
                    "command again later; answers that came are kept.",
                    status=status,
                )
            raise _MayPass(f"status {status}: {reason}", wait_seconds=wait)
        variable = self.settings.api_key_variable
        advice = "Change what is asked as it says."
        if status in (401, 403):
            advice = (
                f"Check the key in ${variable}." if variable else "Set api_key_variable to the variable with a key."
            )
        elif status == 404:
            advice = "Check the base address (it usually ends in /v1) and the model's name."
        elif 300 <= status < 400:
            advice = f"The address has moved to {self._clean(headers.get('location', '?'))}; give that one."
        raise RefusedQuestion(
            f"{self._where(question)}: refused with status {status}: {reason}. {advice}", status=status
        )

    def _adapted(self, body: Mapping[str, Any]) -> dict[str, Any]:
        names = {name: self.adaptations.get(name, name) for name in body}
        return {new: body[name] for name, new in names.items() if new is not None}

    def _adapt(self, reason: str, sent: Mapping[str, Any]) -> bool:
        """Note what to send instead when the server complains of a field that it need not know. Returns: whether."""
        for name, instead in _INSTEAD.items():
            if name in sent and re.search(rf"\b{name}\b", reason) and (instead is None or instead in reason):
                self.adaptations[name] = instead
                return True
        return False

    def _where(self, question: Question) -> str:
        return f"{self.settings.url}{question.path} ({self.settings.model})"

    def _clean(self, text: str) -> str:
        """Words of the server in a form that can be printed: short, on one line, and never with the key in them."""
        if self._key:
            text = text.replace(self._key, "***")
        return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()[:400]


class _Pace:
    """Starts requests no more often than allowed; all of them pause when one is told to wait."""

    def __init__(self, requests_per_minute: float | None):
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._interval
        stop.wait(max(0.0, start - time.monotonic()))

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _make_client(settings: EndpointSettings, key: str | None) -> httpx2.Client:
    try:
        import httpx2
        import tenacity  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(
            f'a served or closed teacher needs the package {error.name}: pip install "limbeck[served]".'
        ) from error
    try:
        address = httpx2.URL(settings.url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise TeacherError(
            f"the endpoint's url is none ({error}). Give one such as http://127.0.0.1:8000/v1."
        ) from None
    if address.scheme not in ("http", "https") or not address.host:
        raise TeacherError(f'the endpoint\'s url "{settings.url}" is none. Give one such as http://127.0.0.1:8000/v1.')
    if address.userinfo or address.query:
        raise TeacherError(
            f"the endpoint's url for {address.host} holds a name, key or query. Keys come from the environment alone: "
            "set api_key_variable to the name of the variable."
        )
    return httpx2.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=settings.timeout_seconds,
        limits=httpx2.Limits(max_connections=settings.concurrency + 1),
    )


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EnvironmentFault(
            f"the environment variable {variable}, which should hold the endpoint's key, is not set."
        )
    if not key.isascii() or not key.isprintable():
        raise EnvironmentFault(
            f"the environment variable {variable} does not hold a key: it has unprintable characters."
        )
    return key


def _error_message(content: bytes) -> str:
    """What the server says: the OpenAI shape, others' `detail` or `message`, or the beginning of the text."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return text or "no reason given"
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        said = [error.get(name) for name in ("message", "detail", "code", "param") if error.get(name)]
        return "; ".join(one if isinstance(one, str) else json.dumps(one) for one in said) or text
    return error if isinstance(error, str) else text


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number or an HTTP date; None when there is neither."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
