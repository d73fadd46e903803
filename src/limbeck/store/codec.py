"""Sparse teacher targets and hidden states as bytes, and back.

A block is n positions. Each holds at most k entries (token id, log-probability, and for sampled targets a weight) and
the log of the mass of all other tokens, the tail. `encode_targets` turns a block into columns, a dict from name to
bytes; every column is one *byte plane*, meant to be a binary column of its own in a file that is compressed by column
(Parquet with zstd). Nothing is entropy-coded here: planes kept apart compress to about the entropy of their bytes, and
any language can read them.

**Planes.** An array of m numbers of w bytes named `x` is stored as `x_0` .. `x_{w-1}`: `x_i` holds byte i (0 is the least
significant) of every number, m bytes. Numbers are little-endian, floats IEEE 754.

**Columns of a block of targets.** N is the number of entries in the whole block.

- `count`, n unsigned numbers of as many bytes as k needs (1 to 3): entries of each position, in order of position.
- `gap`, N unsigned numbers of as many bytes as vocabulary_size - 1 needs (1 to 3). Within a position entries are in
  ascending order of id: the first gap is the id, every further one is id - previous id - 1.
- `value`, N numbers in the order of the gaps. The top of a position is its largest log-probability.
  - uint8 (1 byte): q; the entry's height is h = -8 * range * (255 - q) / (8 * 255 + range * q), in nats below the top:
    q = 255 is the top and q = 0 is -range. A depth v = -h is written as 255 * (1 - v * (range + 8) / (range * (v + 8)))
    rounded, from 0 to 255 (254 for entries below the top); as 255 when the range is 0 and v is.
  - float16: the height itself, 0 for the top.
  - float32: the log-probability, bit for bit.
- `range`, n float16, with uint8 values only: distance in nats from the top of a position to its lowest entry.
- `tail`, n numbers: log of the tail's mass, -inf for none; float32 with float32 values, else float16.
- `weight`, N float32, with sampled targets only.

For uint8 and float16 values log p = h - logsumexp(h over the position) + log(1 - exp(tail)), so that kept entries and
tail always sum to one; this spares the top's own value. An error of d nats in an entry of probability p costs about
p * d^2 / 2 nats of KL, so levels are close where p is large and (v / 8 + 1)^2 times as far apart at depth v; the curve
needs only + - * /, which every machine rounds alike. Decoded entries come in descending order of log-probability, equal
ones by ascending id.

**Columns of a block of hidden states** [n, D], row by row: `hidden`, n * D float32, float16 or int8; with int8 also `scale`,
n float32, which multiply.

The bytes depend on the numbers alone: same input, same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from limbeck.core.errors import StoreError, unknown_name
from limbeck.store.planes import Array, Columns, bytes_for, check_block, damaged, join_planes, split_planes

FORMAT = "limbeck-targets-2"
VALUE_BYTES = {"uint8": 1, "float16": 2, "float32": 4}
HIDDEN_BYTES = {"int8": 1, "float16": 2, "float32": 4}
MOST_VOCABULARY = 2**24
# Less is no mass in float32, and one such entry would stretch a position's range for all others.
LEAST_LOG_PROB = -100.0
# The uint8 curve's one constant: of 4 to 24, the least of the larger mean KL over encyclopedic and tabular text.
BEND_NATS = 8.0
SUM_TOLERANCE = 1e-2  # how far kept mass and tail together may be from one


@dataclass(frozen=True)
class CodecSettings:
    """How targets are written; part of a store's manifest, and all that a reader needs.

    vocabulary_size: ids are below it. values: "uint8" (256 levels from the highest to the lowest log-probability of a
    position, finer near the highest), "float16", or "float32" (lossless). k: most entries of a position. mass: of each
    position keep the fewest entries that reach this probability (at least one, at most k); 1 keeps all that are given.
    sampled: entries carry weights, and none is ever dropped, for that would bias the estimate they are for.
    Raises StoreError for settings that cannot be.
    """

    vocabulary_size: int
    values: str = "uint8"
    k: int = 32
    mass: float = 1.0
    sampled: bool = False

    def __post_init__(self) -> None:
        _whole("vocabulary_size", self.vocabulary_size, most=MOST_VOCABULARY)
        _whole("k", self.k, most=self.vocabulary_size)
        if not isinstance(self.values, str) or self.values not in VALUE_BYTES:
            raise StoreError(f"target codec: {unknown_name('values', str(self.values), VALUE_BYTES)}")
        if isinstance(self.mass, bool) or not isinstance(self.mass, int | float) or not 0 < self.mass <= 1:
            raise StoreError(f"target codec: mass is {self.mass!r}, expected a number above 0 and at most 1")
        if not isinstance(self.sampled, bool):
            raise StoreError(f"target codec: sampled is {self.sampled!r}, expected true or false")
        if self.sampled and self.mass < 1:
            raise StoreError("target codec: sampled targets cannot be cut by mass; set mass to 1")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that says it all, the format's name included."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> CodecSettings:
        """Settings from `to_json`'s object. Raises StoreError for another format, unknown or missing keys, wrong values."""
        if not isinstance(value, Mapping):
            raise StoreError(f"target codec: expected a JSON object, found {type(value).__name__}")
        if value.get("format") != FORMAT:
            raise StoreError(
                f'target codec: format is {value.get("format")!r}, this version reads "{FORMAT}". '
                "A newer version of limbeck may have written the store."
            )
        known = {item.name for item in dataclasses.fields(cls)}
        given = {str(key): item for key, item in value.items() if key != "format"}
        for name in given:
            if name not in known:
                raise StoreError(f"target codec: {unknown_name('setting', name, known)}")
        if missing := sorted(known - given.keys()):
            raise StoreError(f"target codec: the setting {missing[0]} is missing")
        return cls(**given)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of every block, in a fixed order."""
        return tuple(f"{name}_{i}" for name, (_, width) in self._numbers().items() for i in range(width))

    def _numbers(self) -> dict[str, tuple[str, int]]:
        """Name to (numpy type, bytes kept) of each array of a block."""
        tail = "<f4" if self.values == "float32" else "<f2"
        value = {"uint8": "<u1", "float16": "<f2", "float32": "<f4"}[self.values]
        numbers = {"count": ("<u4", bytes_for(self.k)), "gap": ("<u4", bytes_for(self.vocabulary_size - 1))}
        numbers["value"] = (value, VALUE_BYTES[self.values])
        if self.values == "uint8":
            numbers["range"] = ("<f2", 2)
        numbers["tail"] = (tail, int(tail[-1]))
        if self.sampled:
            numbers["weight"] = ("<f4", 4)
        return numbers


class SparseRows(NamedTuple):
    """Targets of n positions, as `core.types.SparseTargets` holds them but in numpy.

    ids [n, k] int64, -1 in unused places; log_probs [n, k] float32, nats, descending, -inf in unused places;
    tail_log_prob [n] float32; weights [n, k] float32, 0 in unused places, or None.
    """

    ids: Array
    log_probs: Array
    tail_log_prob: Array
    weights: Array | None


def encode_targets(
    ids: Array, log_probs: Array, tail_log_prob: Array, weights: Array | None = None, *, codec: CodecSettings
) -> Columns:
    """The columns of a block of targets; see the module's text for the format.

    ids [n, K] integers, -1 in unused places (anywhere in a row); log_probs [n, K] nats, in any order; tail_log_prob [n]
    nats; weights [n, K] when the codec is for sampled targets, else None. Entries beyond the codec's k or mass go to the
    tail, the least likely first; with uint8 and float16 values entries below e^-100 are left out.
    A position without entries has its whole mass in the tail (0.0).
    Raises StoreError, naming the first position at fault, for ids outside the vocabulary, an id given twice, NaN,
    positive log-probabilities, or mass that does not sum to one.
    """
    rows = _checked(SparseRows(np.asarray(ids), np.asarray(log_probs), np.asarray(tail_log_prob), weights), codec)
    rows = _by_id(_trimmed(rows, codec), codec)
    used = rows.ids >= 0
    count = used.sum(axis=1)
    previous = np.concatenate([np.full((len(rows.ids), 1), -1), rows.ids[:, :-1]], axis=1)
    arrays = {"count": count, "gap": (rows.ids - previous - 1)[used], "tail": rows.tail_log_prob}
    if codec.values == "float32":
        arrays["value"] = rows.log_probs[used]
    else:
        top = rows.log_probs.max(axis=1, initial=-np.inf)
        height = np.where(used, rows.log_probs.astype(np.float64) - np.where(count > 0, top, 0.0)[:, None], 0.0)
        # A tail that rounds to all of the mass would leave none to the entries.
        with np.errstate(over="ignore"):
            half_tail = rows.tail_log_prob.astype("<f2")
        arrays["tail"] = np.where(count > 0, np.minimum(half_tail, -np.finfo("<f2").smallest_subnormal), half_tail)
        arrays["value"] = height[used]
        if codec.values == "uint8":
            arrays["range"] = np.abs(height.min(axis=1, initial=0.0)).astype("<f2")
            arrays["value"] = _levels(-height, arrays["range"])[used]
    if rows.weights is not None:
        arrays["weight"] = rows.weights[used]
    return {
        name: plane
        for key, (kind, width) in codec._numbers().items()
        for name, plane in split_planes(key, arrays[key].astype(kind), width).items()
    }


@np.errstate(divide="ignore", invalid="ignore", over="ignore")  # bytes may say anything; what comes of it is checked
def decode_targets(columns: Mapping[str, bytes], n: int, codec: CodecSettings) -> SparseRows:
    """The targets of a block of n positions; every row has codec.k places.

    Raises StoreError for columns that are missing, of the wrong length, or hold what no encoder writes; the message names
    the column. Memory is bounded by the settings and n, never by what the bytes claim.
    """
    check_block(n, codec.k)
    numbers = codec._numbers()
    count = join_planes(columns, "count", *numbers["count"], n)
    if (count > codec.k).any():
        raise damaged("count", f"a position has {count.max()} entries, at most {codec.k} are possible")
    total = int(count.sum(dtype=np.int64))
    arrays = {
        name: join_planes(columns, name, kind, width, n if name in ("range", "tail") else total)
        for name, (kind, width) in numbers.items()
        if name != "count"
    }
    used = np.arange(codec.k) < count[:, None]
    ids = _ids(arrays["gap"], used, codec.vocabulary_size)
    tail = arrays["tail"].astype(np.float32)
    if not (tail <= SUM_TOLERANCE).all():
        raise damaged("tail", "it holds a number that is no log-probability")
    if codec.values == "float32":
        log_probs = _filled(used, arrays["value"], -np.inf)
    else:
        log_probs = _normalised(_heights(arrays, used), used, tail)
    if not (log_probs <= SUM_TOLERANCE).all():
        raise damaged("value", "it holds a number that is no log-probability")
    order = np.argsort(-log_probs, axis=1, kind="stable")
    weights = None
    if codec.sampled:
        if not ((arrays["weight"] >= 0) & np.isfinite(arrays["weight"])).all():
            raise damaged("weight", "it holds a number that is no weight")
        weights = np.take_along_axis(_filled(used, arrays["weight"], 0.0), order, axis=1)
    return SparseRows(
        np.take_along_axis(ids, order, axis=1), np.take_along_axis(log_probs, order, axis=1), tail, weights
    )


def bucket_kl_nats(log_probs: Array, tail_log_prob: Array, decoded_log_probs: Array, decoded_tail: Array) -> Array:
    """KL from true to decoded targets over k + 1 buckets, the kept entries and the tail: what a codec loses. [n] nats.

    Both log_probs are [n, K] of the same ids in the same order, -inf in unused places. Computed in float64.
    """
    true = np.concatenate([log_probs, tail_log_prob[:, None]], axis=1).astype(np.float64)
    decoded = np.concatenate([decoded_log_probs, decoded_tail[:, None]], axis=1).astype(np.float64)
    present = true > -np.inf
    difference = np.where(present, true, 0.0) - np.where(present, decoded, 0.0)
    return (np.where(present, np.exp(true), 0.0) * difference).sum(axis=1)


def encode_hidden(hidden: Array, *, values: str = "float16") -> Columns:
    """The columns of hidden states [n, D]: values "float16", "float32" (lossless) or "int8" (127 steps up to a row's maximum).

    Raises StoreError for NaN or infinity, also for what float16 cannot hold.
    """
    _hidden_values(values)
    hidden = np.asarray(hidden, dtype="<f4")
    if hidden.ndim != 2 or not np.isfinite(hidden).all():
        raise StoreError(f"hidden states of shape {hidden.shape}: expected [n, D] of finite numbers")
    if values == "int8":
        scale = np.abs(hidden).max(axis=1, initial=0.0) / np.float32(127)
        steps = np.rint(hidden / np.where(scale > 0, scale, 1)[:, None]).clip(-127, 127).astype("<i1")
        return {**split_planes("hidden", steps.ravel(), 1), **split_planes("scale", scale.astype("<f4"), 4)}
    with np.errstate(over="ignore"):
        written = hidden.astype("<f2" if values == "float16" else "<f4")
    if not np.isfinite(written).all():
        raise StoreError(
            f"a hidden state of {np.abs(hidden).max():.3g} is beyond float16 (65504): store them as float32 or int8"
        )
    return split_planes("hidden", written.ravel(), HIDDEN_BYTES[values])


def decode_hidden(columns: Mapping[str, bytes], n: int, *, width: int, values: str = "float16") -> Array:
    """Hidden states [n, width] float32. Raises StoreError for columns of the wrong length or with NaN or infinity."""
    _hidden_values(values)
    check_block(n, width)
    kind = {"int8": "<i1", "float16": "<f2", "float32": "<f4"}[values]
    hidden = join_planes(columns, "hidden", kind, HIDDEN_BYTES[values], n * width).astype(np.float32).reshape(n, width)
    if values == "int8":
        with np.errstate(over="ignore", invalid="ignore"):
            hidden = hidden * join_planes(columns, "scale", "<f4", 4, n).astype(np.float32)[:, None]
    if not np.isfinite(hidden).all():
        raise damaged("hidden", "it holds NaN or infinity")
    return hidden


def _checked(rows: SparseRows, codec: CodecSettings) -> SparseRows:
    """The given arrays in one type each, unused places made uniform; StoreError for what is not a set of targets."""
    if rows.ids.ndim != 2 or rows.log_probs.shape != rows.ids.shape or rows.tail_log_prob.shape != rows.ids.shape[:1]:
        raise StoreError(
            f"targets of shapes {rows.ids.shape}, {rows.log_probs.shape}, {rows.tail_log_prob.shape}: expected [n, K], [n, K], [n]"
        )
    if rows.ids.dtype.kind not in "iu":
        raise StoreError(f"target ids of type {rows.ids.dtype}: expected whole numbers")
    if (rows.weights is not None) != codec.sampled:
        raise StoreError(
            f"weights {'missing' if codec.sampled else 'given'}, but the codec says sampled={codec.sampled}"
        )
    check_block(len(rows.ids), codec.k)
    ids = np.where(rows.ids >= 0, rows.ids, -1).astype(np.int64)
    used = ids >= 0
    log_probs = np.where(used, rows.log_probs.astype(np.float32), np.float32(-np.inf))
    tail = rows.tail_log_prob.astype(np.float32)
    if codec.values != "float32":
        none = log_probs < LEAST_LOG_PROB
        ids, log_probs, used = np.where(none, -1, ids), np.where(none, np.float32(-np.inf), log_probs), used & ~none
    _refuse((ids >= codec.vocabulary_size).any(axis=1), f"an id outside the vocabulary of {codec.vocabulary_size}")
    for name, numbers in (("log-probability", log_probs), ("tail", tail[:, None])):
        _refuse(~(numbers <= SUM_TOLERANCE).all(axis=1), f"a {name} that is NaN or above zero")
    mass = np.exp(log_probs.astype(np.float64)).sum(axis=1) + np.exp(tail.astype(np.float64))
    _refuse(np.abs(mass - 1) > SUM_TOLERANCE, "entries and tail whose probabilities do not sum to one")
    weights = None
    if rows.weights is not None:
        if np.shape(rows.weights) != ids.shape:
            raise StoreError(f"weights of shape {np.shape(rows.weights)}: expected that of the ids, {ids.shape}")
        weights = np.where(used, np.asarray(rows.weights, dtype=np.float32), np.float32(0))
        _refuse(~((weights >= 0) & np.isfinite(weights)).all(axis=1), "a weight that is not a finite number >= 0")
        _refuse(used.sum(axis=1) > codec.k, f"more than {codec.k} sampled ids, the codec's k")
    return SparseRows(ids, log_probs, tail, weights)


def _trimmed(rows: SparseRows, codec: CodecSettings) -> SparseRows:
    """Without the entries that k and mass leave out; their probability goes to the tail."""
    if codec.sampled or (codec.mass == 1 and rows.ids.shape[1] <= codec.k):
        return rows
    order = np.argsort(-rows.log_probs, axis=1, kind="stable")
    ids, log_probs = (np.take_along_axis(array, order, axis=1) for array in (rows.ids, rows.log_probs))
    probs = np.exp(log_probs.astype(np.float64))
    before = np.cumsum(probs, axis=1) - probs
    kept = (np.arange(ids.shape[1]) < codec.k) & (ids >= 0)
    if codec.mass < 1:
        kept &= before < codec.mass
    dropped = np.where(kept, 0.0, probs).sum(axis=1)
    with np.errstate(divide="ignore"):
        larger = np.log(np.exp(rows.tail_log_prob.astype(np.float64)) + dropped).astype(np.float32)
    tail = np.where(dropped > 0, np.minimum(larger, 0), rows.tail_log_prob)
    return SparseRows(
        np.where(kept, ids, -1)[:, : codec.k], np.where(kept, log_probs, np.float32(-np.inf))[:, : codec.k], tail, None
    )


def _by_id(rows: SparseRows, codec: CodecSettings) -> SparseRows:
    """Entries in ascending order of id, unused places last."""
    last = np.where(rows.ids >= 0, rows.ids, codec.vocabulary_size)
    order = np.argsort(last, axis=1, kind="stable")
    sort = [np.take_along_axis(array, order, axis=1) for array in (rows.ids, rows.log_probs)]
    ids = sort[0]
    _refuse(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any(axis=1), "the same id twice")
    weights = None if rows.weights is None else np.take_along_axis(rows.weights, order, axis=1)
    return SparseRows(ids, sort[1], rows.tail_log_prob, weights)


def _levels(depth: Array, span: Array) -> Array:
    """Depths below the top [n, K] as the nearest of the 256 levels of each position's range [n]."""
    wide = span.astype(np.float64)[:, None]
    share = depth * (wide + BEND_NATS) / (np.where(wide > 0, wide, 1.0) * (depth + BEND_NATS))
    levels = np.rint(255 * (1 - share)).clip(0, 255)
    # Only the top may stand on the top level, or a near rival with a smaller id would decode as the most likely token.
    return np.where((depth > 0) & (levels == 255), 254, levels)


def _heights(arrays: Mapping[str, Array], used: Array) -> Array:
    """Nats below the top [n, k] float64, -inf in unused places."""
    if "range" in arrays:
        span = arrays["range"].astype(np.float64)
        if not ((span >= 0) & np.isfinite(span)).all():
            raise damaged("range", "it holds a number that is no distance")
        wide, levels = span[:, None], _filled(used, arrays["value"], 0.0).astype(np.float64)
        return np.where(used, -BEND_NATS * wide * (255 - levels) / (BEND_NATS * 255 + wide * levels), -np.inf)
    return _filled(used, arrays["value"], -np.inf).astype(np.float64)


def _normalised(height: Array, used: Array, tail: Array) -> Array:
    """Log-probabilities [n, k] float32 such that entries and tail sum to one."""
    filled = used.any(axis=1)
    top = height.max(axis=1, initial=-np.inf)
    if (tail[filled] >= 0).any():
        raise damaged("tail", "it leaves no probability to the entries of a position")
    total = np.exp(height - np.where(filled, top, 0.0)[:, None]).sum(axis=1)
    kept = np.log(-np.expm1(np.minimum(tail.astype(np.float64), 0.0)))
    shift = np.where(filled, kept - np.log(total) - top, 0.0)
    return (height + shift[:, None]).astype(np.float32)


def _ids(gaps: Array, used: Array, vocabulary_size: int) -> Array:
    """Token ids [n, k] int64 from gaps, -1 in unused places."""
    ids = np.where(used, np.cumsum(_filled(used, gaps.astype(np.int64) + 1, 0), axis=1) - 1, -1)
    if (ids >= vocabulary_size).any():
        raise damaged("gap", f"an id reaches {ids.max()}, the vocabulary has {vocabulary_size}")
    return ids


def _filled(used: Array, flat: Array, unused: float) -> Array:
    """Flat entries put where `used` says [n, k], in the same type (float32 for narrower ones)."""
    kind = np.result_type(flat.dtype, np.float32) if flat.dtype.kind != "i" else flat.dtype
    full = np.full(used.shape, unused, dtype=kind)
    full[used] = flat
    return full


def _whole(name: str, value: Any, *, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise StoreError(f"target codec: {name} is {value!r}, expected a whole number from 1 to {most}")


def _hidden_values(values: str) -> None:
    if values not in HIDDEN_BYTES:
        raise StoreError(f"hidden states: {unknown_name('values', str(values), HIDDEN_BYTES)}")


def _refuse(wrong: Any, what: str) -> None:
    if np.any(wrong):
        raise StoreError(f"targets: position {int(np.argmax(wrong))} of the block has {what}")
