"""The byte model of the Super Tiny Language Models repository, with its shapes and parameter counts, mended.

Source: Hillier et al. 2024, arXiv:2405.14159, and its code. Kept: encoder blocks that widen, whose feed-forward has no
residual; a mean over the patch; all symbols of a patch predicted at once. Mended: patches are cut without loss and end
with a symbol that is learned, the document has one, no slot of padding is read or averaged, positions are added once.
Left out: the auxiliary loss that reconstructs a patch from its own latent.
"""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.nn.blocks import FeedForward, SelfAttention, linear, rms_norm
from limbeck.nn.byte_local import DecoderInput, PackedSlots, Pool, attend_packed, position_table


class WideningBlock(nn.Module):
    """Bidirectional attention with a residual, then a feed-forward without one, which may change the width.

    Its hidden width is `feed_forward_ratio` times the width it starts from.
    """

    def __init__(
        self, width: int, width_out: int, *, heads: int, feed_forward_ratio: float, activation: str, qk_norm: bool,
        dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.attention_norm = rms_norm(width)
        self.attention = SelfAttention(width, heads, causal=False, rope_theta=None, qk_norm=qk_norm)
        self.feed_forward_norm = rms_norm(width)
        hidden = round(feed_forward_ratio * width)
        self.feed_forward = FeedForward(width, hidden, activation=activation, width_out=width_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_ND: Tensor, packed: PackedSlots) -> Tensor:
        """[N, width] to [N, width_out]. Gradients flow everywhere."""
        y_ND = attend_packed(self.attention, self.attention.project(self.attention_norm(x_ND)), packed)
        x_ND = x_ND + self.dropout(self.attention.output(y_ND))
        return self.dropout(self.feed_forward(self.feed_forward_norm(x_ND)))


def widths(width: int, width_out: int, *, layers: int) -> list[tuple[int, int]]:
    """The width into and out of each encoder block: d, 2d, 2d, ..., then the trunk's."""
    between = [width, *[2 * width] * (layers - 1)]
    return list(zip(between, [*between[1:], width_out], strict=True))


class ParallelEncoder(nn.Module):
    """What a patch is, as one vector: blocks that look both ways and widen up to the trunk's width, and a pool."""

    def __init__(self, blocks: list[WideningBlock], *, width: int, slots: int, pool: str, width_out: int):
        super().__init__()
        self.positions = position_table(slots, width)
        self.blocks = nn.ModuleList(blocks)
        self.pool = Pool(width_out, pool)

    def forward(self, embedded_ND: Tensor, slots_N: Tensor, packed: PackedSlots) -> Tensor:
        """Latents [R, D] of packed patches [N, d], shortest patch first. Gradients flow everywhere."""
        x_ND = embedded_ND + self.positions(slots_N)
        for block in self.blocks:
            x_ND = block(x_ND, packed)
        return self.pool(x_ND, packed)


class ParallelDecoder(nn.Module):
    """All symbols of the next patch from its state alone: given the state they are independent of each other."""

    def __init__(self, blocks: list[WideningBlock], *, width: int, slots: int, width_in: int):
        super().__init__()
        self.slots = slots
        self.down = linear(width_in, slots * width)
        self.positions = position_table(slots, width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, states_RD: Tensor, embedded_ND: Tensor, given: DecoderInput) -> Tensor:
        """Outputs [Q, d] where predictions are wanted; the symbols that are known do not matter. Gradients flow."""
        x_RPD = self.down(states_RD).unflatten(1, (self.slots, -1)) + self.positions.weight
        packed = PackedSlots.dense(len(states_RD), self.slots, device=states_RD.device)
        x_ND = x_RPD.flatten(0, 1)
        for block in self.blocks:
            x_ND = block(x_ND, packed)
        return x_ND[given.asked_sequences_Q * self.slots + given.standing_Q]
