import numpy as np
import pytest
import torch
from tests import tiny
from tests.store import small_store
from tests.store.small_store import SmallTeacher, make_batches, make_store

from limbeck.core.errors import StoreError, TeacherError, VocabularyError
from limbeck.core.types import Batch, DenseTargets, Targets
from limbeck.data.text import TextSource, read_documents
from limbeck.data.windows import TokenWindows, tokenise
from limbeck.models.token_bytes import TokenBytes, read_token_bytes
from limbeck.models.tokenizers import encoder, train_tokenizer
from limbeck.store.codec import CodecSettings
from limbeck.store.store import TargetStore
from limbeck.teachers.base import Wanted
from limbeck.teachers.capture import CaptureSettings, capture
from limbeck.teachers.stored_aligned import StoredAlignedTargets
from limbeck.teachers.stored_windows import StoreWindows

BYTES = TokenBytes(tuple(bytes([byte]) for byte in range(256)), {}, None, "bytes", adds_space=False)


def as_bytes(texts):
    return [list(text.encode()) for text in texts]


def test_to_a_student_of_bytes_every_token_is_a_chunk(tmp_path):
    """The captured text is closed by a special token, so that all borders are final."""
    ids = torch.tensor([[1, 2, 3, 4, 0, 5, 6, 0]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    mask = torch.tensor([[False, True, True, True, True, False, True, True]])
    batch = Batch(ids, mask, documents, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]))
    make_store(tmp_path / "s", [batch])
    windows = StoreWindows(tmp_path / "s", encode=as_bytes, context_tokens=20)
    source = StoredAlignedTargets(windows, tokenizer=None, tokens=BYTES)
    source.prepare(Wanted(logits=False, aligned=True))
    student = windows.rows([0])
    aligned = source.targets(student).aligned
    sizes = [len(small_store.TOKEN_BYTES[token]) for token in (1, 2, 3, 4, 5, 6)]
    numbers = [-1, 0, 1, 2, -1, 3]
    expected = [number for number, size in zip(numbers, sizes, strict=True) for _ in range(size)]
    assert aligned.student_chunk_BT[0].tolist() == expected + [-1] * (20 - len(expected))
    log_probs = SmallTeacher().log_probs(batch)[0]
    wanted = [log_probs[t - 1, ids[0, t]].item() for t in (1, 2, 3, 6)]
    np.testing.assert_allclose(aligned.chunk_log_prob_BC[0], wanted, rtol=2**-10, atol=1e-5)
    assert aligned.chunk_mask_BC.all()
    ends = np.cumsum(sizes) - 1
    # After the fourth token comes the special one, in the student's row the next document's first byte: not compared.
    assert aligned.student_position_BP[0].tolist() == ends[[0, 1, 2, 4]].tolist()
    for place, t in enumerate((0, 1, 2, 5)):
        probs = log_probs[t].exp().sort(descending=True).values
        torch.testing.assert_close(aligned.sorted_probs_BPK[0, place], probs, atol=1e-6, rtol=1e-5)


class RandomTeacher:
    name = "random"

    def __init__(self, vocabulary):
        self.vocabulary_size = vocabulary
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator)

    def prepare(self, wanted):
        pass

    def targets(self, batch):
        return Targets(DenseTargets(self.table[batch.input_ids_BT], lambda logits: logits))


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    text = tiny.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    documents = [f"{document} naïve 日本語" for document in read_documents(TextSource(str(text), split="train"))]
    return documents, train_tokenizer(documents, vocab_size=340), train_tokenizer(documents[:3], vocab_size=275)


@pytest.mark.parametrize("context_tokens", [24, 61])
def test_chunks_against_a_slow_reading(tmp_path, two_tokenizers, context_tokens):
    documents, big, small = two_tokenizers
    teacher = RandomTeacher(len(big))
    tokens, starts = tokenise(documents[:8], encoder(big), end_token=0, max_tokens=None)
    captured = TokenWindows(tokens, starts, context_tokens=context_tokens)
    pieces = read_token_bytes(big)
    settings = CaptureSettings(CodecSettings(len(big), values="float32", k=8), fidelity_tokens=0)
    capture(
        teacher, [captured.rows([row]) for row in range(len(captured))], tmp_path / "s", settings=settings,
        teacher={"name": "random", "fingerprint": "r"}, tokenizer="big", token_bytes=pieces.pieces,
    )  # fmt: skip
    student_tokens = read_token_bytes(small)
    windows = StoreWindows(tmp_path / "s", encode=encoder(small), end_token=0, context_tokens=4 * context_tokens)
    source = StoredAlignedTargets(windows, tokenizer=small, tokens=student_tokens)
    store = TargetStore(tmp_path / "s")
    chunks = compared = 0
    for number in range(len(store)):
        student = windows.rows([number])
        aligned = source.targets(student).aligned
        row = store.row(number)
        log_probs = teacher.table[torch.tensor(row.input_ids.tolist())].log_softmax(-1)
        student_of = pieces_by_chunk(student.input_ids_BT[0], aligned.student_chunk_BT[0], student_tokens)
        # Every stretch of the teacher's tokens whose borders enclose the same bytes, in order.
        place = 0
        for chunk, text in sorted(student_of.items()):
            found = None
            for low in range(place, len(row.input_ids)):
                for high in range(low + 1, min(low + 25, len(row.input_ids)) + 1):
                    same = pieces.join(row.input_ids[low:high]) == text and all(
                        pieces.pieces[i] is not None for i in row.input_ids[low:high]
                    )
                    total = sum(float(log_probs[t - 1, row.input_ids[t]]) for t in range(max(low, 1), high))
                    if same and low >= 1 and abs(total - float(aligned.chunk_log_prob_BC[0, chunk])) < 0.02:
                        found = (low, high)
                        break
                if found:
                    break
            assert found, (number, chunk, text)
            assert all(row.scored[found[0] : found[1]])
            place = found[1]
            chunks += 1
        for position, probs in zip(aligned.student_position_BP[0].tolist(), aligned.sorted_probs_BPK[0], strict=True):
            if position >= 0:
                assert student.loss_mask_BT[0, position + 1]
                assert (probs.diff() <= 0).all()
                compared += 1
    assert chunks > 50
    assert compared > 50


def pieces_by_chunk(ids, chunks, tokens):
    found = {}
    for token, chunk in zip(ids.tolist(), chunks.tolist(), strict=True):
        if chunk >= 0:
            found[chunk] = found.get(chunk, b"") + tokens.pieces[token]
    return found


def test_one_tokenizer_on_both_sides_gives_each_token_its_own(tmp_path, two_tokenizers):
    documents, big, _ = two_tokenizers
    teacher = RandomTeacher(len(big))
    tokens, starts = tokenise(documents[:8], encoder(big), end_token=0, max_tokens=None)
    captured = TokenWindows(tokens, starts, context_tokens=40)
    pieces = read_token_bytes(big)
    settings = CaptureSettings(CodecSettings(len(big), values="float32", k=8), fidelity_tokens=0)
    words = {"teacher": {"name": "random", "fingerprint": "r"}, "tokenizer": "big", "token_bytes": pieces.pieces}
    capture(teacher, [captured.rows([row]) for row in range(len(captured))], tmp_path / "s", settings=settings, **words)
    windows = StoreWindows(tmp_path / "s", encode=encoder(big), end_token=0, context_tokens=60)
    source = StoredAlignedTargets(windows, tokenizer=big, tokens=pieces)
    one = windows.rows([0])
    ids = one.input_ids_BT[0]
    aligned = source.targets(one).aligned
    chunk_of = aligned.student_chunk_BT[0]
    log_probs = teacher.table[ids].log_softmax(-1)
    followed = [t for t in range(1, 60) if chunk_of[t] >= 0]
    assert len(followed) > 20
    for t in followed:
        assert (chunk_of == chunk_of[t]).sum() == 1
        assert float(aligned.chunk_log_prob_BC[0, chunk_of[t]]) == pytest.approx(
            float(log_probs[t - 1, ids[t]]), abs=0.01
        )


def test_what_is_refused(tmp_path):
    make_store(tmp_path / "s")
    windows = StoreWindows(tmp_path / "s", encode=as_bytes, context_tokens=30)
    source = StoredAlignedTargets(windows, tokenizer=None, tokens=BYTES)
    with pytest.raises(TeacherError, match="logits"):
        source.prepare(Wanted(logits=True, aligned=True))
    batch = windows.rows([0])
    with pytest.raises(VocabularyError, match="encoded by another tokenizer"):
        source.targets(Batch(batch.input_ids_BT + 1, batch.loss_mask_BT, keys=batch.keys))
    for keys in (None, ("0" * 32,)):
        with pytest.raises(StoreError, match="not of this store"):
            source.targets(Batch(batch.input_ids_BT, batch.loss_mask_BT, keys=keys))
    with pytest.raises(StoreError, match="read with another tokenizer"):
        StoredAlignedTargets(StoreWindows(tmp_path / "s"), tokenizer=None, tokens=BYTES)

    class Quiet(SmallTeacher):
        def targets(self, batch):
            from limbeck.core.types import SparseTargets

            top = self.log_probs(batch).topk(50)
            return Targets(SparseTargets(top.indices, top.values, torch.full(top.values.shape[:2], -torch.inf)))

    make_store(tmp_path / "quiet", make_batches(2), source=Quiet())
    with pytest.raises(StoreError, match="does not keep the log-probability of every token"):
        StoredAlignedTargets(StoreWindows(tmp_path / "quiet", encode=as_bytes), tokenizer=None, tokens=BYTES)


@pytest.mark.parametrize("width", [7, 11, 60])
def test_a_store_of_symbols_keeps_what_the_ends_of_patches_cost_and_closes_no_document(tmp_path, width):
    """A teacher of bytes: each chunk holds its bytes and the EOPs among and right behind them; a cut row has no end."""
    from limbeck.core.symbols import EOD, EOP, SYMBOLS
    from limbeck.models.byte_tokenizer import ByteTokenizer

    teachers, students = ByteTokenizer("fixed:3"), ByteTokenizer("space")
    documents = ["Ada met Bo. Bo saw Ada", "naïve 日本 and so on", "a"]
    tokens, starts = tokenise(documents, encoder(teachers), end_token=EOD, max_tokens=None)
    captured = TokenWindows(tokens, starts, context_tokens=width)
    teacher = RandomTeacher(SYMBOLS)
    capture(
        teacher, [captured.rows([row]) for row in range(len(captured))], tmp_path / "s",
        settings=CaptureSettings(CodecSettings(SYMBOLS, values="float32", k=260), fidelity_tokens=0),
        teacher={"name": "random", "fingerprint": "r"}, tokenizer="symbols", token_bytes=read_token_bytes(teachers).pieces,
    )  # fmt: skip
    windows = StoreWindows(tmp_path / "s", encode=encoder(students), end_token=EOD, context_tokens=4 * width)
    source = StoredAlignedTargets(windows, tokenizer=students, tokens=read_token_bytes(students))
    ends = chunks = 0
    for number in range(len(windows)):
        row, student = windows.store.row(number), windows.rows([number])
        mine = student.input_ids_BT[0].tolist()
        assert mine.count(EOD) == row.input_ids.tolist().count(EOD)
        aligned = source.targets(student).aligned
        said = teacher.table[torch.tensor(row.input_ids.tolist())].log_softmax(-1)
        before = np.cumsum(row.input_ids < 256) - (row.input_ids < 256)
        head = next((n for n, byte in enumerate(row.text) if byte & 0xC0 != 0x80), 0)
        place = head + np.cumsum(np.asarray(mine) < 256) - (np.asarray(mine) < 256)
        for chunk, log_prob in enumerate(aligned.chunk_log_prob_BC[0][aligned.chunk_mask_BC[0]].tolist()):
            bytes_ = [place[t] for t in np.flatnonzero(aligned.student_chunk_BT[0] == chunk) if mine[t] < 256]
            inside = (before >= min(bytes_)) & (before <= max(bytes_)) & (row.input_ids < 256)
            inside |= (before > min(bytes_)) & (before <= max(bytes_) + 1) & (row.input_ids == EOP)
            expected = sum(float(said[t - 1, row.input_ids[t]]) for t in np.flatnonzero(inside))
            assert log_prob == pytest.approx(expected, abs=1e-2)
            ends += int((inside & (row.input_ids == EOP)).sum())
            chunks += 1
    assert chunks > 5
    assert ends > 5
