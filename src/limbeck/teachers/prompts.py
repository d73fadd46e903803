"""Prompts for teachers that write: from a file, or the beginnings of documents."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.errors import DataError, TeacherError
from limbeck.models.token_bytes import encode_text, leading_special_tokens


@dataclass(frozen=True)
class Prompt:
    """Text to go on from, or the messages of a chat to answer; one of the two. Each message has `role` and `content`."""

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None

    def chat(self) -> list[dict[str, str]]:
        """Its messages; a text is what a user says."""
        return [dict(one) for one in self.messages or ({"role": "user", "content": self.text or ""},)]


def read_prompts(path: Path | str) -> list[Prompt]:
    """Read a .jsonl file with one prompt a line, or a .json file with a list of them.

    A prompt is a string, `{"prompt": text}`, `{"messages": [...]}` or a list of messages. Raises: DataError, naming the
    line, for anything else and for a file without prompts.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"prompts file {path}: {error.strerror}. Give an existing .jsonl or .json file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"prompts file {path}: not UTF-8 ({error.reason}). Convert it to UTF-8.") from error
    prompts = [_as_prompt(value, where=where) for where, value in _values(path, text)]
    if not prompts:
        raise DataError(f"prompts file {path}: there is no prompt in it.")
    return prompts


def document_prompts(documents: Iterable[str], *, characters: int) -> Iterator[Prompt]:
    """The beginnings of documents, cut at white space at or before `characters` where there is some."""
    for document in documents:
        start = document.lstrip()
        cut = start[:characters]
        if len(start) > characters and not start[characters].isspace():
            cut = cut.rsplit(None, 1)[0] if len(cut.split(None, 1)) > 1 else cut
        if cut.strip():
            yield Prompt(text=cut.rstrip())


def repeated(prompts: Iterable[Prompt], *, answers: int | None) -> Iterator[Prompt]:
    """As many prompts as answers are wanted, starting over where they end; None goes through them once."""
    if answers is None:
        return iter(prompts)
    return itertools.islice(itertools.cycle(prompts), answers)


def prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Its token ids: a text with the special tokens that the tokenizer puts before it, messages in its chat template.

    Raises: TeacherError when the tokenizer has no chat template.
    """
    if prompt.messages is None:
        return [*leading_special_tokens(tokenizer), *encode_text(tokenizer, [prompt.text or ""])[0]]
    return list(_templated(prompt, tokenizer, tokenize=True))


def prompt_renderer(tokenizer: Any) -> Callable[[Prompt], str]:
    """A function from a prompt to the text that a student with this tokenizer reads before an answer."""
    return lambda prompt: prompt.text if prompt.text is not None else _templated(prompt, tokenizer, tokenize=False)


def _templated(prompt: Prompt, tokenizer: Any, *, tokenize: bool) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise TeacherError(
            "there are prompts with messages, but the tokenizer has no chat template. Give prompts as text, or a "
            "tokenizer with a template."
        )
    return tokenizer.apply_chat_template(
        prompt.chat(), add_generation_prompt=True, tokenize=tokenize, return_dict=False
    )


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix == ".json":
            values = json.loads(text)
            if not isinstance(values, list):
                raise DataError(f"prompts file {path}: it holds {type(values).__name__}, not a list of prompts.")
            yield from ((f"{path}: prompt {number}", value) for number, value in enumerate(values, start=1))
            return
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{path}:{number}", json.loads(line)
    except (ValueError, RecursionError) as error:
        where = path if path.suffix == ".json" else f"{path}:{number}"
        raise DataError(f"prompts file {where}: not JSON ({error}).") from error


def _as_prompt(value: Any, *, where: str) -> Prompt:
    if isinstance(value, dict):
        given = [name for name in ("prompt", "messages") if value.get(name) is not None]
        if len(given) != 1:
            found = ", ".join(map(str, value)) or "nothing"
            raise DataError(f"prompts file {where}: expected `prompt` or `messages`, one of them; found {found}.")
        value = value[given[0]]
    if isinstance(value, str) and value.strip():
        return Prompt(text=value)
    if isinstance(value, list) and value and all(_is_message(one) for one in value):
        return Prompt(messages=_plain(value))
    raise DataError(
        f"prompts file {where}: expected a text that is not empty, or a list of messages, each with the texts `role` and "
        f"`content`; found {json.dumps(value)[:80]}."
    )


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)


def _plain(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, str], ...]:
    return tuple({"role": one["role"], "content": one["content"]} for one in messages)
