"""The local half of a byte model: small transformers that work within one patch.

Patches have one to fifteen symbols, mostly four or five; padded to the longest, two thirds of the work would be for
nothing. So slots are *packed*: sequences one after the other, shortest first. Linear maps and feed-forwards run on the
packed slots as they are, and attention on dense blocks of sequences of one length, which are views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import RecipeError, unknown_name
from limbeck.nn.blocks import FeedForward, SelfAttention, linear, rms_norm

# Embeddings start small (see `SymbolEmbedding`), so their norm must not drown in the epsilon.
_EPS = 1e-12
# Two odd multipliers of 64-bit hashing; which ones does not matter.
_HASHES = (0x9E3779B1, 0x85EBCA77)


@dataclass(frozen=True)
class PackedSlots:
    """R sequences of different lengths one after the other, N slots in all, shortest first.

    starts_R: where each sequence begins, in the order they were given. ranks_R: how many stand before it. groups: how
    many sequences there are of each length, as (sequences, length).
    """

    starts_R: Tensor
    ranks_R: Tensor
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths_R: Tensor) -> PackedSlots:
        """Pack sequences of these lengths, each at least 1."""
        order_R = lengths_R.argsort(stable=True)
        sorted_R = lengths_R[order_R]
        starts_R = torch.empty_like(lengths_R).index_copy(0, order_R, sorted_R.cumsum(0) - sorted_R)
        ranks_R = torch.empty_like(order_R).index_copy(0, order_R, torch.arange(len(order_R), device=lengths_R.device))
        counts = torch.bincount(lengths_R).tolist()
        return cls(starts_R, ranks_R, tuple((count, length) for length, count in enumerate(counts) if count))

    @classmethod
    def dense(cls, sequences: int, length: int, *, device: torch.device) -> PackedSlots:
        """Sequences of one length."""
        ranks_R = torch.arange(sequences, device=device)
        return cls(ranks_R * length, ranks_R, ((sequences, length),))

    @property
    def total(self) -> int:
        """N, the number of slots."""
        return sum(count * length for count, length in self.groups)

    def split(self, x_N: Tensor) -> list[Tensor]:
        """[N, ...] as one block [sequences, length, ...] for each length. Gradients flow; nothing is copied."""
        parts = x_N.split([count * length for count, length in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    @cached_property
    def padded_places_N(self) -> Tensor:
        """Where each slot lies in rows [R, longest], flattened, sequences shortest first."""
        longest = self.groups[-1][1]
        blocks, first = [], 0
        for count, length in self.groups:
            rows = torch.arange(first, first + count, device=self.starts_R.device).unsqueeze(1)
            blocks.append((rows * longest + torch.arange(length, device=self.starts_R.device)).flatten())
            first += count
        return torch.cat(blocks)

    @cached_property
    def key_mask_RL(self) -> Tensor:
        """True at the slots of rows [R, longest] that hold something."""
        sequences, longest = len(self.starts_R), self.groups[-1][1]
        mask = torch.zeros(sequences * longest, dtype=torch.bool, device=self.starts_R.device)
        return mask.index_fill(0, self.padded_places_N, True).view(sequences, longest)


def attend_packed(attention: SelfAttention, qkv: tuple[Tensor, Tensor, Tensor], packed: PackedSlots) -> Tensor:
    """Each sequence's attention within itself, [N, H, d] three times to [N, H d]. Gradients flow.

    On a CPU, length by length without any padding; elsewhere in one padded call, since there launching a dozen small
    kernels costs more than padding does.
    """
    if not packed.groups:
        return qkv[0].flatten(1)
    if qkv[0].device.type == "cpu" or len(packed.groups) == 1:
        return attend_by_length(attention, qkv, packed)
    return attend_padded(attention, qkv, packed)


def attend_by_length(attention: SelfAttention, qkv: tuple[Tensor, Tensor, Tensor], packed: PackedSlots) -> Tensor:
    """The same, one dense call for each length."""
    blocks = zip(*(packed.split(x_NHd) for x_NHd in qkv), strict=True)
    return torch.cat([attention.attend(q, k, v).flatten(0, 1) for q, k, v in blocks])


def attend_padded(attention: SelfAttention, qkv: tuple[Tensor, Tensor, Tensor], packed: PackedSlots) -> Tensor:
    """The same in one call on rows [R, longest]."""
    mask_RL = packed.key_mask_RL
    sequences, longest = mask_RL.shape

    def padded(x_NHd: Tensor) -> Tensor:
        rows = x_NHd.new_zeros(sequences * longest, *x_NHd.shape[1:])
        return rows.index_copy(0, packed.padded_places_N, x_NHd).unflatten(0, (sequences, longest))

    mask_RQK = mask_RL.unsqueeze(1).expand(-1, longest, -1)
    if attention.causal:
        mask_RQK = mask_RQK & torch.ones(longest, longest, dtype=torch.bool, device=mask_RL.device).tril()
    q, k, v = map(padded, qkv)
    return attention.attend(q, k, v, mask_RQK).flatten(0, 1)[packed.padded_places_N]


def normalised(x_ND: Tensor) -> Tensor:
    """At root mean square 1 over the channels, without a learned factor."""
    return F.rms_norm(x_ND, x_ND.shape[-1:], eps=_EPS)


def position_table(slots: int, width: int) -> nn.Embedding:
    """Vectors of the places in a patch, as small at the start as those of symbols."""
    table = nn.Embedding(slots, width)
    nn.init.normal_(table.weight, std=1 / width)
    return table


class LocalBlock(nn.Module):
    """One pre-norm block on packed slots, with both residuals. Positions come from the embeddings alone."""

    def __init__(
        self, width: int, heads: int, feed_forward: int, *, activation: str, causal: bool, qk_norm: bool, zero_init: bool,
        dropout: float,
    ):  # fmt: skip
        super().__init__()
        scale = 0.0 if zero_init else 1.0
        self.attention_norm = rms_norm(width)
        self.attention = SelfAttention(
            width, heads, causal=causal, rope_theta=None, qk_norm=qk_norm, output_scale=scale
        )
        self.feed_forward_norm = rms_norm(width)
        self.feed_forward = FeedForward(width, feed_forward, activation=activation, output_scale=scale)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_ND: Tensor, packed: PackedSlots) -> Tensor:
        """[N, d] to [N, d]. Gradients flow everywhere."""
        y_ND = attend_packed(self.attention, self.attention.project(self.attention_norm(x_ND)), packed)
        x_ND = x_ND + self.dropout(self.attention.output(y_ND))
        return x_ND + self.dropout(self.feed_forward(self.feed_forward_norm(x_ND)))


class SymbolEmbedding(nn.Module):
    """Vectors of symbols; with `ngram_rows`, plus one for each hashed pair and triple of symbols that ends there.

    They start with standard deviation 1 / width: as the output matrix, they then make training start at the logarithm of the
    number of symbols. Only symbols of the same patch before it count, so the vector of a symbol depends on nothing after it. The table of
    pairs and triples (one for both) starts at zero. Source: hashed n-grams: arXiv:2412.09871, section 3.2.1; there for n
    of 3 to 8 in tables of half a million rows, here small.
    """

    def __init__(self, symbols: int, width: int, *, ngram_rows: int = 0):
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        nn.init.normal_(self.symbols.weight, std=1 / width)
        self.ngrams = nn.Embedding(ngram_rows, width) if ngram_rows else None
        if self.ngrams is not None:
            nn.init.zeros_(self.ngrams.weight)

    def forward(self, symbols_N: Tensor, slots_N: Tensor) -> Tensor:
        """[N, d] of symbols in reading order and their slots in their patches."""
        x_ND = self.symbols(symbols_N)
        if self.ngrams is None:
            return x_ND
        key_N = symbols_N
        for back, multiplier in enumerate(_HASHES, start=1):
            before_N = F.pad(symbols_N, (back, 0))[: len(symbols_N)]
            key_N = (key_N + (before_N + 1) * multiplier) % (1 << 40)
            row_N = (key_N ^ (key_N >> 15)) % self.ngrams.num_embeddings
            x_ND = x_ND + self.ngrams(row_N) * (slots_N >= back).unsqueeze(1).to(x_ND.dtype)
        return x_ND


class Pool(nn.Module):
    """One vector for each sequence of slots. kind: a name in `POOLS`; "attention" has one learned query."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        if kind not in POOLS:
            raise RecipeError("pool: " + unknown_name("pool", kind, POOLS))
        self.pool = POOLS[kind]
        self.query = nn.Parameter(torch.zeros(width)) if kind == "attention" else None

    def forward(self, x_ND: Tensor, packed: PackedSlots) -> Tensor:
        """[N, d] to [R, d], sequences shortest first. Gradients flow everywhere."""
        return torch.cat([self.pool(block_RLD, self.query) for block_RLD in packed.split(x_ND)])


def _mean(x_RLD: Tensor, _query: Tensor | None) -> Tensor:
    return x_RLD.mean(1)


def _max(x_RLD: Tensor, _query: Tensor | None) -> Tensor:
    return x_RLD.amax(1)


def _last(x_RLD: Tensor, _query: Tensor | None) -> Tensor:
    return x_RLD[:, -1]


def _attention(x_RLD: Tensor, query: Tensor | None) -> Tensor:
    assert query is not None
    weights_RL = torch.softmax(x_RLD @ query / query.shape[0] ** 0.5, dim=1)
    return (weights_RL.unsqueeze(1) @ x_RLD).squeeze(1)


POOLS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "mean": _mean,
    "max": _max,
    "last": _last,
    "attention": _attention,
}


class LocalEncoder(nn.Module):
    """What a patch is, as one vector: blocks that look both ways, a pool, a linear map, a norm.

    Source: the shape of arXiv:2412.09871 (local encoder) at the size of arXiv:2405.14159, with a pool for its
    cross-attention.
    """

    def __init__(self, blocks: list[LocalBlock], *, width: int, slots: int, pool: str, width_out: int):
        super().__init__()
        self.positions = position_table(slots, width)
        self.blocks = nn.ModuleList(blocks)
        self.pool = Pool(width, pool)
        self.up = linear(width, width_out)
        self.norm = rms_norm(width_out)

    def forward(self, embedded_ND: Tensor, slots_N: Tensor, packed: PackedSlots) -> Tensor:
        """Latents [R, D] of packed patches [N, d], shortest patch first. Gradients flow everywhere."""
        x_ND = normalised(embedded_ND + self.positions(slots_N))
        for block in self.blocks:
            x_ND = block(x_ND, packed)
        return self.norm(self.up(self.pool(x_ND, packed)))


@dataclass(frozen=True)
class DecoderInput:
    """What is known and what is asked about R patches that follow R states.

    known_places_I: rows of the embedded symbols that lie inside these patches (no closing ones, as nothing follows them);
    known_sequences_I, known_slots_I: of which patch, and where in it. asked_sequences_Q, standing_Q: a prediction is wanted
    in this patch when so many symbols stand in it.
    """

    known_places_I: Tensor
    known_sequences_I: Tensor
    known_slots_I: Tensor
    asked_sequences_Q: Tensor
    standing_Q: Tensor


class LocalDecoder(nn.Module):
    """The symbols of a patch one after the other, given what is known before it.

    A state becomes K prefix slots; the patch's symbols follow, and every slot sees those before it. The output of the
    last prefix slot speaks of the first symbol, that of slot j of the symbol after.
    """

    def __init__(self, blocks: list[LocalBlock], *, width: int, slots: int, prefix_slots: int, width_in: int):
        super().__init__()
        self.prefix_slots = prefix_slots
        self.down = linear(width_in, prefix_slots * width)
        self.positions = position_table(slots, width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, states_RD: Tensor, embedded_ND: Tensor, given: DecoderInput) -> Tensor:
        """Normalised outputs [Q, d] where predictions are wanted. Gradients flow everywhere."""
        prefix, sequences = self.prefix_slots, states_RD.shape[0]
        lengths_R = torch.full((sequences,), prefix, device=states_RD.device)
        lengths_R = lengths_R + torch.bincount(given.known_sequences_I, minlength=sequences)
        packed = PackedSlots.of(lengths_R)
        x_KD = self.down(states_RD).view(sequences * prefix, embedded_ND.shape[1])
        x_ID = normalised(embedded_ND[given.known_places_I] + self.positions(given.known_slots_I))
        prefix_R1 = packed.starts_R.unsqueeze(1) + torch.arange(prefix, device=states_RD.device)
        places_N = torch.cat(
            (prefix_R1.flatten(), packed.starts_R[given.known_sequences_I] + prefix + given.known_slots_I)
        )
        x_ND = torch.cat((x_KD, x_ID))[inverse_places(places_N)]
        for block in self.blocks:
            x_ND = block(x_ND, packed)
        asked_Q = packed.starts_R[given.asked_sequences_Q] + (prefix - 1) + given.standing_Q
        return normalised(x_ND[asked_Q])


def inverse_places(places_N: Tensor) -> Tensor:
    """Which entry lies at each place, when each entry's place is given."""
    return torch.empty_like(places_N).index_copy(0, places_N, torch.arange(len(places_N), device=places_N.device))
