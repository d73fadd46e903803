"""Targets and hidden states as bytes: by hand, against a slow reader of the documented format, invariants, hostile bytes."""

import json
import math
import struct

import numpy as np
import pytest

from limbeck.core.errors import StoreError
from limbeck.store.codec import (
    CodecSettings,
    bucket_kl_nats,
    decode_hidden,
    decode_targets,
    encode_hidden,
    encode_targets,
)

ALL_VALUES = ("uint8", "float16", "float32")


def teacher_rows(n, k, vocabulary_size, seed=0, sharpness=3.0):
    """Top-k of random distributions: ids, log-probabilities in descending order, log of the tail's mass."""
    random = np.random.default_rng(seed)
    logits = random.gumbel(size=(n, vocabulary_size)) * sharpness
    log_probs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    order = np.argsort(-log_probs, axis=1, kind="stable")
    log_probs = np.take_along_axis(log_probs, order, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(log_probs[:, k:].astype(np.float64)).sum(axis=1)).astype(np.float32)
    return order[:, :k], log_probs[:, :k], tail


def by_id(rows):
    """One {id: log-probability} of each position."""
    return [
        {int(i): float(p) for i, p in zip(ids, log_probs) if i >= 0} for ids, log_probs in zip(rows.ids, rows.log_probs)
    ]


def slow_read(columns, n, codec):
    """The module's description of the format followed to the letter, one number at a time."""

    def numbers(name, width, count, form):
        whole = [bytes(columns[f"{name}_{i}"][j] for i in range(width)) for j in range(count)]
        if form is None:
            return [int.from_bytes(item, "little") for item in whole]
        return [struct.unpack(form, item)[0] for item in whole]

    def width_of(largest):
        return max(1, math.ceil(largest.bit_length() / 8))

    counts = numbers("count", width_of(codec.k), n, None)
    gaps = numbers("gap", width_of(codec.vocabulary_size - 1), sum(counts), None)
    form, width = {"uint8": ("<B", 1), "float16": ("<e", 2), "float32": ("<f", 4)}[codec.values]
    values = numbers("value", width, sum(counts), form)
    tails = numbers("tail", 4 if codec.values == "float32" else 2, n, "<f" if codec.values == "float32" else "<e")
    ranges = numbers("range", 2, n, "<e") if codec.values == "uint8" else [None] * n
    rows, at = [], 0
    for count, tail, span in zip(counts, tails, ranges):
        token, heights = -1, {}
        for gap, value in zip(gaps[at : at + count], values[at : at + count]):
            token += gap + 1
            heights[token] = value if span is None else -8 * span * (255 - value) / (8 * 255 + span * value)
        at += count
        if codec.values != "float32" and heights:
            total = sum(math.exp(height) for height in heights.values())
            left = math.log(-math.expm1(tail))
            heights = {token: height - math.log(total) + left for token, height in heights.items()}
        rows.append((heights, tail))
    return rows


def test_bytes_by_hand():
    # Vocabulary 300: ids take two planes. Ids 5, 259 and 258 in ascending order are 5, 258, 259: gaps 5, 252, 0.
    ids = np.array([[259, 5, 258]])
    log_probs = np.log(np.array([[0.5, 0.125, 0.25]]))
    tail = np.log(np.array([0.125]))
    columns = encode_targets(ids, log_probs, tail, codec=CodecSettings(300, k=3))
    # Depths below the top: ln 4, ln 2, 0. fp16 rounds the range to 1.38672, a little more than ln 4.
    span, tail_bytes = struct.pack("<e", math.log(4)), struct.pack("<e", math.log(0.125))
    assert columns == {
        "count_0": b"\x03", "gap_0": b"\x05\xfc\x00", "gap_1": b"\x00\x00\x00", "value_0": columns["value_0"],
        "range_0": span[:1], "range_1": span[1:], "tail_0": tail_bytes[:1], "tail_1": tail_bytes[1:],
    }  # fmt: skip
    # ln 2: 255 * (1 - 0.693147 * 9.38672 / (1.38672 * 8.693147)) = 117.4; ln 4: 0.07.
    assert columns["value_0"] == bytes([0, 117, 255])
    # Back: 8 * 1.38672 * 138 / (8 * 255 + 1.38672 * 117) = 0.695171 below the top.
    kept = decode_targets(columns, 1, CodecSettings(300, k=3))
    assert kept.log_probs[0, 0] - kept.log_probs[0, 1] == pytest.approx(0.695171, abs=1e-6)
    assert kept.log_probs[0, 0] - kept.log_probs[0, 2] == pytest.approx(1.386719, abs=1e-6)
    lossless = encode_targets(ids, log_probs, tail, codec=CodecSettings(300, k=3, values="float32"))
    order = [1, 2, 0]
    stored = np.frombuffer(b"".join(struct.pack("<f", log_probs[0, i]) for i in order), np.uint8).reshape(3, 4)
    assert [lossless[f"value_{i}"] for i in range(4)] == [stored[:, i].tobytes() for i in range(4)]
    decoded = decode_targets(lossless, 1, CodecSettings(300, k=3, values="float32"))
    assert decoded.ids.tolist() == [[259, 258, 5]]


@pytest.mark.parametrize("values", ALL_VALUES)
@pytest.mark.parametrize(("k", "vocabulary_size"), [(1, 2), (5, 40), (32, 300), (20, 70_000), (300, 301)])
def test_a_slow_reader_of_the_documented_format_agrees(values, k, vocabulary_size):
    ids, log_probs, tail = teacher_rows(9, k, vocabulary_size, seed=k)
    codec = CodecSettings(vocabulary_size, values=values, k=k, mass=0.97)
    columns = encode_targets(ids, log_probs, tail, codec=codec)
    assert tuple(columns) == codec.columns
    decoded = decode_targets(columns, 9, codec)
    for row, (expected, expected_tail) in enumerate(slow_read(columns, 9, codec)):
        assert by_id(decoded)[row].keys() == expected.keys()
        for token, log_prob in by_id(decoded)[row].items():
            assert log_prob == pytest.approx(expected[token], abs=2e-6, rel=2e-6)
        assert decoded.tail_log_prob[row] == np.float32(expected_tail)


def test_float32_gives_back_every_bit_with_k_equal_to_the_vocabulary():
    ids, log_probs, tail = teacher_rows(50, 37, 37, sharpness=20.0)
    assert (tail == -np.inf).all()
    log_probs[3, -2:] = -np.inf
    log_probs[4] = -np.inf
    log_probs[4, 0] = -0.0
    log_probs[5, 0] = np.nextafter(np.float32(0), np.float32(1))
    log_probs[5, 1:] = -120.0
    codec = CodecSettings(37, values="float32", k=37)
    decoded = decode_targets(encode_targets(ids, log_probs, tail, codec=codec), 50, codec)
    order = np.lexsort((ids, -log_probs), axis=1)
    assert np.take_along_axis(ids, order, axis=1).tolist() == decoded.ids.tolist()
    assert np.take_along_axis(log_probs, order, axis=1).tobytes() == decoded.log_probs.tobytes()
    assert tail.tobytes() == decoded.tail_log_prob.tobytes()


@pytest.mark.parametrize("values", ["uint8", "float16"])
def test_entries_and_tail_sum_to_one_and_stay_close(values):
    ids, log_probs, tail = teacher_rows(400, 32, 1000)
    codec = CodecSettings(1000, values=values)
    decoded = decode_targets(encode_targets(ids, log_probs, tail, codec=codec), 400, codec)
    mass = np.exp(decoded.log_probs.astype(np.float64)).sum(axis=1) + np.exp(decoded.tail_log_prob.astype(np.float64))
    np.testing.assert_allclose(mass, 1.0, atol=2e-6)
    assert (np.diff(decoded.log_probs, axis=1) <= 0).all()
    assert (decoded.ids[:, 0] == ids[:, 0]).all(), "the most likely token stays the most likely"
    exact = by_id(type(decoded)(ids, log_probs, tail, None))
    depth = log_probs[:, :1] - log_probs
    span = depth[:, -1:]
    # Between neighbouring levels of uint8 at a depth: the curve's derivative. The top's is the finest.
    step = (depth + 8) ** 2 / 8 * span / (span + 8) / 255 if values == "uint8" else span * np.float32(2**-11)
    step = np.broadcast_to(step, depth.shape)
    for row, entries in enumerate(by_id(decoded)):
        for place, token in enumerate(ids[row]):
            # Half a step, a whole one beside the top, and what the rounding of the tail and the common shift add.
            assert abs(entries[token] - exact[row][token]) < 0.55 * step[row, place] + step[row, 0] + 1e-3
    kl = bucket_kl_nats(
        np.array([[exact[row][int(token)] for token in tokens] for row, tokens in enumerate(decoded.ids)]), tail,
        decoded.log_probs, decoded.tail_log_prob,
    )  # fmt: skip
    assert (kl > -1e-7).all()
    assert kl.mean() < {"uint8": 5e-5, "float16": 5e-7}[values]


def test_bucket_kl_by_hand():
    true = np.log(np.array([[0.5, 0.25]]))
    decoded = np.log(np.array([[0.25, 0.25]]))
    kl = bucket_kl_nats(true, np.log([0.25]), decoded, np.log([0.5]))
    assert kl[0] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    padded = bucket_kl_nats(
        np.array([[0.0, -np.inf]]), np.array([-np.inf]), np.array([[0.0, -np.inf]]), np.array([-np.inf])
    )
    assert padded[0] == 0
    assert bucket_kl_nats(true, np.log([0.25]), np.array([[0.0, -np.inf]]), np.log([0.5]))[0] == np.inf


@pytest.mark.parametrize("values", ALL_VALUES)
def test_bytes_depend_on_the_targets_alone(values):
    ids, log_probs, tail = teacher_rows(20, 16, 500)
    codec = CodecSettings(500, values=values, k=16)
    first = encode_targets(ids, log_probs, tail, codec=codec)
    shuffle = np.random.default_rng(1).permuted(np.tile(np.arange(16), (20, 1)), axis=1)
    shuffled = [np.take_along_axis(array, shuffle, axis=1) for array in (ids, log_probs)]
    padded = [np.pad(array, ((0, 0), (2, 3)), constant_values=fill) for array, fill in zip(shuffled, (-1, np.nan))]
    assert encode_targets(*shuffled, tail, codec=codec) == first
    assert encode_targets(padded[0].astype(np.int32), padded[1], tail.astype(np.float64), codec=codec) == first
    again = decode_targets(first, 20, codec)
    if values == "float32":
        assert encode_targets(*again[:3], codec=codec) == first


@pytest.mark.parametrize("values", ALL_VALUES)
def test_a_block_is_the_sum_of_its_parts(values):
    ids, log_probs, tail = teacher_rows(12, 8, 100)
    codec = CodecSettings(100, values=values, k=8, mass=0.9)
    whole = encode_targets(ids, log_probs, tail, codec=codec)
    parts = [encode_targets(ids[i : i + 5], log_probs[i : i + 5], tail[i : i + 5], codec=codec) for i in (0, 5, 10)]
    assert whole == {name: b"".join(part[name] for part in parts) for name in codec.columns}


def test_mass_keeps_the_fewest_entries_that_reach_it():
    probs = np.array(
        [[0.5, 0.25, 0.125, 0.0625], [0.9, 0.05, 0.03, 0.01], [0.25, 0.25, 0.25, 0.125], [0.1, 0.1, 0.1, 0.1]]
    )
    tail = np.log(1 - probs.sum(axis=1))
    ids = np.tile([3, 1, 7, 5], (4, 1))
    codec = CodecSettings(8, values="float32", k=3, mass=0.74)
    decoded = decode_targets(encode_targets(ids, np.log(probs), tail, codec=codec), 4, codec)
    # Of equals the first given stay; what is decoded is ordered by id among equals.
    assert decoded.ids.tolist() == [[3, 1, -1], [3, -1, -1], [1, 3, 7], [1, 3, 7]]
    np.testing.assert_allclose(np.exp(decoded.tail_log_prob), [0.25, 0.1, 0.25, 0.7], rtol=1e-6)
    assert (decoded.log_probs[0, 2], decoded.log_probs[1, 1]) == (-np.inf, -np.inf)
    least = CodecSettings(8, values="float32", k=3, mass=1e-9)
    assert (decode_targets(encode_targets(ids, np.log(probs), tail, codec=least), 4, least).ids[:, 1:] == -1).all()


def test_what_k_leaves_out_goes_to_the_tail():
    ids, log_probs, tail = teacher_rows(30, 20, 60)
    codec = CodecSettings(60, values="float32", k=6)
    decoded = decode_targets(encode_targets(ids[:, ::-1], log_probs[:, ::-1], tail, codec=codec), 30, codec)
    assert decoded.ids.tolist() == ids[:, :6].tolist()
    left = np.exp(log_probs[:, 6:].astype(np.float64)).sum(axis=1) + np.exp(tail.astype(np.float64))
    np.testing.assert_allclose(np.exp(decoded.tail_log_prob.astype(np.float64)), left, rtol=1e-6)


@pytest.mark.parametrize("values", ALL_VALUES)
def test_positions_without_entries_certain_positions_and_empty_blocks(values):
    codec = CodecSettings(10, values=values, k=3)
    ids = np.array([[-1, -1, -1], [4, -1, -1], [9, 0, -1], [1, 2, 3]])
    log_probs = np.array([[np.nan] * 3, [0.0, 0, 0], [-1e-6, math.log(1e-6), 0], [-1e9, -2e9, 0.0]])
    tail = np.array([0.0, -np.inf, -np.inf, -np.inf])
    decoded = decode_targets(encode_targets(ids, log_probs, tail, codec=codec), 4, codec)
    assert decoded.ids[:3].tolist() == [[-1, -1, -1], [4, -1, -1], [9, 0, -1]]
    assert decoded.log_probs[1].tolist() == [0.0, -np.inf, -np.inf]
    assert decoded.log_probs[2, 1] == pytest.approx(math.log(1e-6), rel=1e-3)
    assert decoded.ids[3].tolist() == ([3, 1, 2] if values == "float32" else [3, -1, -1])
    assert decoded.tail_log_prob.tolist() == tail.tolist()
    nothing = encode_targets(ids[:0], log_probs[:0], tail[:0], codec=codec)
    assert set(nothing.values()) == {b""}
    assert decode_targets(nothing, 0, codec).ids.shape == (0, 3)


def test_a_tail_that_rounds_to_everything_leaves_the_entries_something():
    codec = CodecSettings(10, k=1)
    decoded = decode_targets(
        encode_targets(np.array([[4]]), np.log([[1e-9]]), np.array([-1e-9]), codec=codec), 1, codec
    )
    assert decoded.tail_log_prob[0] < 0
    assert -17 < decoded.log_probs[0, 0] < -16


def test_a_near_rival_with_a_smaller_id_does_not_become_the_most_likely():
    probs = np.array([[0.4, 0.399999, 1e-5]])
    tail = np.log(1 - probs.sum(axis=1))
    codec = CodecSettings(10, k=3)
    columns = encode_targets(np.array([[7, 2, 5]]), np.log(probs), tail, codec=codec)
    assert columns["value_0"] == bytes([254, 0, 255])
    assert decode_targets(columns, 1, codec).ids.tolist() == [[7, 2, 5]]
    equals = encode_targets(np.array([[7, 2, 5]]), np.log([[0.4, 0.4, 1e-5]]), np.log([0.19999]), codec=codec)
    assert equals["value_0"] == bytes([255, 0, 255])
    level = encode_targets(np.array([[7, 2, 5]]), np.log([[0.25] * 3]), np.log([0.25]), codec=codec)
    assert (level["value_0"], level["range_0"], level["range_1"]) == (b"\xff" * 3, b"\0", b"\0")
    np.testing.assert_allclose(np.exp(decode_targets(level, 1, codec).log_probs), [[0.25] * 3], rtol=1e-3)


def test_a_tail_to_which_nothing_is_added_keeps_every_bit():
    codec = CodecSettings(10, values="float32", k=2, mass=0.5)
    tail = np.array([-1.2e-12], dtype=np.float32)
    columns = encode_targets(np.array([[4]]), np.log([[1.2e-12]]), tail, codec=codec)
    assert decode_targets(columns, 1, codec).tail_log_prob.tobytes() == tail.tobytes()


def test_levels_of_any_kind_are_read_as_documented():
    ids, log_probs, tail = teacher_rows(40, 6, 100)
    codec = CodecSettings(100, k=6)
    columns = encode_targets(ids, log_probs, tail, codec=codec)
    random = np.random.default_rng(5)
    columns["value_0"] = random.integers(0, 256, size=240, dtype=np.uint8).tobytes()  # mostly without a top level
    columns["range_1"] = random.integers(0, 0x58, size=40, dtype=np.uint8).tobytes()  # 0 to about 128 nats
    decoded = decode_targets(columns, 40, codec)
    for row, (expected, _) in enumerate(slow_read(columns, 40, codec)):
        assert by_id(decoded)[row] == pytest.approx(expected, abs=2e-6, rel=2e-6)


@pytest.mark.parametrize("span", [0.25, 4.0, 30.0, 90.0])
def test_levels_are_ordered_reach_both_ends_and_are_finer_towards_the_top(span):
    codec = CodecSettings(256, k=256)
    half = np.frombuffer(np.float16(span).tobytes(), np.uint8)
    columns = {
        "count_0": b"\x00", "count_1": b"\x01", "gap_0": bytes(256), "value_0": bytes(range(256)), "range_0": half[:1].tobytes(),
        "range_1": half[1:].tobytes(), "tail_0": b"\x00", "tail_1": b"\xbc",
    }  # fmt: skip
    decoded = decode_targets(columns, 1, codec)
    assert decoded.ids[0].tolist() == list(range(255, -1, -1))
    depth = (decoded.log_probs[0, 0] - decoded.log_probs[0]).astype(np.float64)
    assert depth[-1] == pytest.approx(span, abs=2e-5)
    steps = np.diff(depth)
    assert (steps > 0).all()
    assert (np.diff(steps) > -2e-5).all()
    assert steps[-1] / steps[0] == pytest.approx((span / 8 + 1) ** 2, rel=0.1)
    # Every level is written as itself.
    again = encode_targets(*decoded[:3], codec=codec)
    if span > 1:
        assert again == columns


def test_levels_beat_even_steps_on_peaked_positions():
    probs = np.tile(np.concatenate([[0.6, 0.3], np.full(30, 1e-9)]), (200, 1))
    probs[:, 1] *= np.linspace(0.5, 1, 200)
    tail = np.log1p(-probs.sum(axis=1))
    ids, codec = np.tile(np.arange(32), (200, 1)), CodecSettings(100, k=32)
    decoded = decode_targets(encode_targets(ids, np.log(probs), tail, codec=codec), 200, codec)
    kl = bucket_kl_nats(np.log(probs), tail, decoded.log_probs, decoded.tail_log_prob)
    # The rival stands about 1 nat deep, where a step is 0.026 nats; even steps would be 0.08 apart, nine times the loss.
    step = (1.04 + 8) ** 2 / 8 * 20.2 / 28.2 / 255
    assert kl.mean() == pytest.approx(0.6 * 0.225 / 0.825 * step**2 / 24, rel=0.25)


@pytest.mark.parametrize("values", ALL_VALUES)
def test_sampled_targets_keep_their_weights(values):
    ids, log_probs, tail = teacher_rows(40, 12, 200)
    weights = np.random.default_rng(2).integers(1, 20, size=ids.shape).astype(np.float32) / 50
    ids[7, 4:], weights[7, 4:] = -1, np.nan
    tail[7] = np.log1p(-np.exp(log_probs[7, :4].astype(np.float64)).sum())
    codec = CodecSettings(200, values=values, k=12, sampled=True)
    decoded = decode_targets(encode_targets(ids, log_probs, tail, weights, codec=codec), 40, codec)
    for row in range(40):
        expected = {int(i): w for i, w in zip(ids[row], weights[row]) if i >= 0}
        assert {int(i): w for i, w in zip(decoded.ids[row], decoded.weights[row]) if i >= 0} == expected
    assert (decoded.weights[7, 4:] == 0).all()


@pytest.mark.parametrize("values", ALL_VALUES)
def test_every_damaged_column_is_refused_by_name(values):
    ids, log_probs, tail = teacher_rows(6, 4, 1000)
    codec = CodecSettings(1000, values=values, k=4, sampled=True)
    columns = encode_targets(ids, log_probs, tail, np.ones_like(log_probs), codec=codec)
    for name in codec.columns:
        for wrong in (columns[name][:-1], columns[name] + b"\0", b"", None, "text"):
            with pytest.raises(StoreError, match="target column"):
                decode_targets({**columns, name: wrong}, 6, codec)
        with pytest.raises(StoreError, match=f"target column {name}: it is missing"):
            decode_targets({key: value for key, value in columns.items() if key != name}, 6, codec)
    with pytest.raises(StoreError, match="count_0: it holds 6 bytes, expected 7"):
        decode_targets(columns, 7, codec)


def altered(columns, **changed):
    return {**columns, **changed}


def test_what_no_encoder_writes_is_refused():
    ids, log_probs, tail = teacher_rows(2, 4, 1000)
    for values in ALL_VALUES:
        codec = CodecSettings(1000, values=values, k=4)
        good = encode_targets(ids, log_probs, tail, codec=codec)
        last = {"uint8": None, "float16": "value_1", "float32": "value_3"}[values]
        wrong = [("count", altered(good, count_0=b"\x05\x03")), ("gap", altered(good, gap_1=b"\xff" * 8))]
        tail_last = "tail_3" if values == "float32" else "tail_1"
        wrong.append(("tail", altered(good, **{tail_last: b"\x7f\x7f", tail_last[:-1] + "0": b"\xff\xff"})))
        if last:
            wrong.append(("value", altered(good, **{last: b"\x7f" * 8})))  # NaN or far above zero
            wrong.append(("value", altered(good, **{f"value_{i}": b"\xff" * 8 for i in range(4)})))
        else:
            wrong.append(("range", altered(good, range_1=b"\x7c\x7c")))
            wrong.append(("range", altered(good, range_1=b"\xc0\xc0")))
        if values != "float32":
            wrong.append(("tail", altered(good, tail_0=b"\0\0", tail_1=b"\0\0")))
        if values == "float16":
            wrong.append(("value", altered(good, value_0=b"\0" * 8, value_1=b"\xfc" * 8)))  # nothing but -inf
        for column, columns in wrong:
            with pytest.raises(StoreError, match=f"target column {column}: "):
                decode_targets(columns, 2, codec)
    sampled = CodecSettings(1000, k=4, sampled=True)
    good = encode_targets(ids, log_probs, tail, np.ones_like(log_probs), codec=sampled)
    for byte in (b"\xff", b"\x7f"):
        with pytest.raises(StoreError, match="target column weight"):
            decode_targets(altered(good, weight_3=byte * 8, weight_2=b"\xff" * 8), 2, sampled)


@pytest.mark.parametrize("values", ALL_VALUES)
def test_random_bytes_are_decoded_or_refused_but_never_crash(values):
    codec = CodecSettings(5000, values=values, k=6)
    ids, log_probs, tail = teacher_rows(8, 6, 5000)
    good = encode_targets(ids, log_probs, tail, codec=codec)
    random = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = dict(good)
        for name in random.choice(codec.columns, size=random.integers(1, 4)):
            octets = np.frombuffer(damaged[name], np.uint8).copy()
            octets[random.integers(len(octets))] ^= 1 << random.integers(8)
            damaged[name] = octets.tobytes()
        try:
            rows = decode_targets(damaged, 8, codec)
        except StoreError:
            refused += 1
            continue
        used = rows.ids >= 0
        assert rows.ids.max() < 5000
        assert (rows.log_probs[used] <= 0.01).all()
        assert not np.isnan(rows.log_probs).any()
    assert refused > 30


def test_blocks_beyond_the_bound_are_refused_before_anything_is_allocated():
    codec = CodecSettings(2**24, k=2**24)
    with pytest.raises(StoreError, match="take fewer positions"):
        decode_targets({}, 10**12, codec)
    with pytest.raises(StoreError, match="take fewer positions"):
        decode_targets({}, -1, codec)
    with pytest.raises(StoreError, match="take fewer positions"):
        decode_hidden({}, 10**9, width=4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [[1, 8, 2], [3, 4, 5]]}, "position 0 of the block has an id outside the vocabulary of 8"),
        ({"ids": [[1, 7, 2], [3, 3, 5]]}, "position 1 of the block has the same id twice"),
        ({"ids": [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]}, "whole numbers"),
        ({"log_probs": [[-1.0, np.nan, -2.0], [-1.0, -2, -3]]}, "position 0 of the block has a log-probability that is NaN"),
        ({"log_probs": [[-1.0, -1.5, -2.0], [np.inf, -2, -3]]}, "position 1 .* log-probability that is NaN or above zero"),
        ({"tail": [np.nan, -1.0]}, "position 0 .* a tail that is NaN"),
        ({"tail": [-1.0, -np.inf]}, "do not sum to one"),
        ({"tail": [-1.0]}, "of shapes"),
        ({"weights": [[1.0] * 3] * 2}, "weights given"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_are_refused(change, message):
    log_probs = np.log(np.array([[0.25, 0.25, 0.125]] * 2))
    given = {"ids": [[1, 7, 2], [3, 4, 5]], "log_probs": log_probs, "tail": np.log([0.375, 0.375]), "weights": None}
    given |= change
    arrays = [None if value is None else np.asarray(value) for value in given.values()]
    with pytest.raises(StoreError, match=message):
        encode_targets(*arrays, codec=CodecSettings(8, k=3))


def test_weights_that_cannot_be_are_refused():
    ids, log_probs, tail = np.array([[1, 2]]), np.log([[0.5, 0.25]]), np.log([0.25])
    codec = CodecSettings(8, k=2, sampled=True)
    for weights, message in (([[1.0, -1.0]], "a weight"), ([[1.0, np.inf]], "a weight"), ([[1.0]], "shape")):
        with pytest.raises(StoreError, match=message):
            encode_targets(ids, log_probs, tail, np.array(weights), codec=codec)
    with pytest.raises(StoreError, match="weights missing"):
        encode_targets(ids, log_probs, tail, codec=codec)
    with pytest.raises(StoreError, match="more than 1 sampled ids"):
        encode_targets(ids, log_probs, tail, np.ones((1, 2)), codec=CodecSettings(8, k=1, sampled=True))


def test_settings_survive_json():
    for codec in (
        CodecSettings(49_152),
        CodecSettings(100, "float32", 100),
        CodecSettings(9, "float16", 4, sampled=True),
    ):
        assert CodecSettings.from_json(json.loads(json.dumps(codec.to_json()))) == codec
    assert CodecSettings.from_json(CodecSettings(100, mass=0.95).to_json()).mass == 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "limbeck-targets-3"}, "newer version"),
        ({"values": "uint9"}, 'unknown values "uint9"'),
        ({"values": ["uint8"]}, "unknown values"),
        ({"k": 0}, "k is 0"),
        ({"k": 9}, "k is 9, expected a whole number from 1 to 8"),
        ({"k": True}, "k is True"),
        ({"k": 2.0}, "k is 2.0"),
        ({"vocabulary_size": 2**40}, "vocabulary_size"),
        ({"mass": 0}, "mass"),
        ({"mass": float("nan")}, "mass"),
        ({"mass": "1"}, "mass"),
        ({"sampled": 1}, "sampled"),
        ({"sampled": True, "mass": 0.5}, "cannot be cut by mass"),
        ({"vals": "uint8"}, 'unknown setting "vals". Did you mean "values"?'),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(StoreError) as raised:
        CodecSettings.from_json({**CodecSettings(8, k=4).to_json(), **change})
    assert message in str(raised.value)


def test_settings_must_be_whole():
    whole = CodecSettings(8, k=4).to_json()
    del whole["k"]
    with pytest.raises(StoreError, match="the setting k is missing"):
        CodecSettings.from_json(whole)
    with pytest.raises(StoreError, match="expected a JSON object"):
        CodecSettings.from_json([1])


@pytest.mark.parametrize(("values", "tolerance"), [("float32", 0.0), ("float16", 2**-11), ("int8", 0.5 / 127)])
def test_hidden_states_come_back(values, tolerance):
    hidden = np.random.default_rng(4).normal(size=(11, 24)).astype(np.float32) * 7
    hidden[3] = 0
    columns = encode_hidden(hidden, values=values)
    assert all(len(plane) in (11 * 24, 11) for plane in columns.values())
    decoded = decode_hidden(columns, 11, width=24, values=values)
    assert decoded.dtype == np.float32
    largest = np.abs(hidden).max(axis=1, keepdims=True)
    assert (np.abs(decoded - hidden) <= tolerance * largest * 1.001).all()
    assert encode_hidden(decoded, values=values) == columns
    assert decode_hidden(encode_hidden(hidden[:0], values=values), 0, width=24, values=values).shape == (0, 24)


def test_hidden_states_that_cannot_be_are_refused():
    hidden = np.ones((3, 4), dtype=np.float32)
    with pytest.raises(StoreError, match="beyond float16"):
        encode_hidden(hidden * 1e6)
    with pytest.raises(StoreError, match="finite"):
        encode_hidden(hidden * np.nan, values="int8")
    with pytest.raises(StoreError, match='unknown values "int4"'):
        encode_hidden(hidden, values="int4")
    columns = encode_hidden(hidden)
    with pytest.raises(StoreError, match="target column hidden_0: it holds 12 bytes, expected 15"):
        decode_hidden(columns, 3, width=5)
    with pytest.raises(StoreError, match="NaN or infinity"):
        decode_hidden({**columns, "hidden_1": b"\x7c" * 12}, 3, width=4)
    wide = encode_hidden(hidden, values="int8")
    with pytest.raises(StoreError, match="NaN or infinity"):
        decode_hidden({**wide, "scale_3": b"\x7f" * 3, "scale_2": b"\x80" * 3}, 3, width=4, values="int8")
