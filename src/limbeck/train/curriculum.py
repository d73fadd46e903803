"""Batches made easier early in a stage: shorter rows, and shorter patches of bytes.

A curriculum is a tuple of (share of the stage, number) in order; past its last part batches are as they are. Tokens per
update never change, so every arm has the same budget. What is in force is a function of the update's number alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from limbeck.core.errors import RecipeError
from limbeck.core.symbols import EOP, SYMBOLS
from limbeck.core.types import Batch

Curriculum = tuple[tuple[float, int], ...]


def in_force(curriculum: Curriculum, step: int, steps: int) -> int | None:
    """The number that holds for update `step` (from 0) of `steps`; None past the last part."""
    passed = 0.0
    for share, number in curriculum:
        passed += share
        if step < round(passed * steps):
            return number
    return None


def eased(batch: Batch, step: int, steps: int, *, length: Curriculum, patch: Curriculum) -> Batch:
    """The global batch [B, T] of update `step` (from 0) of `steps` as the curricula have it: [B k, T / k]."""
    most_symbols = in_force(patch, step, steps)
    if most_symbols is not None:
        batch = shorter_patches(batch, most_symbols)
    divisor = in_force(length, step, steps)
    return batch if divisor is None else shorter_rows(batch, divisor)


def check_curricula(stage: str, *, length: Curriculum, patch: Curriculum, context_tokens: int) -> None:
    """Look at a stage's curricula before it begins.

    Raises: RecipeError when shares are not positive or exceed the stage, a curriculum does not go from easy to hard, or
    its numbers do not fit rows of `context_tokens`.
    """
    for name, curriculum in (("length_curriculum", length), ("patch_curriculum", patch)):
        shares, numbers = [share for share, _ in curriculum], [number for _, number in curriculum]
        if any(share <= 0 for share in shares) or sum(shares) > 1 + 1e-9:
            raise RecipeError(
                f"stages.{stage}.{name}: its shares are {shares}. Expected shares above 0 that add up to 1 at most."
            )
        if numbers != sorted(numbers, reverse=name == "length_curriculum"):
            raise RecipeError(
                f"stages.{stage}.{name}: {numbers} in this order makes the batches easier, not harder. Turn it round."
            )
    bad = [divisor for _, divisor in length if divisor < 1 or context_tokens % divisor or context_tokens // divisor < 2]
    if bad:
        raise RecipeError(
            f"stages.{stage}.length_curriculum: rows of {context_tokens} tokens cannot be cut into {bad[0]} equal rows of 2 "
            "tokens at least. Use divisors of data.context_tokens."
        )
    if any(most < 2 for _, most in patch):
        raise RecipeError(
            f"stages.{stage}.patch_curriculum: a patch has at least 2 symbols: a byte and the symbol that closes it."
        )


def shorter_rows(batch: Batch, divisor: int) -> Batch:
    """Every row [T] as `divisor` rows of T / divisor, in order: [B * divisor, T / divisor].

    A row may begin in the middle of a document, as any window may: positions count from there, and its first token is no
    target. The text stays; divisor - 1 targets a row are lost.
    Source: sequence-length warm-up: Li et al. 2021, arXiv:2108.06084. Deviation: rows are cut, not truncated, so that
    no token is skipped and a step's tokens stay the same; lengths grow in stages, not at every step.

    Raises: RecipeError when T cannot be divided, or the rows name targets in a store: those are for whole rows.
    """
    _refuse_stored(batch, "length_curriculum")
    width = batch.input_ids_BT.shape[1]
    if width % divisor:
        raise RecipeError(
            f"length_curriculum: rows of {width} tokens cannot be cut into {divisor} equal rows. Use a divisor of {width}."
        )

    def cut(tensor_BT: Tensor) -> Tensor:
        return tensor_BT.reshape(-1, width // divisor)

    mask_BT = cut(batch.loss_mask_BT).clone()
    mask_BT[:, 0] = False
    documents_BT = None if batch.document_ids_BT is None else cut(batch.document_ids_BT)
    if documents_BT is not None and bool((documents_BT == documents_BT[:, :1]).all()):
        documents_BT = None
    sources = None if batch.sources is None else tuple(source for source in batch.sources for _ in range(divisor))
    return Batch(cut(batch.input_ids_BT), mask_BT, documents_BT, _positions(documents_BT), sources=sources)


def shorter_patches(batch: Batch, most_symbols: int) -> Batch:
    """Rows of symbols [B, T] in which no patch has more than `most_symbols`, the closing EOP included.

    A longer patch is cut by EOPs after every most_symbols - 1 bytes. Rows then hold less text: what no longer fits into T
    is left out. An EOP put in counts in the loss, has the document and the source of the byte behind it. A live teacher is
    asked about these rows, in which a token may be cut in pieces that it would not write itself.
    Source: compression ratio from low to high: arXiv:2605.30080. Deviation: by rule, with no learned borders.

    Raises: RecipeError when these are no symbols of a byte-level model, or the rows name targets in a store: those are
    for the rows as they were.
    """
    _refuse_stored(batch, "patch_curriculum")
    ids_BT = batch.input_ids_BT
    if int(ids_BT.max()) >= SYMBOLS:
        raise RecipeError(
            "patch_curriculum: these rows are tokens of a vocabulary, not bytes in patches. Remove it, or train a student "
            "that reads bytes (tokenizer.segmenter)."
        )
    index_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    is_byte_BT = ids_BT < 256
    begins_BT = torch.ones_like(is_byte_BT)
    begins_BT[:, 1:] = ~is_byte_BT[:, :-1]
    if batch.document_ids_BT is not None:
        begins_BT[:, 1:] |= batch.document_ids_BT.diff(dim=1) != 0
    slot_BT = index_BT - torch.where(begins_BT, index_BT, 0).cummax(dim=1).values
    is_cut_BT = is_byte_BT & (slot_BT > 0) & (slot_BT % (most_symbols - 1) == 0)
    place_BT = index_BT + is_cut_BT.cumsum(dim=1)
    # The old symbol at or behind each new place; where it is behind, a new EOP stands.
    from_BT = torch.searchsorted(place_BT, index_BT.contiguous())
    is_new_BT = place_BT.gather(1, from_BT) != index_BT
    documents_BT = None if batch.document_ids_BT is None else batch.document_ids_BT.gather(1, from_BT)
    return replace(
        batch,
        input_ids_BT=torch.where(is_new_BT, EOP, ids_BT.gather(1, from_BT)),
        loss_mask_BT=batch.loss_mask_BT.gather(1, from_BT),
        document_ids_BT=documents_BT,
        position_ids_BT=_positions(documents_BT),
    )


def _positions(documents_BT: Tensor | None) -> Tensor | None:
    """Positions that count from zero in every document of every row."""
    if documents_BT is None:
        return None
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT.diff(dim=1) != 0
    return index_T - torch.where(begins_BT, index_T, 0).cummax(dim=1).values


def _refuse_stored(batch: Batch, option: str) -> None:
    if batch.keys is not None:
        raise RecipeError(
            f"{option}: these rows come from a target store, whose targets are for the rows as they are. Remove {option}, or "
            "learn from a live teacher or from text."
        )
