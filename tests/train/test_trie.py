import math

import pytest
import torch
from tests.teachers import trie_pairs
from tests.teachers.test_trie import probabilities, slow_document, slow_paths, tokens_of
from tests.teachers.trie_pairs import DOCUMENTS, PATCH_BYTES, symbol_rows

from limbeck.core.errors import RecipeError, TeacherError
from limbeck.core.symbols import BOS, EOP
from limbeck.core.types import Batch
from limbeck.models.byte_pool import BytePoolConfig, BytePoolForCausalLM
from limbeck.models.token_bytes import read_token_bytes
from limbeck.objectives.byte_trie import path_divergence
from limbeck.teachers.entries import TopK
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.trie import TrieTeacher
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.trie import TrieLesson


@pytest.fixture(scope="module")
def pair():
    tokenizer = trie_pairs.nested()
    return trie_pairs.make_teacher(tokenizer), tokenizer, trie_pairs.byte_tokenizer(tokenizer)


def make_student(*, dtype=torch.float64, **options):
    torch.manual_seed(5)
    trunk = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "feed_forward": 24}
    config = BytePoolConfig(
        trunk=trunk,
        patch_bytes=PATCH_BYTES,
        local_width=8,
        encoder_layers=1,
        decoder_layers=1,
        local_heads=2,
        **options,
    )
    student = BytePoolForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return student


def every_path(trie):
    return len(trie.paths_CP)


def open_teacher(pair, paths, **options):
    return TrieTeacher(*pair, paths=paths, **options)


def gradients(loss, student):
    found = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(student.parameters(), found, strict=True)]


def path_log_prob(student, prefix, paths):
    """The student's log-probability of each path after a row of symbols, by running it on the row and the path."""
    width = max(map(len, paths))
    ids = torch.tensor([[*prefix, *path, *[256] * (width - len(path))] for path in paths])
    logits = student(input_ids=ids).logits.log_softmax(-1)
    return torch.stack(
        [
            sum(logits[row, len(prefix) - 1 + n, symbol] for n, symbol in enumerate(path))
            for row, path in enumerate(paths)
        ]
    )


def dense_token_kl(student, model, tokenizer, document):
    """The sum over the document's patches of KL over all that a patch may be: one teacher and one student run for each."""
    tokens = read_token_bytes(tokenizer)
    symbols, _ = slow_document(model, tokenizer, document)
    read, place, total = [tokenizer.eos_token_id], 0, 0.0
    for token in [*tokens_of(tokenizer, document), tokens.end_id]:
        probs, piece = probabilities(model, read), tokens.pieces[token] or b""
        read.append(token)
        for low in range(0, max(1, len(piece)), PATCH_BYTES - 1):
            expected = slow_paths(probs, tokens, piece[:low], b"")
            paths = list(expected)
            teacher = torch.tensor([expected[path] for path in paths], dtype=torch.float64)
            student_P = path_log_prob(student, [BOS, *symbols[:place]], paths)
            total = total + (teacher * (teacher.log() - student_P)).sum()
            place += len(piece[low : low + PATCH_BYTES - 1]) + 1
    return total


def test_all_paths_are_the_dense_token_kl(pair):
    """Value and gradient of every weight, with nested and equal tokens, one longer than a patch, and the end of the text."""
    model, tokenizer, _ = pair
    student = make_student()
    teacher = open_teacher(pair, 10**6)
    lesson = TrieLesson(student, teacher, [Term("byte_trie")])
    document = "aaaaaab"
    symbols, _ = slow_document(model, tokenizer, document)
    ids = torch.tensor([[BOS, *symbols]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    loss, found = lesson(Batch(ids, mask))
    expected = dense_token_kl(student, model, tokenizer, document)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found["byte_trie"], expected.detach(), atol=1e-10, rtol=0)
    for mine, theirs in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-9)
    assert float(loss) > 1


def test_nodes_on_the_text_against_a_slow_reading(pair):
    """The cheap form: forward KL of any lesson, at every symbol."""
    model, tokenizer, _ = pair
    student = make_student()
    lesson = DistilLesson(student, TrieTeacher(*pair), [Term("forward_kl")])
    symbols, expected = slow_document(model, tokenizer, DOCUMENTS[1])
    ids = torch.tensor([[BOS, *symbols]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    loss, _ = lesson(Batch(ids, mask))
    log_probs = student(input_ids=ids).logits[0, :-1].log_softmax(-1)
    kl = torch.where(expected > 0, expected * (expected.log() - log_probs), 0.0).sum()
    torch.testing.assert_close(loss, kl, atol=1e-10, rtol=0)
    for mine, theirs in zip(gradients(loss, student), gradients(kl, student), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-9)


def test_what_is_not_known_is_not_learnt(pair):
    """Positions without knowledge add nothing, dense or as a tail alone."""
    student = make_student()
    batch = symbol_rows(pair[2], DOCUMENTS, 17)
    teacher = TrieTeacher(*pair)
    dense, _ = DistilLesson(student, teacher, [Term("forward_kl")])(batch)
    known = teacher.targets(batch).known_BT
    mask = batch.loss_mask_BT.clone()
    mask[:, 1:] &= known[:, :-1]
    assert int(mask.sum()) < batch.target_count
    only, _ = DistilLesson(student, teacher, [Term("forward_kl")])(
        Batch(batch.input_ids_BT, mask, batch.document_ids_BT)
    )
    torch.testing.assert_close(dense, only, atol=1e-9, rtol=0)
    # All symbols kept, as a store of symbols would.
    sparse, _ = DistilLesson(student, TrieTeacher(*pair, entries=TopK(260)), [Term("forward_kl")])(batch)
    torch.testing.assert_close(sparse, dense, atol=1e-9, rtol=0)


def test_packed_rows_and_chunks_change_nothing(pair, monkeypatch):
    """Documents packed in one row, or each in a row of its own behind BOS; and a few paths at a time."""
    student = make_student()
    lesson = TrieLesson(student, open_teacher(pair, 5), [Term("byte_trie"), Term("cross_entropy")])
    packed = symbol_rows(pair[2], DOCUMENTS, 200)
    whole, terms = lesson(packed)
    before = gradients(whole, student)
    alone = 0.0
    for number, document in enumerate(DOCUMENTS):
        symbols, _ = slow_document(pair[0], pair[1], document)
        ids = torch.tensor([[BOS, *symbols]])
        mask = torch.ones_like(ids, dtype=torch.bool)
        # Nobody scores the first symbol of a packed document, nor is the first patch of a row known.
        mask[:, : 2 if number else 1 + symbols.index(EOP) + 1] = False
        alone = alone + lesson(Batch(ids, mask))[1]["byte_trie"]
    torch.testing.assert_close(terms["byte_trie"], alone, atol=1e-9, rtol=0)
    monkeypatch.setattr("limbeck.train.trie._PATHS_AT_ONCE", 7)
    parts, _ = lesson(packed)
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0)
    for mine, theirs in zip(gradients(parts, student), before, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-9)


def test_terms_add_up_with_their_weights(pair, monkeypatch):
    student = make_student()
    terms = [
        Term("byte_trie", weight=lambda progress: 0.5, temperature=2.0),
        Term("forward_kl", weight=lambda progress: 0.25),
    ]
    batch = symbol_rows(pair[2], DOCUMENTS, 24)
    lesson = TrieLesson(student, open_teacher(pair, 3), terms)
    softened = []

    def watched(*arguments, **options):
        softened.append((options["temperature"], path_divergence(*arguments, **options)))
        return softened[-1][1]

    monkeypatch.setattr("limbeck.train.trie.path_divergence", watched)
    total, found = lesson(batch)
    assert {temperature for temperature, _ in softened} == {2.0}
    torch.testing.assert_close(found["byte_trie"], 4 * sum(nats.sum().detach() for _, nats in softened))
    torch.testing.assert_close(total, 0.5 * found["byte_trie"] + 0.25 * found["forward_kl"])
    told = lesson.diagnose(batch)
    assert math.isclose(sum(told[f"share.{term.objective}"] for term in terms), 1, abs_tol=1e-6)
    assert lesson._states_BSD is None


def test_only_patches_that_the_batch_scores(pair):
    """Whatever else the teacher speaks of."""

    class Talkative(TrieTeacher):
        def targets(self, batch):
            mask = torch.ones_like(batch.loss_mask_BT)
            return super().targets(Batch(batch.input_ids_BT, mask, batch.document_ids_BT))

    student = make_student()
    batch = symbol_rows(pair[2], DOCUMENTS, 24)
    mask = batch.loss_mask_BT & (torch.arange(24) % 3 == 0)
    half = Batch(batch.input_ids_BT, mask, batch.document_ids_BT)
    losses = [
        TrieLesson(student, kind(*pair, paths=3), [Term("byte_trie")])(half)[0] for kind in (TrieTeacher, Talkative)
    ]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-10, rtol=0)
    assert float(losses[0]) > 0


def test_a_batch_in_which_no_patch_is_known(pair):
    student = make_student()
    lesson = TrieLesson(student, open_teacher(pair, 3), [Term("byte_trie")])
    ids = torch.tensor([[97, 98, 97, 98]])
    total, _ = lesson(Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    total.backward()
    assert float(total) == 0


def test_learning_to_follow_the_teacher(pair):
    """A few steps bring the student nearer to the teacher, in float32."""
    student = make_student(dtype=torch.float32, zero_init=False)
    lesson = TrieLesson(student, open_teacher(pair, 4), [Term("byte_trie")])
    batch = symbol_rows(pair[2], DOCUMENTS * 3, 40)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss, _ = lesson(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_what_does_not_fit_is_refused(pair):
    model, tokenizer, _ = pair
    student, teacher = make_student(), open_teacher(pair, 3)
    with pytest.raises(RecipeError, match="forward_kl"):
        TrieLesson(student, teacher, [Term("byte_trie", options={"divergence": "forwrad_kl"})])
    with pytest.raises(RecipeError, match="exclude each other"):
        TrieLesson(student, teacher, [Term("byte_trie"), Term("chunk_likelihood")])
    with pytest.raises(TeacherError, match="which tokens a patch can be"):
        TrieLesson(student, LiveTeacher(model), [Term("byte_trie")])
    with pytest.raises(RecipeError, match="write patches"):
        TrieLesson(model, teacher, [Term("byte_trie")])
    with pytest.raises(TeacherError, match="aligned"):
        TrieLesson(student, open_teacher(pair, 0), [Term("byte_trie")])
