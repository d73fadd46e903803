"""The lesson of `byte_trie`: a student that reads bytes learns a teacher's distribution over whole tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limbeck.core.errors import RecipeError, TeacherError, unknown_name
from limbeck.core.symbols import PAD
from limbeck.core.types import AlignedText, Batch, SparseTargets, Targets
from limbeck.models.projections import FeatureProjections
from limbeck.nn.patches import read_patches
from limbeck.objectives.byte_trie import PATH_DIVERGENCES, path_divergence, path_log_probs
from limbeck.objectives.chunked import take_rows
from limbeck.objectives.combine import scored_targets
from limbeck.teachers.base import TargetSource
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.lesson import LossAndTerms

BYTE_TRIE = "byte_trie"

_OWN_OPTIONS = ("divergence", "paths")  # the others are the divergence's
# Paths that the student spells out at once; what it needs for the gradient of more is worked out again when that comes.
_PATHS_AT_ONCE = 2048


class TrieLesson(DistilLesson):
    """As `DistilLesson`, and with the term `byte_trie`: where a patch begins, the student's probabilities of the teacher's
    likeliest contents of it, and of all others together, are compared with the teacher's.

    The term is nats per *token* summed over the patches whose first symbol is scored, and like all terms divided by the
    number of scored symbols, so that it is to be compared with the sum of divergences over a patch's symbols. Its options:
    divergence, one of `PATH_DIVERGENCES` (default forward_kl), and that one's own; paths is for who makes the source. A
    temperature softens the buckets, and the value is multiplied by its square.
    student: a byte-pool model (`network.trunk`, `network.decode`). source: gives `Targets.patch_tokens` and has the trie
    whose paths these are (`TrieTeacher` with paths, `StoredTriePaths`).

    Raises: TeacherError when the source knows no such paths; RecipeError for an unknown divergence or another kind of student.
    """

    def __init__(
        self, student: nn.Module, source: TargetSource | None, terms: Sequence[Term], *,
        projections: FeatureProjections | None = None, vocabulary_size: int | None = None,
    ):  # fmt: skip
        self._check(student, source, terms)
        super().__init__(student, source, terms, projections=projections, vocabulary_size=vocabulary_size)
        self._paths_CP: Tensor = source.trie.paths_CP  # type: ignore[union-attr]
        self._network: tuple[Any] = (student.network,)
        self._patch_tokens: SparseTargets | None = None
        self._states_BSD: Tensor | None = None

    @staticmethod
    def _check(student: nn.Module, source: TargetSource | None, terms: Sequence[Term]) -> None:
        for term in terms:
            divergence = term.options.get("divergence", "forward_kl")
            if term.objective == BYTE_TRIE and divergence not in PATH_DIVERGENCES:
                raise RecipeError(f"byte_trie: {unknown_name('divergence', str(divergence), PATH_DIVERGENCES)}")
            if term.objective == "chunk_likelihood":
                raise RecipeError(
                    "byte_trie and chunk_likelihood exclude each other: the one needs patches that are the teacher's tokens, the "
                    "other is for those that are not. Use byte_trie alone."
                )
        if not hasattr(source, "trie"):
            raise TeacherError(
                f"byte_trie needs a teacher that knows which tokens a patch can be; {getattr(source, 'name', 'none')} does not. "
                "Use a live teacher, or a store captured with its tokenizer, and tokenizer: {segmenter: teacher}."
            )
        if not hasattr(getattr(student, "network", None), "decode"):
            raise RecipeError(
                f"byte_trie is for students that write patches (bytepool), and {type(student).__name__} does not. Use forward_kl."
            )

    def _is_crossed(self, term: Term) -> bool:
        return term.objective == BYTE_TRIE or super()._is_crossed(term)

    def _losses(self, batch: Batch, weights: Any, *, diagnose: bool = False) -> LossAndTerms:
        with self._recording_states():
            return super()._losses(batch, weights, diagnose=diagnose)

    @contextmanager
    def _recording_states(self) -> Iterator[None]:
        """Keep what the trunk gives on the pass that gives the student's predictions."""

        def keep(_module: nn.Module, _args: Any, states_BSD: Tensor) -> None:
            self._states_BSD = states_BSD

        handle = self._network[0].trunk.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._states_BSD = self._patch_tokens = None

    def _logit_losses(
        self, batch: Batch, hidden_BTD: Tensor, targets: Targets, weights: Any, diagnose: bool
    ) -> LossAndTerms:
        self._patch_tokens = targets.patch_tokens
        return super()._logit_losses(batch, hidden_BTD, targets, weights, diagnose)

    def _aligned_loss(self, term: Term, batch: Batch, hidden_BTD: Tensor, aligned: AlignedText | None) -> Tensor:
        if term.objective != BYTE_TRIE:
            return super()._aligned_loss(term, batch, hidden_BTD, aligned)
        if self._patch_tokens is None:
            self._refuse_silence()
        states_ND, targets = self._at_patches(batch, self._patch_tokens)

        def loss(states_nD: Tensor, rows: slice) -> Tensor:
            return self._compare(term, states_nD, take_rows(targets, rows, states_nD.device))

        return _by_rows(loss, states_ND, rows_at_once=max(1, _PATHS_AT_ONCE // max(1, targets.ids_BTK.shape[-1])))

    def _refuse_silence(self) -> NoReturn:
        name = getattr(self._source[0], "name", "none")
        raise TeacherError(f"byte_trie: the teacher {name} handed over no tokens at the beginnings of patches.")

    def _at_patches(self, batch: Batch, targets: SparseTargets) -> tuple[Tensor, SparseTargets]:
        """The states [N, D] before the patches that the teacher speaks of and the batch scores, and what it says."""
        assert self._states_BSD is not None
        layout = read_patches(
            batch.input_ids_BT, patch_bytes=self._network[0].settings.patch_bytes, document_ids_BT=batch.document_ids_BT
        )
        wanted_BT = (targets.ids_BTK >= 0).any(dim=-1)
        scored_BT = torch.zeros_like(batch.loss_mask_BT)
        scored_BT[:, 1:] = batch.loss_mask_BT[:, 1:] & wanted_BT[:, :-1]
        row_N, place_N = scored_BT[:, 1:].nonzero(as_tuple=True)
        chosen = scored_targets(targets, scored_BT)
        assert isinstance(chosen, SparseTargets)
        return self._states_BSD[row_N, layout.state_BT[row_N, place_N]], chosen

    def _compare(self, term: Term, states_nD: Tensor, targets: SparseTargets) -> Tensor:
        """The term's sum over some patches."""
        patch_R, place_R = (targets.ids_BTK >= 0).nonzero(as_tuple=True)
        self._paths_CP = self._paths_CP.to(states_nD.device)
        symbols_RP = self._paths_CP[targets.ids_BTK[patch_R, place_R]].long()
        symbols_RP = symbols_RP[:, : int((symbols_RP != PAD).sum(dim=1).max())]
        logits_RPS = self._network[0].decode(states_nD[patch_R], symbols_RP)
        path_R, rest_n = path_log_probs(logits_RPS, symbols_RP, patch_R, patches=len(states_nD))
        path_nK = path_R.new_zeros(targets.ids_BTK.shape).index_put((patch_R, place_R), path_R)
        options = {name: value for name, value in term.options.items() if name not in _OWN_OPTIONS}
        nats_n = path_divergence(
            term.options.get("divergence", "forward_kl"),
            path_nK,
            rest_n,
            targets,
            temperature=term.temperature,
            options=options,
        )
        return term.temperature**2 * nats_n.sum()


def _by_rows(loss: Callable[[Tensor, slice], Tensor], states_ND: Tensor, *, rows_at_once: int) -> Tensor:
    """The sum of `loss` over rows, a few at a time; more than that are worked out again in the backward pass."""
    count = len(states_ND)
    if count == 0:
        return 0.0 * states_ND.float().sum()
    parts = [slice(low, min(low + rows_at_once, count)) for low in range(0, count, rows_at_once)]
    if len(parts) == 1:
        return loss(states_ND, parts[0])
    return torch.stack(
        [checkpoint(loss, states_ND[part], part, use_reentrant=False) for part in parts]  # type: ignore[misc]
    ).sum()
