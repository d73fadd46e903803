"""DistillKit's two codecs: bytes by hand, a slow reader, sizes as published, Parquet files, and data that are not right."""

import math
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.core.errors import StoreError
from limbeck.store.distillkit import (
    decode_distillkit,
    decode_legacy,
    encode_distillkit,
    encode_legacy,
    read_distillkit,
)
from limbeck.store.distillkit_settings import DistillKitSettings, LegacySettings, ResidualBin

RECOMMENDED = {
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "delta_encoding": False,
}
BUDGET = {"k": 50, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"], "delta_encoding": False}
QWEN = {"k": 128, "exact_k": 32, "polynomial_terms": [0, 1, 2], "delta_encoding": True}
LEGACY = {"k": 128, "exact_k": 32, "polynomial_degree": 8}


def settings_of(words, d):
    return DistillKitSettings.from_json({"d": d, "residual_bins": [], **words})


def teacher_rows(n, k, vocabulary_size, seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, vocabulary_size)) * 2
    log_probs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    ids = np.argsort(-log_probs, axis=1)[:, :k]
    return ids, np.take_along_axis(log_probs, ids, axis=1)


@pytest.mark.parametrize(
    ("words", "d", "expected"),
    [(RECOMMENDED, 65_536, 312), (RECOMMENDED, 128_256, 328), (RECOMMENDED, 151_936, 344), (BUDGET, 65_536, 114),
     (BUDGET, 128_256, 121), (BUDGET, 151_936, 127), (QWEN, 65_536, 396), (QWEN, 129_280, 412), (QWEN, 151_936, 428)],
)  # fmt: skip
def test_bytes_per_token_are_those_of_the_format(words, d, expected):
    assert settings_of(words, d).bytes_per_token == expected


@pytest.mark.parametrize(("vocab_size", "expected"), [(65_536, 356), (128_256, 444), (151_936, 444)])
def test_legacy_bytes_per_token_are_those_of_the_format(vocab_size, expected):
    assert LegacySettings.from_json({**LEGACY, "vocab_size": vocab_size}).bytes_per_token == expected


def test_bytes_by_hand():
    # Vocabulary 10: four bits an id. Values -1 and -2 exact in float16; then -2.5 - t / 2 as a line in float32.
    settings = settings_of(
        {"k": 5, "exact_k": 2, "exact_dtype": "float16", "polynomial_terms": [0, 1], "delta_encoding": False}, 10
    )
    values = struct.pack("<ee", -1, -2) + struct.pack("<ff", -2.5, -0.5)
    indices = bytes([0x91, 0x05, 0x30])
    rows = decode_distillkit([list(values)], [list(indices)], settings=settings)
    assert rows.ids.tolist() == [[9, 1, 0, 5, 3]]
    np.testing.assert_array_equal(rows.log_probs, [[-1, -2, -2.5, -3, -3.5]])
    kept = sum(math.exp(x) for x in (-1, -2, -2.5, -3, -3.5))
    assert rows.tail_log_prob[0] == pytest.approx(math.log(1 - kept), rel=1e-6)
    written = encode_distillkit([[9, 1, 0, 5, 3]], [[-1, -2, -2.5, -3, -3.5]], settings=settings)
    assert written["bytepacked_indices"].tobytes() == indices
    assert written["compressed_logprobs"][0, :4].tobytes() == values[:4]
    np.testing.assert_allclose(written["compressed_logprobs"][0, 4:].copy().view("<f4"), [-2.5, -0.5], atol=1e-5)


def test_differences_and_residuals_by_hand():
    # First differences: -1, then -0.5 exact; then residuals (q - 4) * 0.25 with three bits: q = 3 and 2, so -0.25 and -0.5.
    bins = [{"scale_dtype": "float32", "element_bits": 3, "num_elements": 2}]
    settings = settings_of({"k": 4, "exact_k": 2, "residual_bins": bins}, 16)
    octets = struct.pack("<fff", -1, -0.5, 0.25) + bytes([0b011_010_00])
    rows = decode_distillkit([list(octets)], [[0x12, 0x34]], settings=settings)
    np.testing.assert_array_equal(rows.log_probs, [[-1, -1.5, -1.75, -2.25]])
    one_bit = [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 2}]
    settings = settings_of({"k": 4, "exact_k": 2, "residual_bins": one_bit, "delta_encoding": False}, 16)
    octets = struct.pack("<fff", -1, -1.5, 2) + bytes([0b0_0_000000])
    np.testing.assert_array_equal(
        decode_distillkit([list(octets)], [[0x12, 0x34]], settings=settings).log_probs, [[-1, -1.5, -2, -2]]
    )


def test_legacy_by_hand():
    # Vocabulary 300: nine bits, seven ids a word, the first lowest. -2 - 1 / (t + 1): -3, -2.5.
    settings = LegacySettings(k=8, exact_k=6, polynomial_degree=1, vocab_size=300)
    ids = [299, 0, 1, 2, 3, 4, 5, 6]
    first = sum(token << (9 * i) for i, token in enumerate(ids[:7]))
    exact = [-1.25, -2, -2.25, -2.25, -2.5, -2.5]
    rows = decode_legacy([[first, 6]], [exact], [[-2.0, -1.0]], settings=settings)
    # Descending, whatever the curve says; equals keep their order.
    assert rows.ids.tolist() == [[299, 0, 1, 2, 3, 4, 6, 5]]
    np.testing.assert_array_equal(rows.log_probs, [[-1.25, -2, -2.25, -2.25, -2.5, -2.5, -2.5, -3]])
    signed = np.array([[first, 6]], dtype=np.uint64).view(np.int64)
    assert decode_legacy(signed, [exact], [[-2.0, -1.0]], settings=settings).ids.tolist() == rows.ids.tolist()
    written = encode_legacy([ids], [[*exact, -3, -2.5]], settings=settings)
    assert written["packed_indices"].tolist() == [[first, 6]]
    np.testing.assert_allclose(written["coeffs"], [[-2, -1]], atol=1e-5)


def slow_values(octets, settings):
    """One position's values, number by number in float64, from the description of the format."""
    form = {"float16": "<e", "float32": "<f", "float64": "<d"}
    at = 0

    def take(kind):
        nonlocal at
        width = 2 if kind == "bfloat16" else struct.calcsize(form[kind])
        piece = bytes(octets[at : at + width])
        at += width
        return struct.unpack("<f", b"\0\0" + piece)[0] if kind == "bfloat16" else struct.unpack(form[kind], piece)[0]

    values = [take(settings.exact_dtype) for _ in range(settings.exact_k)]
    coefficients = [take(settings.term_dtype) for _ in settings.polynomial_terms]
    rest = []
    for item in settings.residual_bins:
        scale = take(item.scale_dtype)
        bits = "".join(f"{byte:08b}" for byte in octets[at : at + item.packed_bytes])
        at += item.packed_bytes
        for i in range(item.num_elements):
            step = int(bits[i * item.element_bits : (i + 1) * item.element_bits], 2)
            rest.append((step - 2 ** (item.element_bits - 1)) * scale)
    left = settings.k - settings.exact_k
    rest += [0.0] * (left - len(rest))
    for rank in range(left):
        t = rank / (left - 1) if settings.normalize_t else rank
        for term, coefficient in zip(settings.polynomial_terms, coefficients):
            power = {"sqrt": math.sqrt, "exp": math.exp}.get(term, lambda x, term=term: x**term)
            rest[rank] += coefficient * power(t)
    values += rest
    return np.cumsum(values) if settings.delta_encoding else np.array(values)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "words",
    [
        {"k": 20, "exact_k": 4, "polynomial_terms": [0, 1, "exp"], "normalize_t": True, "delta_encoding": False,
         "residual_bins": [{"scale_dtype": "float16", "element_bits": 5, "num_elements": 9},
                           {"scale_dtype": "bfloat16", "element_bits": 11, "num_elements": 3}]},
        {"k": 20, "exact_k": 3, "polynomial_terms": [0, 2, "sqrt"], "delta_encoding": True},
        {"k": 7, "exact_k": 0, "residual_bins": [{"scale_dtype": "float64", "element_bits": 9, "num_elements": 7}]},
        {"k": 5, "exact_k": 5, "exact_dtype": "float64", "delta_encoding": False},
    ],
)  # fmt: skip
def test_a_slow_reader_of_the_format_agrees(words, seed):
    settings = settings_of(words, 1000)
    ids, log_probs = teacher_rows(6, settings.k, 1000, seed)
    written = encode_distillkit(ids, log_probs, settings=settings)
    assert written["compressed_logprobs"].shape == (6, settings.value_bytes)
    assert written["bytepacked_indices"].shape == (6, settings.index_bytes)
    rows = decode_distillkit(**written, settings=settings)
    for row in range(6):
        bits = "".join(f"{byte:08b}" for byte in written["bytepacked_indices"][row])
        tokens = [int(bits[i * 10 : (i + 1) * 10], 2) for i in range(settings.k)]
        assert tokens == ids[row].tolist()
        expected = dict(zip(tokens, slow_values(written["compressed_logprobs"][row], settings)))
        for token, log_prob in zip(rows.ids[row], rows.log_probs[row]):
            assert log_prob == pytest.approx(expected[int(token)], abs=3e-5)


def test_bfloat16_rounds_where_torch_rounds():
    settings = settings_of({"k": 3, "exact_k": 3, "exact_dtype": "bfloat16"}, 1000)
    rows = decode_distillkit(
        **encode_distillkit([[1, 2, 3]], [[-2.0, -2.01, -2.03]], settings=settings), settings=settings
    )
    # The differences -0.01 and -0.02 survive bfloat16; their sums are rounded to its steps of 1 / 64 on the way out.
    assert rows.log_probs.tolist() == [[-2.0, -2.015625, -2.03125]]


def test_the_fit_is_the_best_in_least_squares():
    settings = settings_of({**RECOMMENDED, "exact_dtype": "float32"}, 500)
    ids, log_probs = teacher_rows(20, 128, 500)
    written = encode_distillkit(ids, log_probs, settings=settings)
    t = np.arange(112.0)
    basis = np.stack([t**0, t, t**2, t**3, t**4, np.sqrt(t)], axis=1)
    expected = np.linalg.lstsq(basis, log_probs[:, 16:].T.astype(np.float64), rcond=None)[0].T
    found = written["compressed_logprobs"][:, 64:].copy().view("<f4").astype(np.float64)
    np.testing.assert_allclose(found @ basis.T, expected @ basis.T, atol=1e-5)


def test_mass_beyond_one_is_normalised_and_leaves_no_tail():
    settings = settings_of({"k": 2, "exact_k": 2, "delta_encoding": False}, 16)
    rows = decode_distillkit([list(struct.pack("<ff", 3, 3))], [[0x12]], settings=settings)
    np.testing.assert_allclose(rows.log_probs, np.log([[0.5, 0.5]]), rtol=1e-6)
    assert rows.tail_log_prob[0] == -np.inf


def test_places_that_the_teacher_did_not_fill_stay_empty():
    settings = settings_of({"k": 2, "exact_k": 2, "delta_encoding": False}, 10)
    rows = decode_distillkit([list(struct.pack("<ff", -1, -np.inf))], [[0x1F]], settings=settings)
    assert rows.ids.tolist() == [[1, -1]]
    assert rows.log_probs.tolist() == [[-1.0, -np.inf]]


def write(path, columns, ids):
    """Two rows: three positions and then the rest."""
    pieces = [slice(0, 3), slice(3, None)]
    table = {"input_ids": pa.array([ids[piece] for piece in pieces], pa.list_(pa.uint64()))}
    for name, array in columns.items():
        kind = {"u1": pa.uint8(), "u8": pa.uint64()}.get(array.dtype.str[1:], pa.float32())
        table[name] = pa.array([array[piece].tolist() for piece in pieces], pa.list_(pa.list_(kind)))
    pq.write_table(pa.table(table), path)


def test_published_files_are_read_row_by_row(tmp_path):
    ids, log_probs = teacher_rows(8, 40, 1000)
    new = settings_of({**QWEN, "k": 40}, 1000)
    old = LegacySettings(k=40, exact_k=10, polynomial_degree=3, vocab_size=1000)
    for settings, encode in ((new, encode_distillkit), (old, encode_legacy)):
        columns = encode(ids, log_probs, settings=settings)
        write(tmp_path / "data.parquet", columns, list(range(8)))
        rows = list(read_distillkit(tmp_path / "data.parquet", settings))
        assert [tokens.tolist() for tokens, _ in rows] == [[0, 1, 2], [3, 4, 5, 6, 7]]
        decode = decode_distillkit if settings is new else decode_legacy
        whole = decode(**columns, settings=settings)
        for part in range(3):
            np.testing.assert_array_equal(np.concatenate([targets[part] for _, targets in rows]), whole[part])


def test_files_that_are_not_right_are_named(tmp_path):
    ids, log_probs = teacher_rows(8, 40, 1000)
    settings = settings_of({**QWEN, "k": 40}, 1000)
    path = tmp_path / "data.parquet"
    write(path, encode_distillkit(ids, log_probs, settings=settings), list(range(8)))
    with pytest.raises(
        StoreError, match=r"data.parquet, row 0: .*bytepacked_indices has shape \(3, 50\), the settings say 85"
    ):
        list(read_distillkit(path, settings_of({**QWEN, "k": 40}, 128_256)))
    with pytest.raises(StoreError, match="the column packed_indices is missing"):
        list(read_distillkit(path, LegacySettings(k=40, exact_k=10, polynomial_degree=3, vocab_size=1000)))
    with pytest.raises(StoreError, match=r"data.parquet, row 0: .*position \d+ has an id"):
        list(read_distillkit(path, settings_of({**QWEN, "k": 40}, 600)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"data\.parquet"):
        list(read_distillkit(path, settings))
    ragged = pa.array([[[1, 2], [3]]], pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table({"input_ids": [[1, 2]], "compressed_logprobs": ragged, "bytepacked_indices": ragged}), path)
    with pytest.raises(StoreError, match="different lengths"):
        list(read_distillkit(path, settings))
    with pytest.raises(StoreError, match="missing"):
        list(read_distillkit(tmp_path / "missing.parquet", settings))


def test_numbers_that_cannot_be_are_refused():
    settings = settings_of({"k": 2, "exact_k": 2, "delta_encoding": False}, 10)
    for value in (np.nan, np.inf):
        with pytest.raises(StoreError, match="position 0"):
            decode_distillkit([list(struct.pack("<ff", -1, value))], [[0x12]], settings=settings)
    with pytest.raises(StoreError, match="no bytes"):
        decode_distillkit([[0, 0, 0, 300, 0, 0, 0, 0]], [[0x12]], settings=settings)
    with pytest.raises(StoreError, match="1 positions with values, 2 with ids"):
        decode_distillkit([[0] * 8], [[0x12]] * 2, settings=settings)
    old = LegacySettings(k=2, exact_k=2, polynomial_degree=3, vocab_size=10)
    with pytest.raises(StoreError, match="different numbers of positions"):
        decode_legacy([[1]], [[-1.0, -2.0]] * 2, np.zeros((1, 0)), settings=old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exact_k": 200}, "exact_k is 200"),
        ({"k": "128"}, "k is '128'"),
        ({"term_dtype": "float8"}, 'unknown dtype "float8"'),
        ({"polynomial_terms": [0, "cube"]}, 'unknown term "cube"'),
        ({"polynomial_terms": [0.5]}, "a power in polynomial_terms is 0.5"),
        ({"polynomial_terms": []}, "nothing says how the rest is stored"),
        ({"polynomial_term": [0]}, 'unknown word "polynomial_term". Did you mean "polynomial_terms"?'),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 97}]}, "more elements"),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 0, "num_elements": 9}]}, "element_bits is 0"),
        ({"residual_bins": [3]}, "expected a table"),
        ({"residual_bins": [{"element_bits": 3}]}, "missing"),
        ({"polynomial_terms": 3}, "expected a list"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(StoreError) as raised:
        settings_of({**QWEN, **change}, 151_936)
    assert message in str(raised.value)


def test_writing_with_error_diffusion_is_refused_but_reading_is_not():
    settings = settings_of({"k": 2, "exact_k": 2, "error_diffusion": True}, 16)
    with pytest.raises(StoreError, match="error_diffusion"):
        encode_distillkit([[1, 2]], [[-1.0, -2.0]], settings=settings)
    assert decode_distillkit([list(struct.pack("<ff", -1, -1))], [[0x12]], settings=settings).log_probs.tolist() == [
        [-1, -2]
    ]


def test_settings_say_all_they_need():
    with pytest.raises(StoreError, match="DistillKit settings: .*exact_k"):
        DistillKitSettings.from_json({"d": 10, "k": 3})
    assert ResidualBin("float16", 3, 5).packed_bytes == 2
