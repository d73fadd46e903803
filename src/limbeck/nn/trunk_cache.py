"""What a trunk remembers of what it has read: rows of different lengths, one memory for each block that is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.nn.blocks import SelfAttention
from limbeck.nn.mixers import StatefulMixer

if TYPE_CHECKING:
    from limbeck.nn.trunk import Trunk

_SMALLEST_CAPACITY = 64


@dataclass
class KeysValues:
    """Keys and values of one attention for all rows, [B, capacity, Hkv, d]; what lies beyond a row's length is unused."""

    keys_BCGd: Tensor
    values_BCGd: Tensor

    def reserve(self, length: int) -> None:
        """See that there is room for so many entries a row, by doubling."""
        capacity = self.keys_BCGd.shape[1]
        if length <= capacity:
            return
        more = max(length, 2 * capacity, _SMALLEST_CAPACITY) - capacity

        def grown(old: Tensor) -> Tensor:
            return torch.cat((old, old.new_zeros(old.shape[0], more, *old.shape[2:])), dim=1)

        self.keys_BCGd, self.values_BCGd = grown(self.keys_BCGd), grown(self.values_BCGd)


Memory = KeysValues | list[Any]
"""Of one run of a block: attention's, or for each row the state of its mixer."""


@dataclass
class TrunkCache:
    """The past of a batch of rows, each with a length of its own. One memory for every run of a block, in order.

    Entries are appended by calling the trunk with the cache. Gradients flow through the entries of one call, never into
    the past; generate under `torch.no_grad()`. The methods that change rows give a new cache and leave this one.
    """

    memories: list[Memory]
    lengths: list[int] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def empty(trunk: Trunk, batch_rows: int, device: torch.device | str, dtype: torch.dtype) -> TrunkCache:
        """The cache of rows that have read nothing."""
        memories: list[Memory] = []
        for mixer in trunk.mixers_in_order():
            if isinstance(mixer, SelfAttention):
                shape = (batch_rows, 0, mixer.kv_heads, mixer.head_width)
                memories.append(KeysValues(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))))
            else:
                memories.append([mixer.init_state(1, device=device, dtype=dtype) for _ in range(batch_rows)])
        return TrunkCache(memories, [0] * batch_rows, torch.device(device))

    @property
    def lengths_B(self) -> Tensor:
        """How many entries each row holds."""
        return torch.tensor(self.lengths, device=self.device)

    @property
    def batch_rows(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    def select(self, indices: Tensor | Sequence[int]) -> TrunkCache:
        """A cache of these rows, in this order; a row may be taken several times."""
        rows = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        index_N = torch.tensor(rows, device=self.device, dtype=torch.long)
        memories: list[Memory] = []
        for memory in self.memories:
            if isinstance(memory, KeysValues):
                taken = (memory.keys_BCGd.index_select(0, index_N), memory.values_BCGd.index_select(0, index_N))
                memories.append(KeysValues(*taken))
            else:
                memories.append([memory[row].clone() for row in rows])
        return TrunkCache(memories, [self.lengths[row] for row in rows], self.device)

    def repeat(self, n: int) -> TrunkCache:
        """A cache in which every row stands n times, one after the other."""
        return self.select([row for row in range(self.batch_rows) for _ in range(n)])

    def clone(self) -> TrunkCache:
        """A cache that shares no memory with this one."""
        return self.repeat(1)

    def crop(self, lengths: Sequence[int] | Tensor) -> TrunkCache:
        """A cache in which each row holds its first so many entries only; it shares this one's memory.

        Raises: ValueError where a row is shorter, or the trunk has mixers with a state, which cannot be taken back.
        """
        wanted = [int(length) for length in lengths]
        if len(wanted) != self.batch_rows or any(new > old for new, old in zip(wanted, self.lengths, strict=True)):
            raise ValueError(f"crop: rows of lengths {self.lengths} cannot be cut to {wanted}")
        if wanted != self.lengths and any(isinstance(memory, list) for memory in self.memories):
            raise ValueError(
                "crop: a mixer that is no attention sums up the past in a state that cannot be taken back; clone() the cache before "
                "the entries that may have to go"
            )
        return TrunkCache(list(self.memories), wanted, self.device)

    def open(self, shape: Sequence[int], *, counts_N: list[int] | None, rows_N: Sequence[int] | None) -> Append:
        """Make ready to append entries of a shape [N, S, ...] to some rows (default: all).

        counts_N: how many of the S are there, the first ones of each; None: all.
        Raises: ValueError when a row is named twice, or there are not as many rows as are given.
        """
        rows = list(range(self.batch_rows)) if rows_N is None else list(rows_N)
        if len(set(rows)) != len(rows):
            raise ValueError(f"rows_N: a row can be appended to once in a call, got {rows}")
        if shape[0] != len(rows):
            raise ValueError(f"{shape[0]} rows of entries are given for {len(rows)} rows of the cache")
        counts = [shape[1]] * len(rows) if counts_N is None else counts_N
        return Append(self, rows, [self.lengths[row] for row in rows], counts, shape[1])


class Append:
    """One call of the trunk that appends entries to a cache; `mix_*` are called once for every block that is run."""

    def __init__(self, cache: TrunkCache, rows: list[int], lengths: list[int], counts: list[int], entries: int):
        self.cache, self.rows, self.lengths, self.counts, self.entries = cache, rows, lengths, counts, entries
        self._all_rows = rows == list(range(cache.batch_rows))
        self._even = self._all_rows and len(set(lengths)) <= 1 and all(count == entries for count in counts)
        self._longest = max((old + new for old, new in zip(lengths, counts, strict=True)), default=0)
        device = cache.device
        offset_S = torch.arange(entries, device=device)
        self.positions_NS = torch.tensor(lengths, device=device, dtype=torch.long).unsqueeze(1) + offset_S
        self._mask_NSK: Tensor | None = None
        if not self._even or (entries > 1 and lengths and lengths[0] > 0):
            self._mask_NSK = torch.arange(self._longest, device=device) <= self.positions_NS.unsqueeze(-1)
        if not self._even:
            self._rows_N = torch.tensor(rows, device=device, dtype=torch.long)
            self._real_NS = offset_S < torch.tensor(counts, device=device).unsqueeze(1)
            self._written_rows_M = self._rows_N.unsqueeze(1).expand(-1, entries)[self._real_NS]
            self._written_places_M = self.positions_NS[self._real_NS]

    def mix_attention(self, number: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values of run `number` and attend to all that the rows hold now."""
        memory = self.cache.memories[number]
        assert isinstance(memory, KeysValues)
        memory.reserve(self._longest)
        keys, memory.keys_BCGd = self._stored(memory.keys_BCGd, k)
        values, memory.values_BCGd = self._stored(memory.values_BCGd, v)
        return attention.attend(q, keys.to(q.dtype), values.to(q.dtype), self._mask_NSK)

    def _stored(self, held_BCGd: Tensor, new_NSGd: Tensor) -> tuple[Tensor, Tensor]:
        """What to attend to, [N, longest, Hkv, d], and what the cache holds from now on."""
        if torch.is_grad_enabled() and new_NSGd.requires_grad:
            held_BCGd = held_BCGd.clone()
        if self._even:
            held_BCGd[:, self._longest - self.entries : self._longest] = new_NSGd
        else:
            held_BCGd[self._written_rows_M, self._written_places_M] = new_NSGd[self._real_NS].to(held_BCGd.dtype)
        seen = held_BCGd[:, : self._longest]
        return (seen if self._all_rows else seen[self._rows_N]), held_BCGd.detach()

    def mix_state(self, number: int, mixer: StatefulMixer, hidden_NSD: Tensor) -> Tensor:
        """Continue the rows' own states of run `number`, each alone."""
        states = self.cache.memories[number]
        assert isinstance(states, list)
        outputs = []
        for place, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            out_1SD = hidden_NSD[place : place + 1, :0]
            if count:
                out_1SD, states[row] = mixer.advance(hidden_NSD[place : place + 1, :count], states[row])
            outputs.append(torch.nn.functional.pad(out_1SD, (0, 0, 0, self.entries - count)))
        return torch.cat(outputs) if len(outputs) != 1 else outputs[0]

    def close(self) -> None:
        """Count the entries, when every block has run."""
        for row, count in zip(self.rows, self.counts, strict=True):
            self.cache.lengths[row] += count
