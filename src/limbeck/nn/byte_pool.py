"""A causal language model of bytes that thinks in patches.

    symbols -> local encoder -> one latent a patch -> trunk over patches -> local decoder -> the next patch's symbols

Read `BytePoolNetwork.forward` for one pass over whole rows, and `advance` for reading on from where a state left off:
the same steps, with a cache in the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.symbols import BOS, EOP, PAD, SYMBOLS
from limbeck.nn.blocks import linear
from limbeck.nn.byte_local import (
    DecoderInput,
    LocalBlock,
    LocalDecoder,
    LocalEncoder,
    PackedSlots,
    SymbolEmbedding,
    inverse_places,
)
from limbeck.nn.byte_pool_settings import BytePoolSettings
from limbeck.nn.compact import TiedHead
from limbeck.nn.patches import PatchLayout, forbidden_logit, forbidden_symbols, read_patches
from limbeck.nn.stlm_parallel import ParallelDecoder, ParallelEncoder, WideningBlock, widths
from limbeck.nn.trunk import Trunk, TrunkCache


@dataclass
class BytePoolState:
    """What is remembered of B rows: the trunk's past, each row's state, and the patch that is open.

    states_BD: after the last complete patch. begun_B: rows that have one. open_BP: symbols of the open patch, PAD after
    them.
    """

    cache: TrunkCache
    states_BD: Tensor
    begun_B: Tensor
    open_BP: Tensor

    def select(self, rows: Tensor) -> BytePoolState:
        """A state of the rows at these indices, in their order; a row may be taken several times."""
        rows = rows.to(self.states_BD.device)
        return BytePoolState(
            self.cache.select(rows), self.states_BD[rows], self.begun_B[rows], self.open_BP[rows]
        )  # fmt: skip


class BytePoolNetwork(nn.Module):
    """Logits of the next symbol at every position of rows of symbols (`core/symbols.py`).

    The state after patch s predicts patch s + 1, symbol by symbol, each given those before it. Before the first patch
    stands BOS: where a document does not begin with it, it is put in front. The end of a patch is a symbol too, hence the
    probabilities of all ways to go on add up to one. The output matrix is the symbols' embedding.
    """

    def __init__(self, settings: BytePoolSettings):
        super().__init__()
        self.settings = settings
        self.embedding = SymbolEmbedding(SYMBOLS, settings.local_width, ngram_rows=settings.ngram_rows)
        self.encoder: LocalEncoder | ParallelEncoder
        self.decoder: LocalDecoder | ParallelDecoder
        self.output: nn.Module
        if settings.mode == "stlm_parallel":
            self.encoder, self.decoder = _parallel_parts(settings)
            self.output = linear(settings.local_width, SYMBOLS)
        else:
            self.encoder, self.decoder = _local_parts(settings)
            self.output = TiedHead(self.embedding.symbols)
        self.trunk = Trunk(settings.trunk)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """Logits [B, T, V]; those at t speak of the symbol after t, and are zeros at padding.

        mask_BT: False at padding, which may stand anywhere; PAD is padding in any case. document_ids_BT: a document ends
        where the id changes; documents do not see each other. keep: only the logits [B, keep, V] of the last so many
        positions, without the work for the others. Gradients flow everywhere.
        """
        layout = self._read(ids_BT, document_ids_BT, mask_BT)
        embedded_ND = self.embedding(layout.symbols_N, layout.slots_N)
        states_BSD = self._states(layout, embedded_ND)
        return self._logits(layout, embedded_ND, _at_patches(layout, states_BSD), keep=keep)

    def patch_states(
        self, ids_BT: Tensor, *, document_ids_BT: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> tuple[Tensor, PatchLayout]:
        """The trunk's states [B, S, D] after each complete patch, and which symbols they belong to. Gradients flow."""
        layout = self._read(ids_BT, document_ids_BT, mask_BT)
        return self._states(layout, self.embedding(layout.symbols_N, layout.slots_N)), layout

    def decode(self, states_ND: Tensor, symbols_NP: Tensor) -> Tensor:
        """Logits [N, P, V] of patches that follow states: entry j predicts symbol j given the state and symbols before.

        symbols_NP: each row one patch, or its beginning, PAD after it; at most `patch_bytes` symbols. Entries at PAD are
        zeros. Gradients flow to the states too.
        """
        sequence_Q, slot_Q = (symbols_NP != PAD).nonzero(as_tuple=True)
        symbols_Q = symbols_NP[sequence_Q, slot_Q]
        known_I = (symbols_Q < PAD).nonzero().squeeze(1)
        given = DecoderInput(known_I, sequence_Q[known_I], slot_Q[known_I], sequence_Q, slot_Q)
        logits_QV = self._predict(states_ND, self.embedding(symbols_Q, slot_Q), given)
        whole_NPV = logits_QV.new_zeros(*symbols_NP.shape, SYMBOLS)
        return whole_NPV.index_put((sequence_Q, slot_Q), logits_QV)

    def start(
        self, rows: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BytePoolState:
        """The state before anything was read, by default where the parameters lie and in their type."""
        weight, width = self.embedding.symbols.weight, self.settings.trunk.width
        device = weight.device if device is None else torch.device(device)
        dtype = weight.dtype if dtype is None else dtype
        return BytePoolState(
            TrunkCache.empty(self.trunk, rows, device, dtype),
            torch.zeros(rows, width, device=device, dtype=dtype),
            torch.zeros(rows, dtype=torch.bool, device=device),
            torch.full((rows, self.settings.patch_bytes), PAD, device=device),
        )

    def advance(
        self, ids_BT: Tensor, state: BytePoolState, *, mask_BT: Tensor | None = None, keep: int | None = None
    ) -> Tensor:
        """Read on after `state`, which is changed in place; the logits [B, T, V] of the new symbols.

        Any split into calls gives what `forward` gives for the whole; rows may be padded anywhere, each goes on alone.
        keep: only the logits [B, keep, V] of the last so many positions, without the work for the others.
        """
        width = self.settings.patch_bytes
        if mask_BT is not None:
            mask_BT = F.pad(mask_BT.to(torch.bool), (width, 0), value=True)
        layout = read_patches(
            torch.cat((state.open_BP, ids_BT), dim=1), patch_bytes=width, mask_BT=mask_BT, begun_B=state.begun_B
        )
        embedded_ND = self.embedding(layout.symbols_N, layout.slots_N)
        states_CD = self._advance_trunk(layout, embedded_ND, state)
        new = ids_BT.shape[1]
        logits_BTV = self._logits(layout, embedded_ND, states_CD, keep=new if keep is None else min(keep, new))
        _remember(state, layout, states_CD)
        return logits_BTV

    def _read(self, ids_BT: Tensor, document_ids_BT: Tensor | None, mask_BT: Tensor | None) -> PatchLayout:
        return read_patches(
            ids_BT, patch_bytes=self.settings.patch_bytes, document_ids_BT=document_ids_BT, mask_BT=mask_BT
        )

    def _states(self, layout: PatchLayout, embedded_ND: Tensor) -> Tensor:
        """[B, S, D]: the trunk over all complete patches. Rows with fewer have them first, so none sees what is missing."""
        latents_CD = self._latents(layout, embedded_ND, layout.is_complete_M)
        x_BSD = _in_rows(layout, latents_CD)
        return self.trunk(x_BSD, document_ids_BS=layout.document_ids_BS) if layout.states else x_BSD

    def _latents(self, layout: PatchLayout, embedded_ND: Tensor, chosen_M: Tensor) -> Tensor:
        """What the chosen patches are, [C, D] in reading order. Virtual ones are BOS; EOP is not read, but alone."""
        device = chosen_M.device
        encoded_M = chosen_M & ~layout.is_virtual_M
        sequence_M = torch.where(encoded_M, encoded_M.long().cumsum(0) - 1, encoded_M.sum())
        read_N = encoded_M[layout.patch_N] & ((layout.symbols_N != EOP) | (layout.slots_N == 0))
        symbol_I = read_N.nonzero().squeeze(1)
        bos = torch.full((1,), BOS, device=device)
        embedded_XD = torch.cat((embedded_ND, self.embedding(bos, torch.zeros_like(bos))))
        symbol_I = F.pad(symbol_I, (0, 1), value=len(embedded_ND))
        sequence_I = torch.cat((sequence_M[layout.patch_N[symbol_I[:-1]]], encoded_M.sum().unsqueeze(0)))
        slot_I = F.pad(layout.slots_N[symbol_I[:-1]], (0, 1))
        packed = PackedSlots.of(torch.bincount(sequence_I))
        order_I = inverse_places(packed.starts_R[sequence_I] + slot_I)
        latents_RD = self.encoder(embedded_XD[symbol_I[order_I]], slot_I[order_I], packed)
        return latents_RD[packed.ranks_R[sequence_M[chosen_M]]]

    def _advance_trunk(self, layout: PatchLayout, embedded_ND: Tensor, state: BytePoolState) -> Tensor:
        """States [C, D] after all complete patches; a begun row's virtual patch has the state it was left with."""
        complete_M = layout.is_complete_M
        carried_M = layout.is_virtual_M & state.begun_B[layout.rows_M]
        new_M = complete_M & ~carried_M
        states_CD = state.states_BD[layout.rows_M[complete_M]]
        if not bool(new_M.any()):
            return states_CD
        latents_CD = self._latents(layout, embedded_ND, new_M)
        rows_B = torch.zeros_like(state.begun_B).index_fill(0, layout.rows_M[new_M], True)
        place_B = rows_B.long().cumsum(0) - 1
        row_C = place_B[layout.rows_M[new_M]]
        # Counted without the carried state: rows without holes need no packing in the trunk.
        column_C = (layout.states_M - state.begun_B.long()[layout.rows_M])[new_M]
        count, longest = int(rows_B.sum()), int(column_C.max()) + 1
        mask_NS = torch.zeros(count, longest, dtype=torch.bool, device=rows_B.device)
        mask_NS[row_C, column_C] = True
        x_NSD = latents_CD.new_zeros(count, longest, latents_CD.shape[1]).index_put((row_C, column_C), latents_CD)
        y_NSD = self.trunk(x_NSD, mask_BS=mask_NS, cache=state.cache, rows_N=rows_B.nonzero().squeeze(1))
        return states_CD.index_copy(
            0, new_M[complete_M].nonzero().squeeze(1), y_NSD[row_C, column_C].to(states_CD.dtype)
        )

    def _logits(self, layout: PatchLayout, embedded_ND: Tensor, states_CD: Tensor, *, keep: int | None) -> Tensor:
        """Logits [B, keep, V] of the last positions of rows. Patches that nobody asks about are not decoded."""
        rows, length = layout.shape
        keep = length if keep is None else min(keep, length)
        asked_N = layout.places_N % max(1, length) >= length - keep
        number_N = (layout.is_complete_M.long().cumsum(0) - 1)[layout.source_N]
        used_C = torch.zeros(len(states_CD), dtype=torch.bool, device=states_CD.device)
        used_C[number_N[asked_N]] = True
        sequence_N = (used_C.long().cumsum(0) - 1)[number_N]
        known_I = (~layout.closes_N & used_C[number_N]).nonzero().squeeze(1)
        given = DecoderInput(
            known_I, sequence_N[known_I], layout.slots_N[known_I], sequence_N[asked_N], layout.standing_N[asked_N]
        )
        logits_QV = self._predict(states_CD[used_C], embedded_ND, given)
        if len(logits_QV) == rows * keep:
            return logits_QV.view(rows, keep, SYMBOLS)
        place_Q = layout.places_N[asked_N]
        place_Q = place_Q // length * keep + place_Q % length - (length - keep)
        return logits_QV.new_zeros(rows * keep, SYMBOLS).index_copy(0, place_Q, logits_QV).view(rows, keep, SYMBOLS)

    def _predict(self, states_RD: Tensor, embedded_ND: Tensor, given: DecoderInput) -> Tensor:
        if not len(given.standing_Q):
            return states_RD.new_zeros(0, SYMBOLS)
        y_QD = self.decoder(states_RD, embedded_ND, given)
        logits_QV = self.output(y_QD)
        cap = self.settings.logit_softcap
        if cap is not None:
            logits_QV = torch.tanh(logits_QV / cap) * cap
        forbidden_PV = forbidden_symbols(self.settings.patch_bytes, device=logits_QV.device)
        return logits_QV.masked_fill(forbidden_PV[given.standing_Q], forbidden_logit(logits_QV.dtype))

    def flops_per_symbol(self, context_symbols: float, *, mean_patch_bytes: float) -> float:
        """Operations of one forward pass over `context_symbols`, divided by their number; counted as in `nn.flops`.

        mean_patch_bytes: how many bytes a patch has on average. All patches count as if they had so many.
        """
        symbols = mean_patch_bytes + 1
        total = self.trunk.flops_per_position(context_symbols / symbols) + _local_flops(self.encoder, mean_patch_bytes)
        return (total + self.flops_per_path(mean_patch_bytes)) / symbols

    def flops_per_path(self, content_bytes: float) -> float:
        """Operations of spelling out one patch of so many bytes after a state, with the logits of its symbols."""
        settings = self.settings
        slots = settings.prefix_slots + content_bytes
        if settings.mode == "stlm_parallel":
            slots = settings.patch_bytes
        return _local_flops(self.decoder, slots) + (content_bytes + 1) * 2 * SYMBOLS * settings.local_width


def _local_flops(part: nn.Module, slots: float) -> float:
    """Operations of an encoder or decoder for one patch of so many slots."""
    blocks = cast(nn.ModuleList, part.blocks)
    total = 2.0 * (_matrix_weights(part) - _matrix_weights(blocks))
    for block in blocks:
        attention = cast(LocalBlock | WideningBlock, block).attention
        seen = (slots + 1) / 2 if attention.causal else slots
        total += slots * (2 * _matrix_weights(block) + 4 * attention.heads * attention.head_width * seen)
    return total


def _matrix_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _local_parts(settings: BytePoolSettings) -> tuple[LocalEncoder, LocalDecoder]:
    def blocks(layers: int, *, causal: bool) -> list[LocalBlock]:
        return [
            LocalBlock(
                settings.local_width, settings.local_heads, cast(int, settings.local_feed_forward),
                activation=settings.local_activation, causal=causal, qk_norm=settings.qk_norm,
                zero_init=settings.zero_init, dropout=settings.dropout,
            )
            for _ in range(layers)
        ]  # fmt: skip

    width, slots = settings.local_width, settings.patch_bytes - 1
    return (
        LocalEncoder(
            blocks(settings.encoder_layers, causal=False), width=width, slots=slots, pool=settings.pool,
            width_out=settings.trunk.width,
        ),
        LocalDecoder(
            blocks(settings.decoder_layers, causal=True), width=width, slots=slots, prefix_slots=settings.prefix_slots,
            width_in=settings.trunk.width,
        ),
    )  # fmt: skip


def _parallel_parts(settings: BytePoolSettings) -> tuple[ParallelEncoder, ParallelDecoder]:
    ratio = cast(int, settings.local_feed_forward) / settings.local_width

    def block(width: int, width_out: int) -> WideningBlock:
        return WideningBlock(
            width, width_out, heads=settings.local_heads, feed_forward_ratio=ratio, activation=settings.local_activation,
            qk_norm=settings.qk_norm, dropout=settings.dropout,
        )  # fmt: skip

    width, trunk_width = settings.local_width, settings.trunk.width
    encoder = [block(*pair) for pair in widths(width, trunk_width, layers=settings.encoder_layers)]
    decoder = [block(width, width) for _ in range(settings.decoder_layers)]
    slots = settings.patch_bytes
    return (
        ParallelEncoder(encoder, width=width, slots=slots, pool=settings.pool, width_out=trunk_width),
        ParallelDecoder(decoder, width=width, slots=slots, width_in=trunk_width),
    )


def _in_rows(layout: PatchLayout, values_CD: Tensor) -> Tensor:
    """[B, S, D] of values of all complete patches, zeros where a row has fewer."""
    shape = (layout.shape[0], layout.states, values_CD.shape[1])
    if len(values_CD) == shape[0] * shape[1]:
        return values_CD.view(shape)
    return values_CD.new_zeros(shape).flatten(0, 1).index_copy(0, _state_places(layout), values_CD).view(shape)


def _at_patches(layout: PatchLayout, states_BSD: Tensor) -> Tensor:
    """[C, D] of all complete patches: the inverse."""
    return states_BSD.flatten(0, 1)[_state_places(layout)]


def _state_places(layout: PatchLayout) -> Tensor:
    return (layout.rows_M * layout.states + layout.states_M)[layout.is_complete_M]


def _remember(state: BytePoolState, layout: PatchLayout, states_CD: Tensor) -> None:
    """Keep each row's last state, and the symbols after it."""
    rows_C = layout.rows_M[layout.is_complete_M]
    is_last_C = torch.ones_like(rows_C, dtype=torch.bool)
    is_last_C[:-1] = rows_C[1:] != rows_C[:-1]
    state.states_BD = state.states_BD.index_copy(0, rows_C[is_last_C], states_CD[is_last_C].detach())
    state.begun_B = state.begun_B.index_fill(0, rows_C, True)
    is_open_N = ~layout.is_complete_M[layout.patch_N]
    state.open_BP = torch.full_like(state.open_BP, PAD)
    row_N = layout.places_N // max(1, layout.shape[1])
    state.open_BP[row_N[is_open_N], layout.slots_N[is_open_N]] = layout.symbols_N[is_open_N]
