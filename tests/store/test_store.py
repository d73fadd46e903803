import shutil

import numpy as np
import pytest
from tests.store import small_store
from tests.store.small_store import make_batches, make_store

from limbeck.core.errors import StoreError
from limbeck.store import store as module
from limbeck.store.records import batch_keys, batch_rows
from limbeck.store.store import TargetStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "small"
    make_store(folder, hidden=(1, 3))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_rows_in_the_order_of_the_text(folder):
    store = TargetStore(folder)
    records = [record for batch in make_batches() for record in batch_rows(batch)]
    assert len(store) == len(records) == 18
    for number in np.random.default_rng(0).permutation(18):
        row = store.row(int(number))
        np.testing.assert_array_equal(row.input_ids, records[number].input_ids)
        assert row.document_starts == records[number].document_starts
        np.testing.assert_array_equal(row.scored, records[number].scored)


def test_rows_are_found_by_key(folder):
    store = TargetStore(folder)
    keys = [key for batch in make_batches() for key in batch_keys(batch)]
    assert store.find(keys).tolist() == list(range(18))
    assert store.find([keys[3], "0" * 32, "f" * 32, "", keys[3] + "0", "é", keys[0]]).tolist() == [
        3,
        -1,
        -1,
        -1,
        -1,
        -1,
        0,
    ]
    assert store.find([]).tolist() == []


def test_targets_and_hidden_states_only_where_asked_for(folder):
    store = TargetStore(folder)
    batch = make_batches()[0]
    teacher = small_store.SmallTeacher()
    row = store.row(2, layers=(3,))
    np.testing.assert_allclose(row.hidden[3], 3 * teacher.hidden(batch)[2], rtol=1e-3)
    assert list(row.hidden) == [3]
    bare = store.row(2, targets=False)
    assert bare.ids is None
    assert not bare.hidden


def test_what_was_read_stays_within_the_cache(folder, monkeypatch):
    monkeypatch.setattr(module, "_CACHE_BYTES", 1)
    monkeypatch.setattr(module, "_OPEN_SHARDS", 2)
    store, fresh = TargetStore(folder), TargetStore(folder)
    for number in (0, 17, 5, 0, 11, 17):
        np.testing.assert_array_equal(store.row(number).log_probs, fresh.row(number).log_probs)
        assert len(store._groups) == 1
        assert len(store._readers) <= 2
    assert store._cached_bytes == next(iter(store._groups.values())).nbytes


def test_out_of_range(folder):
    with pytest.raises(IndexError):
        TargetStore(folder).row(18)


def test_a_truncated_shard(copy):
    shard = copy / "shards" / "00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        StoreError, match=r"00002.parquet: \d+ bytes where the manifest says \d+: the shard is truncated"
    ):
        TargetStore(copy)


def test_a_missing_shard(copy):
    (copy / "shards" / "00001.parquet").unlink()
    with pytest.raises(StoreError, match=r"00001.parquet: the shard is missing \(a hole of 4 rows\)"):
        TargetStore(copy)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit(copy, place):
    shard = copy / "shards" / "00002.parquet"
    content = bytearray(shard.read_bytes())
    content[int(place * len(content))] ^= 4
    shard.write_bytes(content)
    store = TargetStore(copy)
    assert store.row(0).ids is not None
    for touch in (lambda: store.row(8), store.check, store.all_keys):
        with pytest.raises(StoreError, match=r"00002.parquet: its checksum"):
            touch()


def test_a_shard_of_another_store(copy, tmp_path):
    make_store(tmp_path / "other", make_batches(seed=9), hidden=(1, 3))
    shutil.copy(tmp_path / "other" / "shards" / "00000.parquet", copy / "shards" / "00000.parquet")
    with pytest.raises(StoreError, match=r"00000.parquet"):
        TargetStore(copy).check()


def test_an_unfinished_store(copy):
    (copy / "progress").mkdir()
    with pytest.raises(StoreError, match="capture was stopped before its end"):
        TargetStore(copy)


def test_datasets_reads_it(folder, tmp_path):
    import datasets

    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert rows.num_rows == 18
    assert rows[1]["input_ids"] == make_batches()[0].input_ids_BT[1].tolist()
    assert rows[0]["key"] == batch_keys(make_batches()[0])[0]
