"""Comparing tokenizers: never "identical" for ids that mean different text."""

import pytest
from tests.models import toy_tokenizers as toy

from limbeck.core.errors import VocabularyError
from limbeck.models.vocabulary import compare_tokenizers, require_same_tokens


def facts(comparison):
    return {what: (student, teacher, verdict) for what, student, teacher, verdict in comparison.rows()}


def test_identical():
    comparison = compare_tokenizers(toy.byte_level(300), toy.byte_level(300), student_rows=320, teacher_rows=320)
    assert (comparison.verdict, comparison.usable_vocabulary) == ("identical", 320)
    assert {verdict for _, _, verdict in facts(comparison).values()} == {"same"}
    assert require_same_tokens(comparison, asked_for="forward_kl") == 320


def test_identical_without_models_means_the_tokenizer_s_own_size():
    comparison = compare_tokenizers(toy.byte_level(300), toy.byte_level(300))
    assert (comparison.verdict, comparison.usable_vocabulary) == ("identical", 300)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(304, 352), (352, 304)])
def test_one_tokenizer_in_models_padded_differently(student_rows, teacher_rows):
    tokenizer = toy.byte_level(300)
    comparison = compare_tokenizers(tokenizer, tokenizer, student_rows=student_rows, teacher_rows=teacher_rows)
    assert (comparison.verdict, comparison.usable_vocabulary) == ("padded", 304)
    assert facts(comparison)["rows of the model"] == (str(student_rows), str(teacher_rows), "differs")
    assert require_same_tokens(comparison, asked_for="forward_kl") == 304
    assert "304" in comparison.explain()


def test_a_model_smaller_than_its_tokenizer_is_refused():
    with pytest.raises(VocabularyError, match="teacher's tokenizer has ids up to 299.*only 280 rows"):
        compare_tokenizers(toy.byte_level(300), toy.byte_level(300), teacher_rows=280)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_extra_special_tokens_on_one_side(side):
    pair = {"student": toy.byte_level(300), "teacher": toy.byte_level(300)}
    pair[side].add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    comparison = compare_tokenizers(pair["student"], pair["teacher"], student_rows=320, teacher_rows=352)
    assert (comparison.verdict, comparison.usable_vocabulary) == ("subset", 300)
    shown = facts(comparison)["ids only one has"]
    assert "<|im_start|>" in shown[0 if side == "student" else 1]
    assert shown[1 if side == "student" else 0] == "none"


def test_extra_tokens_that_stand_for_text_are_no_subset():
    student, teacher = toy.byte_level(300), toy.byte_level(300)
    teacher.add_tokens(["weather"])
    comparison = compare_tokenizers(student, teacher)
    assert comparison.verdict == "different"
    assert facts(comparison)["ids only one has"] == ("none", "1: 'weather'", "forbids")


def test_a_hole_between_common_ids_is_no_subset():
    def without(name):
        def drop(words):
            words["model"]["vocab"].pop(name)
            words["model"]["merges"] = []

        return drop

    student, teacher = toy.byte_level(257), toy.changed(toy.byte_level(257), without("~"))
    assert compare_tokenizers(student, teacher).verdict == "different"


def test_more_merges_are_no_subset():
    assert compare_tokenizers(toy.byte_level(290), toy.byte_level(300)).verdict == "different"


def test_other_merges():
    student, teacher = toy.byte_level(300), toy.byte_level(300, texts=["zebra zebra quagga"])
    comparison = compare_tokenizers(student, teacher)
    assert (comparison.verdict, comparison.usable_vocabulary) == ("different", 0)
    assert facts(comparison)["merges or scores"][2] == "forbids"
    assert any(what.startswith("id ") and verdict == "forbids" for what, (_, _, verdict) in facts(comparison).items())


def test_the_same_vocabulary_with_other_merges():
    """Every id is the same string, and yet text is cut differently."""
    one = toy.byte_level_of_merges([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")][:3])
    other = toy.byte_level_of_merges([("a", "b"), ("b", "c"), ("a", "bc")])
    assert one.get_vocab() == other.get_vocab()
    comparison = compare_tokenizers(one, other)
    assert comparison.verdict == "different"
    assert facts(comparison)["merges or scores"][2] == "forbids"


def test_permuted_ids_are_different():
    """The sets of strings are equal, the sizes are equal, the merges are equal: only ids are exchanged."""
    student = toy.byte_level(300)
    order = sorted(student.get_vocab(), key=student.get_vocab().get)
    order[100], order[200] = order[200], order[100]

    def permute(words):
        words["model"]["vocab"] = {name: token for token, name in enumerate(order)}

    teacher = toy.changed(student, permute)
    assert set(student.get_vocab()) == set(teacher.get_vocab())
    comparison = compare_tokenizers(student, teacher, student_rows=300, teacher_rows=300)
    assert (comparison.verdict, comparison.usable_vocabulary) == ("different", 0)
    shown = facts(comparison)
    assert shown["ids that differ"] == ("2", "2", "forbids")
    assert shown["id 100"] == (repr(order[200]), repr(order[100]), "forbids")
    assert shown["strings the other has"] == ("300 of 300", "300 of 300", "same")
    with pytest.raises(VocabularyError, match=r"(?s)forward_kl compares logits.*chunk_likelihood.*id 100"):
        require_same_tokens(comparison, asked_for="forward_kl")


def test_one_exchanged_pair_that_no_test_sentence_shows_is_found():
    student = toy.byte_level_of_merges([("q", "z"), ("z", "q")])
    names = sorted(student.get_vocab(), key=student.get_vocab().get)
    names[-1], names[-2] = names[-2], names[-1]
    teacher = toy.byte_level_of_merges([("q", "z"), ("z", "q")], names=names)
    comparison = compare_tokenizers(student, teacher)
    assert facts(comparison)["test sentences cut alike"][2] == "same"
    assert comparison.verdict == "different"


def test_other_scores_of_the_same_unigram_pieces():
    one = toy.sentence_piece(360, kind="unigram")

    def rescore(words):
        pieces = words["model"]["vocab"]
        pieces[-1][1] -= 0.5

    comparison = compare_tokenizers(one, toy.changed(one, rescore))
    assert comparison.verdict == "different"


def test_chat_templates_and_roles_are_shown_but_forbid_nothing():
    student, teacher = toy.byte_level(300), toy.byte_level(300)
    teacher.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
    teacher.pad_token = "!"
    comparison = compare_tokenizers(student, teacher)
    assert comparison.verdict == "identical"
    shown = facts(comparison)
    assert shown["chat template"][0] == "none"
    assert shown["chat template"][1].startswith("74 characters, sha256 ")
    assert shown["chat template"][2] == "differs"
    assert shown["pad token"] == ("<|endoftext|>", "!", "differs")


def test_normalisation_is_shown():
    student = toy.byte_level(300)
    teacher = toy.changed(student, lambda words: words.update(normalizer={"type": "NFC"}))
    comparison = compare_tokenizers(student, teacher)
    assert comparison.verdict == "identical"
    assert facts(comparison)["normalisation"] == ("none", "NFC", "differs")


def test_the_table_is_readable():
    comparison = compare_tokenizers(toy.byte_level(300), toy.sentence_piece())
    lines = comparison.table().splitlines()
    assert lines[0].split() == ["student", "teacher"]
    assert all(len(line) < 160 for line in lines)
    assert comparison.verdict == "different"


def test_different_kinds_of_tokenizer():
    for other in (toy.sentence_piece(), toy.word_piece(), toy.sentence_piece(360, kind="unigram")):
        assert compare_tokenizers(toy.byte_level(300), other).verdict == "different"
        assert compare_tokenizers(other, toy.byte_level(300)).verdict == "different"
