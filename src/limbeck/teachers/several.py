"""Several teachers of one vocabulary as one: a mixture of their distributions, with weights that may differ by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import TeacherError, VocabularyError
from limbeck.core.types import Batch, DenseTargets, SparseTargets, Targets
from limbeck.teachers.base import TargetSource, Wanted, refuse_missing

RowWeights = Callable[[Batch], Tensor]
Kept = Literal["union", "common"]


@dataclass(frozen=True)
class _Answer:
    """What one teacher says of the rows it was asked about. index: its place among the teachers."""

    index: int
    rows: Tensor
    logits: DenseTargets | SparseTargets

    @property
    def kind(self) -> str:
        if isinstance(self.logits, DenseTargets):
            return "dense"
        return "top-k" if self.logits.weights_BTK is None else "sampled"

    @property
    def dense(self) -> DenseTargets:
        assert isinstance(self.logits, DenseTargets)
        return self.logits

    @property
    def sparse(self) -> SparseTargets:
        assert isinstance(self.logits, SparseTargets)
        return self.logits


class SeveralTeachers:
    """The weighted mixture of several teachers' distributions, in probability space: p = sum of w_i p_i.

    weights: one for each teacher, which are brought to the sum 1; or a callable from a batch to weights [B, I] by row, for
    routing by domain (see `weights_by_text`). A teacher is asked only about rows in which it counts. Weights by row are brought
    to the sum 1 too, and `Targets.weight_B` says what their sum was: a row of zeros has no teacher, and one that sums to
    0.5 counts half.

    Dense targets are mixed exactly, when a loss asks for them. Of sparse ones, `kept` says which entries survive:
    "union": every token that a counting teacher kept. Exact where all of them kept it; elsewhere a teacher that did not
    is taken to give it nothing, which is too little by at most its smallest kept probability, and its tail goes to the
    mixture's tail, so that masses sum to one. "common": only tokens that every counting teacher kept, all other mass in the
    tail: fewer entries, every one of them and the tail exact. For an exact mixture with all entries, mix dense targets.
    Sampled targets stay unbiased under "union": weights of a token add up (its log-probability is then a lower bound).

    Raises: TeacherError for weights that cannot be, VocabularyError when vocabularies differ.
    """

    def __init__(
        self,
        teachers: Sequence[TargetSource],
        *,
        weights: Sequence[float] | RowWeights | None = None,
        kept: Kept = "union",
        name: str | None = None,
    ):
        self.teachers = tuple(teachers)
        if not self.teachers:
            raise TeacherError("several teachers: none is named. Name at least one.")
        self.name = name or " + ".join(teacher.name for teacher in self.teachers)
        self.vocabulary_size = _common_vocabulary(self.teachers)
        self.kept = kept
        self._by_row = callable(weights)
        self._weights = _as_row_weights(weights, len(self.teachers), self.name)

    def prepare(self, wanted: Wanted) -> None:
        """Say once what will be wanted. Raises: TeacherError for all but logits."""
        refuse_missing(
            wanted, source=self.name, offers=("logits",),
            advice="Hidden states of several models cannot be mixed: take those objectives from one teacher alone.",
        )  # fmt: skip
        for teacher in self.teachers:
            teacher.prepare(wanted)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """The mixture for a batch. Raises: TeacherError when teachers hand over different kinds of targets."""
        weights_BI = self._row_weights(batch)
        total_B = weights_BI.sum(-1)
        share_BI = weights_BI / torch.where(total_B > 0, total_B, 1.0)[:, None]
        asked_BI = share_BI > 0
        # A batch in which nobody counts still needs targets of the right kind and shape.
        asked_BI[:, 0] |= ~asked_BI.any()
        answers = [self._ask(index, batch, asked_BI[:, index]) for index in range(len(self.teachers))]
        return Targets(self._mix(answers, share_BI), weight_B=total_B if self._by_row else None)

    def _row_weights(self, batch: Batch) -> Tensor:
        weights_BI = self._weights(batch).to(batch.input_ids_BT.device, torch.float32)
        expected = (len(batch.input_ids_BT), len(self.teachers))
        if tuple(weights_BI.shape) != expected:
            raise TeacherError(
                f"{self.name}: weights by row have shape {tuple(weights_BI.shape)}; {expected} was expected (rows, teachers)."
            )
        if not bool((torch.isfinite(weights_BI) & (weights_BI >= 0)).all()):
            raise TeacherError(f"{self.name}: a weight by row is negative or not a number. Weights are 0 or more.")
        return weights_BI

    def _ask(self, index: int, batch: Batch, asked_B: Tensor) -> _Answer | None:
        rows = asked_B.nonzero().flatten()
        if not len(rows):
            return None
        logits = self.teachers[index].targets(_select(batch, rows)).logits
        if logits is None:
            raise TeacherError(f"{self.teachers[index].name} handed over no distribution, so it cannot be mixed.")
        return _Answer(index, rows, logits)

    def _mix(self, answers: Sequence[_Answer | None], share_BI: Tensor) -> DenseTargets | SparseTargets:
        given = [answer for answer in answers if answer is not None]
        kinds = {answer.kind for answer in given}
        if len(kinds) > 1:
            raise TeacherError(
                f"{self.name}: teachers hand over {' and '.join(sorted(kinds))} targets, which cannot be mixed. Let all "
                "of them hand over the same kind."
            )
        return _mix_dense(given, share_BI) if kinds == {"dense"} else _mix_sparse(given, share_BI, self.kept)


def weights_by_text(weights: Sequence[float], texts: Sequence[Collection[int] | None]) -> RowWeights:
    """Each teacher's weight in the rows of the texts that it teaches (None: of all), by `Batch.sources`.

    The weights of a row are brought to the sum 1; a row of a text that nobody teaches has none.
    """

    def by_row(batch: Batch) -> Tensor:
        sources = batch.sources or (0,) * len(batch.input_ids_BT)
        rows = [
            [
                weight if taught is None or source in taught else 0.0
                for weight, taught in zip(weights, texts, strict=True)
            ]
            for source in sources
        ]
        weights_BI = torch.tensor(rows, device=batch.input_ids_BT.device)
        return weights_BI / weights_BI.sum(-1, keepdim=True).clamp(min=1e-12)

    return by_row


def _mix_dense(answers: Sequence[_Answer], share_BI: Tensor) -> DenseTargets:
    """One head over all hidden states side by side, with every row's weights behind them as further channels.

    So the weights travel with a position when a loss picks positions, and each teacher's head runs where it counts.
    """
    dense = [answer.dense for answer in answers]
    widths = [targets.hidden_BTD.shape[-1] for targets in dense]
    dtype = torch.promote_types(torch.float32, _widest(targets.hidden_BTD.dtype for targets in dense))
    shape = (len(share_BI), dense[0].hidden_BTD.shape[1], sum(widths) + len(dense))
    side_by_side = torch.zeros(shape, dtype=dtype, device=share_BI.device)
    *columns, share_column = side_by_side.split([*widths, len(dense)], dim=-1)
    for answer, targets, column_BTD in zip(answers, dense, columns, strict=True):
        column_BTD[answer.rows] = targets.hidden_BTD.to(dtype)
    share_column.copy_(share_BI[:, None, [answer.index for answer in answers]])

    @torch.no_grad()
    def head(hidden_ND: Tensor) -> Tensor:
        *hidden, share_NI = hidden_ND.split([*widths, len(dense)], dim=-1)
        # A position without any teacher gets the same logit everywhere: it says nothing of any token.
        used_NI = share_NI > 0
        used_NI[:, 0] |= ~used_NI.any(-1)
        mixed_NV = torch.empty(0)
        for index, (targets, own_ND) in enumerate(zip(dense, hidden, strict=True)):
            rows = used_NI[:, index].nonzero().flatten()
            own_RD, share_R = own_ND[rows].to(targets.hidden_BTD.dtype), share_NI[rows, index]
            log_p_RV = targets.head(own_RD).to(dtype).log_softmax(-1)
            log_p_RV = torch.where(share_R[:, None] > 0, log_p_RV + share_R.log()[:, None], 0.0)
            if index == 0:
                mixed_NV = log_p_RV.new_full((len(hidden_ND), log_p_RV.shape[-1]), -torch.inf)
            mixed_NV[rows] = torch.logaddexp(mixed_NV[rows], log_p_RV)
        return mixed_NV

    return DenseTargets(side_by_side, head)


def _mix_sparse(answers: Sequence[_Answer], share_BI: Tensor, kept: Kept) -> SparseTargets:
    """The entries of all teachers side by side, equal ids joined."""
    columns = [_weighted(answer, share_BI) for answer in answers]
    tail_BT = torch.stack([tail_BT for *_, tail_BT in columns]).logsumexp(0)
    ids_BTK, log_p_BTK, weights_BTK = (
        torch.cat(column, dim=-1) for column in list(zip(*columns, strict=True))[:3]
    )  # fmt: skip
    keepers_BTK = (log_p_BTK > -torch.inf).to(torch.int64)
    ids_BTK, place_BTK = _join(ids_BTK.masked_fill(keepers_BTK == 0, -1))
    log_p_BTK = _log_sum_at(place_BTK, log_p_BTK)
    if kept == "common":
        keepers_BTK = torch.zeros_like(keepers_BTK).scatter_add(-1, place_BTK, keepers_BTK)
        is_common_BTK = keepers_BTK == (share_BI > 0).sum(-1)[:, None, None]
        spilled_BT = torch.where(is_common_BTK, -torch.inf, log_p_BTK).logsumexp(-1)
        tail_BT = torch.logaddexp(tail_BT, spilled_BT)
        ids_BTK = torch.where(is_common_BTK, ids_BTK, -1)
        log_p_BTK = torch.where(is_common_BTK, log_p_BTK, -torch.inf)
    # A row without any teacher has all its mass in the tail: it says nothing of any token.
    tail_BT = torch.where((share_BI > 0).any(-1)[:, None], tail_BT, 0.0)
    order_BTK = log_p_BTK.argsort(dim=-1, descending=True, stable=True)
    weights = None
    if answers[0].kind == "sampled":
        weights = torch.zeros_like(weights_BTK).scatter_add(-1, place_BTK, weights_BTK).gather(-1, order_BTK)
    return SparseTargets(ids_BTK.gather(-1, order_BTK), log_p_BTK.gather(-1, order_BTK), tail_BT, weights)


def _weighted(answer: _Answer, share_BI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One teacher's ids, log-probabilities, weights and tail times its share in every row of the batch."""
    sparse = answer.sparse
    _, T, K = sparse.ids_BTK.shape
    share_R = share_BI[answer.rows, answer.index]
    ids_BTK = sparse.ids_BTK.new_full((len(share_BI), T, K), -1)
    log_p_BTK = share_BI.new_full((len(share_BI), T, K), -torch.inf)
    weights_BTK = share_BI.new_zeros((len(share_BI), T, K))
    tail_BT = share_BI.new_full((len(share_BI), T), -torch.inf)
    ids_BTK[answer.rows] = sparse.ids_BTK
    log_p_BTK[answer.rows] = sparse.log_probs_BTK.to(share_R) + share_R.log()[:, None, None]
    tail_BT[answer.rows] = sparse.tail_log_prob_BT.to(share_R) + share_R.log()[:, None]
    if sparse.weights_BTK is not None:
        weights_BTK[answer.rows] = sparse.weights_BTK.to(share_R) * share_R[:, None, None]
    return ids_BTK, log_p_BTK, weights_BTK, tail_BT


def _join(ids_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """Every different id once (the rest -1), and the place among them of each given entry; unused entries go last."""
    sorted_BTK, order_BTK = ids_BTK.masked_fill(ids_BTK < 0, torch.iinfo(torch.int64).max).sort(dim=-1)
    is_new_BTK = torch.ones_like(sorted_BTK, dtype=torch.bool)
    is_new_BTK[..., 1:] = sorted_BTK[..., 1:] != sorted_BTK[..., :-1]
    place_BTK = is_new_BTK.cumsum(-1) - 1
    used_BTK = sorted_BTK != torch.iinfo(torch.int64).max
    joined_BTK = torch.full_like(ids_BTK, -1).scatter(-1, place_BTK, torch.where(used_BTK, sorted_BTK, -1))
    return joined_BTK, torch.empty_like(place_BTK).scatter(-1, order_BTK, place_BTK)


def _log_sum_at(place_BTK: Tensor, log_p_BTK: Tensor) -> Tensor:
    """Logarithm of the sum of the entries that share a place."""
    most_BTK = torch.full_like(log_p_BTK, -torch.inf).scatter_reduce(-1, place_BTK, log_p_BTK, "amax")
    safe_BTK = torch.where(most_BTK == -torch.inf, 0.0, most_BTK)
    shifted_BTK = (log_p_BTK - safe_BTK.gather(-1, place_BTK)).exp()
    return torch.zeros_like(log_p_BTK).scatter_add(-1, place_BTK, shifted_BTK).log() + safe_BTK


def _select(batch: Batch, rows: Tensor) -> Batch:
    if len(rows) == len(batch.input_ids_BT):
        return batch
    documents, positions = batch.document_ids_BT, batch.position_ids_BT
    return Batch(
        batch.input_ids_BT[rows],
        batch.loss_mask_BT[rows],
        None if documents is None else documents[rows],
        None if positions is None else positions[rows],
        None if batch.keys is None else tuple(batch.keys[row] for row in rows.tolist()),
    )


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _common_vocabulary(teachers: Sequence[TargetSource]) -> int | None:
    sizes = {teacher.name: teacher.vocabulary_size for teacher in teachers}
    if len(set(sizes.values())) > 1:
        raise VocabularyError(
            f"several teachers must share one vocabulary, but theirs have {', '.join(f'{size} ({name})' for name, size in sizes.items())} "
            "tokens. Where the tokenizers are the same and only padding differs, give all of them one vocabulary_size."
        )
    return next(iter(sizes.values()))


def _as_row_weights(weights: Sequence[float] | RowWeights | None, count: int, name: str) -> RowWeights:
    if callable(weights):
        return weights
    shares = torch.tensor([1.0] * count if weights is None else list(weights), dtype=torch.float64)
    if len(shares) != count:
        raise TeacherError(f"{name}: {len(shares)} weights for {count} teachers. Give one weight for each.")
    if not bool((torch.isfinite(shares) & (shares >= 0)).all()) or not bool(shares.sum() > 0):
        raise TeacherError(f"{name}: weights {shares.tolist()} must be 0 or more, and one of them above 0.")
    return lambda batch: (shares / shares.sum()).float().expand(len(batch.input_ids_BT), -1)
