import shutil

import numpy as np
import pytest
import torch
from tests.store import small_store
from tests.store.small_store import VOCABULARY, SmallTeacher, make_batches, make_store
from torch.testing import assert_close

from limbeck.core.errors import StoreError, TeacherError, VocabularyError
from limbeck.core.types import Batch
from limbeck.data.order import Mixture
from limbeck.data.windows import TokenWindows
from limbeck.store.manifest import Manifest
from limbeck.store.records import TextRecord, batch_keys
from limbeck.store.sink import RowSink
from limbeck.store.store import TargetStore
from limbeck.teachers.base import TargetSource, Wanted
from limbeck.teachers.stored import StoredTargets
from limbeck.teachers.stored_windows import StoreWindows, read_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "small"
    make_store(folder, hidden=(0, 2), hidden_values="float32")
    return folder


def stored(folder, wanted=None, **expected):
    source = StoredTargets(folder, **expected)
    source.prepare(wanted or Wanted())
    return source


def test_it_is_a_target_source(folder):
    source = stored(folder)
    assert isinstance(source, TargetSource)
    assert (source.name, source.vocabulary_size) == ("small (stored)", VOCABULARY)


def test_stored_targets_are_the_live_ones_exactly(folder):
    """k = V and lossless values: bit for bit what the capture computed from the same batches."""
    from limbeck.teachers.largest import keep_largest

    teacher = SmallTeacher()
    source = stored(folder, Wanted(hidden=(2,)))
    for batch in make_batches():
        found = source.targets(batch)
        said_BT = torch.zeros_like(batch.loss_mask_BT)
        said_BT[:, :-1] = batch.loss_mask_BT[:, 1:]
        logits_NV = teacher.hidden(batch)[said_BT] @ teacher.weight
        live = keep_largest(logits_NV, torch.zeros(len(logits_NV), dtype=torch.long), k=VOCABULARY)
        assert torch.equal(found.logits.ids_BTK[said_BT], live["ids"])
        assert torch.equal(found.logits.log_probs_BTK[said_BT], live["log_probs"])
        assert (found.logits.tail_log_prob_BT[said_BT] == -torch.inf).all()
        assert (found.logits.ids_BTK[~said_BT] == -1).all()
        assert (found.logits.tail_log_prob_BT[~said_BT] == 0).all()
        assert torch.equal(found.hidden[2], 2 * teacher.hidden(batch))
        assert set(found.hidden) == {2}
        assert found.logits.ids_BTK.dtype == torch.int64


def test_found_by_key_or_by_content_in_any_order(folder):
    source = stored(folder)
    batches = make_batches()
    ids = torch.cat([batches[4].input_ids_BT[[2]], batches[0].input_ids_BT[[1]]])
    mask = torch.cat([batches[4].loss_mask_BT[[2]], batches[0].loss_mask_BT[[1]]])
    keys = (batch_keys(batches[4])[2], batch_keys(batches[0])[1])
    for batch in (Batch(ids, mask), Batch(ids, mask, keys=keys)):
        found = source.targets(batch).logits.log_probs_BTK
        assert torch.equal(found[0], source.targets(batches[4]).logits.log_probs_BTK[2])
        assert torch.equal(found[1], source.targets(batches[0]).logits.log_probs_BTK[1])


def test_holes_are_named_before_training(folder):
    source = stored(folder)
    other = make_batches(3, seed=7)
    assert source.missing_keys(make_batches()) == []
    source.check(make_batches())
    expected = [key for batch in other for key in batch_keys(batch)]
    assert source.missing_keys([*make_batches(2), *other]) == expected
    with pytest.raises(StoreError, match=f"no targets for 9 of the rows asked for .{expected[0]}, .*, ...."):
        source.check([*make_batches(2), *other])
    with pytest.raises(StoreError, match="no targets for 3 of the rows"):
        source.targets(other[0])


def test_the_same_ids_in_other_documents_are_another_row(folder):
    batch = make_batches()[1]
    with pytest.raises(StoreError, match="no targets for 3"):
        stored(folder).targets(Batch(batch.input_ids_BT, batch.loss_mask_BT))


def test_rows_of_other_ids_under_a_stored_key_are_refused(folder):
    batch = make_batches()[0]
    other = Batch((batch.input_ids_BT + 1) % VOCABULARY, batch.loss_mask_BT, keys=tuple(batch_keys(batch)))
    with pytest.raises(VocabularyError, match="other token ids"):
        stored(folder).targets(other)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"expected_tokenizer": "t9"}, r"another tokenizer: t0 \(small\), where t9 is expected"),
        ({"expected_vocabulary_size": 64}, r"another vocabulary size: 50 \(small\), where 64"),
        ({"expected_teacher": "beef"}, r"another teacher: f00d \(small\), where beef"),
    ],
)
def test_a_store_of_something_else(folder, expected, words):
    with pytest.raises(StoreError, match=words):
        StoredTargets(folder, **expected)
    StoredTargets(folder, expected_tokenizer="t0", expected_vocabulary_size=50, expected_teacher="f00d")


def test_what_was_not_captured(folder):
    with pytest.raises(StoreError, match=r"layers \[1, 3\] are wanted, but the store has layers \[0, 2\]"):
        stored(folder, Wanted(hidden=(1, 2, 3)))
    with pytest.raises(TeacherError, match="features"):
        stored(folder, Wanted(features=("attention",)))
    with pytest.raises(TeacherError, match="aligned"):
        stored(folder, Wanted(aligned=True))


def test_hidden_states_alone(folder):
    found = stored(folder, Wanted(logits=False, hidden=(0,))).targets(make_batches()[3])
    assert found.logits is None
    assert found.hidden[0].shape == (3, 13, 8)


def test_log_probability_of_the_next_token(folder):
    source = stored(folder, Wanted(features=("next_log_prob",)))
    batch = make_batches()[3]
    found = source.targets(batch).features["next_log_prob"][:, :-1]
    mask = batch.loss_mask_BT[:, 1:]
    expected = SmallTeacher().log_probs(batch)[:, :-1].gather(-1, batch.input_ids_BT[:, 1:, None])[..., 0]
    assert_close(found[mask], expected[mask], rtol=2**-10, atol=1e-5)
    assert found[~mask].isnan().all()


def test_damage_is_found_when_it_is_met(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "s")
    shard = copy / "shards" / "00004.parquet"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    source = StoredTargets(copy)
    with pytest.raises(StoreError, match="00004.parquet: its checksum"):
        source.check(make_batches())
    with pytest.raises(StoreError, match="00004.parquet: its checksum"):
        source.targets(make_batches()[5])


def test_rows_of_different_widths_in_one_batch(tmp_path):
    """With a share of the mass to keep, a sure position keeps few entries and an unsure one many."""
    make_store(tmp_path / "s", k=20, values="uint8", mass=0.5, source=SmallTeacher(scale=0.6))
    store = TargetStore(tmp_path / "s")
    assert len({store.row(number).ids.shape[1] for number in range(18)}) > 1
    for batch in make_batches():
        found = stored(store).targets(batch).logits
        used = found.ids_BTK >= 0
        assert used.any(-1)[:, :-1].equal(batch.loss_mask_BT[:, 1:])
        kept = torch.where(used, found.log_probs_BTK.exp(), 0).sum(-1)
        assert_close(kept + found.tail_log_prob_BT.exp(), torch.ones(3, 13), atol=2e-3, rtol=0)
        assert (kept[used.any(-1) & (used.sum(-1) < 20)] > 0.49).all()


def token_windows(*, cross_documents=False):
    chance = np.random.default_rng(3)
    tokens = chance.integers(0, VOCABULARY, 11 * 13 + 5).astype(np.int32)
    starts = np.array([0, 5, 13, 30, 31, 60, 100])
    return TokenWindows(tokens, starts, context_tokens=13, cross_documents=cross_documents)


@pytest.mark.parametrize("cross_documents", [False, True])
def test_windows_of_a_store_are_the_windows_that_were_captured(tmp_path, cross_documents):
    captured = token_windows(cross_documents=cross_documents)
    make_store(tmp_path / "s", [captured.rows(range(low, min(low + 4, 11))) for low in range(0, 11, 4)])
    windows = StoreWindows(tmp_path / "s")
    assert (len(windows), windows.context_tokens) == (11, 13)
    for indices in ([0], [1, 2], [10, 3, 7], list(range(11))):
        one, two = captured.rows(indices), windows.rows(indices)
        for name in ("input_ids_BT", "loss_mask_BT", "document_ids_BT", "position_ids_BT"):
            a, b = getattr(one, name), getattr(two, name)
            assert (a is None) == (b is None), name
            assert a is None or torch.equal(a, b), name
        assert list(two.keys) == batch_keys(one)


def test_windows_can_be_mixed_and_looked_up(tmp_path):
    captured = token_windows()
    make_store(tmp_path / "s", [captured.rows([index]) for index in range(11)])
    store = TargetStore(tmp_path / "s")
    mixed = Mixture([StoreWindows(store), StoreWindows(store)], weights=[1.0, 1.0], seed=0).batch(3, 8)
    assert len(mixed.keys) == 8
    assert stored(store).targets(mixed).logits.ids_BTK.shape == (8, 13, VOCABULARY)


def test_a_shorter_context_is_refused(folder):
    with pytest.raises(StoreError, match="rows have 13 tokens, and data.context_tokens is 8"):
        StoreWindows(folder, context_tokens=8)
    padded = StoreWindows(folder, context_tokens=20).rows([0, 3])
    assert padded.input_ids_BT.shape == (2, 20)
    assert not padded.loss_mask_BT[:, 13:].any()
    assert stored(folder).targets(padded).logits.ids_BTK.shape == (2, 20, VOCABULARY)


def as_bytes(texts):
    return [list(text.encode()) for text in texts]


def test_the_text_in_another_tokenizers_ids(tmp_path):
    """Token 0 is special (no bytes), so that it closes a document; the others are one to three letters."""
    ids = torch.tensor([[1, 2, 3, 0, 4, 5, 6, 7]])
    begins = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    mask = torch.tensor([[False, True, True, True, False, True, True, True]])
    make_store(tmp_path / "s", [Batch(ids, mask, begins, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))])
    texts = [b"".join(small_store.TOKEN_BYTES[token] for token in part) for part in ([1, 2, 3], [4, 5, 6, 7])]
    batch = StoreWindows(tmp_path / "s", encode=as_bytes, end_token=0, padding_token=9, context_tokens=20).rows([0])
    size = len(texts[0]) + 1 + len(texts[1])
    expected = [*texts[0], 0, *texts[1], *[9] * (20 - size)]
    assert batch.input_ids_BT[0].tolist() == expected
    scored = [False, *[True] * len(texts[0]), False, *[True] * (len(texts[1]) - 1), *[False] * (20 - size)]
    assert batch.loss_mask_BT[0].tolist() == scored
    second = len(texts[0]) + 1
    assert batch.document_ids_BT[0].tolist() == [0] * second + [1] * (20 - second)
    assert batch.position_ids_BT[0].tolist() == [*range(second), *range(20 - second)]
    assert list(batch.keys) == TargetStore(tmp_path / "s").all_keys().astype(str).tolist()
    cut = StoreWindows(tmp_path / "s", encode=as_bytes, end_token=0, context_tokens=4).rows([0])
    assert cut.input_ids_BT[0].tolist() == expected[:4]
    assert cut.document_ids_BT is None


def test_unscored_text_stays_unscored_in_other_ids(tmp_path):
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[False, False, False, True, True, False]])
    make_store(tmp_path / "s", [Batch(ids, mask)])
    batch = StoreWindows(tmp_path / "s", encode=as_bytes, context_tokens=16).rows([0])
    prompt, answer, rest = (
        b"".join(small_store.TOKEN_BYTES[token] for token in part) for part in ([1, 2, 3], [4, 5], [6])
    )
    assert bytes(batch.input_ids_BT[0].tolist()[: len(prompt + answer + rest)]) == prompt + answer + rest
    scored = [*[False] * len(prompt), *[True] * len(answer), *[False] * (16 - len(prompt) - len(answer))]
    assert batch.loss_mask_BT[0].tolist() == scored


@pytest.mark.parametrize(
    ("data", "text", "skipped"),
    [
        (b"plain", "plain", 0),
        ("é".encode()[1:] + "naïve".encode(), "naïve", 1),
        ("🙂".encode()[1:] + b"x" + "🙂".encode()[:3], "x", 3),
        (b"a\xffb", "a\ufffdb", 0),
        ("日本".encode()[:-1], "日", 0),
        (b"", "", 0),
        ("🙂".encode()[1:], "", 3),
    ],
)
def test_text_cut_inside_a_character(data, text, skipped):
    assert read_bytes(data) == (text, skipped)


def test_a_store_without_text_has_one_tokenizer(tmp_path):
    make_store(tmp_path / "s", token_bytes=None)
    assert len(StoreWindows(tmp_path / "s")) == 18
    with pytest.raises(StoreError, match="keeps no text"):
        StoreWindows(tmp_path / "s", encode=as_bytes)


def test_prompts_and_completions(tmp_path):
    sink = RowSink(tmp_path / "s", Manifest("text", {"name": "closed", "fingerprint": None}, rows_per_shard=4))
    records = [TextRecord("Two?", "2"), TextRecord("", "Alone."), TextRecord("A long question", "and answer")]
    for record in records:
        sink(record)
    sink.finish()
    windows = StoreWindows(tmp_path / "s", encode=as_bytes, end_token=1, padding_token=0, context_tokens=12)
    batch = windows.rows([0, 1, 2])
    assert batch.input_ids_BT[0].tolist() == [*b"Two?2", 1, *[0] * 6]
    assert batch.loss_mask_BT[0].tolist() == [False] * 4 + [True] * 2 + [False] * 6
    assert batch.loss_mask_BT[1].tolist() == [False] + [True] * 6 + [False] * 5
    assert not batch.loss_mask_BT[2].any()
    assert batch.keys == tuple(record.key for record in records)
    with pytest.raises(StoreError, match="needs a tokenizer and a context length"):
        StoreWindows(tmp_path / "s")
    with pytest.raises(StoreError, match="holds texts, not targets"):
        StoredTargets(tmp_path / "s")
