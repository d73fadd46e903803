"""How much of its distribution a live teacher hands over: all of it, the top k, or random draws.

All three come from hidden states and a head, a few positions at a time, so that logits of a whole batch never exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import TrainingError
from limbeck.core.types import Batch, SparseTargets
from limbeck.teachers.largest import keep_largest

Head = Callable[[Tensor], Tensor]

# Logits of one call of the head, in float32: enough rows for a fast product, and little memory beside the model.
_LOGIT_BYTES = {"cpu": 64 * 2**20}
_LOGIT_BYTES_ELSEWHERE = 512 * 2**20
# On a processor what follows the head is bound by memory: this many rows of logits stay in its cache.
_CACHED_ROWS = 16


@dataclass(frozen=True)
class Dense:
    """The whole distribution, computed where and when a loss asks for it."""


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens of every position and the mass of all others."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; at least one entry must be kept")


@dataclass(frozen=True)
class Sampled:
    """Random draws from the teacher, weighted so that sums over the vocabulary are estimated without bias.

    draws: how many at every position. temperature: of the proposal the draws are taken from; 1 is the teacher itself,
    more reaches unlikely tokens more often. seed: chooses among sequences of draws.
    """

    draws: int
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; at least one draw must be taken")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")


Entries = Dense | TopK | Sampled


def top_k_targets(hidden_BTD: Tensor, head: Head, *, k: int, chunk_tokens: int) -> SparseTargets:
    """The k largest log-probabilities of every position, descending, and the log of the mass of the rest.

    The mass of the rest is summed over the rest, not taken as 1 minus the kept: it stays right to float32 down to 1e-37
    (less counts as none), and is exactly zero (-inf) when k is the vocabulary. A k above it is cut to it. The head is run
    on `chunk_tokens` positions at a time.

    Raises: TrainingError when logits are NaN or infinite.
    """
    parts = []
    for chunk_ND in hidden_BTD.flatten(0, 1).split(chunk_tokens):
        logits_NV = head(chunk_ND).float()
        nobody_N = torch.zeros(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
        parts.append(keep_largest(logits_NV, nobody_N, k=min(k, logits_NV.shape[-1])))
    columns = {name: torch.cat([part[name] for part in parts]).unflatten(0, hidden_BTD.shape[:2]) for name in parts[0]}
    _refuse_nonsense(columns["is_finite"])
    return SparseTargets(columns["ids"], columns["log_probs"], columns["tail"])


def sampled_targets(
    hidden_BTD: Tensor, head: Head, uniforms_BTN: Tensor, *, chunk_tokens: int, temperature: float = 1.0
) -> SparseTargets:
    """Draws from softmax(logits / temperature), equal ones joined; the weight of an id is count / N * p / q.

    The sum of weight * f(id) is an unbiased estimate of the sum of p * f over the vocabulary; at temperature 1 weights
    are the shares of the draws and sum to one. uniforms_BTN: numbers in [0, 1), float64, one for each draw (see
    `uniforms_of`). Ids are sorted by descending log-probability, unused places last.
    Source: arXiv:2503.16870, section 4 (random sampling). Our deviation: at temperatures other than 1 weights are not
    renormalised, which would bring a bias back.

    Raises: TrainingError when logits are NaN or infinite.
    """
    uniforms_NN = uniforms_BTN.to(hidden_BTD.device).flatten(0, 1)
    parts, row = [], 0
    for chunk_ND in hidden_BTD.flatten(0, 1).split(chunk_tokens):
        logits_NV = head(chunk_ND)
        for part in logits_NV.split(_CACHED_ROWS if logits_NV.device.type == "cpu" else chunk_tokens):
            parts.append(_sample(part.float(), uniforms_NN[row : row + len(part)], temperature))
            row += len(part)
    columns = zip(*parts, strict=True)
    ids, log_probs, tail, weights = (torch.cat(column).unflatten(0, hidden_BTD.shape[:2]) for column in columns)
    return SparseTargets(ids, log_probs, tail, weights)


def uniforms_of(batch: Batch, *, draws: int, seed: int) -> Tensor:
    """Numbers in [0, 1) for every draw at every position, float64 [B, T, draws], on the processor.

    They depend on the seed and on what a row holds (its tokens and where documents start), not on the rows beside it:
    a capture that is resumed, or a batch that is divided differently, draws the same tokens.
    """
    ids_BT = batch.input_ids_BT.cpu()
    starts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    if batch.document_ids_BT is not None:
        starts_BT[:, 1:] = (batch.document_ids_BT.diff(dim=1) != 0).cpu()
    rows = []
    for ids_T, starts_T in zip(ids_BT, starts_BT, strict=True):
        content = f"{seed} {ids_T.tolist()} {starts_T.nonzero().flatten().tolist()}".encode()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand((len(ids_T), draws), dtype=torch.float64, generator=generator))
    return torch.stack(rows)


def chunk_tokens_for(vocabulary_size: int, device: torch.device) -> int:
    """How many positions the head is run on at once: their logits take 64 MiB on a processor, 512 MiB elsewhere."""
    return max(1, _LOGIT_BYTES.get(device.type, _LOGIT_BYTES_ELSEWHERE) // (4 * vocabulary_size))


def _sample(logits_NV: Tensor, uniforms_NN: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p_NV = logits_NV.log_softmax(-1)
    _refuse_nonsense(log_p_NV.amax(-1).isfinite())
    log_q_NV = log_p_NV if temperature == 1 else (logits_NV / temperature).log_softmax(-1)
    # Float64, since in float32 the sum over a large vocabulary would lose its rarest tokens. MPS has no float64.
    wide = torch.float32 if logits_NV.device.type == "mps" else torch.float64
    cumulated_NV = log_q_NV.exp().cumsum(-1, dtype=wide)
    points_NN = uniforms_NN.to(wide) * cumulated_NV[:, -1:]
    drawn_NN = torch.searchsorted(cumulated_NV, points_NN, right=True).clamp_(max=logits_NV.shape[-1] - 1)
    ids_NN, counts_NN = _count(drawn_NN)
    used_NN = counts_NN > 0
    log_p_NN = log_p_NV.gather(-1, ids_NN).masked_fill(~used_NN, -torch.inf)
    log_q_NN = log_q_NV.gather(-1, ids_NN)
    share_NN = counts_NN.to(torch.float32) / drawn_NN.shape[-1]
    weights_NN = torch.where(used_NN, share_NN * (log_p_NN - log_q_NN).exp(), 0.0)
    rest_N = log_p_NV.exp().scatter(-1, ids_NN, 0.0).sum(-1)
    order_NN = log_p_NN.argsort(dim=-1, descending=True, stable=True)
    ids_NN = ids_NN.masked_fill(~used_NN, -1)
    return ids_NN.gather(-1, order_NN), log_p_NN.gather(-1, order_NN), rest_N.log(), weights_NN.gather(-1, order_NN)


def _count(drawn_NN: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids of every row and how often each was drawn; unused places repeat the row's first id, count 0."""
    sorted_NN = drawn_NN.sort(dim=-1).values
    is_new_NN = torch.ones_like(sorted_NN, dtype=torch.bool)
    is_new_NN[:, 1:] = sorted_NN[:, 1:] != sorted_NN[:, :-1]
    place_NN = is_new_NN.cumsum(-1) - 1
    ids_NN = sorted_NN[:, :1].repeat(1, sorted_NN.shape[1]).scatter(-1, place_NN, sorted_NN)
    return ids_NN, torch.zeros_like(place_NN).scatter_add(-1, place_NN, torch.ones_like(place_NN))


def _refuse_nonsense(is_finite: Tensor) -> None:
    if not bool(is_finite.all()):
        raise TrainingError(
            f"the teacher's logits are not numbers (NaN or infinite) at {int((~is_finite).sum())} positions. Load it in "
            "float32 or bfloat16 instead of float16, and check its weights."
        )
