"""Prompts from files and documents."""

import json

import pytest
from tests.teachers.fake_server import TEMPLATE

from limbeck.core.errors import DataError, TeacherError
from limbeck.models.tokenizers import train_tokenizer
from limbeck.teachers.prompts import Prompt, document_prompts, prompt_ids, prompt_renderer, read_prompts, repeated

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def tokenizer():
    return train_tokenizer(["Ada met Bo. Bo saw Cy."] * 20, vocab_size=280)


def test_lines_of_every_form(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = ["Once", {"prompt": "Twice"}, {"messages": MESSAGES, "note": "kept out"}, MESSAGES]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    chat = Prompt(messages=tuple(MESSAGES))
    assert read_prompts(path) == [Prompt(text="Once"), Prompt(text="Twice"), chat, chat]


def test_one_list(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["Once", {"prompt": "Twice"}]))
    assert read_prompts(path) == [Prompt(text="Once"), Prompt(text="Twice")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.jsonl", '"a"\n{"prompt": ""}\n', r"p\.jsonl:2: .*not empty"),
        ("p.jsonl", '"a"\n{"text": "b"}\n', r"p\.jsonl:2: expected `prompt` or `messages`.*found text"),
        ("p.jsonl", '{"prompt": "b", "messages": []}', r"p\.jsonl:1: .*found prompt, messages"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', r"p\.jsonl:1: .*`role` and `content`"),
        ("p.jsonl", '"a"\n\n{"prompt"', r"p\.jsonl:3: not JSON"),
        ("p.jsonl", "7", r"p\.jsonl:1: "),
        ("p.jsonl", "\n", "no prompt"),
        ("p.json", '{"prompt": "a"}', "not a list"),
        ("p.json", '["a", 5]', "prompt 2"),
        ("p.json", "[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_prompts(path)


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(tmp_path / "p.jsonl")


def test_beginnings_of_documents():
    documents = ["  Ada met Bo today", "short", "   ", "unbreakableword and more", "Ada met"]
    assert [one.text for one in document_prompts(documents, characters=7)] == ["Ada met", "short", "unbreak", "Ada met"]
    assert [one.text for one in document_prompts(["Ada met Bo today"], characters=9)] == ["Ada met"]


def test_repeated():
    prompts = [Prompt(text="a"), Prompt(text="b")]
    assert "".join(one.text for one in repeated(prompts, answers=5)) == "ababa"
    assert list(repeated(prompts, answers=None)) == prompts


def test_ids_of_texts_and_chats(tokenizer):
    assert prompt_ids(Prompt(text="Ada met"), tokenizer) == tokenizer("Ada met")["input_ids"]
    chat = Prompt(messages=tuple(MESSAGES))
    with pytest.raises(TeacherError, match="no chat template"):
        prompt_ids(chat, tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(prompt_ids(chat, tokenizer)) == "<user>Hi\n<assistant>"
    render = prompt_renderer(tokenizer)
    assert render(chat) == "<user>Hi\n<assistant>"
    assert render(Prompt(text="Ada")) == "Ada"


def test_a_text_is_opened_but_not_closed(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer("Ada")["input_ids"][-1] == 0
    assert prompt_ids(Prompt(text="Ada"), tokenizer) == tokenizer("Ada")["input_ids"][:-1]
    assert prompt_ids(Prompt(text="Ada"), tokenizer)[0] == 0


def test_a_text_is_what_a_user_says():
    assert Prompt(text="Hi").chat() == MESSAGES
    assert Prompt(messages=tuple(MESSAGES)).chat() == MESSAGES
