"""The client of an endpoint, against a server in this process that fails in every way we could think of."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from email.utils import formatdate
from pathlib import Path

import pytest
from tests.teachers.fake_server import FakeServer, asked, raw, slow, status, trickle, truncated

from limbeck.core.errors import EnvironmentFault, StoreError, TeacherError
from limbeck.models.tokenizers import train_tokenizer
from limbeck.teachers.answers import AnswerFile, KeptAnswer, Question, Usage, read_usage
from limbeck.teachers.endpoint import Endpoint, EndpointSettings, RefusedQuestion, _retry_after


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Ada met Bo. Bo saw Cy and Cy saw Ada."] * 20, vocab_size=290)


@pytest.fixture
def server(tokenizer):
    with FakeServer(tokenizer).running() as running:
        yield running


def settings(server, **changes):
    return EndpointSettings(
        server.url, "m", **({"backoff_seconds": 0.01, "retries": 2, "timeout_seconds": 5.0} | changes)
    )


def question(number=0, path="/completions"):
    return Question(path, {"model": "m", "prompt": [1, 2, number], "max_tokens": 2, "temperature": 0.0})


def text_of(question, raw):
    return raw["choices"][0]["text"]


def test_asks_and_counts_what_it_cost(server):
    with Endpoint(settings(server)) as endpoint:
        answer = endpoint.ask(question())
    assert answer["choices"][0]["finish_reason"] == "length"
    assert endpoint.usage == Usage(answers=1, prompt_tokens=3, completion_tokens=2)


def test_answers_come_in_the_order_of_the_questions_and_at_once(server):
    server.delay_seconds = 0.05
    server.faults = {0: slow(0.2)}
    with Endpoint(settings(server, concurrency=4)) as endpoint:
        begun = time.monotonic()
        numbers = [one.body["prompt"][2] for one, _ in endpoint.ask_all(map(question, range(24)), text_of)]
        seconds = time.monotonic() - begun
    assert numbers == list(range(24))
    assert server.most_under_way == 4
    assert seconds < 24 * 0.05


def test_one_at_a_time(server):
    server.delay_seconds = 0.01
    with Endpoint(settings(server, concurrency=1)) as endpoint:
        list(endpoint.ask_all(map(question, range(4)), text_of))
    assert server.most_under_way == 1


def test_requests_per_minute(server):
    with Endpoint(settings(server, requests_per_minute=1200)) as endpoint:
        begun = time.monotonic()
        list(endpoint.ask_all(map(question, range(7)), text_of))
    assert 0.3 <= time.monotonic() - begun < 1.5


def test_waits_as_long_as_it_is_told(server):
    server.faults = {0: status(429, "slow down", retry_after="0.4")}
    with Endpoint(settings(server)) as endpoint:
        begun = time.monotonic()
        endpoint.ask(question())
    assert time.monotonic() - begun >= 0.4
    assert endpoint.retried == 1


def test_all_wait_when_one_is_told_to(server):
    server.faults = {0: status(429, "slow down", retry_after="0.4")}
    starts = []
    server.alter = lambda answer: (starts.append(time.monotonic()), answer)[1]
    with Endpoint(settings(server, concurrency=1)) as endpoint:
        begun = time.monotonic()
        list(endpoint.ask_all(map(question, range(3)), text_of))
    assert min(starts) - begun >= 0.4


def test_retry_after_as_seconds_or_date():
    assert _retry_after(None) is None
    assert _retry_after("7") == 7
    assert _retry_after("nonsense") is None
    assert _retry_after(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=3)
    assert _retry_after(formatdate(time.time() - 100, usegmt=True)) == 0


def test_a_wait_too_long_is_said(server):
    server.faults = {-1: status(429, "daily limit", retry_after="7200")}
    with (
        Endpoint(settings(server)) as endpoint,
        pytest.raises(RefusedQuestion, match=r"wait 7200 s .*daily limit.*later"),
    ):
        endpoint.ask(question())
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(529), raw("<html>busy</html>"), raw("[1]"), raw('{"error": {"message": "later"}}'), truncated],
    ids=["500", "503", "529", "not JSON", "a list", "error with 200", "truncated"],
)  # fmt: skip
def test_what_may_pass_is_tried_again(server, fault):
    server.faults = {0: fault}
    with Endpoint(settings(server)) as endpoint:
        assert endpoint.ask(question())["choices"]
    assert (len(server.bodies), endpoint.retried) == (2, 1)
    assert endpoint.usage.answers == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(500, "out of memory"), "status 500: out of memory"),
        (raw("<html>busy</html>"), "not JSON; it begins with '<html>busy"),
        (truncated, "the connection broke"),
        (slow(0.6), "no answer within 0.3 s"),
        (trickle(1.0), "not complete within 0.3 s"),
    ],
    ids=["500", "not JSON", "truncated", "slow", "trickle"],
)
def test_what_does_not_pass_is_told(server, fault, words):
    server.faults = {-1: fault}
    with (
        Endpoint(settings(server, retries=1, timeout_seconds=0.3)) as endpoint,
        pytest.raises(TeacherError, match=f"2 attempts; the last failed: .*{words}"),
    ):
        endpoint.ask(question())
    assert len(server.bodies) == 2


def test_an_endpoint_that_is_down(server):
    gone = EndpointSettings("http://127.0.0.1:9/v1", "m", retries=1, backoff_seconds=0.01)
    with (
        Endpoint(gone) as endpoint,
        pytest.raises(TeacherError, match=r"127\.0\.0\.1:9/v1.*2 attempts.*cannot connect"),
    ):
        endpoint.ask(question())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(404, "no such model"), "404: no such model.*usually ends in /v1.*model's name"),
        (status(400, "too long"), "400: too long"),
        (status(401, "bad"), "401: bad.*Set api_key_variable"),
        (status(302, "", location="http://elsewhere/"), "moved to http://elsewhere/"),
        (status(429, "insufficient_quota: pay"), "429: insufficient_quota"),
        (raw('{"object": "list"}'), "no `choices`.*object.*OpenAI-compatible"),
    ],
    ids=["404", "400", "401", "302", "quota", "other JSON"],
)
def test_what_will_not_pass_is_asked_once(server, fault, words):
    server.faults = {-1: fault}
    with Endpoint(settings(server)) as endpoint, pytest.raises(TeacherError, match=words):
        endpoint.ask(question())
    assert len(server.bodies) == 1


def test_fields_that_a_server_does_not_know_are_left_out_once(server):
    server.faults = {
        0: status(400, "Unrecognized request argument: return_tokens_as_token_ids"),
        1: status(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
    }
    body = {"model": "m", "prompt": [1], "max_tokens": 2, "return_tokens_as_token_ids": True}
    with Endpoint(settings(server)) as endpoint:
        endpoint.ask(Question("/completions", body))
        endpoint.ask(Question("/completions", body))
    assert endpoint.adaptations == {"return_tokens_as_token_ids": None, "max_tokens": "max_completion_tokens"}
    assert [sorted(sent) for sent in server.bodies[2:]] == [["max_completion_tokens", "model", "prompt"]] * 2
    assert endpoint.retried == 0


def test_a_complaint_about_the_value_of_a_field_is_no_reason_to_rename_it(server):
    server.faults = {-1: status(400, "max_tokens is too large: 4096")}
    with Endpoint(settings(server)) as endpoint, pytest.raises(RefusedQuestion, match="max_tokens is too large"):
        endpoint.ask(question())
    assert len(server.bodies) == 1


class TestKey:
    KEY = "sk-very-secret-0123456789"

    @pytest.fixture(autouse=True)
    def _set(self, monkeypatch):
        monkeypatch.setenv("TEACHER_KEY", self.KEY)

    def test_goes_into_the_header_and_nowhere_else(self, server, tmp_path, capsys, caplog):
        kept = AnswerFile(tmp_path / "answers.jsonl")
        with Endpoint(settings(server, api_key_variable="TEACHER_KEY"), kept=kept) as endpoint:
            list(endpoint.ask_all([question()], text_of))
        assert server.headers[0]["Authorization"] == f"Bearer {self.KEY}"
        everywhere = [
            repr(endpoint), repr(endpoint.settings), repr(vars(endpoint)["_client"].headers), json.dumps(server.bodies),
            (tmp_path / "answers.jsonl").read_text(), *capsys.readouterr(), caplog.text,
        ]  # fmt: skip
        assert not any(self.KEY in place for place in everywhere)

    @pytest.mark.parametrize("code", [400, 401, 500])
    def test_is_not_printed_though_the_server_says_it(self, server, code):
        server.faults = {-1: status(code, f"Incorrect key {self.KEY}, sorry")}
        with (
            Endpoint(settings(server, api_key_variable="TEACHER_KEY", retries=0)) as endpoint,
            pytest.raises(TeacherError, match=r"Incorrect key \*\*\*, sorry") as caught,
        ):
            endpoint.ask(question())
        assert self.KEY not in "".join(traceback.format_exception(caught.value))

    def test_is_not_printed_where_the_answer_is_no_json(self, server):
        server.faults = {-1: raw("x" * 70 + self.KEY)}
        with (
            Endpoint(settings(server, api_key_variable="TEACHER_KEY", retries=0)) as endpoint,
            pytest.raises(TeacherError) as caught,
        ):
            endpoint.ask(question())
        assert self.KEY[:8] not in str(caught.value)

    def test_refused(self, server):
        server.faults = {-1: status(401, "no")}
        with (
            Endpoint(settings(server, api_key_variable="TEACHER_KEY")) as endpoint,
            pytest.raises(TeacherError, match=r"Check the key in \$TEACHER_KEY"),
        ):
            endpoint.ask(question())

    def test_missing(self, server, monkeypatch):
        monkeypatch.delenv("TEACHER_KEY")
        with pytest.raises(EnvironmentFault, match="TEACHER_KEY.*is not set"):
            Endpoint(settings(server, api_key_variable="TEACHER_KEY"))

    @pytest.mark.parametrize(
        "url", ["http://me:sk-very-secret-0123456789@host/v1", "http://host/v1?key=sk-very-secret-0123456789"]
    )
    def test_in_the_address_is_refused_and_not_printed(self, url):
        with pytest.raises(TeacherError, match="environment alone") as caught:
            Endpoint(EndpointSettings(url, "m"))
        assert self.KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_an_address_that_is_none(url):
    with pytest.raises(TeacherError, match="such as http://127"):
        Endpoint(EndpointSettings(url, "m"))


def test_words_of_the_server_are_made_harmless(server):
    server.faults = {-1: status(400, "\x1b[31mred\nline\x00" + "long " * 500)}
    with Endpoint(settings(server)) as endpoint, pytest.raises(TeacherError) as caught:
        endpoint.ask(question())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


class TestKeptAnswers:
    def test_are_not_asked_for_again(self, server, tmp_path):
        for repeat in range(2):
            kept = AnswerFile(tmp_path / "answers.jsonl")
            with Endpoint(settings(server), kept=kept) as endpoint:
                texts = [text for _, text in endpoint.ask_all(map(question, range(5)), text_of)]
            kept.close()
            if repeat == 0:
                first = texts
                assert endpoint.usage == Usage(5, 15, 10)
            else:
                assert endpoint.usage == Usage()
                assert endpoint.usage_before == Usage(5, 15, 10)
        assert texts == first
        assert len(server.bodies) == 5

    def test_what_came_before_a_failure_is_kept(self, server, tmp_path):
        server.faults = {number: status(400, "no") for number in range(3, 100)}
        kept = AnswerFile(tmp_path / "answers.jsonl")
        with Endpoint(settings(server, concurrency=1), kept=kept) as endpoint, pytest.raises(TeacherError):
            list(endpoint.ask_all(map(question, range(10)), text_of))
        assert len(kept) == 3
        server.faults = {}
        with Endpoint(settings(server, concurrency=1), kept=kept) as endpoint:
            assert len(list(endpoint.ask_all(map(question, range(10)), text_of))) == 10
        assert endpoint.usage.answers == 7

    def test_stopping_early_asks_little_more(self, server, tmp_path):
        kept = AnswerFile(tmp_path / "answers.jsonl")
        with Endpoint(settings(server, concurrency=2), kept=kept) as endpoint:
            answers = endpoint.ask_all(map(question, range(1000)), text_of)
            next(answers)
            answers.close()
        assert len(server.bodies) <= 4
        assert len(kept) == len(server.bodies)

    def test_an_answer_that_cannot_be_used_is_not_kept_but_counted(self, server, tmp_path):
        def refuse(question, raw):
            raise TeacherError("unusable")

        kept = AnswerFile(tmp_path / "answers.jsonl")
        with (
            Endpoint(settings(server, concurrency=1), kept=kept) as endpoint,
            pytest.raises(TeacherError, match="unusable"),
        ):
            list(endpoint.ask_all([question()], refuse))
        assert len(kept) == 0
        assert endpoint.usage.answers == 1

    def test_another_body_path_or_context_is_another_question(self):
        keys = {
            one.key
            for one in (
                question(0),
                question(1),
                question(0, "/other"),
                Question("/completions", question(0).body, {"t": "x"}),
            )
        }
        assert len(keys) == 4
        assert Question("/p", {"a": 1, "b": 2}).key == Question("/p", {"b": 2, "a": 1}).key

    def test_a_line_without_its_end_is_cut_off(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        kept = AnswerFile(path)
        for number in range(3):
            kept.put(question(number), KeptAnswer({"text": "é" * number, "x": 0.1}, Usage(1, 2, 3)))
        kept.close()
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        for cut in [0, 1, 7, 8, 9, 60, len(lines[2]) - 1]:
            path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
            again = AnswerFile(path)
            assert len(again) == 2
            assert again.get(question(1)) == KeptAnswer({"text": "é", "x": 0.1}, Usage(1, 2, 3))
            assert again.get(question(2)) is None
            again.put(question(2), KeptAnswer({"text": "éé", "x": 0.1}, Usage(1, 2, 3)))
            again.close()
            assert path.read_bytes() == whole

    def test_damage_is_found_and_named(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        kept = AnswerFile(path)
        for number in range(3):
            kept.put(question(number), KeptAnswer({"logprob": -1.25}))
        kept.close()
        path.write_bytes(path.read_bytes().replace(b"-1.25", b"-1.75", 2).replace(b"-1.75", b"-1.25", 1))
        with pytest.raises(StoreError, match=r"answers\.jsonl:2: .*checksum.*Delete that line"):
            AnswerFile(path)

    @pytest.mark.parametrize("content", [b"a shopping list", b"a shopping list\n", b"{}\n", b'{"sum":[]}\n', b"[1]\n"])
    def test_another_file_is_left_alone(self, tmp_path, content):
        path = tmp_path / "mine.txt"
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"mine\.txt:1"):
            AnswerFile(path)
        assert path.read_bytes() == content

    def test_nobody_else_may_read_them(self, tmp_path):
        AnswerFile(tmp_path / "answers.jsonl").close()
        assert (tmp_path / "answers.jsonl").stat().st_mode & 0o077 == 0

    def test_a_killed_capture_goes_on_without_paying_twice(self, server, tmp_path):
        server.delay_seconds = 0.02
        program = f"""
import sys
from limbeck.teachers.answers import AnswerFile, Question
from limbeck.teachers.endpoint import Endpoint, EndpointSettings
questions = (Question("/completions", {{"model": "m", "prompt": [1, 2, n], "max_tokens": 2, "temperature": 0.0}}) for n in range(120))
with Endpoint(EndpointSettings({server.url!r}, "m"), kept=AnswerFile({str(tmp_path / "answers.jsonl")!r})) as endpoint:
    for question, answer in endpoint.ask_all(questions, lambda question, raw: raw["choices"][0]["text"]):
        print(question.body["prompt"][2], repr(answer), flush=True)
"""
        source = str(Path(__file__).parents[2] / "src")
        environment = os.environ | {"PYTHONPATH": source}
        with subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        ) as first:
            before = [first.stdout.readline() for _ in range(20)]
            first.send_signal(signal.SIGKILL)
        lines = (tmp_path / "answers.jsonl").read_bytes().count(b"\n")
        again = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        after = again.stdout.splitlines(keepends=True)
        assert len(after) == 120
        assert after[:20] == before
        assert 20 <= lines < 120
        # Only what was under way when it was killed may have been asked twice.
        assert sum(count - 1 for count in asked(server).values()) <= 4
        assert len(asked(server)) == 120


def test_usage_and_cost():
    assert read_usage({"usage": {"prompt_tokens": 7, "completion_tokens": 2}}) == Usage(1, 7, 2)
    for broken in (
        {},
        {"usage": None},
        {"usage": {"prompt_tokens": -1, "completion_tokens": 2}},
        {"usage": {"prompt_tokens": 3}},
    ):
        assert read_usage(broken) == Usage(answers=1, uncounted=1)
    total = Usage(2, 1_500_000, 250_000) + Usage(1, 500_000, 250_000)
    assert total == Usage(3, 2_000_000, 500_000)
    assert total.cost(input_price=0.5, output_price=4.0) == pytest.approx(2 * 0.5 + 0.5 * 4)
    assert total.cost(input_price=None, output_price=4.0) is None
    assert (total + Usage(1, uncounted=1)).cost(input_price=1, output_price=1) is None
