import math

import pytest
import torch
from tests.teachers import trie_pairs
from tests.teachers.trie_pairs import DOCUMENTS, PATCH_BYTES, symbol_rows

from limbeck.core.errors import TeacherError, TrainingError, VocabularyError
from limbeck.core.symbols import BOS, EOD, EOP, SYMBOLS
from limbeck.core.types import Batch, SparseTargets
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.token_bytes import read_token_bytes
from limbeck.store.codec import CodecSettings
from limbeck.teachers.base import Wanted
from limbeck.teachers.capture import CaptureSettings, capture
from limbeck.teachers.entries import Sampled, TopK
from limbeck.teachers.stored import StoredTargets
from limbeck.teachers.trie import TrieTeacher


@pytest.fixture(scope="module", params=["nested", "with_spaces"])
def pair(request):
    tokenizer = getattr(trie_pairs, request.param)()
    return trie_pairs.make_teacher(tokenizer), tokenizer, trie_pairs.byte_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def nested():
    tokenizer = trie_pairs.nested()
    return trie_pairs.make_teacher(tokenizer), tokenizer, trie_pairs.byte_tokenizer(tokenizer)


def open_teacher(pair, **options):
    teacher = TrieTeacher(*pair, **options)
    teacher.prepare(Wanted(aligned=bool(options.get("paths"))))
    return teacher


def probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def slow_conditional(probs, tokens, before, prefix):
    """What follows `prefix` in a patch of a token of which `before` stood in earlier patches (or nowhere)."""
    found = torch.zeros(SYMBOLS, dtype=torch.float64)
    if len(prefix) == PATCH_BYTES - 1:
        found[EOP] = 1
        return found
    for token, piece in enumerate(tokens.pieces):
        if token == tokens.end_id and not before and not prefix:
            found[EOD] += probs[token]
        elif piece and piece != before + prefix and piece.startswith(before + prefix):
            found[piece[len(before + prefix)]] += probs[token]
        elif piece and piece == before + prefix and prefix:
            found[EOP] += probs[token]
    return found / found.sum()


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def slow_document(model, tokenizer, document):
    """The distribution after every symbol of a document (the first is after BOS), token by token, and the symbols."""
    tokens = read_token_bytes(tokenizer)
    opening = [tokenizer.bos_token_id] if tokenizer.bos_token else [tokenizer.eos_token_id]
    read, symbols, found = list(opening), [], []
    for number, token in enumerate([*tokens_of(tokenizer, document), tokens.end_id]):
        probs = probabilities(model, read)
        read.append(token)
        if token == tokens.end_id:
            symbols.append(EOD)
            found.append(slow_conditional(probs, tokens, b"", b""))
            continue
        piece = tokens.pieces[token]
        lead = b" " if number == 0 and tokens.adds_space else b""
        assert piece.startswith(lead)
        for low in range(len(lead), len(piece), PATCH_BYTES - 1):
            part = piece[low : low + PATCH_BYTES - 1]
            found += [slow_conditional(probs, tokens, piece[:low], part[:n]) for n in range(len(part) + 1)]
            symbols += [*part, EOP]
    return symbols, torch.stack(found)


def test_every_symbol_of_a_document_against_a_slow_reading(pair):
    model, tokenizer, _ = pair
    teacher = open_teacher(pair)
    for document in DOCUMENTS:
        symbols, expected = slow_document(model, tokenizer, document)
        ids = torch.tensor([[BOS, *symbols]])
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        found = teacher.targets(Batch(ids, mask))
        assert found.known_BT[0].tolist() == [True] * len(symbols) + [False]
        logits = found.logits.head(found.logits.hidden_BTD)[0, :-1]
        torch.testing.assert_close(logits.exp(), expected, atol=1e-12, rtol=1e-10)
        assert logits.dtype == torch.float64


def test_the_byte_tokenizer_cuts_where_the_slow_reading_does(pair):
    model, tokenizer, byte_tokenizer = pair
    for document in DOCUMENTS:
        symbols, _ = slow_document(model, tokenizer, document)
        assert [*byte_tokenizer(document, add_special_tokens=False)["input_ids"], EOD] == symbols


def test_the_end_of_the_text_at_the_root(nested):
    """After a closed patch, EOD has the probability of the end-of-text token among tokens with symbols."""
    model, tokenizer, byte_tokenizer = nested
    symbols = byte_tokenizer("abc", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[BOS, *symbols, EOD]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = open_teacher(nested).targets(Batch(ids, mask))
    end = tokenizer.eos_token_id
    probs = probabilities(model, [end, *tokens_of(tokenizer, "abc")])
    spoken = probs[: len(read_token_bytes(tokenizer).pieces)].sum()
    torch.testing.assert_close(found.logits.hidden_BTD[0, -2, EOD].exp(), probs[end] / spoken, atol=1e-13, rtol=0)


def test_packed_documents_are_read_apart(pair):
    """Each document in a row of several as it would be alone, but for its first symbol."""
    teacher, byte_tokenizer = open_teacher(pair), pair[2]
    packed = symbol_rows(byte_tokenizer, DOCUMENTS, 200)
    found = teacher.targets(packed)
    place = 0
    for number, document in enumerate(DOCUMENTS):
        alone = symbol_rows(byte_tokenizer, [document], 200, packed=False)
        length = int(alone.loss_mask_BT.sum()) + 1
        ids = torch.cat((torch.tensor([[BOS]]), alone.input_ids_BT[:, :length]), dim=1)
        expected = teacher.targets(Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
        assert found.known_BT[0, place : place + length - 1].all() or number == 0
        if number:
            mine = found.logits.hidden_BTD[0, place : place + length - 1]
            torch.testing.assert_close(mine, expected.logits.hidden_BTD[0, 1:length], atol=1e-12, rtol=1e-10)
            assert not found.known_BT[0, place - 1]
        place += length


def test_windows_cut_anywhere(nested):
    """Nothing is said of a first patch that may be cut; everything else is one distribution."""
    teacher, byte_tokenizer = open_teacher(nested), nested[2]
    batch = symbol_rows(byte_tokenizer, DOCUMENTS, 13, packed=False)
    found = teacher.targets(batch)
    assert 0 < int(found.known_BT.sum()) < batch.target_count
    sums = found.logits.hidden_BTD.logsumexp(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)
    unknown = found.logits.hidden_BTD[~found.known_BT]
    torch.testing.assert_close(unknown, torch.full_like(unknown, -math.log(SYMBOLS)))


def slow_paths(probs, tokens, before, lead):
    """The probability of every content of a patch, given what of its token stood before it."""
    found = {}
    for token, piece in enumerate(tokens.pieces):
        if token == tokens.end_id and not before and not lead:
            found[(EOD,)] = found.get((EOD,), 0.0) + float(probs[token])
        elif piece and piece.startswith(before + lead) and len(piece) > len(before + lead):
            content = piece[len(before + lead) :][: PATCH_BYTES - 1]
            found[(*content, EOP)] = found.get((*content, EOP), 0.0) + float(probs[token])
    total = math.fsum(found.values())
    return {path: value / total for path, value in found.items()}


def content(trie, number):
    return tuple(symbol for symbol in trie.paths_CP[number].tolist() if symbol != 256)


def test_the_likeliest_patches_against_a_slow_reading(pair):
    model, tokenizer, _ = pair
    tokens = read_token_bytes(tokenizer)
    teacher = open_teacher(pair, paths=6)
    symbols, _ = slow_document(model, tokenizer, DOCUMENTS[1])
    ids = torch.tensor([[BOS, *symbols]])
    sparse = teacher.targets(Batch(ids, torch.ones_like(ids, dtype=torch.bool))).patch_tokens
    begins = [t for t in range(len(symbols)) if t == 0 or symbols[t - 1] == EOP]
    assert (sparse.ids_BTK[0] >= 0).any(-1).nonzero().flatten().tolist() == begins
    read = [tokenizer.bos_token_id if tokenizer.bos_token else tokenizer.eos_token_id]
    place = 0
    for number, token in enumerate(tokens_of(tokenizer, DOCUMENTS[1])):
        probs, piece = probabilities(model, read), tokens.pieces[token]
        read.append(token)
        lead = b" " if number == 0 and tokens.adds_space else b""
        for low in range(len(lead), len(piece), PATCH_BYTES - 1):
            expected = slow_paths(probs, tokens, piece[len(lead) : low], lead)
            ranked = sorted(expected, key=lambda path: -expected[path])
            t = begins[place]
            place += 1
            assert [content(teacher.trie, path) for path in sparse.ids_BTK[0, t].tolist() if path >= 0] == ranked[:6]
            wanted = torch.tensor([expected[path] for path in ranked[:6]], dtype=torch.float64)
            torch.testing.assert_close(sparse.log_probs_BTK[0, t, : len(wanted)].exp(), wanted, atol=1e-12, rtol=1e-10)
            rest = math.fsum(expected[path] for path in ranked[6:])
            torch.testing.assert_close(float(sparse.tail_log_prob_BT[0, t].exp()), rest, atol=1e-12, rtol=1e-10)
    assert any(len(tokens.pieces[token] or b"") > PATCH_BYTES - 1 for token in read) or tokens.adds_space


def test_chunks_of_patches_change_nothing(nested, monkeypatch):
    batch = symbol_rows(nested[2], DOCUMENTS, 40)
    teacher = open_teacher(nested, paths=4)
    whole = teacher.targets(batch)
    monkeypatch.setattr("limbeck.teachers.trie._WEIGHT_BYTES", {"cpu": 1})
    parts = teacher.targets(batch)
    torch.testing.assert_close(parts.logits.hidden_BTD, whole.logits.hidden_BTD, atol=1e-12, rtol=1e-12)
    assert torch.equal(parts.known_BT, whole.known_BT)
    assert torch.equal(parts.patch_tokens.ids_BTK, whole.patch_tokens.ids_BTK)


def test_what_the_teacher_all_but_never_says_is_not_known(nested):
    model, tokenizer, byte_tokenizer = nested
    symbols = byte_tokenizer("bc", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[BOS, *symbols]])
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    head = model.get_output_embeddings()
    kept = head.weight.detach().clone()
    teacher = open_teacher(nested)
    assert teacher.targets(batch).known_BT[0].tolist() == [True, True, True, False]
    try:
        with torch.no_grad():
            begins_with_b = [t for t, p in enumerate(read_token_bytes(tokenizer).pieces) if p and p.startswith(b"b")]
            bias = torch.zeros(len(head.weight), dtype=torch.float64)
            bias[begins_with_b] = -40.0
            head.bias = torch.nn.Parameter(bias)
        assert teacher.targets(batch).known_BT[0].tolist() == [True, False, False, False]
    finally:
        head.bias = None
        assert torch.equal(head.weight, kept)


def test_a_store_of_symbols_is_read_back(nested, tmp_path):
    """Captured and read back by the store as it is: the same targets, unknown positions all tail."""
    batch = symbol_rows(nested[2], DOCUMENTS, 24)
    teacher = open_teacher(nested, entries=TopK(12))
    live = teacher.targets(batch)
    assert isinstance(live.logits, SparseTargets)
    settings = CaptureSettings(CodecSettings(SYMBOLS, values="float32", k=12), fidelity_tokens=0)
    capture(
        teacher,
        [batch],
        tmp_path / "s",
        settings=settings,
        teacher={"name": "t", "fingerprint": "f"},
        tokenizer="bytes",
    )
    stored = StoredTargets(tmp_path / "s").targets(batch).logits
    scored = torch.zeros_like(batch.loss_mask_BT)
    scored[:, :-1] = batch.loss_mask_BT[:, 1:]
    torch.testing.assert_close(stored.tail_log_prob_BT[scored], live.logits.tail_log_prob_BT[scored].float())
    full = torch.full((*scored.shape, SYMBOLS + 1), -math.inf)
    mine, theirs = (
        full.scatter(-1, torch.where(t.ids_BTK < 0, SYMBOLS, t.ids_BTK), t.log_probs_BTK.float())
        for t in (live.logits, stored)
    )
    torch.testing.assert_close(theirs[scored], mine[scored], atol=1e-6, rtol=1e-6)
    unknown = scored & ~live.known_BT
    assert bool(unknown.any())
    assert bool((stored.ids_BTK[unknown] == -1).all())
    assert bool((stored.tail_log_prob_BT[unknown] == 0).all())


def test_top_k_of_symbols_sums_to_one(nested):
    live = open_teacher(nested, entries=TopK(3)).targets(symbol_rows(nested[2], DOCUMENTS, 24)).logits
    mass = torch.cat((live.log_probs_BTK, live.tail_log_prob_BT.unsqueeze(-1)), dim=-1).logsumexp(-1)
    torch.testing.assert_close(mass, torch.zeros_like(mass), atol=1e-12, rtol=0)


def test_a_teacher_that_gives_no_numbers(nested):
    model, tokenizer, byte_tokenizer = nested
    broken = trie_pairs.make_teacher(tokenizer)
    teacher = TrieTeacher(broken, tokenizer, byte_tokenizer, name="broken")
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(TrainingError, match="broken are not numbers"):
        teacher.targets(symbol_rows(byte_tokenizer, DOCUMENTS, 24))


def test_what_does_not_fit_is_refused(nested):
    model, tokenizer, _ = nested
    with pytest.raises(VocabularyError, match="the rule space"):
        TrieTeacher(model, tokenizer, ByteTokenizer("space"))
    with pytest.raises(VocabularyError, match="has another tokenizer"):
        TrieTeacher(model, tokenizer, trie_pairs.byte_tokenizer(trie_pairs.with_spaces()))
    with pytest.raises(VocabularyError, match="reads bytes in patches"):
        TrieTeacher(model, tokenizer, tokenizer)
    with pytest.raises(TeacherError, match="hidden"):
        TrieTeacher(*nested).prepare(Wanted(hidden=(1,)))
    with pytest.raises(TeacherError, match="aligned"):
        TrieTeacher(*nested).prepare(Wanted(aligned=True))
    with pytest.raises(TeacherError, match="random draws"):
        TrieTeacher(*nested, entries=Sampled(4))


def test_a_batch_of_which_nothing_is_known(nested):
    ids = torch.tensor([[97, 98, 97, 98]])
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    found = open_teacher(nested, paths=2).targets(batch)
    assert not found.known_BT.any()
    assert bool((found.patch_tokens.ids_BTK == -1).all())
