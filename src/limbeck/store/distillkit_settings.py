"""The settings of DistillKit's two codecs, as its configuration files say them, and the sizes that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from limbeck.core.errors import StoreError, unknown_name

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SPECIAL_TERMS = {"sqrt": torch.sqrt, "exp": torch.exp}


@dataclass(frozen=True)
class ResidualBin:
    """Consecutive residuals that share a scale: its type, bits of each element, how many elements."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    def __post_init__(self) -> None:
        _float(self.scale_dtype)
        _whole("element_bits", self.element_bits, 1, 32)
        _whole("num_elements", self.num_elements, 1, 2**16)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed elements."""
        return (self.element_bits * self.num_elements + 7) // 8


@dataclass(frozen=True)
class DistillKitSettings:
    """The words of a DistillKit `logprob_compressor` section. Raises StoreError for what cannot be.

    d: size of the vocabulary. k: entries. exact_k, exact_dtype: values stored as they are. polynomial_terms: powers of the
    rank, "sqrt" or "exp" of it. normalize_t: ranks are mapped to [0, 1].
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        _whole("d", self.d, 2, 2**24)
        _whole("k", self.k, 1, self.d)
        _whole("exact_k", self.exact_k, 0, self.k)
        _float(self.exact_dtype)
        _float(self.term_dtype)
        for term in self.polynomial_terms:
            if isinstance(term, str) and term not in SPECIAL_TERMS:
                raise StoreError(f"DistillKit settings: {unknown_name('term', term, SPECIAL_TERMS)}")
            if not isinstance(term, str):
                _whole("a power in polynomial_terms", term, -64, 64)
        if sum(item.num_elements for item in self.residual_bins) > self.k - self.exact_k:
            raise StoreError("DistillKit settings: residual_bins have more elements than k - exact_k")
        if self.exact_k < self.k and not self.polynomial_terms and not self.residual_bins:
            raise StoreError("DistillKit settings: exact_k is below k, and nothing says how the rest is stored")

    @classmethod
    def from_json(cls, value: Any) -> DistillKitSettings:
        """Settings from the section as it stands in DistillKit's YAML or JSON."""
        given = _known_keys(cls, value)
        given["polynomial_terms"] = _listed("polynomial_terms", given)
        bins = _listed("residual_bins", given)
        given["residual_bins"] = tuple(_made(ResidualBin, _known_keys(ResidualBin, item)) for item in bins)
        return _made(cls, given)

    @property
    def index_bits(self) -> int:
        """Bits of one id."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def value_bytes(self) -> int:
        """Bytes of one position's log-probabilities."""
        bins = sum(float_bytes(item.scale_dtype) + item.packed_bytes for item in self.residual_bins)
        return (
            self.exact_k * float_bytes(self.exact_dtype)
            + len(self.polynomial_terms) * float_bytes(self.term_dtype)
            + bins
        )

    @property
    def index_bytes(self) -> int:
        """Bytes of one position's ids."""
        return (self.k * self.index_bits + 7) // 8

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position as DistillKit lays it out, before any compression of the file."""
        return self.value_bytes + self.index_bytes


@dataclass(frozen=True)
class LegacySettings:
    """The words of a DistillKit `legacy_logit_compression` section. Raises StoreError for what cannot be."""

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"

    def __post_init__(self) -> None:
        _whole("vocab_size", self.vocab_size, 2, 2**24)
        _whole("k", self.k, 1, self.vocab_size)
        _whole("exact_k", self.exact_k, 0, self.k)
        _whole("polynomial_degree", self.polynomial_degree, 0, 64)
        _float(self.term_dtype)

    @classmethod
    def from_json(cls, value: Any) -> LegacySettings:
        """Settings from the section as it stands in DistillKit's YAML or JSON."""
        return _made(cls, _known_keys(cls, value))

    @property
    def index_bits(self) -> int:
        """Bits of one id."""
        return int(np.ceil(np.log2(np.float32(self.vocab_size))))

    @property
    def words(self) -> int:
        """64-bit words of one position's ids."""
        return math.ceil(self.k / (64 // self.index_bits))

    @property
    def terms(self) -> int:
        """Coefficients of one position."""
        return 0 if self.exact_k == self.k else self.polynomial_degree + 1 + int(self.with_sqrt_term)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position with values in float16 and coefficients in term_dtype, before any compression."""
        return 2 * self.exact_k + self.terms * float_bytes(self.term_dtype) + 8 * self.words


def float_bytes(kind: str) -> int:
    """Bytes of one number of a named type."""
    return FLOATS[kind].itemsize


def _float(kind: Any) -> None:
    if not isinstance(kind, str) or kind not in FLOATS:
        raise StoreError(f"DistillKit settings: {unknown_name('dtype', str(kind), FLOATS)}")


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise StoreError(f"DistillKit settings: {name} is {value!r}, expected a whole number from {least} to {most}")


def _known_keys(kind: Any, value: Any) -> dict[str, Any]:
    known = [item.name for item in fields(kind)]
    if not isinstance(value, Mapping):
        raise StoreError(f"DistillKit settings: expected a table of words, found {type(value).__name__}")
    for name in value:
        if name not in known:
            raise StoreError(f"DistillKit settings: {unknown_name('word', str(name), known)}")
    return dict(value)


def _listed(name: str, given: Mapping[str, Any]) -> tuple[Any, ...]:
    value = given.get(name) or []
    if not isinstance(value, list | tuple):
        raise StoreError(f"DistillKit settings: {name} is {value!r}, expected a list")
    return tuple(value)


def _made(kind: Any, given: dict[str, Any]) -> Any:
    try:
        return kind(**given)
    except TypeError as error:
        raise StoreError(f"DistillKit settings: {error}") from error
