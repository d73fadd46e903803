"""Where patches lie in rows of symbols, worked out for all rows at once.

A row is a stretch of a stream of symbols (`core/symbols.py`), cut anywhere; a patch that was cut is just a patch. Real
symbols are numbered N in reading order, padding left out wherever it stands, and patches M in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS

FORBIDDEN = -1e10
"""The logit of a symbol that the grammar does not allow: finite, so that no product with a probability is NaN, and less
than the -1e9 that beam search gives to beams it has no use for yet, so that no forbidden symbol ever beats those."""


@dataclass(frozen=True)
class PatchLayout:
    """How rows of symbols [B, T] fall into patches.

    A patch is *complete* when a symbol closes it (EOP, EOD, BOS) or another patch follows it in its document. Each complete
    patch has a *state*, what is known after it; the states of a row are numbered 0, 1, ... in order. In front of every
    document that does not begin with BOS stands a virtual patch, complete and without symbols.

    places_N: b T + t of each real symbol. symbols_N, slots_N: the symbol and its place in its patch. patch_N: its patch
    among all. closes_N: whether it closes its patch. rows_M, sizes_M, documents_M: row, number of symbols, and number of
    the document (over the whole batch) of each patch. states_M: which of its row's states belongs to it; -1: incomplete.
    """

    shape: tuple[int, int]
    places_N: Tensor
    symbols_N: Tensor
    slots_N: Tensor
    patch_N: Tensor
    closes_N: Tensor
    rows_M: Tensor
    sizes_M: Tensor
    documents_M: Tensor
    states_M: Tensor

    @cached_property
    def is_complete_M(self) -> Tensor:
        """Which patches have a state."""
        return self.states_M >= 0

    @cached_property
    def is_virtual_M(self) -> Tensor:
        """Which patches hold no symbol: they stand for the beginning of a document."""
        return self.sizes_M == 0

    @cached_property
    def states(self) -> int:
        """S, the most states in a row."""
        return int(self.states_M.max()) + 1 if self.states_M.numel() else 0

    @cached_property
    def source_N(self) -> Tensor:
        """The patch whose state predicts the symbol after each one: its own where it closes it, else the one before."""
        return torch.where(self.closes_N, self.patch_N, self.patch_N - 1)

    @cached_property
    def standing_N(self) -> Tensor:
        """How many symbols stand in the patch of the symbol after each one: 0 where that one begins a patch."""
        return torch.where(self.closes_N, 0, self.slots_N + 1)

    @property
    def slot_BT(self) -> Tensor:
        """The place of each symbol in its patch, -1 at padding."""
        return self._spread(self.slots_N)

    @property
    def patch_BT(self) -> Tensor:
        """The number of each symbol's patch in its row, virtual patches counted, -1 at padding."""
        first_B = torch.full((self.shape[0],), len(self.rows_M), device=self.rows_M.device)
        number_M = torch.arange(len(self.rows_M), device=self.rows_M.device)
        first_B = first_B.scatter_reduce(0, self.rows_M, number_M, "amin")
        return self._spread((number_M - first_B[self.rows_M])[self.patch_N])

    @property
    def state_BT(self) -> Tensor:
        """Which of its row's states predicts the symbol *after* t, -1 at padding."""
        return self._spread(self.states_M[self.source_N])

    @cached_property
    def mask_BS(self) -> Tensor:
        """True where a row has a state; rows with fewer than S have them first."""
        mask_BS = torch.zeros((self.shape[0], self.states), dtype=torch.bool, device=self.rows_M.device)
        mask_BS[self.rows_M[self.is_complete_M], self.states_M[self.is_complete_M]] = True
        return mask_BS

    @cached_property
    def document_ids_BS(self) -> Tensor | None:
        """Which document each state belongs to, -1 where there is none; None when no row holds two documents."""
        if int(self.is_first_M.sum()) <= len(self.rows_M.unique_consecutive()):
            return None
        documents_BS = torch.full((self.shape[0], self.states), -1, device=self.rows_M.device)
        chosen_M = self.is_complete_M
        documents_BS[self.rows_M[chosen_M], self.states_M[chosen_M]] = self.documents_M[chosen_M]
        return documents_BS

    @property
    def is_first_M(self) -> Tensor:
        """Which patches begin a document."""
        return _differs(self.documents_M)

    def _spread(self, values_N: Tensor) -> Tensor:
        rows, length = self.shape
        spread = torch.full((rows * length,), -1, dtype=torch.long, device=values_N.device)
        return spread.index_copy(0, self.places_N, values_N).view(rows, length)


def read_patches(
    ids_BT: Tensor,
    *,
    patch_bytes: int,
    document_ids_BT: Tensor | None = None,
    mask_BT: Tensor | None = None,
    begun_B: Tensor | None = None,
) -> PatchLayout:
    """Find the patches of rows of symbols. PAD, and what `mask_BT` marks False, is not there, wherever it stands.

    patch_bytes: most symbols in a patch, the closing one included. document_ids_BT: a document ends where the id changes.
    begun_B: rows that go on from an earlier stretch: they have a virtual patch in front whatever they begin with.

    Every stream can be read, also one that breaks the grammar (which has no probability): after patch_bytes - 1 symbols
    the patch is over whatever follows, and BOS always begins a patch. What a symbol belongs to never depends on later ones.
    """
    rows, length = ids_BT.shape
    real_BT = ids_BT != PAD
    if mask_BT is not None:
        real_BT = real_BT & mask_BT.to(torch.bool)
    places_N = real_BT.flatten().nonzero().squeeze(1)
    symbols_N = ids_BT.flatten()[places_N]
    rows_N = places_N // max(1, length)
    closes_N = symbols_N >= BOS
    fresh_N = _differs(rows_N)
    if document_ids_BT is not None:
        fresh_N = fresh_N | _differs(document_ids_BT.flatten()[places_N])
    begins_N = fresh_N | (symbols_N == BOS)
    begins_N[1:] |= closes_N[:-1]
    since_N = _since(begins_N)
    begins_N = begins_N | ((since_N % (patch_bytes - 1) == 0) & (symbols_N != EOP))
    is_led_N = fresh_N & (symbols_N != BOS)
    if begun_B is not None:
        is_led_N = is_led_N | (fresh_N & begun_B[rows_N])
    patch_N = (begins_N.long() + is_led_N.long()).cumsum(0) - 1
    patches = int(patch_N[-1]) + 1 if patch_N.numel() else 0

    def of_patches(values_N: Tensor) -> Tensor:
        values_M = values_N.new_empty(patches).index_copy(0, patch_N, values_N)
        return values_M.index_copy_(0, patch_N[is_led_N] - 1, values_N[is_led_N])

    rows_M, documents_M = of_patches(rows_N), of_patches(fresh_N.long().cumsum(0) - 1)
    sizes_M = torch.bincount(patch_N, minlength=patches)
    closed_M = of_patches(torch.zeros_like(closes_N))
    closed_M[patch_N[closes_N]] = True
    is_complete_M = closed_M | (sizes_M == 0)
    is_complete_M[:-1] |= documents_M[1:] == documents_M[:-1]
    return PatchLayout(
        (rows, length), places_N, symbols_N, _since(begins_N), patch_N, closes_N, rows_M, sizes_M, documents_M,
        _number_within_rows(is_complete_M, rows_M, rows=rows),
    )  # fmt: skip


def forbidden_symbols(patch_bytes: int, *, device: torch.device | str | None = None) -> Tensor:
    """What the grammar forbids as the next symbol when n symbols stand in the patch: bool [P, V], row n.

    PAD and BOS are never predicted; no patch is empty; the end of the document stands alone; the last place is EOP's.
    """
    symbol_V = torch.arange(SYMBOLS, device=device)
    standing_P1 = torch.arange(patch_bytes, device=device).unsqueeze(1)
    is_first_P1 = standing_P1 == 0
    never_V = (symbol_V == PAD) | (symbol_V == BOS)
    out_of_place_PV = torch.where(is_first_P1, symbol_V == EOP, symbol_V == EOD)
    return never_V | out_of_place_PV | ((standing_P1 == patch_bytes - 1) & (symbol_V < PAD))


def forbidden_logit(dtype: torch.dtype) -> float:
    """`FORBIDDEN`, or half of the most negative number where the type does not reach so far."""
    return max(FORBIDDEN, torch.finfo(dtype).min / 2)


def _differs(values_N: Tensor) -> Tensor:
    """True at the first entry, and wherever an entry is not like the one before."""
    differs_N = torch.ones_like(values_N, dtype=torch.bool)
    differs_N[1:] = values_N[1:] != values_N[:-1]
    return differs_N


def _since(begins_N: Tensor) -> Tensor:
    """How many entries ago the last beginning was; the first entry is one."""
    index_N = torch.arange(len(begins_N), device=begins_N.device)
    return index_N - torch.where(begins_N, index_N, 0).cummax(0).values if len(begins_N) else index_N


def _number_within_rows(chosen_M: Tensor, rows_M: Tensor, *, rows: int) -> Tensor:
    """0, 1, ... over the chosen entries of each row, -1 for the others."""
    count_B = torch.zeros(rows, dtype=torch.long, device=rows_M.device).index_add(0, rows_M, chosen_M.long())
    before_B = count_B.cumsum(0) - count_B
    return torch.where(chosen_M, chosen_M.long().cumsum(0) - 1 - before_B[rows_M], -1)
