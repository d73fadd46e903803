import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.core.errors import StoreError
from limbeck.store.distillkit import decode_distillkit, encode_distillkit, encode_legacy
from limbeck.store.distillkit_rows import convert_distillkit
from limbeck.store.distillkit_settings import DistillKitSettings, LegacySettings
from limbeck.store.store import TargetStore
from limbeck.store.verify import verify_store

V, K, T = 300, 16, 12
SETTINGS = DistillKitSettings(V, K, 8, "float32", (0, 1, "sqrt"))


def make_rows(count=5, *, shift=0, seed=0):
    """Ids [count, T], kept ids and log-probabilities [count, T, K]; the token at t + 1 + shift is always the likeliest of t."""
    chance = np.random.default_rng(seed)
    ids = chance.integers(0, V, (count, T))
    logits = chance.normal(size=(count, T, V)).astype(np.float32)
    target = np.roll(ids, -1 - shift, axis=1)
    np.put_along_axis(logits, target[..., None], 8.0, axis=-1)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = np.argsort(-log_probs, axis=-1)[..., :K]
    return ids, kept, np.take_along_axis(log_probs, kept, axis=-1)


def write(folder, ids, kept, log_probs, *, positions=T, settings=SETTINGS, **extra):
    """Two files as DistillKit lays them out, and the settings beside them; returns what each row was encoded to."""
    folder.mkdir(exist_ok=True)
    encode = encode_distillkit if isinstance(settings, DistillKitSettings) else encode_legacy
    encoded = [encode(k[:positions], p[:positions], settings=settings) for k, p in zip(kept, log_probs, strict=True)]
    rows = [
        {"input_ids": list(row_ids)}
        | {name: [list(position) for position in column] for name, column in columns.items()}
        | {name: list(column[number]) for name, column in extra.items()}
        for number, (row_ids, columns) in enumerate(zip(ids, encoded, strict=True))
    ]
    for number, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"data_{number}.parquet")
    words = asdict(settings) | ({"residual_bins": []} if encode is encode_distillkit else {})
    (folder / "compression_config.json").write_text(json.dumps(words))
    return encoded


@pytest.mark.parametrize("positions", [T, T - 1])
def test_targets_as_the_codec_decodes_them(tmp_path, positions):
    ids, kept, log_probs = make_rows()
    encoded = write(tmp_path / "dk", ids, kept, log_probs, positions=positions)
    facts = convert_distillkit(tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer="t", values="float32")
    assert facts["rows"] == 5
    assert facts["next_token_kept"] == 1.0
    assert verify_store(tmp_path / "s")["problems"] == []
    store = TargetStore(tmp_path / "s")
    for number in range(5):
        row = store.row(number)
        expected = decode_distillkit(*encoded[number].values(), settings=SETTINGS)
        np.testing.assert_array_equal(row.input_ids, ids[number])
        np.testing.assert_array_equal(row.ids[:-1], expected.ids[: T - 1])
        np.testing.assert_array_equal(row.log_probs[:-1], expected.log_probs[: T - 1])
        np.testing.assert_array_equal(row.tail[:-1], expected.tail_log_prob[: T - 1])


def test_the_legacy_codec(tmp_path):
    settings = LegacySettings(K, 8, 3, V)
    ids, kept, log_probs = make_rows()
    write(tmp_path / "dk", ids, kept, log_probs, settings=settings)
    facts = convert_distillkit(tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer=None)
    assert (facts["rows"], facts["next_token_kept"]) == (5, 1.0)
    row = TargetStore(tmp_path / "s").row(0)
    np.testing.assert_array_equal(row.ids[:-1, 0], ids[0, 1:])


def test_packed_rows(tmp_path):
    ids, kept, log_probs = make_rows()
    segments = np.tile([1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0], (5, 1))
    labels = ids.copy()
    labels[:, 6] = -100
    write(tmp_path / "dk", ids, kept, log_probs, attention_mask=segments, labels=labels)
    convert_distillkit(tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer="t")
    row = TargetStore(tmp_path / "s").row(3)
    assert row.document_starts == [4, 9]
    assert np.flatnonzero(row.scored).tolist() == [1, 2, 3, 5, 7, 8]
    assert np.flatnonzero(row.ids[:, 0] >= 0).tolist() == [0, 1, 2, 4, 6, 7]


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_data_are_refused(tmp_path, shift):
    write(tmp_path / "dk", *make_rows(shift=shift))
    with pytest.raises(StoreError, match="These data are shifted"):
        convert_distillkit(tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer="t")
    assert not (tmp_path / "s").exists()


def test_settings_are_needed_and_must_fit(tmp_path):
    write(tmp_path / "dk", *make_rows())
    with pytest.raises(StoreError, match="data_0.parquet, row 0"):
        convert_distillkit(
            tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer="t",
            settings=DistillKitSettings(2 * V, K, 8, "float32", (0, 1, "sqrt")),
        )  # fmt: skip
    (tmp_path / "dk" / "compression_config.json").unlink()
    with pytest.raises(StoreError, match="cannot be read without its settings"):
        convert_distillkit(tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer="t")
    with pytest.raises(StoreError, match="no Parquet file"):
        convert_distillkit(tmp_path / "nothing", tmp_path / "s", teacher="big", tokenizer="t")


def test_settings_in_yaml(tmp_path):
    write(tmp_path / "dk", *make_rows())
    (tmp_path / "dk" / "compression_config.json").unlink()
    (tmp_path / "dk" / "compression_config.yaml").write_text(
        "d: 300\nk: 16\nexact_k: 8\nexact_dtype: float32\npolynomial_terms: [0, 1, sqrt]\nresidual_bins: []\n"
    )
    assert convert_distillkit(tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer="t")["rows"] == 5


def test_rows_of_other_lengths(tmp_path):
    ids, kept, log_probs = make_rows()
    write(tmp_path / "dk", ids, kept, log_probs, positions=T - 2)
    with pytest.raises(StoreError, match=r"data_0.parquet, row 0: 10 positions of targets for 12 tokens"):
        convert_distillkit(tmp_path / "dk", tmp_path / "s", teacher="big", tokenizer="t")
