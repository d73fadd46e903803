"""The trunk of a small language model: blocks of a mixer and feed-forward, some of whose weights are shared.

`TrunkSettings` is the menu; `Trunk` runs it, in one pass or continuing a `TrunkCache`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.nn.blocks import FeedForward, LowRank, Rotary, SelfAttention, rms_norm
from limbeck.nn.flops import attention_flops_per_token
from limbeck.nn.mixers import ATTENTION, MIXERS, StatefulMixer
from limbeck.nn.trunk_cache import Append, TrunkCache
from limbeck.nn.trunk_settings import Step, TrunkSettings, plan_steps, shared_parts

__all__ = ["Block", "Trunk", "TrunkCache", "TrunkSettings"]

Mixer = SelfAttention | StatefulMixer


class Block(nn.Module):
    """One layer: its norms, and the mixer and feed-forward that belong to it (None where it uses another layer's)."""

    def __init__(self, width: int, mixer: Mixer | None, feed_forward: FeedForward | None, dropout: float):
        super().__init__()
        self.mixer_norm = rms_norm(width)
        self.mixer = mixer
        self.feed_forward_norm = rms_norm(width)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, run: _Run) -> Tensor:
        """x + mixer(norm(x)), then the same with the feed-forward. Gradients flow everywhere."""
        x_BSD = x_BSD + self.dropout(run.mix(self.mixer_norm(x_BSD)))
        return x_BSD + self.dropout(run.feed(self.feed_forward_norm(x_BSD)))


class _Call(Protocol):
    """How entries are mixed in one call of the trunk: among themselves, or with those of a cache."""

    def mix_attention(self, number: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def mix_state(self, number: int, mixer: StatefulMixer, hidden_NSD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _OnePass:
    mask_BSS: Tensor | None = None
    document_ids_BS: Tensor | None = None

    def mix_attention(self, number: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attend(q, k, v, self.mask_BSS)

    def mix_state(self, number: int, mixer: StatefulMixer, hidden_NSD: Tensor) -> Tensor:
        return mixer(hidden_NSD, document_ids_BT=self.document_ids_BS)


@dataclass(frozen=True)
class _Run:
    """Run `number` of the plan: whose weights a block works with, and on what."""

    number: int
    mixer: Mixer
    output: SelfAttention | None
    feed_forward: FeedForward
    deltas: nn.ModuleDict | None
    call: _Call
    rotary: Rotary | None

    def mix(self, x_BSD: Tensor) -> Tensor:
        if not isinstance(self.mixer, SelfAttention):
            return self.call.mix_state(self.number, self.mixer, x_BSD)
        assert self.output is not None
        q, k, v = self.mixer.project(x_BSD, rotary=self.rotary, deltas=self.deltas)
        return self.output.output(self.call.mix_attention(self.number, self.mixer, q, k, v), deltas=self.deltas)

    def feed(self, x_BSD: Tensor) -> Tensor:
        return self.feed_forward(x_BSD, deltas=self.deltas)


class Trunk(nn.Module):
    """A stack of causal blocks over a sequence of vectors, by `TrunkSettings`.

    A part that several layers share is held by the first of them and by no other, so that every tensor has one name:
    it is counted once, saved once, and loads tied without further ado. `plan` says which block runs when, with whose
    parts. `residual_scales` and `input_scales` have one number for each run, `deltas` one set.
    """

    def __init__(self, settings: TrunkSettings):
        super().__init__()
        self.settings = settings
        self.plan = plan_steps(settings)
        runs = len(self.plan)
        output_scale = 0.0 if settings.zero_init else 1 / math.sqrt(2 * runs)
        outputs = {step.output for step in self.plan}
        mixers = {step.mixer for step in self.plan}
        feed_forwards = {step.feed_forward for step in self.plan}
        self.layers = nn.ModuleList(
            Block(
                settings.width,
                _mixer(settings, layer, output_scale, own_output=layer in outputs) if layer in mixers else None,
                FeedForward(
                    settings.width, settings.feed_forward, activation=settings.activation, output_scale=output_scale
                )
                if layer in feed_forwards
                else None,
                settings.dropout,
            )
            for layer in range(settings.layers)
        )
        self.deltas = nn.ModuleList(self._step_deltas(step) for step in self.plan) if settings.delta_rank else None
        self.residual_scales = nn.Parameter(torch.ones(runs)) if settings.residual_scalars else None
        self.input_scales = nn.Parameter(torch.zeros(runs)) if settings.residual_scalars else None
        self.norm = rms_norm(settings.width)

    def _block(self, layer: int) -> Block:
        return cast(Block, self.layers[layer])

    def _step_deltas(self, step: Step) -> nn.ModuleDict:
        """A low-rank change for every matrix of this run that another run uses too."""
        mixers, outputs, feed_forwards = shared_parts(self.plan)
        shared: dict[str, nn.Linear | None] = {}
        attention, output = self._block(step.mixer).mixer, self._block(step.output).mixer
        if isinstance(attention, SelfAttention) and isinstance(output, SelfAttention):
            if step.mixer in mixers:
                shared |= {"query": attention.query, "key": attention.key, "value": attention.value}
            if step.output in outputs:
                shared["out"] = output.out
        if step.feed_forward in feed_forwards:
            feed_forward = cast(FeedForward, self._block(step.feed_forward).feed_forward)
            shared |= {"up": feed_forward.up, "gate": feed_forward.gate, "down": feed_forward.down}
        rank = self.settings.delta_rank
        return nn.ModuleDict(
            {
                name: LowRank(matrix.in_features, matrix.out_features, rank)
                for name, matrix in shared.items()
                if matrix is not None
            }
        )

    def mixers_in_order(self) -> list[Mixer]:
        """The mixer of every run of the plan; one that runs several times stands there several times."""
        return [cast(Mixer, self._block(step.mixer).mixer) for step in self.plan]

    def forward(
        self,
        x_BSD: Tensor,
        *,
        document_ids_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        cache: TrunkCache | None = None,
        rows_N: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, S, D] after the final norm; entry s has seen entries 0..s of its row.

        mask_BS: True for entries that exist. The others may stand anywhere, change nothing and come back as zeros.
        document_ids_BS: a document ends where the id changes (from one existing entry to the next); documents do not
        see each other. cache: the entries are appended to these rows of it (default: to all, in order) and see what it
        holds. Positions count existing entries, within each document. Gradients flow everywhere but into the cache.

        Raises: ValueError for documents with a cache.
        """
        if cache is not None and document_ids_BS is not None:
            raise ValueError("document_ids and a cache exclude each other: run packed documents in one pass")
        if mask_BS is None or bool(mask_BS.all()):
            return self._run(x_BSD, document_ids_BS, None, cache, rows_N)
        # Entries that exist go to the front of their row: what is left behind them is after them, hence not seen.
        mask_BS = mask_BS.to(torch.bool)
        count_B = mask_BS.sum(dim=1)
        counts = count_B.tolist()
        front_BL = torch.arange(max(counts, default=0), device=x_BSD.device) < count_B.unsqueeze(1)
        if not front_BL.any():
            return torch.zeros_like(x_BSD)
        packed_BLD = x_BSD.new_zeros(*front_BL.shape, x_BSD.shape[-1])
        packed_BLD[front_BL] = x_BSD[mask_BS]
        if document_ids_BS is not None:
            packed_ids_BL = document_ids_BS.new_zeros(front_BL.shape)
            packed_ids_BL[front_BL] = document_ids_BS[mask_BS]
            document_ids_BS = packed_ids_BL
        packed_BLD = self._run(packed_BLD, document_ids_BS, counts, cache, rows_N)
        y_BSD = packed_BLD.new_zeros(x_BSD.shape)
        y_BSD[mask_BS] = packed_BLD[front_BL]
        return y_BSD

    def _run(
        self,
        x_BSD: Tensor,
        document_ids_BS: Tensor | None,
        counts: list[int] | None,
        cache: TrunkCache | None,
        rows_N: Sequence[int] | Tensor | None,
    ) -> Tensor:
        """The blocks by the plan and the final norm, on rows whose existing entries are in front."""
        call: _OnePass | Append
        if cache is not None:
            rows = rows_N.tolist() if isinstance(rows_N, Tensor) else rows_N
            call = cache.open(x_BSD.shape, counts_N=counts, rows_N=rows)
            positions_BS = call.positions_NS
        else:
            call, positions_BS = _one_pass(x_BSD, document_ids_BS)
        rotary = None
        y_BSD = x_BSD
        for number, step in enumerate(self.plan):
            if self.residual_scales is not None and self.input_scales is not None:
                y_BSD = self.residual_scales[number] * y_BSD + self.input_scales[number] * x_BSD
            mixer, output = self._block(step.mixer).mixer, self._block(step.output).mixer
            if rotary is None and isinstance(mixer, SelfAttention):
                rotary = mixer.rotary(positions_BS, dtype=x_BSD.dtype)
            run = _Run(
                number, cast(Mixer, mixer), output if isinstance(output, SelfAttention) else None,
                cast(FeedForward, self._block(step.feed_forward).feed_forward),
                None if self.deltas is None else cast(nn.ModuleDict, self.deltas[number]), call, rotary,
            )  # fmt: skip
            y_BSD = self.layers[step.layer](y_BSD, run)
        if isinstance(call, Append):
            call.close()
        return self.norm(y_BSD)

    def parameters_run(self) -> int:
        """Parameters that the same computation would have with nothing shared."""

        def size(module: nn.Module | None) -> int:
            return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

        total = size(self) - size(self.layers)
        for step in self.plan:
            block, mixer, output = (
                self._block(step.layer),
                self._block(step.mixer).mixer,
                self._block(step.output).mixer,
            )
            total += size(block.mixer_norm) + size(block.feed_forward_norm)
            total += size(cast(nn.Module, mixer)) + size(self._block(step.feed_forward).feed_forward)
            if isinstance(mixer, SelfAttention) and isinstance(output, SelfAttention):
                total += size(output.out) - size(mixer.out)
        return total

    def flops_per_position(self, context: float) -> float:
        """Operations of one forward pass over `context` entries, divided by their number; shared parts count each run.

        Counted as in `nn.flops`: matrices, mixing, deltas; norms, activations and sums are not.
        """
        total = 0.0
        matrices: list[nn.Linear | None]
        for number, step in enumerate(self.plan):
            mixer, output = self._block(step.mixer).mixer, self._block(step.output).mixer
            matrices = []
            if not isinstance(mixer, SelfAttention):
                total += cast(StatefulMixer, mixer).flops_per_token(context)
            else:
                assert isinstance(output, SelfAttention)
                matrices = [mixer.query, mixer.key, mixer.value, output.out]
                total += attention_flops_per_token(mixer.heads * mixer.head_width, context_tokens=context)
            feed_forward = cast(FeedForward, self._block(step.feed_forward).feed_forward)
            matrices += [feed_forward.up, feed_forward.gate, feed_forward.down]
            if self.deltas is not None:
                matrices += [m for m in self.deltas[number].modules() if isinstance(m, nn.Linear)]
            total += 2 * sum(matrix.weight.numel() for matrix in matrices if matrix is not None)
        return total


def _mixer(settings: TrunkSettings, layer: int, output_scale: float, *, own_output: bool) -> Mixer:
    kind = settings.mixer_of(layer)
    if kind == ATTENTION:
        return SelfAttention(
            settings.width, settings.heads, settings.kv_heads, rope_theta=settings.rope_theta,
            qk_norm=settings.qk_norm, output_scale=output_scale, own_output=own_output,
        )  # fmt: skip
    try:
        mixer = MIXERS[kind](settings.width, **settings.options_of(kind))
    except TypeError as error:
        where = "trunk.hyena" if kind == "hyena" else f"trunk.mixer_options.{kind}"
        raise RecipeError(f"{where}: {error}") from error
    if not isinstance(getattr(mixer, "out_proj", None), nn.Linear):
        raise RecipeError(f"trunk.mixers: {kind} has no out_proj, the torch.nn.Linear with which every mixer ends")
    with torch.no_grad():
        for parameter in mixer.out_proj.parameters():
            parameter.mul_(output_scale)
    return mixer


def _one_pass(x_BSD: Tensor, document_ids_BS: Tensor | None) -> tuple[_OnePass, Tensor]:
    """How entries are mixed among themselves, and their positions."""
    index_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    if document_ids_BS is None:
        return _OnePass(), index_S.unsqueeze(0)
    begins_BS = torch.zeros_like(document_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    if not begins_BS.any():
        return _OnePass(), index_S.unsqueeze(0)
    document_BS = begins_BS.cumsum(dim=1)
    mask_BSS = (document_BS.unsqueeze(2) == document_BS.unsqueeze(1)) & (index_S <= index_S.unsqueeze(1))
    positions_BS = index_S - torch.where(begins_BS, index_S, 0).cummax(dim=1).values
    return _OnePass(mask_BSS, document_BS), positions_BS
