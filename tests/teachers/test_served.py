"""A served teacher: every shape of answer becomes the same rows; what is not to be trusted is refused."""

import copy
import itertools

import numpy as np
import pytest
from tests.teachers.fake_server import TEMPLATE, FakeServer, raw

from limbeck.core.errors import DataError, TeacherError, VocabularyError
from limbeck.models.tokenizers import train_tokenizer
from limbeck.store.records import RowRecord, usual_scored
from limbeck.teachers.answers import AnswerFile
from limbeck.teachers.endpoint import Endpoint, EndpointSettings
from limbeck.teachers.prompts import Prompt
from limbeck.teachers.served import ServedTeacher

PROMPTS = [Prompt(text=text) for text in ("Ada met", "Bo saw Cy and", "Cy", "The end of Ada")]
CHATS = [Prompt(messages=({"role": "user", "content": one.text},)) for one in PROMPTS]
SHAPES = {
    "chat, everything": ("chat", ("id", "bytes", "token")),
    "chat, ids": ("chat", ("id", "token")),
    "chat, bytes": ("chat", ("bytes", "token")),
    "classic, ids": ("classic", ("token_id",)),
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["Ada met Bo. Bo saw Cy and Cy saw Ada."] * 20, vocab_size=285)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def server(tokenizer):
    with FakeServer(tokenizer).running() as running:
        yield running


def connect(server, **changes):
    return Endpoint(EndpointSettings(server.url, "m", retries=1, backoff_seconds=0.01), **changes)


def generate(server, tokenizer, prompts=PROMPTS, *, context_tokens=64, tokens=None, kept=None, **options):
    rows = []
    with connect(server, kept=kept) as endpoint:
        teacher = ServedTeacher(endpoint, tokenizer, **({"top_logprobs": 8, "max_new_tokens": 12} | options))
        total = teacher.generate(prompts, context_tokens=context_tokens, sink=rows.append, tokens=tokens)
    return rows, total


def assert_true_of(row, model, *, k):
    """Slowly: position t of a row speaks of token t+1 as the model does, given the tokens up to t of its document."""
    ids = [int(one) for one in row.input_ids]
    starts = {0, *row.document_starts}
    begin = 0
    for place in range(len(ids)):
        begin = place if place in starts else begin
        if place + 1 >= len(ids) or not row.scored[place + 1]:
            assert (row.ids[place] == -1).all()
            assert np.isneginf(row.log_probs[place]).all()
            assert row.tail[place] == 0
            assert np.isnan(row.next_log_prob[place])
            continue
        truth = model.log_probs(ids[begin : place + 1])
        best = np.argsort(-truth)[:k]
        assert row.ids[place].tolist() == best.tolist()
        np.testing.assert_allclose(row.log_probs[place], truth[best], rtol=1e-6)
        np.testing.assert_allclose(np.exp(row.tail[place]), 1 - np.exp(truth[best]).sum(), atol=1e-6)
        np.testing.assert_allclose(row.next_log_prob[place], truth[ids[place + 1]], rtol=1e-6)


class TestGenerate:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("prompts", [PROMPTS, CHATS], ids=["texts", "chats"])
    def test_rows_are_what_the_model_says(self, server, tokenizer, shape, prompts):
        server.shape, server.names = SHAPES[shape]
        rows, total = generate(server, tokenizer, prompts)
        for prompt, row in zip(prompts, rows, strict=True):
            before = (
                tokenizer(prompt.text)["input_ids"]
                if prompt.text
                else tokenizer.apply_chat_template(prompt.chat(), add_generation_prompt=True, return_dict=False)
            )
            assert row.input_ids[: len(before)].tolist() == before
            assert row.scored.tolist() == [False] * len(before) + [True] * 12
            assert row.text == server.token_bytes.join(row.input_ids)
            assert row.token_bytes.sum() == len(row.text)
            assert_true_of(row, server.model, k=8)
        assert (total.rows, total.scored_tokens) == (4, 48)
        assert total.tokens == sum(len(row.input_ids) for row in rows)
        assert total.finish_reasons == {"length": 4}

    def test_greedy_tokens_are_the_likeliest(self, server, tokenizer):
        rows, _ = generate(server, tokenizer, temperature=0.0)
        for row in rows:
            said = np.flatnonzero(row.scored) - 1
            assert (row.ids[said, 0] == row.input_ids[said + 1]).all()

    def test_all_log_probs_leave_no_tail(self, server, tokenizer):
        rows, _ = generate(server, tokenizer, PROMPTS[:1], top_logprobs=len(tokenizer))
        said = np.flatnonzero(rows[0].scored) - 1
        assert np.isneginf(rows[0].tail[said]).all()
        np.testing.assert_allclose(np.exp(rows[0].log_probs[said]).sum(axis=1), 1, rtol=1e-5)

    def test_every_answer_has_its_own_seed(self, server, tokenizer):
        rows, _ = generate(server, tokenizer, [PROMPTS[0]] * 4)
        assert len({row.key for row in rows}) == 4

    def test_stops_when_there_are_enough_tokens(self, server, tokenizer):
        rows, total = generate(server, tokenizer, [PROMPTS[0]] * 100, tokens=60)
        assert total.tokens >= 60 > total.tokens - len(rows[-1].input_ids)

    def test_a_long_prompt_is_cut_and_a_long_answer_not_asked_for(self, server, tokenizer):
        rows, total = generate(server, tokenizer, [Prompt(text="Ada met Bo. " * 30), PROMPTS[0]], context_tokens=16)
        assert [len(row.input_ids) for row in rows] == [16, len(tokenizer("Ada met")["input_ids"]) + 12]
        assert rows[0].scored.tolist() == [False] * 8 + [True] * 8
        assert total.cut_prompts == 1
        assert_true_of(rows[0], server.model, k=8)

    def test_a_long_chat_is_refused(self, server, tokenizer):
        with pytest.raises(DataError, match=r"prompt 1 has \d+ tokens.*window of 8"):
            generate(server, tokenizer, CHATS, context_tokens=8)

    def test_a_stopped_capture_goes_on_with_the_same_rows(self, server, tokenizer, tmp_path):
        whole, _ = generate(server, tokenizer)
        kept = AnswerFile(tmp_path / "answers.jsonl")
        generate(server, tokenizer, PROMPTS[:2], kept=kept)
        kept.close()
        asked = len(server.bodies)
        rows, total = generate(server, tokenizer, kept=AnswerFile(tmp_path / "answers.jsonl"))
        assert len(server.bodies) - asked == 2 + 3  # two new answers, three questions that check the server
        assert [row.key for row in rows] == [row.key for row in whole]
        for one, other in zip(rows, whole, strict=True):
            np.testing.assert_array_equal(one.log_probs, other.log_probs)
            np.testing.assert_array_equal(one.ids, other.ids)
        assert total.rows == 4

    def test_answers_of_another_tokenizer_are_not_taken_from_the_file(self, server, tokenizer, tmp_path):
        kept = AnswerFile(tmp_path / "answers.jsonl")
        generate(server, tokenizer, CHATS, kept=kept)
        changed = copy.deepcopy(tokenizer)
        changed.add_tokens(["Dora"])
        before = len(kept)
        generate(server, changed, CHATS, kept=kept)
        assert len(kept) == 2 * before

    def test_an_answer_ends_where_tokens_are_put_into_one_entry(self, server, tokenizer):
        """Its beginning is used as it is; the emoji and what follows are not."""
        last = tokenizer("é")["input_ids"][1]

        def merge(answer):
            content = answer["choices"][0]["logprobs"]["content"]
            if len(content) == 12:
                content[5:7] = [content[5] | {"id": last, "bytes": list("é".encode()), "token": "é"}]
            return answer

        whole, _ = generate(server, tokenizer)
        server.alter = merge
        rows, total = generate(server, tokenizer)
        for one, row in zip(whole, rows, strict=True):
            assert row.input_ids.tolist() == one.input_ids[:-7].tolist()
            assert_true_of(row, server.model, k=8)
        assert (total.cut_answers, total.scored_tokens) == (4, 20)

    def test_an_answer_that_ends_within_a_character(self, server, tokenizer):
        """Then the last entries are missing, and the text ends in replacement characters."""

        def drop(answer):
            choice = answer["choices"][0]
            if len(choice["logprobs"]["content"]) == 12:
                del choice["logprobs"]["content"][-2:]
                known = [entry["id"] for entry in choice["logprobs"]["content"]]
                choice["text"] = server.token_bytes.join(known).decode("utf-8", "replace") + "\ufffd"
            return answer

        server.alter = drop
        rows, total = generate(server, tokenizer)
        assert total.scored_tokens == 40
        assert_true_of(rows[0], server.model, k=8)

    def test_empty_answers_make_no_row(self, server, tokenizer):
        server.end_after = None
        count = [0]

        def sometimes_empty(answer):
            count[0] += 1
            if count[0] in (5, 6):
                answer["choices"][0]["logprobs"] = {"content": []}
                answer["usage"]["completion_tokens"] = 0
            return answer

        server.alter = sometimes_empty
        rows, total = generate(server, tokenizer)
        assert (len(rows), total.rows, total.empty_answers) == (2, 2, 2)


class TestRefusals:
    def test_no_log_probs(self, server, tokenizer):
        server.faults = {-1: raw('{"choices": [{"text": " Bo", "logprobs": null}]}')}
        with pytest.raises(TeacherError, match="no log-probabilities.*closed"):
            generate(server, tokenizer)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_fewer_than_asked(self, server, tokenizer, shape):
        server.shape, server.names = SHAPES[shape]
        server.most_logprobs = 5
        with pytest.raises(TeacherError, match=r"token 0, \d+.* gives 5 log-probabilities, and 8 were asked for"):
            generate(server, tokenizer)

    def test_classic_without_the_likeliest(self, server, tokenizer):
        server.shape, server.names = SHAPES["classic, ids"]

        def drop(answer):
            answer["choices"][0]["logprobs"]["top_logprobs"] = None
            return answer

        server.alter = drop
        with pytest.raises(TeacherError, match="4 tokens, 4 log-probabilities.*at 0 places"):
            generate(server, tokenizer)

    def test_fewer_tokens_than_were_written(self, server, tokenizer):
        def drop(answer):
            del answer["choices"][0]["logprobs"]["content"][2:]
            return answer

        server.alter = drop
        with pytest.raises(TeacherError, match="wrote 4 tokens but tells log-probabilities of 2"):
            generate(server, tokenizer)

    def test_log_probs_at_the_sampling_temperature(self, server, tokenizer):
        server.scaled_by_temperature = True
        generate(server, tokenizer, temperature=1.0)
        with pytest.raises(TeacherError, match=r"temperature 0\.5 differ from those at 1 by .*Set temperature: 1"):
            generate(server, tokenizer, temperature=0.5)
        server.scaled_by_temperature = False
        generate(server, tokenizer, temperature=0.5)

    @pytest.mark.parametrize("shift", [1, -1])
    def test_distributions_shifted_against_the_tokens_written(self, server, tokenizer, shift):
        server.written_shift = shift
        with pytest.raises(
            TeacherError, match=r"at temperature 0 it wrote .* likelier by .* shifted against the tokens"
        ):
            generate(server, tokenizer)

    def test_what_is_written_differs_from_what_is_gone_on_from(self, server, tokenizer):
        """A server whose answers depend on what it was asked before."""
        log_probs = server.model.log_probs
        server.model.log_probs = lambda ids: log_probs([*ids, len(server.bodies)])
        with pytest.raises(TeacherError, match="are not those it writes with.*on a known text, at token 2"):
            generate(server, tokenizer)

    def test_values_of_tokens_that_are_not_those_listed(self, server, tokenizer):
        def shift(answer):
            content = answer["choices"][0]["logprobs"]["content"]
            for one, following in itertools.pairwise(content):
                one["top_logprobs"] = following["top_logprobs"]
            return answer

        server.alter = shift
        with pytest.raises(TeacherError, match=r"token 0, .* but (lists it with|does not list it).*not aligned"):
            generate(server, tokenizer)

    def test_another_template_or_a_token_put_before(self, server, tokenizer):
        def more(answer):
            answer["usage"]["prompt_tokens"] += 1
            return answer

        server.alter = more
        with pytest.raises(TeacherError, match=r"reads a prompt as (\d+) tokens.*chat template"):
            generate(server, tokenizer, CHATS)

    def test_another_tokenizer(self, server):
        other = train_tokenizer(["quick brown foxes jump over lazy dogs"] * 20, vocab_size=285)
        with pytest.raises(
            VocabularyError, match=r"has the id \d+, which is .* here: the served model has another tokenizer"
        ):
            generate(server, other)

    def test_an_id_beyond_the_vocabulary(self, server):
        smaller = train_tokenizer(["Ada met Bo. Bo saw Cy and Cy saw Ada."] * 20, vocab_size=270)
        with pytest.raises(VocabularyError, match="the tokenizer has 270 tokens"):
            generate(server, smaller, top_logprobs=100)

    def test_spellings_that_do_not_tell_the_token(self, server, tokenizer):
        """Bytes that are no whole character are all spelled alike."""
        server.shape, server.names = "classic", ("token",)
        with pytest.raises(VocabularyError, match="no whole character.*ids or bytes"):
            generate(server, tokenizer, top_logprobs=60)

    def test_answers_without_any_token(self, server, tokenizer):
        server.end_after = 0
        with pytest.raises(TeacherError, match="wrote nothing"):
            generate(server, tokenizer)

    def test_a_capture_whose_answers_are_all_empty_ends(self, server, tokenizer):
        """Though its prompts never do."""

        def empty(answer):
            if len(answer["choices"][0]["logprobs"]["content"]) == 12:
                answer["choices"][0]["logprobs"]["content"] = []
                answer["usage"]["completion_tokens"] = 0
            return answer

        server.alter = empty
        with pytest.raises(TeacherError, match="11 of 11 answers had no token"):
            generate(server, tokenizer, itertools.cycle(PROMPTS), tokens=1000)
        with pytest.raises(TeacherError, match="4 of 4 answers had no token"):
            generate(server, tokenizer)
        assert len(server.bodies) < 11 + 4 + 6 + 12

    @pytest.mark.parametrize(
        ("value", "words"),
        [("-0.5", "no number"), (None, "no number"), (float("nan"), "no number"), (0.7, "none is above 0")],
    )
    def test_what_is_no_log_probability(self, server, tokenizer, value, words):
        def spoil(answer):
            answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][3]["logprob"] = value
            return answer

        server.alter = spoil
        with pytest.raises(TeacherError, match=words):
            generate(server, tokenizer)

    def test_probabilities_above_one(self, server, tokenizer):
        def spoil(answer):
            for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                top["logprob"] = -0.5
            return answer

        server.alter = spoil
        with pytest.raises(TeacherError, match=r"sum to 4\.85"):
            generate(server, tokenizer)


def windows(tokenizer):
    """Two windows of running text; in the first, documents begin at 5 and 6."""
    ids = tokenizer("Ada met Bo. Bo saw Cy and Cy saw Ada. Bo met Cy. Ada saw Bo and Bo saw Ada.")["input_ids"]
    rows = [(ids[:12], [5, 6]), (ids[12:24], [])]
    return [
        RowRecord(np.asarray(part, dtype=np.int32), starts, usual_scored(len(part), starts)) for part, starts in rows
    ]


def score(server, tokenizer, **options):
    rows = []
    with connect(server, **options) as endpoint:
        total = ServedTeacher(endpoint, tokenizer, top_logprobs=8).score(windows(tokenizer), sink=rows.append)
    return rows, total


class TestScore:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_by_echo(self, server, tokenizer, shape):
        server.shape, server.names = SHAPES[shape]
        server.echo = True
        self.check(server, tokenizer)

    def test_by_prompt_logprobs(self, server, tokenizer):
        server.prompt_logprobs = True
        self.check(server, tokenizer)
        assert not any(body.get("echo") for body in server.bodies)

    def check(self, server, tokenizer):
        rows, total = score(server, tokenizer)
        for row, window in zip(rows, windows(tokenizer), strict=True):
            assert row.key == window.key
            assert_true_of(row, server.model, k=8)
        assert (total.rows, total.tokens, total.scored_tokens) == (2, 24, 9 + 11)

    def test_resumes(self, server, tokenizer, tmp_path):
        server.prompt_logprobs = True
        asked = []
        for _ in range(2):
            kept = AnswerFile(tmp_path / "answers.jsonl")
            score(server, tokenizer, kept=kept)
            kept.close()
            asked.append(len(server.bodies))
        assert asked[0] - (asked[1] - asked[0]) == 3  # the second time the server is checked, nothing more

    @pytest.mark.parametrize("way", ["echo", "prompt_logprobs"])
    @pytest.mark.parametrize("shift", [1, -1])
    def test_an_echo_that_is_shifted_is_refused(self, server, tokenizer, way, shift):
        """llama-cpp-python reads row i instead of i-1 where the tokenizer puts no token before the text."""
        setattr(server, way, True)
        server.echo_shift = shift
        with pytest.raises(TeacherError, match=rf"shifted by \{-shift:+d} token.*every target would be wrong"):
            score(server, tokenizer)
        assert not any(len(body["prompt"]) == 12 for body in server.bodies if body.get("echo"))

    def test_an_echo_of_something_else_is_refused(self, server, tokenizer):
        server.echo = True
        scored = server.scored
        server.scored = lambda ids, place, k: scored([*ids[: place - 1], 0, ids[place]], place, k)
        with pytest.raises(TeacherError, match="are not those it writes with"):
            score(server, tokenizer)

    def test_a_server_that_scores_no_text(self, server, tokenizer):
        with pytest.raises(
            TeacherError,
            match=r"does not score given text \(prompt_logprobs: it is not answered\. echo: 1 log-prob.*mode: generate",
        ):
            score(server, tokenizer)

    def test_an_echo_with_a_token_put_before(self, server, tokenizer):
        server.echo = True
        logprobs = server.logprobs
        server.logprobs = lambda ids, written, k, body: logprobs([0, *ids], written, k, body)
        with pytest.raises(TeacherError, match=r"token 0 of a prompt was sent as .* and came back as"):
            score(server, tokenizer)
