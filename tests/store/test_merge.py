import numpy as np
import pytest
from tests.store.small_store import SmallTeacher, files_of, make_batches, make_store

from limbeck.core.errors import StoreError
from limbeck.store.merge import merge_stores
from limbeck.store.store import TargetStore
from limbeck.store.verify import verify_store


def test_each_row_once_in_the_order_given(tmp_path):
    batches = make_batches(6)
    make_store(tmp_path / "a", batches[:4])
    make_store(tmp_path / "b", batches[2:])
    facts = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert (facts["rows"], facts["duplicates"], facts["shards"]) == (18, 6, 5)
    assert verify_store(tmp_path / "ab")["problems"] == []
    make_store(tmp_path / "whole", batches)
    merged, whole = TargetStore(tmp_path / "ab"), TargetStore(tmp_path / "whole")
    assert merged.all_keys().tolist() == whole.all_keys().tolist()
    for number in range(18):
        np.testing.assert_array_equal(merged.row(number).log_probs, whole.row(number).log_probs)
    shards = {name: content for name, content in files_of(tmp_path / "ab").items() if name.startswith("shards")}
    assert shards == {name: content for name, content in files_of(tmp_path / "whole").items() if name in shards}


def test_fidelity_of_the_whole(tmp_path):
    make_store(tmp_path / "a", make_batches(4), values="uint8", k=5, fidelity_tokens=10_000)
    make_store(tmp_path / "b", make_batches(2, seed=5), values="uint8", k=5, fidelity_tokens=10_000)
    merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    one, two, both = (TargetStore(tmp_path / name).manifest.fidelity for name in ("a", "b", "ab"))
    assert both["positions"] == one["positions"] + two["positions"]
    assert both["mean_kl_nats"] == pytest.approx((4 * one["mean_kl_nats"] + 2 * two["mean_kl_nats"]) / 6)
    assert both["max_kl_nats"] == max(one["max_kl_nats"], two["max_kl_nats"])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"teacher": {"name": "small", "fingerprint": "beef"}}, "teacher f00d against beef"),
        ({"tokenizer": "t1"}, "tokenizer t0 against t1"),
        ({"k": 7}, "codec"),
        ({"hidden": (1,)}, "hidden_width"),
    ],
)
def test_stores_that_differ(tmp_path, words, match):
    make_store(tmp_path / "a", make_batches(2))
    make_store(tmp_path / "b", make_batches(2, seed=5), source=SmallTeacher(), **words)
    with pytest.raises(StoreError, match=match):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert not (tmp_path / "ab").exists()


def test_into_a_new_folder_only(tmp_path):
    make_store(tmp_path / "a", make_batches(2))
    make_store(tmp_path / "b", make_batches(2, seed=5))
    with pytest.raises(StoreError, match="there is a store already"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "b")
    with pytest.raises(StoreError, match="two stores at least"):
        merge_stores([tmp_path / "a"], tmp_path / "c")
