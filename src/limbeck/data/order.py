"""The order of samples: a pure function of the seed, so that a position is one integer.

Sample number n is the same on one process or many and after any resume. Each epoch over a source is a fresh
permutation; several sources are interleaved in fixed proportions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from limbeck.core.runtime import derive_seed
from limbeck.core.types import Batch

_BLOCK = 1024


class Windows(Protocol):
    """Rows of equal length, by number."""

    @property
    def context_tokens(self) -> int:
        """Tokens in each row."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers as one batch [B, T]."""


class Mixture:
    """Several window sets drawn in proportion to their size times their weight."""

    def __init__(self, sources: Sequence[Windows], *, weights: Sequence[float], seed: int):
        self.sources, self.seed = list(sources), seed
        self._pattern = interleave([len(source) * weight for source, weight in zip(sources, weights, strict=True)])
        self._totals = np.bincount(self._pattern, minlength=len(self.sources))

    def reseeded(self, seed: int) -> Mixture:
        """The same sources in another order."""
        other = Mixture.__new__(Mixture)
        other.__dict__ |= self.__dict__ | {"seed": seed}
        return other

    @property
    def context_tokens(self) -> int:
        """Tokens in each row."""
        return self.sources[0].context_tokens

    @property
    def windows(self) -> int:
        """Distinct windows in all sources together."""
        return sum(len(source) for source in self.sources)

    @property
    def tokens(self) -> int:
        """Distinct tokens in all sources together."""
        return sum(len(source) * source.context_tokens for source in self.sources)

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, window) of sample number `sample`."""
        block, within = divmod(sample, _BLOCK)
        source = int(self._pattern[within])
        turn = block * int(self._totals[source]) + int((self._pattern[:within] == source).sum())
        epoch, place = divmod(turn, len(self.sources[source]))
        return source, int(_permutation(len(self.sources[source]), derive_seed(self.seed, source, epoch))[place])

    def batch(self, first: int, count: int) -> Batch:
        """Samples `first` .. `first + count - 1` as one batch, in that order."""
        places = [self.locate(first + offset) for offset in range(count)]
        whole = concatenate([self.sources[source].rows([window]) for source, window in places])
        return replace(whole, sources=tuple(source for source, _ in places))


def interleave(shares: Sequence[float]) -> np.ndarray:
    """A block of source numbers in which source i appears in proportion to `shares[i]`, spread evenly."""
    wanted = np.asarray(shares, dtype=np.float64)
    wanted = wanted / wanted.sum()
    credit = np.zeros_like(wanted)
    pattern = np.empty(_BLOCK, dtype=np.int64)
    for place in range(_BLOCK):
        credit += wanted
        pattern[place] = int(credit.argmax())
        credit[pattern[place]] -= 1.0
    return pattern


@lru_cache(maxsize=16)
def _permutation(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)


def concatenate(parts: Sequence[Batch]) -> Batch:
    """Stack batches of the same length. A row without document ids counts as one document."""
    ids_BT = torch.cat([part.input_ids_BT for part in parts])
    mask_BT = torch.cat([part.loss_mask_BT for part in parts])
    keys = tuple(key for part in parts for key in part.keys or ()) or None
    if all(part.document_ids_BT is None for part in parts):
        return Batch(ids_BT, mask_BT, keys=keys)

    def or_default(tensor: torch.Tensor | None, part: Batch, default_T: torch.Tensor) -> torch.Tensor:
        return default_T.expand_as(part.input_ids_BT) if tensor is None else tensor

    width = ids_BT.shape[1]
    zeros_T, arange_T = torch.zeros(width, dtype=torch.long), torch.arange(width)
    documents_BT = torch.cat([or_default(part.document_ids_BT, part, zeros_T) for part in parts])
    positions_BT = torch.cat([or_default(part.position_ids_BT, part, arange_T) for part in parts])
    return Batch(ids_BT, mask_BT, documents_BT, positions_BT, keys)
