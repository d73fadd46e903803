"""A teacher behind an OpenAI-compatible address that tells log-probabilities: it writes, or it scores given text.

Before anything is kept, a few questions with known answers are asked: that distributions are not shifted against tokens,
that they do not depend on the sampling temperature, that the tokenizer is the served model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise, tee
from typing import Any

import numpy as np

from limbeck.core.errors import DataError, TeacherError
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.store.records import RowRecord
from limbeck.teachers.answers import Question, read_usage
from limbeck.teachers.endpoint import Endpoint, RefusedQuestion
from limbeck.teachers.logprobs import (
    TokenScores,
    mean_difference_nats,
    read_prompt_scores,
    read_scores,
    row_arrays,
)
from limbeck.teachers.prompts import Prompt, prompt_ids
from limbeck.teachers.token_names import TokenNames

_PROBE = "The capital of France is Paris, and the capital of Italy is"
# Above what batching and half precision make of one distribution, far below what two different ones differ by.
_SAME_NATS = 0.1
# Empty answers that are put up with before the capture is stopped: this many, or as many as there are rows.
_FEW_EMPTY = 10


@dataclass
class Written:
    """What a capture handed over.

    rows, tokens: in all. scored_tokens: those with targets. cut_prompts: prompts shortened to fit the window.
    cut_answers: those that end where the server put several tokens into one entry (emoji and rare letters with
    llama.cpp). empty_answers: answers without a token, which make no row. finish_reasons: how often each was given.
    """

    rows: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    empty_answers: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)

    def count(self, row: RowRecord) -> None:
        """Add a row."""
        self.rows += 1
        self.tokens += len(row.input_ids)
        self.scored_tokens += int(np.sum(row.scored))


class ServedTeacher:
    """Rows of targets from an endpoint.

    tokenizer: the served model's own; rows are written in its ids. top_logprobs: how many are asked for at every token.
    max_new_tokens: most tokens of an answer. temperature: of sampling; targets are always those at temperature 1. A
    server's other defaults (llama.cpp: top_k 40, min_p 0.05) shape what is written, never the targets. seed: the first
    of the seeds that are sent, one for each answer.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: Any,
        *,
        top_logprobs: int = 20,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        seed: int = 0,
    ):
        self.endpoint, self.tokenizer = endpoint, tokenizer
        self.top_logprobs, self.max_new_tokens = top_logprobs, max_new_tokens
        self.temperature, self.seed = temperature, seed
        self._names = TokenNames(tokenizer)
        self._fingerprint = tokenizer_fingerprint(tokenizer)

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        return self._names.vocabulary_size

    def generate(
        self,
        prompts: Iterable[Prompt],
        *,
        context_tokens: int,
        sink: Callable[[RowRecord], None],
        tokens: int | None = None,
    ) -> Written:
        """Let the teacher write to each prompt, and hand over a row for each answer, in order.

        A row is the prompt's tokens, not scored, and the answer's, with targets; at most context_tokens, for which a
        text prompt is shortened and fewer tokens are asked for. Texts are gone on from (/completions), messages are
        answered (/chat/completions). tokens: stop once the rows hold that many; None takes all prompts.

        Raises: TeacherError when the endpoint fails or is not to be trusted, or most answers are empty;
        VocabularyError for tokens that are not the tokenizer's; DataError for a chat longer than the window.
        """
        total = Written()
        questions = self._writing_questions(prompts, context_tokens=context_tokens, total=total)
        with closing(self.endpoint.ask_all(questions, self._read_written)) as answers:
            for question, answer in answers:
                total.finish_reasons[str(answer["finish_reason"])] += 1
                scores = TokenScores(**answer["scores"])
                total.cut_answers += scores.is_cut
                if len(scores) == 0:
                    total.empty_answers += 1
                    if total.empty_answers > max(_FEW_EMPTY, total.rows):
                        break
                    continue
                row = self._written_row(question.context["prompt"], scores, context_tokens=context_tokens)
                total.count(row)
                sink(row)
                if tokens is not None and total.tokens >= tokens:
                    break
        if total.empty_answers > max(_FEW_EMPTY, total.rows) or not total.rows:
            raise TeacherError(
                f"{self.endpoint}: {total.empty_answers} of {total.rows + total.empty_answers} answers had no token that can "
                "be used. Check the prompts, and whether the model wants messages (chat) rather than text."
            )
        return total

    def score(self, rows: Iterable[RowRecord], *, sink: Callable[[RowRecord], None]) -> Written:
        """Let the teacher score windows of given text, and hand each over with targets, in order.

        rows: without targets (see `store.records.batch_rows`); every document in a window is a question of its own, so
        that the teacher does not look across. The server must score prompts: vLLM's `prompt_logprobs`, or `echo`.

        Raises: TeacherError when the server cannot, or does it wrongly; VocabularyError as in `generate`.
        """
        route = self.check_scoring()
        total = Written()
        for_questions, for_rows = tee(rows)
        questions = (
            self._scoring_question(row.input_ids[low:high], route)
            for row in for_questions
            for low, high in _documents(row)
        )
        with closing(self.endpoint.ask_all(questions, self._read_scored)) as answers:
            for row in for_rows:
                pieces = [(low, TokenScores(**next(answers)[1])) for low, _ in _documents(row)]
                filled = self._with_targets(row, pieces)
                total.count(filled)
                sink(filled)
        return total

    def check_writing(self, prompt: Prompt) -> dict[str, float]:
        """Ask for a few tokens in ways that must agree. Returns: by how many nats they differ.

        At temperature 0 the token that is written is the likeliest one. A distribution is the same when what came before
        it is given rather than written (of texts; a chat cannot be gone on from), and at any sampling temperature.
        prompt: decides whether texts or chats are checked.

        Raises: TeacherError when one of these does not hold.
        """
        probe = prompt if prompt.messages is not None else Prompt(text=_PROBE)
        ids = prompt_ids(probe, self.tokenizer)
        greedy = self._ask_to_write(probe, ids, most_tokens=4, temperature=0.0)
        plain = self._ask_to_write(probe, ids, most_tokens=4, temperature=1.0)
        if not len(greedy) or not len(plain):
            raise TeacherError(f"{self.endpoint}: asked for a few tokens, it wrote nothing.")
        self._check_greedy(greedy)
        found: dict[str, float] = {}
        if probe.messages is None and len(plain) > 1:
            place = min(2, len(plain) - 1)
            found["continued_nats"] = self._check_place(plain, place, [*ids, *plain.ids[:place]])
        if self.temperature != 1:
            warm = self._ask_to_write(probe, ids, most_tokens=1, temperature=self.temperature)
            found["temperature_nats"] = apart = mean_difference_nats(plain.top(0), warm.top(0) if len(warm) else {})
            if apart > _SAME_NATS:
                raise TeacherError(
                    f"{self.endpoint}: its log-probabilities at temperature {self.temperature:g} differ from those at 1 by "
                    f"{apart:.2f} nats, so they are not the model's own. Set temperature: 1."
                )
        return found

    def _check_greedy(self, greedy: TokenScores) -> None:
        for place, number in enumerate(greedy.ids):
            behind = greedy.top_log_probs[place][0] - greedy.top(place).get(number, -np.inf)
            if behind > _SAME_NATS:
                raise TeacherError(
                    f"{self.endpoint}: at temperature 0 it wrote {self._names.spell(number)}, but tells that "
                    f"{self._names.spell(greedy.top_ids[place][0])} was likelier by {behind:.2f} nats: its distributions "
                    "are shifted against the tokens, so every target would be wrong. Use another server."
                )

    def check_scoring(self) -> str:
        """Find out how the server scores given text, by scoring a known one. Returns: "prompt_logprobs" or "echo".

        The distribution after a beginning of the text must be the one that the server writes from there.
        Raises: TeacherError when it scores no text, or is shifted.
        """
        ids = prompt_ids(Prompt(text=_PROBE), self.tokenizer)
        reasons: list[str] = []
        for route in ("prompt_logprobs", "echo"):
            question = self._scoring_question(ids, route)
            try:
                scores = TokenScores(**self._read_scored(question, self.endpoint.ask(question)))
            except (RefusedQuestion, _NotScored) as error:
                if isinstance(error, RefusedQuestion) and error.status not in (400, 404, 422, 501):
                    raise
                reasons.append(f"{route}: {error}")
                continue
            for place in (len(ids) // 2, len(ids) - 1):
                self._check_place(scores, place, ids[:place])
            return route
        raise TeacherError(
            f"{self.endpoint}: it does not score given text ({' '.join(reasons)}) Use mode: generate, or a server that "
            "does (vLLM)."
        )

    def _check_place(self, scores: TokenScores, place: int, before: Sequence[int]) -> float:
        """Compare what was told of one place with what the server writes after the tokens before it."""
        written = self._ask_to_write(Prompt(text=""), before, most_tokens=1, temperature=1.0)
        apart = {
            shift: mean_difference_nats(scores.top(place + shift), written.top(0))
            for shift in (0, -1, 1)
            if len(written) and 0 <= place + shift < len(scores)
        }
        if apart and apart[0] <= _SAME_NATS:
            return apart[0]
        shifts = [shift for shift, nats in apart.items() if nats <= _SAME_NATS]
        told = f"are shifted by {shifts[0]:+d} token" if shifts else "are not those it writes with"
        raise TeacherError(
            f"{self.endpoint}: its log-probabilities {told} (checked on a known text, at token {place}), so every target "
            "would be wrong. Use another server, or mode: generate if this one was scoring."
        )

    def _ask_to_write(self, prompt: Prompt, ids: Sequence[int], *, most_tokens: int, temperature: float) -> TokenScores:
        question = self._writing_question(prompt, ids, most_tokens=most_tokens, temperature=temperature, seed=self.seed)
        return TokenScores(**self._read_written(question, self.endpoint.ask(question))["scores"])

    def _writing_questions(
        self, prompts: Iterable[Prompt], *, context_tokens: int, total: Written
    ) -> Iterator[Question]:
        room = context_tokens - min(self.max_new_tokens, context_tokens // 2)
        for index, prompt in enumerate(prompts):
            if index == 0:
                self.check_writing(prompt)
            ids = prompt_ids(prompt, self.tokenizer)
            if prompt.messages is None and len(ids) > room:
                ids = ids[:room]
                total.cut_prompts += 1
            most = min(self.max_new_tokens, context_tokens - len(ids))
            if most < 1:
                raise DataError(
                    f"prompt {index + 1} has {len(ids)} tokens, which leaves no room for an answer in a window of "
                    f"{context_tokens}. Shorten it, or raise data.context_tokens."
                )
            yield self._writing_question(
                prompt, ids, most_tokens=most, temperature=self.temperature, seed=self.seed + index
            )

    def _writing_question(
        self, prompt: Prompt, ids: Sequence[int], *, most_tokens: int, temperature: float, seed: int
    ) -> Question:
        shared: dict[str, Any] = {
            "model": self.endpoint.settings.model, "max_tokens": most_tokens, "temperature": temperature, "top_p": 1.0,
            "seed": seed, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        context = {"tokenizer": self._fingerprint, "prompt": _whole(ids)}
        if prompt.messages is not None:
            body = shared | {"messages": prompt.chat(), "logprobs": True, "top_logprobs": self.top_logprobs}
            return Question("/chat/completions", body, context)
        return Question("/completions", shared | {"prompt": _whole(ids), "logprobs": self.top_logprobs}, context)

    def _scoring_question(self, ids: Sequence[int] | np.ndarray, route: str) -> Question:
        body: dict[str, Any] = {
            "model": self.endpoint.settings.model, "prompt": _whole(ids), "max_tokens": 1, "temperature": 0.0,
        }  # fmt: skip
        if route == "prompt_logprobs":
            body |= {"prompt_logprobs": self.top_logprobs}
        else:
            body |= {"echo": True, "logprobs": self.top_logprobs, "return_tokens_as_token_ids": True}
        return Question("/completions", body, {"tokenizer": self._fingerprint})

    def _read_written(self, question: Question, raw: Mapping[str, Any]) -> dict[str, Any]:
        choice = _only_choice(raw)
        usage = read_usage(raw)
        prompt_length = len(question.context["prompt"])
        if not usage.uncounted and usage.prompt_tokens != prompt_length:
            raise TeacherError(
                f"{self.endpoint}: the server reads a prompt as {usage.prompt_tokens} tokens, the tokenizer as "
                f"{prompt_length}. Name the served model's own tokenizer, with the same chat template."
            )
        scores = read_scores(choice, self._names, k=self.top_logprobs)
        # The token that ends a text is counted by some servers and listed by others.
        missing = 0 if usage.uncounted else usage.completion_tokens - len(scores)
        if abs(missing) > 1 and not scores.is_cut and not self._ends_within_character(choice, scores):
            raise TeacherError(
                f"{self.endpoint}: the server wrote {usage.completion_tokens} tokens but tells log-probabilities of "
                f"{len(scores)}. Turn off its parsers of reasoning and tools, or use another server."
            )
        return {"finish_reason": choice.get("finish_reason"), "scores": scores.as_json()}

    def _read_scored(self, question: Question, raw: Mapping[str, Any]) -> dict[str, Any]:
        ids = question.body["prompt"]
        choice = _only_choice(raw)
        if "prompt_logprobs" in question.body:
            told = read_prompt_scores(choice, ids, self._names, k=self.top_logprobs)
            if told is None:
                raise _NotScored("it is not answered.")
            return told.as_json()
        scores = read_scores(choice, self._names, k=self.top_logprobs, may_lack_first=True)
        if len(scores) < len(ids):
            raise _NotScored(f"{len(scores)} log-probabilities came back for a prompt of {len(ids)} tokens.")
        for place, (sent, echoed) in enumerate(zip(ids, scores.ids, strict=False)):
            if sent != echoed:
                raise TeacherError(
                    f"{self.endpoint}: token {place} of a prompt was sent as {self._names.spell(sent)} and came back as "
                    f"{self._names.spell(echoed)}: the server changes the text (a token put before it?)."
                )
        return scores.first(len(ids)).as_json()

    def _ends_within_character(self, choice: Mapping[str, Any], scores: TokenScores) -> bool:
        """Whether nothing is missing but the last tokens, whose bytes are no whole character yet."""
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        if not isinstance(text, str) or self._names.token_bytes is None:
            return False
        known = self._names.token_bytes.join(scores.ids).decode("utf-8", "replace")
        return text.startswith(known) and not text[len(known) :].strip("\ufffd")

    def _written_row(self, ids: Sequence[int], scores: TokenScores, *, context_tokens: int) -> RowRecord:
        length = min(len(ids) + len(scores), context_tokens)
        scored = np.arange(length) >= len(ids)
        row = RowRecord(np.asarray([*ids, *scores.ids][:length], dtype=np.int32), [], scored)
        return self._with_targets(row, [(len(ids), scores)])

    def _with_targets(self, row: RowRecord, pieces: Iterable[tuple[int, TokenScores]]) -> RowRecord:
        """Put in targets: what is told of the token at t belongs at t-1. pieces: where each begins in the row."""
        length, k = len(row.input_ids), self.top_logprobs
        ids = np.full((length, k), -1, dtype=np.int64)
        log_probs = np.full((length, k), -np.inf, dtype=np.float32)
        tail = np.zeros(length, dtype=np.float32)
        following = np.full(length, np.nan, dtype=np.float32)
        for start, scores in pieces:
            told = row_arrays(scores, k=k, vocabulary_size=self.vocabulary_size)
            for token in range(start, min(start + len(scores), length)):
                place = token - start
                if token > 0 and row.scored[token] and scores.top_ids[place]:
                    ids[token - 1], log_probs[token - 1], tail[token - 1] = (part[place] for part in told)
                    own = scores.log_probs[place]
                    following[token - 1] = np.nan if own is None else own
        filled = replace(row, ids=ids, log_probs=log_probs, tail=tail, next_log_prob=following)
        if (known := self._names.token_bytes) is not None:
            filled.text, filled.token_bytes = known.join(row.input_ids), known.lengths[np.asarray(row.input_ids)]
        return filled


class _NotScored(TeacherError):
    """The server answered, but did not score the prompt."""


def _only_choice(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(raw["choices"]) != 1:
        raise TeacherError(f"the server gave {len(raw['choices'])} answers to one question.")
    return raw["choices"][0]


def _documents(row: RowRecord) -> list[tuple[int, int]]:
    """From where to where each document of a window reaches; those of one token tell nothing."""
    borders = [0, *row.document_starts, len(row.input_ids)]
    return [(low, high) for low, high in pairwise(borders) if high - low > 1]


def _whole(ids: Sequence[int] | np.ndarray) -> list[int]:
    return [int(one) for one in ids]
