"""Names of tokens and shapes of log-probabilities, as servers write them."""

import math

import numpy as np
import pytest

from limbeck.core.errors import TeacherError, VocabularyError
from limbeck.models.tokenizers import train_tokenizer
from limbeck.teachers.logprobs import TokenScores, mean_difference_nats, read_prompt_scores, read_scores, row_arrays
from limbeck.teachers.token_names import TokenNames


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Ada met Bo. Bo saw Cy and Cy saw Ada."] * 20, vocab_size=285)


class TestTokenNames:
    def test_every_way_of_naming(self, tokenizer):
        names = TokenNames(tokenizer)
        met = tokenizer(" met")["input_ids"][0]
        space, bom = tokenizer("é")["input_ids"]
        for name in (
            {"id": met, "bytes": list(b" met"), "token": " met"}, {"id": met, "token": ""}, {"bytes": list(b" met")},
            {"token": " met"}, " met", f"token_id:{met}", {"token": f"token_id:{met}"}, "bytes:\\x20met",
        ):  # fmt: skip
            assert names.find(name) == met
        assert names.find({"token": "�", "bytes": [0xC3]}) == space
        assert names.find("bytes:\\xa9") == bom
        assert names.find("<|endoftext|>") == 0
        assert names.find({"id": 0, "token": "", "bytes": []}) == 0

    @pytest.mark.parametrize("name", ["zebra", "�", "", {"token": "", "bytes": []}, {"id": 9999}, {"token": None}])
    def test_refuses_and_names_the_token(self, tokenizer, name):
        with pytest.raises(VocabularyError, match="the server's token"):
            TokenNames(tokenizer).find(name)

    def test_a_piece_is_meant_rather_than_a_byte(self):
        names = TokenNames(sentence_piece())
        vocabulary = sentence_piece().get_vocab()
        assert names.find("A") == vocabulary["A"]
        assert names.find(" ") == vocabulary["▁"]
        assert names.find({"bytes": [0x0A]}) == vocabulary["<0x0A>"]

    def test_a_tokenizer_that_hides_its_bytes_needs_ids(self):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel({"[UNK]": 0, "ada": 1}, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
        assert names.find({"id": 1, "token": "ada"}) == 1
        with pytest.raises(VocabularyError, match="has no id.*bytes of its tokens"):
            names.find("ada")


def sentence_piece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "A": 258, "▁A": 259}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "A")], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class TestNumbers:
    def test_rows_by_hand(self):
        """Half, a quarter, and an eighth left; then all of it; then nothing known."""
        scores = TokenScores(
            [5, 6, 7],
            [math.log(0.5), 0.0, None],
            [[5, 1, 2], [6], []],
            [[math.log(p) for p in (0.5, 0.25, 0.125)], [0.0], []],
        )
        ids, log_probs, tail = row_arrays(scores, k=3, vocabulary_size=10)
        assert ids.tolist() == [[5, 1, 2], [6, -1, -1], [-1, -1, -1]]
        np.testing.assert_allclose(np.exp(log_probs), [[0.5, 0.25, 0.125], [1, 0, 0], [0, 0, 0]], rtol=1e-6)
        np.testing.assert_allclose(np.exp(tail), [0.125, 1e-7, 1], rtol=1e-6)

    def test_rounding_never_takes_all_mass_from_the_tail(self):
        """Two halves and a little too much; 8 others of at most e**-20 each, then of at most a half."""
        half = math.log(0.5)
        scores = TokenScores([1, 1], [None] * 2, [[1, 2, 3], [1, 2]], [[half + 1e-6, half, -20.0], [half + 1e-6, half]])
        tail = row_arrays(scores, k=3, vocabulary_size=11)[2]
        np.testing.assert_allclose(tail, [math.log(8) - 20, math.log(1e-7)], rtol=1e-6)

    def test_difference_by_hand(self):
        one = {1: math.log(0.6), 2: math.log(0.3)}
        other = {1: math.log(0.6) - 0.1, 2: math.log(0.3) + 0.4}
        wanted = (0.6 * (1 + math.exp(-0.1)) * 0.1 + 0.3 * (1 + math.exp(0.4)) * 0.4) / (
            0.6 * (1 + math.exp(-0.1)) + 0.3 * (1 + math.exp(0.4))
        )
        assert mean_difference_nats(one, other) == pytest.approx(wanted)
        assert mean_difference_nats(one, one) == 0
        assert mean_difference_nats(one, {3: math.log(0.9), 2: math.log(0.1)}) == math.inf
        assert mean_difference_nats(one, {}) == math.inf

    def test_what_stands_for_never_is_left_out(self, tokenizer):
        top = [{"id": 3, "logprob": 0.0}, {"id": 4, "logprob": -9999.0}]
        scores = read_scores(
            {"logprobs": {"content": [{"id": 3, "logprob": 0.0, "top_logprobs": top}]}}, TokenNames(tokenizer), k=2
        )
        assert (scores.top_ids, scores.top_log_probs) == ([[3]], [[0.0]])

    @pytest.mark.parametrize(
        "places", [[None], [None, {"x": {"logprob": -1}}], [None, {"3": -1}], [None, {"3": {}}], [None, 7]]
    )
    def test_prompt_logprobs_of_another_shape(self, tokenizer, places):
        with pytest.raises(TeacherError):
            read_prompt_scores({"prompt_logprobs": places}, [2, 3], TokenNames(tokenizer), k=1)

    def test_a_token_listed_twice(self, tokenizer):
        top = [{"id": 3, "logprob": -1.0}, {"id": 3, "logprob": -2.0}]
        with pytest.raises(VocabularyError, match="lists the token 3 .* twice"):
            read_scores({"logprobs": {"content": [{"id": 3, "top_logprobs": top}]}}, TokenNames(tokenizer), k=2)

    def test_nothing_has_any_probability(self, tokenizer):
        top = [{"id": 3, "logprob": -9999.0}, {"id": 4, "logprob": -math.inf}]
        with pytest.raises(TeacherError, match="no token any probability"):
            read_scores({"logprobs": {"content": [{"id": 3, "top_logprobs": top}]}}, TokenNames(tokenizer), k=2)

    @pytest.mark.parametrize(
        "logprobs",
        [7, [], {"content": [7]}, {"content": [{"top_logprobs": 7}]}, {"content": [{"id": -1}]}, {"tokens": [["a"]]},
         {"content": [{"token": "a", "bytes": [999]}]}, {"words": []}, {"tokens": ["a"], "token_logprobs": [1], "top_logprobs": [[7]]}],
    )  # fmt: skip
    def test_any_other_shape(self, tokenizer, logprobs):
        with pytest.raises((TeacherError, VocabularyError)):
            read_scores({"logprobs": logprobs}, TokenNames(tokenizer), k=2)

    def test_tokens_put_into_one_entry_end_what_is_known(self, tokenizer):
        """As llama.cpp's server does: the letter's last token is listed with the bytes of both."""
        names = TokenNames(tokenizer)
        letter, (_, last) = tokenizer("A")["input_ids"][0], tokenizer("é")["input_ids"]
        entries = [
            {"id": letter, "bytes": [65]},
            {"id": last, "token": "é", "bytes": list("é".encode())},
            {"id": letter},
        ]
        top = [{"id": letter, "logprob": -0.5}]
        answer = {"logprobs": {"content": [entry | {"logprob": -0.5, "top_logprobs": top} for entry in entries]}}
        scores = read_scores(answer, names, k=1)
        assert (scores.ids, scores.is_cut) == ([letter], True)
        entries[1]["bytes"] = list("é".encode())[1:]
        answer = {"logprobs": {"content": [{"id": last, "bytes": entries[1]["bytes"], "top_logprobs": top}]}}
        assert (read_scores(answer, names, k=1).ids, read_scores(answer, names, k=1).is_cut) == ([last], False)
        answer = {"logprobs": {"content": [{"id": last, "bytes": list("ü".encode()), "top_logprobs": top}]}}
        with pytest.raises(VocabularyError, match="another tokenizer"):
            read_scores(answer, names, k=1)
