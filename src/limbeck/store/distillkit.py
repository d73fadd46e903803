"""Read the compressed teacher logits that DistillKit writes and others have published, in both of its codecs.

A row holds token ids and, for every position, the k largest log-probabilities of the next token in descending order. Two
codecs exist:

- `DistillKitSettings` (columns `compressed_logprobs`, `bytepacked_indices`): the first `exact_k` values as floats; the rest as
  the coefficients of a curve over the rank t = 0 .. k - exact_k - 1, fitted by least squares; optionally bins of
  quantised residuals (one scale and packed integers each). With delta_encoding all this is done to first differences.
  Ids take ceil(log2 d) bits each, most significant bit first, in order of rank, padded to a byte.
- `LegacySettings` (columns `packed_indices`, `exact_values`, `coeffs`): exact float16 values; a polynomial in 1 / (t + 1); ids in
  64-bit words, as many as fit whole, the first in the lowest bits.

No tail is stored: it is what the kept mass leaves. Where the mass exceeds one (an inaccurate curve, or a legacy data set of
logits) the entries are normalised and nothing is left for a tail. Position t speaks of the token at t + 1. Settings are not in
the data; they must be those of the capture, and lengths are checked against them. Writing exists for comparison (with the
curve fitted in float64): limbeck's own stores use `codec`.

Source: https://github.com/arcee-ai/DistillKit, distillkit/compression. Torch does the arithmetic, as it does there, so that
bfloat16 and float16 round in the same places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import StoreError
from limbeck.store.codec import SparseRows
from limbeck.store.distillkit_settings import (
    FLOATS,
    SPECIAL_TERMS,
    DistillKitSettings,
    LegacySettings,
    ResidualBin,
    float_bytes,
)

LEAST_SINGULAR_VALUE = 1e-5


def read_distillkit(
    path: Path, settings: DistillKitSettings | LegacySettings
) -> Iterator[tuple[np.ndarray, SparseRows]]:
    """Rows of one Parquet file: the token ids [T] and the targets of each position.

    One row is in memory at a time besides the file's current batch. Raises StoreError, naming the file and the row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    new = isinstance(settings, DistillKitSettings)
    names = ["compressed_logprobs", "bytepacked_indices"] if new else ["packed_indices", "exact_values", "coeffs"]
    number = 0
    try:
        file = pq.ParquetFile(path)
        if missing := [name for name in ("input_ids", *names) if name not in file.schema_arrow.names]:
            raise StoreError(f"the column {missing[0]} is missing; there are {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=1, columns=["input_ids", *names]):
            ids = _numbers(batch.column("input_ids").flatten()).astype(np.int64)
            arrays = [_table(batch.column(name)) for name in names]
            if isinstance(settings, DistillKitSettings):
                yield ids, decode_distillkit(*arrays, settings=settings)
            else:
                yield ids, decode_legacy(*arrays, settings=settings)
            number += 1
    except (StoreError, OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}, row {number}: {error}") from error


def decode_distillkit(compressed_logprobs: Any, bytepacked_indices: Any, *, settings: DistillKitSettings) -> SparseRows:
    """Targets of n positions from DistillKit's bytes [n, value_bytes] and [n, index_bytes].

    Raises StoreError when the widths do not fit the settings, an id is outside the vocabulary or a value is NaN.
    """
    octets = _bytes("compressed_logprobs", compressed_logprobs, settings.value_bytes)
    packed = _bytes("bytepacked_indices", bytepacked_indices, settings.index_bytes)
    if len(octets) != len(packed):
        raise StoreError(f"DistillKit data: {len(octets)} positions with values, {len(packed)} with ids")
    exact_type, term_type = FLOATS[settings.exact_dtype], FLOATS[settings.term_dtype]
    rest = settings.k - settings.exact_k
    exact, octets = _take(octets, settings.exact_k, settings.exact_dtype)
    coefficients, octets = _take(octets, len(settings.polynomial_terms), settings.term_dtype)
    residuals = []
    for item in settings.residual_bins:
        scale, octets = _take(octets, 1, item.scale_dtype)
        steps = _unpacked(octets[:, : item.packed_bytes], item.element_bits, item.num_elements)
        octets = octets[:, item.packed_bytes :]
        residuals.append(_residuals(torch.from_numpy(steps), scale, item))
    left = rest - sum(item.num_elements for item in settings.residual_bins)
    residual = torch.cat([*residuals, torch.zeros(len(exact), left)], dim=-1)
    approximate = residual.to(exact_type)
    if settings.polynomial_terms:
        basis_RK = _basis(settings.polynomial_terms, rest, term_type, settings.normalize_t)
        approximate = (basis_RK * coefficients[:, None, :]).sum(-1) + approximate
    values = torch.cat([exact.to(exact_type), approximate], dim=-1)
    if settings.delta_encoding:
        values = values.float().cumsum(-1).to(exact_type)
    ids = _unpacked(packed, settings.index_bits, settings.k)
    return _rows(ids, values.float().numpy(), settings.d)


def decode_legacy(packed_indices: Any, exact_values: Any, coeffs: Any, *, settings: LegacySettings) -> SparseRows:
    """Targets of n positions from the legacy columns [n, words], [n, exact_k] and [n, terms]."""
    words = _matrix("packed_indices", packed_indices, settings.words).astype(np.uint64)
    exact = _matrix("exact_values", exact_values, settings.exact_k).astype(np.float32)
    coefficients = torch.from_numpy(_matrix("coeffs", coeffs, settings.terms).astype(np.float32))
    if not len(words) == len(exact) == len(coefficients):
        raise StoreError("DistillKit data: its columns have different numbers of positions")
    bits = settings.index_bits
    shifts = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
    ids = ((words[:, :, None] >> shifts) & np.uint64(2**bits - 1)).reshape(len(words), -1)[:, : settings.k]
    fitted = (_legacy_basis(settings) * coefficients[:, None, :]).sum(-1)
    values = np.concatenate([exact, fitted.numpy()], axis=1)
    return _rows(ids.astype(np.int64), values, settings.vocab_size)


def encode_distillkit(ids: Any, log_probs: Any, *, settings: DistillKitSettings) -> dict[str, np.ndarray]:
    """DistillKit's bytes of n positions from ids and descending log-probabilities [n, k], without error diffusion."""
    if settings.error_diffusion:
        raise StoreError(
            "DistillKit settings: writing with error_diffusion is not supported; reading needs no such thing"
        )
    values = torch.as_tensor(np.asarray(log_probs, dtype=np.float32))
    if settings.delta_encoding:
        values = torch.cat([values[:, :1], values[:, 1:] - values[:, :-1]], dim=-1)
    parts = [_octets(values[:, : settings.exact_k].to(FLOATS[settings.exact_dtype]))]
    residual = values[:, settings.exact_k :]
    if settings.polynomial_terms:
        term_type = FLOATS[settings.term_dtype]
        basis_RK = _basis(settings.polynomial_terms, residual.shape[1], torch.float32, settings.normalize_t)
        coefficients = _fitted(residual, basis_RK).to(term_type)
        parts.append(_octets(coefficients))
        residual = residual - (basis_RK.to(term_type) * coefficients[:, None, :]).sum(-1).float()
    start = 0
    for item in settings.residual_bins:
        bin_values = residual[:, start : start + item.num_elements]
        largest = bin_values.abs().amax(-1, keepdim=True)
        half = 1 if item.element_bits == 1 else 2 ** (item.element_bits - 1)
        scale = torch.where(largest == 0, 1.0, largest / half).to(FLOATS[item.scale_dtype])
        lowest, highest = (0, 1) if item.element_bits == 1 else (-half, half - 1)
        steps = (bin_values / scale.float()).round().clamp(lowest, highest).long() - lowest
        parts += [_octets(scale), _packed(steps.numpy(), item.element_bits)]
        start += item.num_elements
    return {
        "compressed_logprobs": np.concatenate(parts, axis=1),
        "bytepacked_indices": _packed(np.asarray(ids, dtype=np.int64), settings.index_bits),
    }


def encode_legacy(ids: Any, log_probs: Any, *, settings: LegacySettings) -> dict[str, np.ndarray]:
    """The legacy columns of n positions from ids and descending log-probabilities [n, k]."""
    values = torch.as_tensor(np.asarray(log_probs, dtype=np.float32))
    coefficients = torch.zeros(len(values), 0)
    if settings.terms:
        coefficients = _fitted(values[:, settings.exact_k :], _legacy_basis(settings))
    bits, per_word = settings.index_bits, 64 // settings.index_bits
    padded = np.zeros((len(values), settings.words * per_word), dtype=np.uint64)
    padded[:, : settings.k] = np.asarray(ids)
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    return {
        "packed_indices": (padded.reshape(len(values), settings.words, per_word) << shifts).sum(-1, dtype=np.uint64),
        "exact_values": values[:, : settings.exact_k].half().numpy(),
        "coeffs": coefficients.to(FLOATS[settings.term_dtype]).float().numpy(),
    }


def _rows(ids: np.ndarray, values: np.ndarray, vocabulary_size: int) -> SparseRows:
    """Descending log-probabilities with the tail that they leave; -inf marks a place that the teacher did not fill."""
    used = values > -np.inf
    wrong = (np.isnan(values) | (values == np.inf) | (used & (ids >= vocabulary_size))).any(axis=1)
    if wrong.any():
        raise StoreError(
            f"DistillKit data: position {int(wrong.argmax())} has an id or value that cannot be; "
            "the settings are not those of the capture, or the data are damaged"
        )
    total = np.logaddexp.reduce(values.astype(np.float64), axis=1, initial=-np.inf)
    excess = np.maximum(total, 0.0)
    with np.errstate(divide="ignore"):
        tail = np.log(-np.expm1(np.minimum(total, 0.0)))
    log_probs = (values - excess[:, None]).astype(np.float32)
    order = np.argsort(-log_probs, axis=1, kind="stable")
    ids, log_probs = (np.take_along_axis(item, order, axis=1) for item in (np.where(used, ids, -1), log_probs))
    return SparseRows(ids, log_probs, tail.astype(np.float32), None)


def _basis(terms: Sequence[int | str], ranks: int, kind: torch.dtype, normalise: bool) -> Tensor:
    """Each term at every rank, [ranks, terms]."""
    points = torch.linspace(0, 1, ranks, dtype=kind) if normalise else torch.arange(ranks, dtype=kind)
    return torch.stack([SPECIAL_TERMS[term](points) if isinstance(term, str) else points**term for term in terms], -1)


def _legacy_basis(settings: LegacySettings) -> Tensor:
    points = torch.arange(settings.k - settings.exact_k, dtype=torch.float32) + 1
    sign = -1 if settings.invert_polynomial else 1
    terms = [points ** (sign * power) for power in range(settings.polynomial_degree + 1)]
    if settings.with_sqrt_term:
        terms.append(points.sqrt())
    return torch.stack(terms, dim=-1)[:, : settings.terms]


def _fitted(values_NR: Tensor, basis_RK: Tensor) -> Tensor:
    """Least-squares coefficients [n, terms], without directions whose singular value is tiny.

    In float64: powers of the rank differ by eight orders of magnitude, and in DistillKit's own float32 the small singular
    vectors drown in rounding. So these bytes are the best that the format can hold.
    """
    left, singular, right = torch.linalg.svd(basis_RK.double(), full_matrices=False)
    inverse = torch.where(singular > LEAST_SINGULAR_VALUE, 1 / singular, 0.0)
    return ((values_NR.double() @ left * inverse) @ right).float()


def _residuals(steps: Tensor, scale: Tensor, item: ResidualBin) -> Tensor:
    if item.element_bits == 1:
        return (steps.float() * 2 - 1) * scale
    return (steps - 2 ** (item.element_bits - 1)).float() * scale


def _take(octets: np.ndarray, count: int, kind: str) -> tuple[Tensor, np.ndarray]:
    """The first `count` floats of every row, and the bytes after them."""
    if count == 0:
        return torch.zeros(len(octets), 0, dtype=FLOATS[kind]), octets
    width = count * float_bytes(kind)
    taken = torch.from_numpy(octets[:, :width].flatten()).view(FLOATS[kind])
    return taken.reshape(len(octets), count), octets[:, width:]


def _octets(values: Tensor) -> np.ndarray:
    return values.contiguous().view(torch.uint8).reshape(len(values), -1).numpy()


def _unpacked(octets: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` numbers of `bits` bits from each row, most significant bit first."""
    stream = np.unpackbits(octets, axis=1, count=count * bits).reshape(len(octets), count, bits)
    return stream @ (np.int64(1) << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    stream = (numbers[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(len(numbers), -1), axis=1)


def _table(column: Any) -> np.ndarray:
    """A single row's list<list<number>> column as a matrix; positions of unequal length are refused."""
    inner = column.flatten()
    widths = inner.value_lengths().to_numpy(zero_copy_only=False)
    if len(widths) == 0:
        return np.zeros((0, 0), dtype=np.uint8)
    if inner.null_count or (widths != widths[0]).any():
        raise StoreError("positions of one row have different lengths")
    return _numbers(inner.flatten()).reshape(len(widths), int(widths[0]))


def _numbers(array: Any) -> np.ndarray:
    if array.null_count:
        raise StoreError("a number is missing")
    return array.to_numpy(zero_copy_only=False)


def _bytes(name: str, given: Any, width: int) -> np.ndarray:
    array = _matrix(name, given, width)
    if array.size and not (array.dtype.kind in "iu" and 0 <= array.min() <= array.max() <= 255):
        raise StoreError(f"DistillKit data: {name} holds numbers that are no bytes")
    return array.astype(np.uint8)


def _matrix(name: str, given: Any, width: int) -> np.ndarray:
    array = np.asarray(given)
    if len(array) == 0:
        return np.zeros((0, width), dtype=np.uint8)
    if array.ndim != 2 or array.shape[1] != width or array.dtype.kind not in "iuf":
        raise StoreError(
            f"DistillKit data: {name} has shape {array.shape}, the settings say {width} per position. "
            "They must be those of the capture (its vocabulary size included)."
        )
    return array
