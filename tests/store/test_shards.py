import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from limbeck.core.errors import StoreError
from limbeck.store.codec import CodecSettings
from limbeck.store.records import RowRecord, TextRecord
from limbeck.store.shards import RowFormat, ShardBuilder, row_columns

V = 20


def make_record(length=7, k=3, *, seed=0, scored=None, **changes):
    chance = np.random.default_rng(seed)
    logits = chance.normal(size=(length, V)).astype(np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-log_probs, axis=1)[:, :k]
    kept = np.take_along_axis(log_probs, ids, axis=1)
    words = {
        "input_ids": chance.integers(0, V, length), "document_starts": [3],
        "scored": [position not in (0, 3) for position in range(length)] if scored is None else scored,
        "ids": ids, "log_probs": kept, "tail": np.log1p(-np.exp(kept).sum(axis=1)),
        "next_log_prob": log_probs[:, 0], "text": b"abcdefg", "token_bytes": np.ones(length, dtype=np.int64),
        "hidden": {2: chance.normal(size=(length, 4)).astype(np.float32)},
    }  # fmt: skip
    return RowRecord(**(words | changes))


def make_form(**words):
    return RowFormat(CodecSettings(V, values="float32", k=3, **words), {2: 4}, "float32")


def through(form, record):
    builder = ShardBuilder(form)
    builder.add(record)
    table = pq.read_table(io.BytesIO(builder.to_bytes()))
    return form.decode(row_columns(table, 0), targets=True, layers=tuple(form.hidden_width))


@pytest.mark.parametrize("scored", [None, [False, False, False, True, True, False, True]])
def test_a_row_comes_back_at_scored_positions(scored):
    record = make_record(scored=scored)
    back = through(make_form(), record)
    said = np.append(np.asarray(record.scored)[1:], False)
    np.testing.assert_array_equal(back.input_ids, record.input_ids)
    np.testing.assert_array_equal(back.scored, record.scored)
    assert back.document_starts == record.document_starts
    assert (back.text, back.token_bytes.tolist()) == (b"abcdefg", [1] * 7)
    np.testing.assert_array_equal(back.ids[said], record.ids[said])
    np.testing.assert_array_equal(back.log_probs[said], record.log_probs[said])
    np.testing.assert_array_equal(back.tail[said], record.tail[said].astype(np.float32))
    np.testing.assert_array_equal(back.hidden[2], record.hidden[2])
    np.testing.assert_allclose(back.next_log_prob[said], record.next_log_prob[said], rtol=2**-10)
    assert back.key == record.key


def test_unscored_positions_say_nothing():
    back = through(make_form(), make_record())
    unsaid = [2, 6]
    assert (back.ids[unsaid] == -1).all()
    assert np.isneginf(back.log_probs[unsaid]).all()
    assert (back.tail[unsaid] == 0).all()
    assert np.isnan(back.next_log_prob[unsaid]).all()


def test_a_row_in_which_nothing_is_scored():
    back = through(make_form(), make_record(scored=[False] * 7))
    assert (back.ids == -1).all()
    assert (back.tail == 0).all()


def test_sampled_rows_keep_their_weights():
    record = make_record(weights=np.arange(21, dtype=np.float32).reshape(7, 3))
    back = through(make_form(sampled=True), record)
    np.testing.assert_array_equal(back.weights[[0, 1, 3]], record.weights[[0, 1, 3]])


def test_what_was_not_known_stays_unknown():
    back = through(make_form(), make_record(next_log_prob=None, text=None, token_bytes=None))
    assert back.next_log_prob is None
    assert back.text is None
    assert back.token_bytes is None


def test_same_rows_same_bytes():
    contents = []
    for _ in range(2):
        builder = ShardBuilder(make_form())
        for seed in range(5):
            builder.add(make_record(seed=seed))
        contents.append(builder.to_bytes())
    assert contents[0] == contents[1]
    assert (builder.tokens, builder.scored_tokens) == (35, 25)


def test_encoded_rows_are_counted_as_records_are():
    form, builder, again = make_form(), ShardBuilder(make_form()), ShardBuilder(make_form())
    for scored in (None, [True, False, False, True, True, False, True]):
        builder.add(make_record(scored=scored))
    table = pq.read_table(io.BytesIO(builder.to_bytes()))
    for place in range(2):
        again.add_encoded(row_columns(table, place))
    assert (again.tokens, again.scored_tokens) == (builder.tokens, builder.scored_tokens) == (14, 8)
    assert again.to_bytes() == builder.to_bytes()
    assert form.codec is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": np.array([0, 1, 2, 3, 4, 5, V])}, "vocabulary of 20"),
        ({"scored": [True]}, "same number"),
        ({"document_starts": [0]}, "document starts"),
        ({"document_starts": [7]}, "document starts"),
        ({"ids": None}, "without targets"),
        ({"hidden": {}}, "layer 2"),
        ({"weights": np.ones((7, 3))}, "sampled"),
    ],
)
def test_records_that_cannot_be(changes, words):
    with pytest.raises(StoreError, match=words):
        make_form().encode(make_record(**changes))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("target_gap_0", b"\xff" * 200, "gap"),
        ("target_count_0", b"\x09" * 5, "count"),
        ("target_tail_0", None, "tail"),
        ("input_ids", np.array([0, V], dtype=np.int32), "vocabulary"),
        ("input_ids", None, "token ids"),
        ("next_log_prob_0", b"\0", "next_log_prob"),
        ("document_starts", np.array([99], dtype=np.int32), "starts"),
        ("layer_2_hidden_0", b"", "hidden"),
    ],
)
def test_hostile_columns_are_refused(name, value, words):
    form = make_form()
    columns = form.encode(make_record())
    assert form.decode(columns, targets=True, layers=(2,)).ids is not None
    columns[name] = value
    with pytest.raises(StoreError, match=words):
        form.decode(columns, targets=True, layers=(2,))


def test_texts():
    form = RowFormat(None, {}, "float16")
    assert through(form, TextRecord("Why?", "Since…")) == TextRecord("Why?", "Since…")
    with pytest.raises(StoreError, match="store of texts"):
        form.encode(make_record())
    with pytest.raises(StoreError, match="store of targets"):
        make_form().encode(TextRecord("a", "b"))
