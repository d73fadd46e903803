"""The teacher's exact distribution in the student's tokens, against sums over every sequence the teacher could write."""

import functools
import math

import pytest
import torch
from tests.models import toy_tokenizers as toy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from limbeck.core.errors import VocabularyError
from limbeck.core.types import Batch
from limbeck.models.exact_likelihood import decompose, exact_targets, read_contexts
from limbeck.models.heads import SplitModel
from limbeck.models.teacher import EMBEDDED, load_tokenizer
from limbeck.models.token_bytes import encode_text, read_token_bytes

MERGES = [("a", "b"), ("b", "a"), ("ab", "a"), ("ab", "ab"), ("b", "b"), ("aba", "bb"), ("bb", "a")]


@functools.cache
def tokenizer_with(merges):
    return toy.byte_level_of_merges(MERGES[:merges])


def decomposition(student_merges):
    student, teacher = tokenizer_with(student_merges), tokenizer_with(len(MERGES))
    return decompose(student, read_token_bytes(student), teacher, read_token_bytes(teacher))


class ToyTeacher:
    """Random next-token probabilities over the tokens of "a" and "b", none for what its tokenizer never writes."""

    def __init__(self, tokenizer, *, is_canonical=True):
        self.tokenizer, self.is_canonical = tokenizer, is_canonical
        tokens = read_token_bytes(tokenizer)
        self.tokens = tokens
        self.usual = [t for t, p in enumerate(tokens.pieces) if p is not None and set(p) <= set(b"ab")] + [0]
        self.asked, self.known = 0, {}

    def after(self, context):
        if context not in self.known:
            self.known[context] = self.draw(context)
        return self.known[context]

    def draw(self, context):
        noise = torch.Generator().manual_seed(hash(context) % 2**31)
        logits = torch.full((len(self.tokens.pieces),), -math.inf, dtype=torch.float64)
        for token in self.usual:
            if self.writes(context, token):
                logits[token] = torch.randn((), generator=noise, dtype=torch.float64)
        return logits.log_softmax(-1)

    def writes(self, context, token):
        if not self.is_canonical or token == 0:
            return True
        sequence = [*context[1:], token]
        return encode_text(self.tokenizer, [self.tokens.join(sequence).decode()])[0] == sequence

    def __call__(self, contexts):
        self.asked += len(contexts)
        return torch.stack([self.after(tuple(context)) for context in contexts])


def mass_of_prefix(teacher, runs, prefix):
    """P(the student's tokens begin with `prefix`), by trying every sequence the teacher can write."""

    def follow(context, rest):
        total = 0.0
        log_probs = teacher.after(context)
        for token in teacher.usual:
            run = runs[token]
            shared = min(len(run), len(rest))
            if log_probs[token] == -math.inf or run[:shared] != rest[:shared]:
                continue
            mass = float(log_probs[token].exp())
            total += mass if len(run) >= len(rest) else mass * follow((*context, token), rest[shared:])
        return total

    return follow((0,), tuple(prefix))


@pytest.mark.parametrize("text", ["abababbabba", "bbabaabab", "aaab", "babbbbaba"])
@pytest.mark.parametrize("student_merges", [0, 1, 3, 5, 7])
def test_against_all_sequences_the_teacher_can_write(student_merges, text):
    found = decomposition(student_merges)
    student = found.student
    teacher = ToyTeacher(tokenizer_with(len(MERGES)))
    read = encode_text(tokenizer_with(student_merges), [text])[0]
    row = torch.tensor([[*read, 0]])
    targets = exact_targets(
        Batch(row, torch.ones_like(row, dtype=torch.bool)), found, teacher, vocabulary_size=len(student.pieces)
    )
    assert targets.known_BT[0].tolist() == [True] * len(read) + [False]
    for place in range(len(read)):
        prefix = read[: place + 1]
        whole = mass_of_prefix(teacher, found.runs, prefix)
        following = [t for t, p in enumerate(student.pieces) if p is not None and set(p) <= set(b"ab")] + [0]
        for token in following:
            expected = mass_of_prefix(teacher, found.runs, [*prefix, token]) / whole
            assert_close(float(targets.log_prob_BTV[0, place, token].exp()), expected, atol=1e-6, rtol=1e-5)
        assert_close(float(targets.log_prob_BTV[0, place].exp().sum()), 1.0, atol=1e-6, rtol=0)


def test_with_equal_tokens_it_is_the_teacher_s_own_distribution():
    found = decomposition(7)
    teacher = ToyTeacher(tokenizer_with(7), is_canonical=False)
    read = encode_text(tokenizer_with(7), ["abababbabba"])[0]
    row = torch.tensor([read])
    targets = exact_targets(Batch(row, torch.ones_like(row, dtype=torch.bool)), found, teacher, vocabulary_size=264)
    for place in range(len(read)):
        own = teacher.after((0, *read[: place + 1])).float()
        assert_close(targets.log_prob_BTV[0, place], own, atol=1e-6, rtol=1e-5)


def test_the_chain_rule_gives_the_teacher_s_likelihood_of_a_whole_document():
    """Summed over the student's tokens, the end included, it is the teacher's own log-probability of its tokens."""
    text = "abababbabbabb"
    for student_merges in (0, 2, 4):
        found = decomposition(student_merges)
        teacher = ToyTeacher(tokenizer_with(7))
        read = encode_text(tokenizer_with(student_merges), [text])[0]
        row = torch.tensor([[*read, 0]])
        targets = exact_targets(Batch(row, torch.ones_like(row, dtype=torch.bool)), found, teacher, vocabulary_size=264)
        later = sum(float(targets.log_prob_BTV[0, t, row[0, t + 1]]) for t in range(len(read)))
        first = math.log(mass_of_prefix(teacher, found.runs, read[:1]))
        theirs = [0, *encode_text(tokenizer_with(7), [text])[0], 0]
        own = sum(float(teacher.after(tuple(theirs[:n]))[theirs[n]]) for n in range(1, len(theirs)))
        assert_close(first + later, own, atol=1e-5, rtol=1e-6)


def test_one_reading_for_every_token():
    found = decomposition(0)
    teacher = ToyTeacher(tokenizer_with(7))
    read = encode_text(tokenizer_with(0), ["abababbabba"])[0]
    row = torch.tensor([read])
    exact_targets(Batch(row, torch.ones_like(row, dtype=torch.bool)), found, teacher, vocabulary_size=264)
    assert teacher.asked <= len(read) + 1


def test_documents_and_special_tokens():
    found = decomposition(1)
    teacher = ToyTeacher(tokenizer_with(7))
    one, two = (encode_text(tokenizer_with(1), [text])[0] for text in ("abab", "bba"))
    row = torch.tensor([[*one, 0, *two]])
    documents = torch.tensor([[0] * (len(one) + 1) + [1] * len(two)])
    mask = torch.ones_like(row, dtype=torch.bool)
    together = exact_targets(Batch(row, mask, documents), found, teacher, vocabulary_size=264)
    assert together.known_BT[0].tolist() == [True] * len(one) + [False] + [True] * len(two)
    for begin, ids in ((0, one), (len(one) + 1, two)):
        alone = torch.tensor([ids])
        apart = exact_targets(
            Batch(alone, torch.ones_like(alone, dtype=torch.bool)), found, teacher, vocabulary_size=264
        )
        assert_close(together.log_prob_BTV[0, begin : begin + len(ids)], apart.log_prob_BTV[0])
    nowhere = together.log_prob_BTV[0, len(one)]
    assert_close(nowhere, torch.full_like(nowhere, -math.log(264)))


def test_words_and_characters_cut_anywhere():
    """Bytes of real text under a real pre-tokenizer: prefixes end inside words and inside characters."""
    teacher = load_tokenizer(EMBEDDED)
    student = toy.byte_level(257)
    found = decompose(student, read_token_bytes(student), teacher, read_token_bytes(teacher))
    text = "The caf\u00e9 in K\u00f6ln, 日本 and 🙂; don't"
    ends = list(range(len(text.encode()) + 1))
    for end, ids in zip(ends, found.encode_prefixes(text, ends), strict=True):
        assert ids is not None
        assert found.tokens.join(ids) == text.encode()[:end]
        try:
            whole = text.encode()[:end].decode()
        except UnicodeDecodeError:
            continue
        assert list(ids) == encode_text(teacher, [whole])[0]


def test_a_window_that_begins_inside_a_character():
    student, teacher = toy.byte_level(257), toy.byte_level(300)
    found = decompose(student, read_token_bytes(student), teacher, read_token_bytes(teacher))
    ids = encode_text(student, ["日 ab"])[0][1:]
    row = torch.tensor([ids])

    def uniform(contexts):
        return torch.zeros(len(contexts), 300).log_softmax(-1)

    targets = exact_targets(Batch(row, torch.ones_like(row, dtype=torch.bool)), found, uniform, vocabulary_size=257)
    assert targets.known_BT[0].tolist() == [False, False, True, True, True]
    assert_close(targets.log_prob_BTV.exp().sum(-1), torch.ones(1, 5), atol=1e-5, rtol=0)


def test_a_live_teacher_reads_contexts_as_it_would_alone():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    contexts = [(0,), (0, 5), (0, 5, 7, 9), (0, 6), (0, 5, 7, 8), (0, 5, 7), (0, 6, 6, 6, 6)]
    found = read_contexts(SplitModel(model), contexts, rows_at_once=2)
    for context, log_probs in zip(contexts, found, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        assert_close(log_probs, alone, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_exact_is_refused_with_the_reason():
    def attempt(student, teacher, reason):
        with pytest.raises(VocabularyError, match=reason):
            decompose(student, read_token_bytes(student), teacher, read_token_bytes(teacher))

    attempt(toy.byte_level(257), toy.sentence_piece(), "not a byte-level BPE")
    attempt(toy.byte_level(300, texts=["zebra quagga"]), toy.byte_level(300), "merges are not the first")
    attempt(toy.byte_level(300), toy.byte_level(280), "merges are not the first")
    attempt(toy.byte_level_of_merges(MERGES[:2], split=True), tokenizer_with(7), "prepared differently.*pre-tokenizer")
    twice = toy.byte_level_of_merges([*MERGES[:3], ("a", "ba")], names=[*tokenizer_names(3)])
    attempt(tokenizer_with(3), twice, "'aba' can come about in several ways")
    extra = toy.byte_level(300)
    extra.add_tokens(["weather"])
    attempt(toy.byte_level(290), extra, "different added tokens")


def tokenizer_names(merges):
    vocabulary = tokenizer_with(merges).get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def test_first_merges_of_a_trained_teacher():
    student, teacher = toy.byte_level(280), toy.byte_level(340)
    found = decompose(student, read_token_bytes(student), teacher, read_token_bytes(teacher))
    for text in toy.TEXT:
        theirs = encode_text(teacher, [text])[0]
        assert found.join_runs(theirs) == tuple(encode_text(student, [text])[0])
