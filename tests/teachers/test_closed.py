"""A teacher that gives text alone: what is used, what is refused, what it costs."""

import pytest
from tests.teachers.fake_server import TEMPLATE, FakeServer, raw, status

from limbeck.core.errors import DataError, TeacherError
from limbeck.models.tokenizers import train_tokenizer
from limbeck.store.records import TextRecord
from limbeck.teachers.answers import AnswerFile, Usage
from limbeck.teachers.closed import ClosedTeacher
from limbeck.teachers.endpoint import Endpoint, EndpointSettings
from limbeck.teachers.prompts import Prompt, prompt_renderer

PROMPTS = [Prompt(text=f"Who met Ada, number {number}?") for number in range(6)]


@pytest.fixture
def tokenizer():
    tokenizer = train_tokenizer(["Ada met Bo. Bo saw Cy."] * 20, vocab_size=280)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def server(tokenizer):
    with FakeServer(tokenizer).running() as running:
        yield running


def connect(server, **changes):
    return Endpoint(EndpointSettings(server.url, "m", retries=2, backoff_seconds=0.01), **changes)


def say(text, reason="stop"):
    """The server says these words, or those that a function makes of its own answer."""

    def alter(answer):
        answer["choices"][0] |= {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return answer

    return alter


def test_texts_usage_and_cost(server, tokenizer):
    rows = []
    with connect(server) as endpoint:
        teacher = ClosedTeacher(endpoint, max_new_tokens=8, input_price=2.0, output_price=10.0)
        told = teacher.write(PROMPTS, sink=rows.append)
    assert [row.prompt for row in rows] == [one.text for one in PROMPTS]
    assert all(isinstance(row, TextRecord) and row.completion for row in rows)
    read = sum(
        len(tokenizer.apply_chat_template(one.chat(), add_generation_prompt=True, return_dict=False)) for one in PROMPTS
    )
    assert told.usage == Usage(6, read, 48)
    assert told.cost == pytest.approx((read * 2 + 48 * 10) / 1e6)
    assert (told.texts, told.empty_answers, dict(told.finish_reasons)) == (6, 0, {"length": 6})
    assert told.characters == sum(len(row.completion) for row in rows)
    assert all("logprobs" not in body for body in server.bodies)
    assert sorted(body["seed"] for body in server.bodies) == list(range(6))


def test_no_price_no_cost(server):
    with connect(server) as endpoint:
        assert ClosedTeacher(endpoint, input_price=1.0).write(PROMPTS[:1], sink=lambda row: None).cost is None


def test_the_total_counts_what_was_paid_before(server, tmp_path):
    totals, rows = [], []
    for count in (3, 6):
        kept = AnswerFile(tmp_path / "answers.jsonl")
        with connect(server, kept=kept) as endpoint:
            totals.append(ClosedTeacher(endpoint, max_new_tokens=4).write(PROMPTS[:count], sink=rows.append).usage)
        kept.close()
    assert len(server.bodies) == 6
    assert totals[1].completion_tokens == 24
    assert rows[:3] == rows[3:6]


def test_a_conversation_is_rendered_for_the_student(server, tokenizer):
    chat = Prompt(messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))
    rows = []
    with connect(server) as endpoint:
        ClosedTeacher(endpoint, max_new_tokens=2).write([chat], sink=rows.append, render=prompt_renderer(tokenizer))
        assert rows[0].prompt == "<system>Be brief.\n<user>Hi\n<assistant>"
        assert server.bodies[0]["messages"] == chat.chat()
        with pytest.raises(DataError, match="conversation"):
            ClosedTeacher(endpoint).write([chat], sink=rows.append)


def test_stops_when_there_is_enough(server):
    server.alter = say("four")
    rows = []
    with connect(server) as endpoint:
        ClosedTeacher(endpoint).write(PROMPTS * 50, sink=rows.append, characters=10)
    assert len(rows) == 3
    assert len(server.bodies) <= 3 + 8


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_a_few_empty_answers_are_left_out_and_counted(server, text):
    replies = iter([text, "fine", "fine", text, "fine", "fine"])
    server.alter = lambda answer: say(
        reply := next(replies), "content_filter" if not reply or not reply.strip() else "stop"
    )(answer)
    rows = []
    with Endpoint(EndpointSettings(server.url, "m", concurrency=1)) as endpoint:
        told = ClosedTeacher(endpoint).write(PROMPTS, sink=rows.append)
    assert [row.completion for row in rows] == ["fine"] * 4
    assert (told.texts, told.empty_answers) == (4, 2)
    assert told.finish_reasons == {"content_filter": 2, "stop": 4}


def test_many_empty_answers_end_it(server):
    server.alter = say("", "length")
    with connect(server) as endpoint:
        with pytest.raises(
            TeacherError, match=r"6 of 6 answers hold no text \(finish reasons: length: 6\).*max_new_tokens"
        ):
            ClosedTeacher(endpoint).write(PROMPTS, sink=print)
        with pytest.raises(TeacherError, match="11 of 11 answers hold no text"):
            ClosedTeacher(endpoint, seed=100).write(PROMPTS * 20, sink=print)
    assert len(server.bodies) < 6 + 11 + 10


@pytest.mark.parametrize("content", [[{"type": "text"}], 7])
def test_what_is_no_text_is_refused(server, content):
    server.alter = say(content)
    with connect(server) as endpoint, pytest.raises(TeacherError, match="not text"):
        ClosedTeacher(endpoint).write(PROMPTS[:1], sink=print)


def test_no_choice_is_an_empty_answer(server):
    server.faults = {-1: raw('{"choices": []}')}
    with connect(server) as endpoint, pytest.raises(TeacherError, match="finish reasons: None: 1"):
        ClosedTeacher(endpoint).write(PROMPTS[:1], sink=print)


def test_a_failing_endpoint(server):
    server.faults = {-1: status(503, "overloaded")}
    with connect(server) as endpoint, pytest.raises(TeacherError, match="3 attempts.*overloaded"):
        ClosedTeacher(endpoint).write(PROMPTS[:1], sink=print)
