import math

import pytest
import torch
from tests.teachers import trie_pairs
from tests.teachers.test_trie import content, slow_paths
from tests.teachers.trie_pairs import DOCUMENTS, PATCH_BYTES

from limbeck.core.errors import StoreError, TeacherError, VocabularyError
from limbeck.core.symbols import EOD, EOP, PAD
from limbeck.core.types import Batch
from limbeck.data.windows import TokenWindows, tokenise
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.token_bytes import read_token_bytes
from limbeck.models.tokenizers import encoder, tokenizer_fingerprint
from limbeck.store.codec import CodecSettings
from limbeck.teachers.base import Wanted
from limbeck.teachers.capture import CaptureSettings, capture
from limbeck.teachers.entries import Sampled
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.stored_trie import StoredTriePaths
from limbeck.teachers.stored_windows import StoreWindows

CONTEXT = 11


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A store of all of a teacher's predictions of tokens, in rows that cut documents."""
    tokenizer = trie_pairs.nested()
    model = trie_pairs.make_teacher(tokenizer).float()
    folder = tmp_path_factory.mktemp("captured") / "s"
    write(folder, tokenizer, LiveTeacher(model), k=len(tokenizer))
    return folder, tokenizer, model


def write(folder, tokenizer, teacher, *, k, sampled=False):
    tokens, starts = tokenise(DOCUMENTS * 2, encoder(tokenizer), end_token=tokenizer.eos_token_id, max_tokens=None)
    rows = TokenWindows(tokens, starts, context_tokens=CONTEXT)
    settings = CaptureSettings(
        CodecSettings(teacher.vocabulary_size, values="float32", k=k, sampled=sampled), fidelity_tokens=0
    )
    capture(
        teacher, [rows.rows([row]) for row in range(len(rows))], folder, settings=settings,
        teacher={"name": "t", "fingerprint": "f"}, tokenizer=tokenizer_fingerprint(tokenizer),
        token_bytes=read_token_bytes(tokenizer).pieces,
    )  # fmt: skip


def open_windows(folder, byte_tokenizer, context_tokens=64):
    return StoreWindows(
        folder, encode=encoder(byte_tokenizer), end_token=EOD, padding_token=PAD, context_tokens=context_tokens
    )


def open_paths(captured, paths=6, context_tokens=64):
    folder, tokenizer, _ = captured
    byte_tokenizer = trie_pairs.byte_tokenizer(tokenizer)
    windows = open_windows(folder, byte_tokenizer, context_tokens)
    source = StoredTriePaths(windows, tokenizer=tokenizer, byte_tokenizer=byte_tokenizer, paths=paths)
    source.prepare(Wanted(logits=False, aligned=True))
    return source, windows


@pytest.mark.parametrize("context_tokens", [64, 17])
def test_where_a_token_begins_a_patch_may_be_what_the_store_says(captured, context_tokens):
    """Against the store's rows read token by token. A token's second patch, and what is not scored, is not spoken of."""
    source, windows = open_paths(captured, context_tokens=context_tokens)
    tokens = read_token_bytes(captured[1])
    compared = ends = 0
    for number in range(len(windows)):
        batch = windows.rows([number])
        sparse = source.targets(batch).patch_tokens
        row = windows.store.row(number)
        expected = {}
        symbols = -1
        for place, token in enumerate(row.input_ids.tolist()):
            piece = tokens.pieces[token] or b""
            begin, size = symbols, len(piece) + max(1, -(-len(piece) // (PATCH_BYTES - 1)))
            symbols += size
            if row.scored[place] and begin + 1 < context_tokens:
                expected[begin] = (place - 1, token == tokens.end_id)
        found = (sparse.ids_BTK[0] >= 0).any(-1).nonzero().flatten().tolist()
        assert found == sorted(expected)
        for t, (said, is_end) in expected.items():
            probs = torch.zeros(len(tokens.pieces), dtype=torch.float64)
            kept = row.ids[said] < len(tokens.pieces)
            probs[row.ids[said][kept]] = torch.from_numpy(row.log_probs[said][kept]).double().exp()
            wanted = slow_paths(probs, tokens, b"", b"")
            ranked = sorted(wanted, key=lambda path: -wanted[path])[:6]
            assert [content(source.trie, path) for path in sparse.ids_BTK[0, t].tolist()] == ranked
            values = torch.tensor([wanted[path] for path in ranked])
            torch.testing.assert_close(sparse.log_probs_BTK[0, t].exp(), values.float(), atol=1e-5, rtol=1e-4)
            rest = 1 - math.fsum(wanted[path] for path in ranked)
            assert abs(float(sparse.tail_log_prob_BT[0, t].exp()) - rest) < 1e-4
            compared += 1
            ends += is_end
    assert compared > 25
    assert ends > 2


def test_a_store_of_few_tokens(captured, tmp_path):
    """What was not kept is a tail; two kept tokens of one path are one."""
    folder, tokenizer, model = captured
    write(tmp_path / "few", tokenizer, LiveTeacher(model), k=4)
    source, windows = open_paths((tmp_path / "few", tokenizer, model), paths=9)
    sparse = source.targets(windows.rows([0, 1])).patch_tokens
    used = (sparse.ids_BTK >= 0).sum(-1)
    assert 0 < int(used.max()) <= 4
    mass = torch.cat((sparse.log_probs_BTK, sparse.tail_log_prob_BT.unsqueeze(-1)), -1).logsumexp(-1)
    torch.testing.assert_close(mass, torch.zeros_like(mass), atol=1e-5, rtol=0)
    assert bool((sparse.tail_log_prob_BT[used == 0] == 0).all())


def test_what_does_not_fit_is_refused(captured, tmp_path):
    folder, tokenizer, model = captured
    byte_tokenizer = trie_pairs.byte_tokenizer(tokenizer)
    windows = open_windows(folder, byte_tokenizer)
    with pytest.raises(StoreError, match="read as bytes"):
        StoredTriePaths(StoreWindows(folder), tokenizer=tokenizer, byte_tokenizer=byte_tokenizer)
    with pytest.raises(StoreError, match="another tokenizer"):
        StoredTriePaths(windows, tokenizer=trie_pairs.with_spaces(), byte_tokenizer=byte_tokenizer)
    with pytest.raises(VocabularyError, match="the rule space"):
        StoredTriePaths(windows, tokenizer=tokenizer, byte_tokenizer=ByteTokenizer("space"))
    source, _ = open_paths(captured)
    with pytest.raises(TeacherError, match="logits"):
        source.prepare(Wanted(aligned=True))
    batch = windows.rows([0])
    with pytest.raises(StoreError, match="not of this store"):
        source.targets(Batch(batch.input_ids_BT, batch.loss_mask_BT))
    with pytest.raises(VocabularyError, match="another tokenizer"):
        source.targets(Batch(batch.input_ids_BT.roll(1), batch.loss_mask_BT, keys=batch.keys))
    write(tmp_path / "drawn", tokenizer, LiveTeacher(model, entries=Sampled(5)), k=5, sampled=True)
    with pytest.raises(StoreError, match="random draws"):
        open_paths((tmp_path / "drawn", tokenizer, model))


def test_the_rows_are_patches_of_the_captured_tokens(captured):
    """The premise: the byte tokenizer writes a row's text as the row's tokens."""
    _, windows = open_paths(captured)
    for number in range(len(windows)):
        ids = windows.rows([number]).input_ids_BT[0]
        assert int((ids == EOP).sum()) >= int((windows.store.row(number).token_bytes > 0).sum())
