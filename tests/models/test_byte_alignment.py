"""A byte-level student and teachers with tokens, and the other way round: ends of patches lie in the chunk they end."""

import functools
import itertools

import numpy as np
import pytest
import torch
from tests.models import toy_tokenizers as toy
from torch.testing import assert_close

from limbeck.core.errors import VocabularyError
from limbeck.core.symbols import BOS, EOD, EOP
from limbeck.core.types import Batch
from limbeck.data.windows import TokenWindows, tokenise
from limbeck.models.alignment import align_batch
from limbeck.models.borders import Offsets, meet
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.exact_likelihood import decompose
from limbeck.models.token_bytes import encode_text, read_token_bytes
from limbeck.models.tokenizers import encoder
from limbeck.objectives.cross_tokenizer import chunk_likelihood, chunk_log_probs

DOCUMENTS = [
    "Ada met Bo. Bo saw Ada, and Ada saw Bo again, and the weather was fine.",
    "日本語のテキスト と кошка сидела на окне 🙂 🙂, said the cat to the dog.",
    "The caf\u00e9  in\n\nK\u00f6ln opened at 9:30; </s> and <eop> are text here.",
    "averyveryverylongwordindeed and e\u0301te\u0301",
]
STUDENTS = ["space", "fixed", "bpe", "entropy", "one byte"]
TEACHERS = ["coarse", "fine", "sentencepiece", "unigram", "byte teacher"]


@functools.cache
def kinds():
    return {
        "space": ByteTokenizer(), "fixed": ByteTokenizer("fixed:3", patch_bytes=4), "one byte": ByteTokenizer(patch_bytes=2),
        "bpe": ByteTokenizer.from_tokenizer(toy.byte_level(400), patch_bytes=6), "entropy": ByteTokenizer.fit_entropy(toy.TEXT),
        "coarse": toy.byte_level(400), "fine": toy.byte_level(280), "sentencepiece": toy.sentence_piece(),
        "unigram": toy.sentence_piece(360, kind="unigram"), "byte teacher": ByteTokenizer("fixed:5"),
    }  # fmt: skip


@functools.cache
def tokens_of(name):
    return read_token_bytes(kinds()[name])


def windows(name, *, width=24):
    tokenizer = kinds()[name]
    ids, starts = tokenise(DOCUMENTS * 2, encoder(tokenizer), end_token=tokenizer.eos_token_id, max_tokens=None)
    table = TokenWindows(ids, starts, context_tokens=width)
    return table.rows(range(len(table)))


def align(student, teacher, batch):
    return align_batch(batch, tokens_of(student), kinds()[teacher], tokens_of(teacher))


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("width", [7, 24, 100])
def test_chunks_hold_the_same_bytes_and_the_ends_of_their_patches(student, teacher, width):
    batch = windows(student, width=width)
    alignment = align(student, teacher, batch)
    mine, theirs = tokens_of(student), tokens_of(teacher)
    for row, ids in enumerate(batch.input_ids_BT):
        chunk_T, their_chunk_U = alignment.student_chunk_BT[row], alignment.teacher_chunk_BU[row]
        their_ids = alignment.teacher_batch.input_ids_BT[row]
        for chunk in range(int(alignment.chunk_mask_BC[row].sum())):
            one = mine.join(ids[chunk_T == chunk].tolist())
            other = theirs.join(their_ids[their_chunk_U == chunk].tolist())
            assert one
            assert one == other or (tokens_of(teacher).adds_space and other == b" " + one)
        for stream, chunks in ((ids, chunk_T), (their_ids, their_chunk_U)):
            for place in (
                (stream == EOP).nonzero().flatten().tolist() if stream is ids or teacher == "byte teacher" else []
            ):
                if place and stream[place - 1] < 256:
                    assert chunks[place] == chunks[place - 1]
        assert (chunk_T[ids >= BOS][ids[ids >= BOS] != EOP] == -1).all()
        for place, other in zip(
            alignment.student_position_BP[row].tolist(), alignment.teacher_position_BP[row].tolist()
        ):
            assert place < 0 or ids[place] == EOP or ids[place + 1] != EOP
            assert other < 0 or teacher != "byte teacher" or their_ids[other] == EOP or their_ids[other + 1] != EOP
    if width > 7:
        assert alignment.covered > 0.3 * batch.target_count


@pytest.mark.parametrize(
    ("student", "teacher"), [("space", "coarse"), ("fixed", "fine"), ("bpe", "coarse"), ("entropy", "byte teacher")]
)
def test_against_a_slow_reference(student, teacher):
    """Whole documents: chunks lie between all neighbouring common borders, and an EOP goes with the byte before it."""
    for document in DOCUMENTS:
        ids = [BOS, *encode_text(kinds()[student], [document])[0], EOD]
        theirs = encode_text(kinds()[teacher], [document])[0]
        row = torch.tensor([ids])
        scored = torch.ones_like(row, dtype=torch.bool)
        scored[0, 0] = False
        alignment = align(student, teacher, Batch(row, scored))
        ends = list(itertools.accumulate(0 if symbol > 255 else 1 for symbol in ids))
        their_ends = list(itertools.accumulate(len(tokens_of(teacher).pieces[token] or b"") for token in theirs))
        borders = [0, *sorted(set(their_ends))]  # every byte ends a symbol of the student
        if teacher != "byte teacher":  # without an opening token the teacher's first is predicted by nobody
            borders = borders[1:]
        expected = [-1] * len(ids)
        for place, symbol in enumerate(ids):
            if symbol not in (BOS, EOD):
                expected[place] = next(
                    (n for n, (low, high) in enumerate(itertools.pairwise(borders)) if low < ends[place] <= high), -1
                )
        assert alignment.student_chunk_BT[0].tolist() == expected


def test_ends_of_patches_by_hand():
    """Bytes "ab|c|" (| is EOP) against tokens "a", "bc"; then a row that begins with the EOP of a patch cut off."""
    student = Offsets(0, np.array([1, 2, 2, 3, 3]), np.ones(5, dtype=bool))
    teacher = Offsets(0, np.array([1, 3]), np.ones(2, dtype=bool))
    scored = np.ones(5, dtype=bool)
    found = meet(student, teacher, student_scored=scored, teacher_scored=np.ones(2, dtype=bool), until=3)
    assert found.student_chunk.tolist() == [0, 1, 1, 1, 1]
    assert found.student_last.tolist() == [0, 4]
    assert found.teacher_last.tolist() == [0, 1]
    begun = Offsets(0, np.array([0, 1, 2, 2, 3, 3]), np.ones(6, dtype=bool))
    found = meet(begun, teacher, student_scored=np.ones(6, dtype=bool), teacher_scored=np.ones(2, dtype=bool), until=3)
    assert found.student_chunk.tolist() == [-1, 0, 1, 1, 1, 1]
    unscored = np.array([False, True, True, True, True, True])
    found = meet(begun, teacher, student_scored=unscored, teacher_scored=np.ones(2, dtype=bool), until=3)
    assert found.student_chunk.tolist() == [-1, 0, 1, 1, 1, 1]


def test_the_likelihood_of_a_chunk_counts_its_ends_of_patches():
    """A student that gives each byte 2 nats and each EOP 0.5 pays 4.5 for the patch "ab"; a teacher alike costs nothing."""
    tokenizer = kinds()["bpe"]
    ids = [BOS, *encode_text(tokenizer, ["Ada met Bo. Bo saw Ada."])[0], EOD]
    row = torch.tensor([ids])
    scored = torch.ones_like(row, dtype=torch.bool)
    scored[0, 0] = False
    alignment = align("bpe", "sentencepiece", Batch(row, scored))
    nats_BT = torch.where(row == EOP, 0.5, 2.0)
    student_BC = chunk_log_probs(-nats_BT, alignment.student_chunk_BT, chunks=alignment.chunk_mask_BC.shape[1])
    chunk = alignment.student_chunk_BT
    for number in range(student_BC.shape[1]):
        inside = row[chunk == number]
        assert_close(student_BC[0, number], -(2.0 * (inside < 256).sum() + 0.5 * (inside == EOP).sum()))
    assert int((row[chunk >= 0] == EOP).sum()) == ids.count(EOP)
    teacher = torch.zeros(alignment.teacher_batch.input_ids_BT.shape)
    first_of_chunk = torch.cat([torch.ones(1, dtype=torch.bool), alignment.teacher_chunk_BU[0].diff() != 0])
    known = (alignment.teacher_chunk_BU[0] >= 0) & first_of_chunk
    teacher[0, known] = student_BC[0, alignment.teacher_chunk_BU[0, known]]
    aligned = alignment.finish(teacher)
    assert_close(
        chunk_likelihood(student_BC, aligned.chunk_log_prob_BC, aligned.chunk_mask_BC), torch.zeros_like(student_BC)
    )


@pytest.mark.parametrize("student", STUDENTS)
def test_bytes_that_are_no_text_end_what_the_teacher_sees(student):
    good, bad = b"the cat sat on the mat. ", b"\xff\xfe"
    ids = torch.tensor([kinds()[student].encode_bytes(good + bad + good)])
    alignment = align(student, "coarse", Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert tokens_of("coarse").join(alignment.teacher_batch.input_ids_BT[0].tolist()) == good
    place = int((ids[0] == 0xFF).nonzero()[0])
    assert (alignment.student_chunk_BT[0, place:] == -1).all()
    assert (alignment.student_chunk_BT[0, :place] >= 0).any()


@pytest.mark.parametrize("offset", range(1, 16))
def test_a_window_may_begin_inside_a_character_or_with_the_end_of_a_patch(offset):
    ids = torch.tensor([kinds()["one byte"].encode_bytes("日🙂 the cat sat on the mat".encode())[offset:]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    alignment = align("one byte", "coarse", Batch(ids, mask))
    written = tokens_of("coarse").join(alignment.teacher_batch.input_ids_BT[0].tolist())
    data = kinds()["one byte"].decode_bytes(ids[0].tolist())
    assert written == data.decode(errors="ignore").encode()
    assert int(alignment.chunk_mask_BC.sum()) > 3
    if ids[0, 0] == EOP:
        assert alignment.student_chunk_BT[0, 0] == -1


def test_the_exact_distribution_of_a_teacher_is_not_for_symbols_with_ends_of_patches():
    student, teacher = kinds()["space"], kinds()["coarse"]
    with pytest.raises(VocabularyError):
        decompose(student, tokens_of("space"), teacher, tokens_of("coarse"))
