"""Alignment of two tokenizers on windows: bytes agree in every chunk, whatever the window cuts."""

import functools
import itertools
import random

import pytest
import torch
from tests.models import toy_tokenizers as toy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPTNeoXConfig

from limbeck.core.errors import TeacherError
from limbeck.core.types import Batch
from limbeck.data.windows import TokenWindows, tokenise
from limbeck.models.alignment import align_batch
from limbeck.models.borders import offsets_in_text
from limbeck.models.packing import forward_batch
from limbeck.models.teacher import EMBEDDED, load_tokenizer
from limbeck.models.token_bytes import encode_text, read_token_bytes
from limbeck.objectives.cross_tokenizer import chunk_likelihood, chunk_log_probs

DOCUMENTS = [
    "Ada met Bo. Bo saw Ada, and Ada saw Bo again, and the weather was fine.",
    "日本語のテキスト と кошка сидела на окне 🙂 🙂, said the cat to the dog.",
    "x",
    "The caf\u00e9  in\n\nK\u00f6ln opened at 9:30; </s> and <|endoftext|> are text here.",
    "e\u0301te\u0301 is not \u00e9t\u00e9, but the same word in other bytes.",
]


@functools.cache
def kinds():
    nfc = toy.changed(toy.byte_level(320), lambda words: words.update(normalizer={"type": "NFC"}))
    return {
        "coarse": toy.byte_level(400), "fine": toy.byte_level(280), "bytes": toy.byte_level(257), "nfc": nfc,
        "embedded": load_tokenizer(EMBEDDED), "sentencepiece": toy.sentence_piece(),
        "no space": toy.sentence_piece(add_space=False, begin=False),
        "unigram": toy.sentence_piece(360, kind="unigram"), "byt5": ByT5Tokenizer(),
    }  # fmt: skip


@functools.cache
def tokens_of(name):
    return read_token_bytes(kinds()[name])


def windows(name, *, width=24, cross_documents=False, count=None, documents=DOCUMENTS):
    """All windows of the documents, packed, each closed by the end token."""
    tokenizer = kinds()[name]
    ids, starts = tokenise(
        documents * 2, lambda texts: encode_text(tokenizer, texts), end_token=tokenizer.eos_token_id, max_tokens=None
    )
    table = TokenWindows(ids, starts, context_tokens=width, cross_documents=cross_documents)
    return table.rows(range(count or len(table)))


def align(student, teacher, batch, **options):
    return align_batch(batch, tokens_of(student), kinds()[teacher], tokens_of(teacher), **options)


def nfc(data):
    import unicodedata

    return unicodedata.normalize("NFC", data.decode()).encode()


@pytest.mark.parametrize("teacher", ["coarse", "nfc", "embedded", "sentencepiece", "no space", "unigram", "byt5"])
@pytest.mark.parametrize("student", ["coarse", "fine", "bytes", "sentencepiece", "no space", "byt5"])
def test_the_two_sides_of_every_chunk_are_the_same_bytes(student, teacher):
    for cross_documents in (False, True):
        batch = windows(student, cross_documents=cross_documents)
        alignment = align(student, teacher, batch)
        mine, theirs = tokens_of(student), tokens_of(teacher)
        for row in range(len(batch.input_ids_BT)):
            for chunk in range(int(alignment.chunk_mask_BC[row].sum())):
                places = (alignment.student_chunk_BT[row] == chunk).nonzero().flatten()
                others = (alignment.teacher_chunk_BU[row] == chunk).nonzero().flatten()
                assert len(places)
                assert len(others)
                assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
                assert others.tolist() == list(range(int(others[0]), int(others[-1]) + 1))
                assert batch.loss_mask_BT[row, places].all()
                one = mine.join(batch.input_ids_BT[row, places].tolist())
                other = theirs.join(alignment.teacher_batch.input_ids_BT[row, others].tolist())
                is_first = int(alignment.teacher_batch.input_ids_BT[row, others[0] - 1]) in theirs.special_names
                if is_first and one != other:  # a space of either tokenizer's own
                    one, other = one.lstrip(b" "), other.lstrip(b" ")
                assert one == other or (teacher == "nfc" and nfc(one) == other)
                assert theirs.is_text[alignment.teacher_batch.input_ids_BT[row, others].numpy()].all()
        assert torch.equal(alignment.teacher_batch.loss_mask_BT, alignment.teacher_chunk_BU >= 0)
        assert alignment.covered > 0.5 * batch.target_count if teacher != "nfc" else alignment.covered


@pytest.mark.parametrize(("student", "teacher"), [("coarse", "embedded"), ("fine", "no space"), ("bytes", "coarse")])
def test_against_a_slow_reference(student, teacher):
    """Documents whole in one row: chunks lie between all neighbouring common borders, and no others."""
    for document in DOCUMENTS:
        ids = encode_text(kinds()[student], [document])[0]
        theirs = encode_text(kinds()[teacher], [document])[0]
        row = torch.tensor([[*ids, kinds()[student].eos_token_id]])
        scored = torch.ones_like(row, dtype=torch.bool)
        scored[0, 0] = False
        alignment = align(student, teacher, Batch(row, scored))
        ends = [sum(len(tokens_of(student).pieces[i]) for i in ids[: n + 1]) for n in range(len(ids))]
        their_ends = [sum(len(tokens_of(teacher).pieces[i]) for i in theirs[: n + 1]) for n in range(len(theirs))]
        borders = [0] + [end for end in ends if end in their_ends]
        chunk, expected = -1, []
        for low, high in itertools.pairwise(borders):
            members = [n for n, end in enumerate(ends) if low < end <= high]
            others = [n for n, end in enumerate(their_ends) if low < end <= high]
            if 0 in members or 0 in others:  # nobody predicts the first token: no opening token here
                continue
            chunk += 1
            expected += [(n, chunk) for n in members]
        found = [(n, int(c)) for n, c in enumerate(alignment.student_chunk_BT[0]) if c >= 0]
        assert found == expected
        positions = [int(p) for p in alignment.student_position_BP[0]]
        assert positions == [ends.index(border) for border in borders[1:]]
        assert [their_ends[p] for p in alignment.teacher_position_BP[0].tolist()] == borders[1:]


def test_equal_tokenizers_have_one_token_in_a_chunk():
    batch = windows("coarse", width=280, count=1)
    alignment = align("coarse", "coarse", batch)
    assert torch.equal(alignment.teacher_batch.input_ids_BT, batch.input_ids_BT)
    assert torch.equal(alignment.student_chunk_BT, alignment.teacher_chunk_BU)
    numbers = alignment.student_chunk_BT[alignment.student_chunk_BT >= 0]
    assert torch.equal(numbers, torch.arange(len(numbers)))
    special = batch.input_ids_BT == kinds()["coarse"].eos_token_id
    assert (alignment.student_chunk_BT[special] == -1).all()
    before_last_word = 270
    text = batch.loss_mask_BT & ~special
    assert (alignment.student_chunk_BT[:, :before_last_word][text[:, :before_last_word]] >= 0).all()


def test_documents_of_a_row_stay_apart_and_open_as_the_teacher_s_do():
    batch = windows("coarse", width=120)
    teacher = kinds()["sentencepiece"]
    written = align("coarse", "sentencepiece", batch).teacher_batch
    assert written.document_ids_BT is not None
    for row in range(len(batch.input_ids_BT)):
        ids, documents = written.input_ids_BT[row], written.document_ids_BT[row]
        changes = (documents.diff(prepend=documents[:1] - 1) != 0).nonzero().flatten().tolist()
        for place, following in zip(changes, [*changes[1:], len(ids)]):
            positions = written.position_ids_BT[row, place:following]
            assert torch.equal(positions, torch.arange(following - place))
            if ids[place] == teacher.eos_token_id and following == len(ids):
                continue  # padding
            assert ids[place] == teacher.bos_token_id
            if following != len(ids) and ids[following] == teacher.bos_token_id:
                assert ids[following - 1] == teacher.eos_token_id
        assert int((ids == teacher.bos_token_id).sum()) == len({*batch.document_ids_BT[row].tolist()})


def test_a_document_begins_without_the_space_that_the_student_s_tokenizer_added():
    documents = ["Bo saw Ada.", "Ada saw Bo."]
    ids, starts = tokenise(documents, lambda t: encode_text(kinds()["sentencepiece"], t), end_token=2, max_tokens=None)
    batch = TokenWindows(ids, starts, context_tokens=len(ids)).rows([0])
    alignment = align("sentencepiece", "coarse", batch)
    second = alignment.teacher_batch.document_ids_BT[0] == 1
    assert tokens_of("coarse").join(alignment.teacher_batch.input_ids_BT[0, second].tolist()) == b"Ada saw Bo."


def test_a_token_that_is_the_tokenizer_s_own_space_goes_with_the_first_word():
    tokenizer, tokens = kinds()["unigram"], tokens_of("unigram")
    text = "9:30"
    ids = encode_text(tokenizer, [text])[0]
    assert tokens.pieces[ids[0]] == b" "
    offsets = offsets_in_text(torch.tensor(ids).numpy(), text, tokens, tokenizer)
    assert offsets.ends.tolist() == [1, 1, 2, 3, 4]
    assert offsets.is_border.tolist() == [False, True, True, True, True]
    row = torch.tensor([[kinds()["fine"].eos_token_id, *encode_text(kinds()["fine"], [text])[0], 0]])
    alignment = align("fine", "unigram", Batch(row, torch.ones_like(row, dtype=torch.bool)))
    assert alignment.teacher_chunk_BU[0].tolist()[:3] == [-1, 0, 0]
    assert alignment.student_chunk_BT[0].tolist()[:2] == [-1, 0]


def test_across_documents_the_end_token_becomes_the_teacher_s():
    batch = windows("fine", width=100, cross_documents=True)
    alignment = align("fine", "no space", batch)
    assert alignment.teacher_batch.document_ids_BT is None
    mine = (batch.input_ids_BT == kinds()["fine"].eos_token_id).sum()
    theirs = (alignment.teacher_batch.input_ids_BT == kinds()["no space"].eos_token_id).sum()
    assert theirs >= mine  # padding is written with it too
    assert (alignment.student_chunk_BT[batch.input_ids_BT == kinds()["fine"].eos_token_id] == -1).all()


def test_special_tokens_without_counterpart_end_the_teacher_s_document():
    student = toy.byte_level(300)
    student.add_special_tokens({"additional_special_tokens": ["<|user|>", "<s>"]})
    user, begin = student.convert_tokens_to_ids(["<|user|>", "<s>"])
    one, two = (encode_text(student, [text])[0] for text in ("Ada met Bo", " and saw Bo"))
    for special, documents in ((user, 2), (begin, 1)):
        row = torch.tensor([[*one, special, *two, student.eos_token_id]])
        batch = Batch(row, torch.ones_like(row, dtype=torch.bool))
        alignment = align_batch(batch, read_token_bytes(student), kinds()["sentencepiece"], tokens_of("sentencepiece"))
        written = alignment.teacher_batch
        if documents == 2:
            assert int((written.input_ids_BT == 1).sum()) == 2
            assert int(written.document_ids_BT.max()) == 1
        else:
            assert written.document_ids_BT is None
            assert int((written.input_ids_BT == 1).sum()) == 2  # the opening, and the one in the text
        assert alignment.student_chunk_BT[0, len(one)] == -1


def test_names_of_special_tokens_inside_text_are_text():
    document = "a </s> b <|endoftext|> c"
    row = torch.tensor([encode_text(kinds()["fine"], [document])[0]])
    for teacher in ("coarse", "no space", "unigram"):
        alignment = align("fine", teacher, Batch(row, torch.ones_like(row, dtype=torch.bool)))
        ids = alignment.teacher_batch.input_ids_BT[0]
        inside = ids[alignment.teacher_chunk_BU[0] >= 0].numpy()
        assert tokens_of(teacher).is_text[inside].all()


@pytest.mark.parametrize("offset", range(1, 12))
def test_a_window_may_begin_inside_a_character(offset):
    """Bytes: the window begins at every byte of two characters of 3 and 4 bytes in turn."""
    text = "日🙂 the cat sat on the mat"
    ids = torch.tensor([encode_text(kinds()["bytes"], [text])[0][offset:]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    alignment = align("bytes", "coarse", Batch(ids, mask))
    written = tokens_of("coarse").join(alignment.teacher_batch.input_ids_BT[0].tolist())
    assert written == text.encode()[offset:].decode(errors="ignore").encode()
    found = {int(c) for c in alignment.student_chunk_BT[0] if c >= 0}
    assert found == set(range(int(alignment.chunk_mask_BC.sum())))
    assert found


def test_bytes_that_are_no_text_end_what_the_teacher_sees():
    good, bad = b"the cat sat on the mat. ", b"\xff\xfe"
    ids = torch.tensor([[byte + 3 for byte in good + bad + good]])
    alignment = align("byt5", "coarse", Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert tokens_of("coarse").join(alignment.teacher_batch.input_ids_BT[0].tolist()) == good
    assert (alignment.student_chunk_BT[0, len(good) :] == -1).all()
    assert (alignment.student_chunk_BT[0, : len(good)] >= 0).any()


def test_after_bytes_that_are_no_text_the_teacher_begins_anew():
    """It has not seen all that stands before, so what follows is another document to it."""
    one, two = b"the cat sat. ", b"the dog too. "
    ids = torch.tensor([[*(byte + 3 for byte in one + b"\xff"), 1, *(byte + 3 for byte in two), 1]])
    for bad, documents in ((True, 2), (False, 1)):
        row = ids if bad else torch.cat([ids[:, : len(one)], ids[:, len(one) + 1 :]], dim=1)
        written = align("byt5", "coarse", Batch(row, torch.ones_like(row, dtype=torch.bool))).teacher_batch
        found = 1 if written.document_ids_BT is None else int(written.document_ids_BT.max()) + 1
        assert found == documents


def test_documents_that_no_end_token_closes_stay_apart():
    one, two = (encode_text(kinds()["fine"], [text])[0] for text in ("Ada saw", "the cat"))
    row = torch.tensor([[*one, *two]])
    documents = torch.tensor([[0] * len(one) + [1] * len(two)])
    mask = torch.ones_like(row, dtype=torch.bool)
    mask[0, [0, len(one)]] = False
    written = align("fine", "coarse", Batch(row, mask, documents)).teacher_batch
    for document, text in enumerate(("Ada saw", "the cat")):
        inside = written.document_ids_BT[0] == document
        assert written.input_ids_BT[0, inside].tolist() == encode_text(kinds()["coarse"], [text])[0]


def test_a_first_token_that_the_teacher_cannot_predict_is_in_no_chunk():
    row = torch.tensor([[*encode_text(kinds()["fine"], [DOCUMENTS[0]])[0], 0]])
    everything = Batch(row, torch.ones_like(row, dtype=torch.bool))
    bare, opened = align("fine", "coarse", everything), align("fine", "sentencepiece", everything)
    assert bare.teacher_chunk_BU[0, 0] == -1
    assert bare.student_chunk_BT[0, 0] == -1
    assert opened.teacher_chunk_BU[0, 1] == 0
    assert opened.student_chunk_BT[0, 0] == 0


def test_the_cut_word_at_the_end_is_not_compared():
    text = "the cat sat on the weath"
    ids = torch.tensor([[byte + 3 for byte in text.encode()]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    cut = align("byt5", "coarse", Batch(ids, mask))
    last_space = text.rindex(" ")
    assert (cut.student_chunk_BT[0, last_space:] == -1).all()
    assert (cut.student_chunk_BT[0, :last_space] >= 0).any()
    closed = torch.cat([ids, torch.tensor([[1]])], dim=1)
    whole = align("byt5", "coarse", Batch(closed, torch.ones_like(closed, dtype=torch.bool)))
    assert (whole.student_chunk_BT[0, last_space:-1] >= 0).all()


def test_the_loss_mask_is_respected():
    batch = windows("fine", width=60, count=1)
    mask = batch.loss_mask_BT.clone()
    mask[:, :20] = False
    alignment = align("fine", "coarse", Batch(batch.input_ids_BT, mask, batch.document_ids_BT, batch.position_ids_BT))
    assert (alignment.student_chunk_BT[:, :20] == -1).all()
    positions = alignment.student_position_BP[alignment.student_position_BP >= 0]
    assert positions.min() >= 19  # its prediction, of token 20, is scored


def test_a_teacher_with_a_short_memory():
    batch = windows("fine", width=100, count=1, documents=[" ".join(DOCUMENTS[:1] * 4)])
    free, limited = align("fine", "coarse", batch), align("fine", "coarse", batch, limit_tokens=10)
    assert limited.teacher_batch.input_ids_BT.shape[1] < free.teacher_batch.input_ids_BT.shape[1]
    seen = limited.student_chunk_BT >= 0
    assert 0 < seen.sum() < (free.student_chunk_BT >= 0).sum()
    assert torch.equal(limited.student_chunk_BT[seen], free.student_chunk_BT[seen])


def test_rows_do_not_depend_on_their_neighbours():
    batch = windows("fine", width=40)
    together = align("fine", "embedded", batch)
    for row in range(len(batch.input_ids_BT)):
        alone = align(
            "fine", "embedded",
            Batch(*(t[row : row + 1] for t in (batch.input_ids_BT, batch.loss_mask_BT, batch.document_ids_BT, batch.position_ids_BT))),
        )  # fmt: skip
        assert torch.equal(alone.student_chunk_BT[0], together.student_chunk_BT[row])
        length = alone.teacher_batch.input_ids_BT.shape[1]
        assert torch.equal(alone.teacher_batch.input_ids_BT[0], together.teacher_batch.input_ids_BT[row, :length])
        assert int(alone.chunk_mask_BC.sum()) == int(together.chunk_mask_BC[row].sum())


def test_random_text_in_random_windows():
    chance = random.Random(3)
    alphabet = "ab c\u00e9日🙂\n.e\u0301"
    documents = ["".join(chance.choices(alphabet, k=chance.randint(1, 60))) for _ in range(30)]
    for student, teacher in (("bytes", "coarse"), ("fine", "nfc"), ("no space", "embedded")):
        for width in (7, 31):
            batch = windows(student, width=width, documents=documents)
            alignment = align(student, teacher, batch)
            mine, theirs = tokens_of(student), tokens_of(teacher)
            for row in range(len(batch.input_ids_BT)):
                for chunk in range(int(alignment.chunk_mask_BC[row].sum())):
                    one = mine.join(batch.input_ids_BT[row, alignment.student_chunk_BT[row] == chunk].tolist())
                    other = theirs.join(
                        alignment.teacher_batch.input_ids_BT[row, alignment.teacher_chunk_BU[row] == chunk].tolist()
                    )
                    assert one == other or nfc(one) == other


def tiny_teacher(vocabulary):
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def token_log_probs(model, batch):
    with torch.no_grad():
        logits_BUV = forward_batch(model, batch).logits
    picked = logits_BUV[:, :-1].log_softmax(-1).gather(-1, batch.input_ids_BT[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(picked, (1, 0)), logits_BUV


@pytest.mark.parametrize("teacher", ["coarse", "sentencepiece"])
def test_likelihoods_are_those_of_each_document_read_alone(teacher):
    model = tiny_teacher(len(kinds()[teacher]))
    batch = windows("fine", width=60)
    alignment = align("fine", teacher, batch)
    aligned = alignment.finish(token_log_probs(model, alignment.teacher_batch)[0])
    opening = [1] if teacher == "sentencepiece" else []
    checked = 0
    for row in range(len(batch.input_ids_BT)):
        documents = batch.document_ids_BT[row]
        for document in documents.unique():
            places = (documents == document).nonzero().flatten()
            ids = batch.input_ids_BT[row, places].tolist()
            text = tokens_of("fine").join(ids).decode(errors="ignore")
            alone = torch.tensor([[*opening, *encode_text(kinds()[teacher], [text])[0]]])
            if alone.shape[1] < 2:
                continue
            known = token_log_probs(model, Batch(alone, torch.ones_like(alone, dtype=torch.bool)))[0][0]
            for chunk in alignment.student_chunk_BT[row, places].unique():
                if chunk < 0:
                    continue
                theirs = (alignment.teacher_chunk_BU[row] == chunk).nonzero().flatten()
                first = (alignment.teacher_batch.document_ids_BT[row] == document).nonzero().flatten()[0]
                assert_close(aligned.chunk_log_prob_BC[row, chunk], known[theirs - first].sum(), atol=1e-4, rtol=1e-5)
                checked += 1
    assert checked > 30


def test_the_loss_is_zero_for_a_student_that_is_the_teacher():
    model = tiny_teacher(len(kinds()["coarse"]))
    batch = windows("coarse", width=280, count=1)
    alignment = align("coarse", "coarse", batch)
    log_prob_BT = token_log_probs(model, alignment.teacher_batch)[0]
    aligned = alignment.finish(log_prob_BT)
    student_BC = chunk_log_probs(log_prob_BT, aligned.student_chunk_BT, chunks=aligned.chunk_mask_BC.shape[1])
    for temperature in (1.0, 100.0, float("inf")):
        nats_BC = chunk_likelihood(
            student_BC, aligned.chunk_log_prob_BC, aligned.chunk_mask_BC, temperature=temperature
        )
        assert torch.equal(nats_BC, torch.zeros_like(nats_BC))
    assert aligned.chunk_mask_BC.sum() > 200


def test_a_teacher_that_overflows_is_refused():
    batch = windows("fine", width=60, count=2)
    alignment = align("fine", "coarse", batch)
    values = torch.zeros(alignment.teacher_batch.input_ids_BT.shape)
    values[~alignment.teacher_batch.loss_mask_BT] = float("nan")
    alignment.finish(values)
    values[alignment.teacher_batch.loss_mask_BT] = float("-inf")
    with pytest.raises(TeacherError, match="not a finite number"):
        alignment.finish(values)


def test_nothing_to_align_is_no_error():
    ids = torch.zeros(2, 5, dtype=torch.long)
    alignment = align("coarse", "sentencepiece", Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    aligned = alignment.finish(torch.zeros(alignment.teacher_batch.input_ids_BT.shape))
    assert aligned.chunk_log_prob_BC.shape == (2, 0)
    assert (aligned.student_chunk_BT == -1).all()
