"""A teacher that hands over text alone: sequence-level distillation, with what it cost.

Source: Kim and Rush 2016, arXiv:1606.07947, section 3.2 (sequence-level knowledge distillation); answers are sampled
here, where they use beam search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import tee
from typing import Any

from limbeck.core.errors import DataError, TeacherError
from limbeck.store.records import TextRecord
from limbeck.teachers.answers import Question, Usage
from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.prompts import Prompt

# Empty answers that are put up with before the capture is stopped: this many, or this share once there are more.
_FEW_EMPTY = 10
_EMPTY_SHARE = 0.1


@dataclass
class Told:
    """What a closed teacher handed over.

    texts: answers that were used. empty_answers: answers without text (refused, filtered, spent on thinking), which
    are not. characters: of the answers. finish_reasons: how often each was given; "length" are those cut short.
    usage: tokens it cost, in this session and before. cost: in the currency of the prices; None when unknown.
    """

    texts: int = 0
    empty_answers: int = 0
    characters: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    usage: Usage = field(default_factory=Usage)
    cost: float | None = None


class ClosedTeacher:
    """Texts from a chat endpoint.

    max_new_tokens: most tokens of an answer. temperature: of sampling. seed: the first of the seeds that are sent, one
    for each answer. input_price, output_price: of a million tokens; None leaves the cost unknown.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        seed: int = 0,
        input_price: float | None = None,
        output_price: float | None = None,
    ):
        self.endpoint = endpoint
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.input_price, self.output_price = input_price, output_price

    def write(
        self,
        prompts: Iterable[Prompt],
        *,
        sink: Callable[[TextRecord], None],
        render: Callable[[Prompt], str] | None = None,
        characters: int | None = None,
    ) -> Told:
        """Let the teacher answer each prompt, and hand over prompt and answer, in order.

        render: turns a prompt into the text that the student reads before the answer (see `prompts.prompt_renderer`);
        None takes texts and single messages as they are. characters: stop once the answers hold that many; None takes
        all prompts.

        Raises: TeacherError when the endpoint fails, or when many answers are empty; DataError for a conversation
        without `render`.
        """
        render = render or _plain_text
        total = Told()
        asked, prompts = tee(prompts)
        with closing(self.endpoint.ask_all(self._questions(asked), _read_text)) as answers:
            for prompt, (_, answer) in zip(prompts, answers, strict=True):
                total.finish_reasons[str(answer["finish_reason"])] += 1
                text = answer["text"]
                if not text.strip():
                    total.empty_answers += 1
                    self._refuse_empty(total)
                    continue
                total.texts += 1
                total.characters += len(text)
                sink(TextRecord(render(prompt), text))
                if characters is not None and total.characters >= characters:
                    break
        if not total.texts:
            raise TeacherError(self._told_empty(total))
        total.usage = self.endpoint.usage_before + self.endpoint.usage
        total.cost = total.usage.cost(input_price=self.input_price, output_price=self.output_price)
        return total

    def _questions(self, prompts: Iterable[Prompt]) -> Iterator[Question]:
        for index, prompt in enumerate(prompts):
            body = {
                "model": self.endpoint.settings.model, "messages": prompt.chat(), "max_tokens": self.max_new_tokens,
                "temperature": self.temperature, "seed": self.seed + index,
            }  # fmt: skip
            yield Question("/chat/completions", body)

    def _refuse_empty(self, total: Told) -> None:
        if total.empty_answers > max(_FEW_EMPTY, _EMPTY_SHARE * (total.texts + total.empty_answers)):
            raise TeacherError(self._told_empty(total))

    def _told_empty(self, total: Told) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in total.finish_reasons.most_common())
        return (
            f"{self.endpoint}: {total.empty_answers} of {total.texts + total.empty_answers} answers hold no text (finish "
            f"reasons: {reasons or 'none'}). Check the prompts; with `length`, raise max_new_tokens: the model may spend "
            "them on thinking."
        )


def _read_text(question: Question, raw: Mapping[str, Any]) -> dict[str, Any]:
    choice = raw["choices"][0] if raw["choices"] else {}
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if content is not None and not isinstance(content, str):
        raise TeacherError(f"the server's answer holds {type(content).__name__}, not text.")
    return {"text": content or "", "finish_reason": choice.get("finish_reason")}


def _plain_text(prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    if prompt.messages and len(prompt.messages) == 1:
        return prompt.messages[0]["content"]
    raise DataError(
        "a prompt holds a conversation, which only a chat template turns into text. Give the student a tokenizer with one."
    )
