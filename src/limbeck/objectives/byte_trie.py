"""A distribution over tokens as one over bytes and ends of patches, and back: exact distillation without a shared vocabulary.

A student that reads bytes in patches, each of which is a token of the teacher, walks down a trie of the teacher's tokens. At
a node, the next symbol's probability is the mass of the tokens below the child divided by that of all below the node; the
token that ends there is the end of the patch. The product along a token's path is its probability, so for any two models

    KL over tokens = sum over nodes of (teacher's mass of the node) * KL of the two conditionals there.

The cheap form compares conditionals at the nodes that the text itself goes through (an unbiased sample of that sum where the
text is the teacher's own). The exact form works the sum out the other way: the student's probabilities of whole patches.

Source: "trie distillation" is derived here; prefix marginals of a token model also in arXiv:2604.07466, whose byte heads
do not end patches and so are an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import unknown_name
from limbeck.core.symbols import EOP, PAD, SYMBOLS
from limbeck.core.types import SparseTargets
from limbeck.objectives.divergences import at_least_float32, log_probs
from limbeck.objectives.sparse import COMPARISONS

INSIDE, START, FULL = 0, 1, 2
"""Where in a patch a node is met: after some of its bytes, before the first, or when no further byte fits."""

PATH_DIVERGENCES = (
    "forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl", "alpha_beta",
    "total_variation",
)  # fmt: skip
"""The divergences that mean something between masses of paths and of the rest together."""

_NEARLY_NEVER = -1e30


@dataclass(frozen=True)
class TrieNodes:
    """A trie over the symbols of tokens. An entry is a token that has symbols; W of them in the order of their symbols.

    Nodes are numbered level by level from the root, 0, so that the children of node n are child_M1[n] to child_M1[n+1] - 1
    and their symbols rise. The entries below node n are low_M[n] to high_M[n] - 1; those before own_M[n] end there.
    token_W: the token of each entry. symbol_M: by which symbol a node is reached (-1: the root). All int64, on one device.
    """

    token_W: Tensor
    low_M: Tensor
    own_M: Tensor
    high_M: Tensor
    child_M1: Tensor
    symbol_M: Tensor

    def to(self, device: torch.device | str) -> TrieNodes:
        """The same on another device."""
        return TrieNodes(**{name: value.to(device) for name, value in vars(self).items()})


def entry_weights(logits_NV: Tensor, nodes: TrieNodes) -> Tensor:
    """Unnormalised probabilities [N, W] of the entries, the likeliest 1, in float64.

    logits_NV: of the teacher, with any additive constant. Tokens without an entry are left out.
    """
    logits_NW = at_least_float32(logits_NV).index_select(1, nodes.token_W)
    return (logits_NW - logits_NW.amax(dim=1, keepdim=True)).double().exp_()


def node_log_conditionals(
    weights_NW: Tensor, nodes: TrieNodes, *, row_M: Tensor, node_M: Tensor, state_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The distribution over the next symbol at M nodes, each under one of N distributions over tokens.

    weights_NW: from `entry_weights`. row_M: which of the N. state_M: INSIDE; START, where the patch may not end, so that
    only longer tokens count; FULL, where it must. A special token's symbol stands by itself and ends no patch.
    Returns log-probabilities [M, SYMBOLS] in nats, -inf for what cannot follow (all of them where no token goes on), and
    [M] the log of the share of all entries' mass from which they were computed. Every mass is a sum of its tokens' own, never a
    difference of larger sums, so that unlikely nodes are as precise as likely ones.
    """
    owner_E, symbol_E, low_E, high_E = _branches(nodes, node_M, state_M)
    mass_E = range_sums(weights_NW, row_M[owner_E], low_E, high_E)
    mass_M = weights_NW.new_zeros(len(node_M)).index_add_(0, owner_E, mass_E)
    found_MS = weights_NW.new_full((len(node_M), SYMBOLS), -math.inf)
    found_MS[owner_E, symbol_E] = mass_E.log() - mass_M.log()[owner_E]
    found_MS = torch.where((mass_M > 0).unsqueeze(-1), found_MS, -math.inf)
    return found_MS, mass_M.log() - weights_NW.sum(dim=1).log()[row_M]


def _branches(nodes: TrieNodes, node_M: Tensor, state_M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What may follow at each node: whose branch, its symbol, and the entries [low, high) that take it."""
    first_M, last_M = nodes.child_M1[node_M], nodes.child_M1[node_M + 1]
    owner_E, child_E = _ranges(first_M, torch.where(state_M == FULL, first_M, last_M))
    may_end_M = state_M != START
    ending_M = node_M[may_end_M]
    end_M = torch.where(state_M == FULL, nodes.high_M[node_M], nodes.own_M[node_M])[may_end_M]
    return (
        torch.cat((owner_E, may_end_M.nonzero().flatten())),
        torch.cat((nodes.symbol_M[child_E], torch.full_like(ending_M, EOP))),
        torch.cat((nodes.low_M[child_E], nodes.low_M[ending_M])),
        torch.cat((nodes.high_M[child_E], end_M)),
    )


def range_sums(values_NW: Tensor, row_E: Tensor, low_E: Tensor, high_E: Tensor) -> Tensor:
    """Sums [E] of values_NW[row, low:high], for many ranges, without subtracting: a small sum beside large values stays exact.

    All ranges' borders cut the values into segments, each summed once; a range is the sum of its segments.
    """
    width = values_NW.shape[1]
    ends_2E = torch.cat((row_E * width + low_E, row_E * width + high_E, row_E.new_tensor([0, values_NW.numel()])))
    border_S, place_2E = ends_2E.unique(return_inverse=True)
    segment_S = torch.segment_reduce(values_NW.flatten(), "sum", offsets=border_S)
    first_E, last_E = place_2E[: len(low_E)], place_2E[len(low_E) : -2]
    owner, segment = _ranges(first_E, last_E)
    return values_NW.new_zeros(len(low_E)).index_add_(0, owner, segment_S[segment])


def _ranges(first_E: Tensor, last_E: Tensor) -> tuple[Tensor, Tensor]:
    """The members of ranges [first, last), one after the other: which range each belongs to, and its value."""
    count_E = last_E - first_E
    owner = torch.repeat_interleave(torch.arange(len(count_E), device=count_E.device), count_E)
    begin_E = count_E.cumsum(0) - count_E
    return owner, torch.arange(len(owner), device=owner.device) - begin_E[owner] + first_E[owner]


def path_weights(weights_NW: Tensor, path_W: Tensor) -> Tensor:
    """Weights [N, W] in which neighbouring entries of one path stand together, in the first of them; 0 in the others.

    path_W: the path of each entry, -1 for none, whose weights become 0.
    """
    has_none = bool((path_W < 0).any())
    merged_NW = torch.where(path_W >= 0, weights_NW, 0.0) if has_none else weights_NW.clone()
    is_more_W = torch.zeros_like(path_W, dtype=torch.bool)
    is_more_W[1:] = path_W[1:] == path_W[:-1]
    more = is_more_W.nonzero().flatten()
    head = torch.where(is_more_W, 0, torch.arange(len(path_W), device=path_W.device)).cummax(0).values[more]
    merged_NW.index_add_(1, head, merged_NW[:, more])
    return merged_NW.index_fill_(1, more, 0.0)


def merge_paths(ids_NK: Tensor, log_probs_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Several tokens of one path as one: ids [N, K] each once (-1 in unused places), log-probabilities added up, descending.

    ids_NK: paths, -1 for none, whose log-probabilities do not matter.
    """
    last = torch.iinfo(torch.int64).max
    sorted_NK, order_NK = torch.where(ids_NK < 0, last, ids_NK).sort(dim=-1)
    probs_NK = torch.where(ids_NK < 0, -math.inf, log_probs_NK.double()).gather(-1, order_NK).exp()
    is_new_NK = torch.ones_like(sorted_NK, dtype=torch.bool)
    is_new_NK[:, 1:] = sorted_NK[:, 1:] != sorted_NK[:, :-1]
    place_NK = is_new_NK.cumsum(-1) - 1
    merged_NK = torch.zeros_like(probs_NK).scatter_add_(-1, place_NK, probs_NK)
    found_NK = torch.full_like(ids_NK, -1).scatter_(-1, place_NK, torch.where(sorted_NK == last, -1, sorted_NK))
    merged_NK, down_NK = merged_NK.sort(dim=-1, descending=True, stable=True)
    return found_NK.gather(-1, down_NK), merged_NK.log().to(log_probs_NK.dtype)


def path_log_probs(logits_RPS: Tensor, symbols_RP: Tensor, patch_R: Tensor, *, patches: int) -> tuple[Tensor, Tensor]:
    """The student's log-probability of R whole paths, and of everything else at each patch.

    logits_RPS: entry [r, j] speaks of symbol j of path r given those before it. symbols_RP: the paths, PAD after their
    end. patch_R: the patch that a path is a possible content of; the paths of one patch differ, and none begins another.
    Returns [R] and [patches] nats. The rest is summed over where the paths' tree is left, not taken from one: it stays
    exact when it is small. Gradients flow to the logits.
    """
    row_Q, slot_Q = (symbols_RP != PAD).nonzero(as_tuple=True)
    symbol_Q = symbols_RP[row_Q, slot_Q]
    log_prob_QS = log_probs(logits_RPS[row_Q, slot_Q])
    step_Q = log_prob_QS.gather(-1, symbol_Q.unsqueeze(-1)).squeeze(-1)
    through_RP = step_Q.new_zeros(symbols_RP.shape).index_put((row_Q, slot_Q), step_Q).cumsum(dim=1)
    node_Q, nodes = _shared_beginnings(symbols_RP, patch_R, row_Q, slot_Q)
    # Paths with the same beginning say the same there: any of them stands for all.
    any_U = row_Q.new_zeros(nodes).scatter_(0, node_Q, torch.arange(len(node_Q), device=node_Q.device))
    is_taken_US = torch.zeros(nodes, SYMBOLS, dtype=torch.bool, device=node_Q.device)
    is_taken_US[node_Q, symbol_Q] = True
    left_U = log_prob_QS[any_U].masked_fill(is_taken_US, _NEARLY_NEVER).logsumexp(dim=-1)
    before_U = F.pad(through_RP, (1, 0))[row_Q[any_U], slot_Q[any_U]]
    rest_N = _log_sums(left_U + before_U, patch_R[row_Q[any_U]], patches)
    return through_RP[:, -1], rest_N


def _shared_beginnings(symbols_RP: Tensor, patch_R: Tensor, row_Q: Tensor, slot_Q: Tensor) -> tuple[Tensor, int]:
    """A number [Q] for what stands before each symbol, equal where patch and symbols are, and how many there are."""
    node_RP = torch.zeros_like(symbols_RP)
    node_R, count = patch_R, 0
    for slot in range(symbols_RP.shape[1]):
        distinct_U, node_R = node_R.unique(return_inverse=True)
        node_RP[:, slot] = node_R + count
        count += len(distinct_U)
        node_R = node_R * (SYMBOLS + 1) + symbols_RP[:, slot]
    _, node_Q = node_RP[row_Q, slot_Q].unique(return_inverse=True)
    return node_Q, int(node_Q.max()) + 1


def _log_sums(values_E: Tensor, owner_E: Tensor, count: int) -> Tensor:
    """Log of the sum of exponentials of each owner's values, [count]."""
    top_N = values_E.new_full((count,), _NEARLY_NEVER).scatter_reduce(0, owner_E, values_E.detach(), "amax")
    sums_N = values_E.new_zeros(count).index_add(0, owner_E, (values_E - top_N[owner_E]).exp())
    return sums_N.log() + top_N


def path_divergence(
    name: str,
    path_log_prob_NK: Tensor,
    rest_log_prob_N: Tensor,
    targets: SparseTargets,
    *,
    temperature: float = 1.0,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """A divergence over K whole paths and, as one bucket more, all other patches together. Returns [N] nats.

    path_log_prob_NK, rest_log_prob_N: the student's; anything finite where the targets' ids are -1. targets: of N rows. With
    all paths kept it is the divergence over tokens itself. As with `missing: tail` of top-k targets, the buckets of both
    models are softened by the temperature. Gradients flow to the student only.

    Raises: ValueError for a divergence that is not of `PATH_DIVERGENCES`.
    """
    if name not in PATH_DIVERGENCES:
        raise ValueError(unknown_name("divergence of byte_trie", name, PATH_DIVERGENCES))
    kept_NK = path_log_prob_NK.masked_fill(targets.ids_BTK < 0, -math.inf)
    student_NK1 = log_probs(torch.cat((kept_NK, rest_log_prob_N.unsqueeze(-1)), dim=-1), temperature)
    tail_N1 = targets.tail_log_prob_BT.unsqueeze(-1)
    teacher_NK1 = log_probs(torch.cat((targets.log_probs_BTK, tail_N1), dim=-1), temperature)
    return COMPARISONS[name].of_log_probs(student_NK1, teacher_NK1.detach(), **dict(options or {}))
