"""A live teacher's predictions as those of bytes and ends of patches, exactly, for a student whose patches are its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import TeacherError, TrainingError, VocabularyError
from limbeck.core.symbols import SYMBOLS
from limbeck.core.types import Batch, DenseTargets, SparseTargets, Targets
from limbeck.models.bpe_segmenter import BpeSegmenter
from limbeck.models.byte_trie import ByteTrie
from limbeck.models.heads import SplitModel
from limbeck.models.patch_tokens import PatchTokens, patch_tokens
from limbeck.models.token_bytes import leading_special_tokens, read_token_bytes
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.objectives.byte_trie import START, TrieNodes, entry_weights, node_log_conditionals, path_weights
from limbeck.teachers.base import TargetSource, Wanted, refuse_missing
from limbeck.teachers.entries import Dense, TopK, chunk_tokens_for
from limbeck.teachers.largest import largest

LEAST_MASS = 1e-12
"""Where the teacher gives less than this to all tokens that begin as the patch does, it says nothing of how they go on."""

# Distributions over tokens that are worked on at once, in float64.
_WEIGHT_BYTES = {"cpu": 2**23}
_WEIGHT_BYTES_ELSEWHERE = 2**28


class TrieTeacher:
    """What a model with tokens says about every next *symbol* of a student that reads its tokens byte by byte.

    The teacher reads each patch as one of its tokens. Its distribution over the next token is, byte by byte, one over what
    continues the patch and what ends it: the product of these along a token is the token's probability. So objectives on
    predictions mean between these two models what they mean between models that share tokens. Tokens that stand for no text,
    other than the end of text, are left out and the rest scaled up.
    Not known (`Targets.known_BT`) are a first patch that the row may have cut, bytes that no token begins with, what the
    teacher all but never says, and positions that the batch does not score.
    Of a token that is longer than a patch, the following patches are predicted by what the tokens that begin so go on with;
    where the first patch is a token by itself the student cannot see which it was, and learns the mixture.

    tokenizer: the model's. byte_tokenizer: that of the batches. entries: all symbols, or the k likeliest with a tail, as a
    target store of symbols keeps them; what is not known is then a tail alone, which every loss leaves as it is. paths:
    how many of the likeliest patch contents are handed over where a patch begins (`Targets.patch_tokens`; their ids are
    rows of `trie.paths_CP`), asked for as `Wanted.aligned`; 0 for none.

    Raises: VocabularyError when patches do not end at this tokenizer's borders, or the model has too few logits; TeacherError
    for sampled entries.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, byte_tokenizer: Any, *, entries: Dense | TopK = Dense(),  # noqa: B008 (frozen)
        paths: int = 0, name: str = "teacher",
    ):  # fmt: skip
        if not isinstance(entries, Dense | TopK):
            raise TeacherError(
                f"{name}: random draws are of tokens, and this student learns symbols, of which there are only {SYMBOLS}. Write "
                "teacher.targets: dense or top_k."
            )
        require_borders_of(tokenizer, byte_tokenizer, teacher=name)
        tokens = read_token_bytes(tokenizer)
        self.model, self.name = model.eval(), name
        self.trie = ByteTrie.of_tokenizer(tokenizer, patch_bytes=byte_tokenizer.patch_bytes)
        self._split = SplitModel(model)
        if self.trie.tokens > self._split.vocabulary_size:
            raise VocabularyError(
                f"{name}: its tokenizer has tokens up to {self.trie.tokens - 1}, but the model only {self._split.vocabulary_size} logits. "
                "They do not belong together."
            )
        self._entries, self._paths = entries, min(paths, len(self.trie.paths_CP))
        self._opening = leading_special_tokens(tokenizer) or ([] if tokens.end_id is None else [tokens.end_id])
        self._adds = {"adds_space": tokens.adds_space, "adds_to_space": tokens.adds_to_space}
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
        self._wanted = Wanted()
        self._nodes = self.trie.nodes

    @property
    def vocabulary_size(self) -> int | None:
        """How many symbols there are."""
        return SYMBOLS

    def prepare(self, wanted: Wanted) -> None:
        """Say what will be wanted. Raises: TeacherError for hidden states and the like."""
        refuse_missing(
            wanted, source=self.name, offers=("logits", "aligned") if self._paths else ("logits",),
            advice="Its hidden states stand at tokens, the student's at bytes: use objectives on predictions.",
        )  # fmt: skip
        self._wanted = wanted

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """What the model says about the next symbol wherever the batch scores it, on the batch's device.

        Raises: TrainingError when its logits are not numbers.
        """
        here = patch_tokens(batch.to("cpu"), self.trie, opening=self._opening, limit_tokens=self._limit, **self._adds)
        hidden_BUD = self._split.hidden(here.teacher_batch.to(self._split.input_device))
        # What follows needs float64 and sums of segments, which MPS has not.
        device = torch.device("cpu") if hidden_BUD.device.type == "mps" else hidden_BUD.device
        self._nodes = self._nodes.to(device)
        answer = _Answer(
            batch.input_ids_BT.numel(),
            self._wanted,
            self._paths,
            double=hidden_BUD.dtype == torch.float64,
            device=device,
        )
        for first, logits_nV in self._predictions(hidden_BUD, here):
            weights_nW = entry_weights(logits_nV.to(device), self._nodes)
            low, high = torch.searchsorted(here.patch_M, torch.tensor([first, first + len(logits_nV)])).tolist()
            if self._wanted.logits:
                self._add_symbols(answer, here, slice(low, high), weights_nW, first)
            if answer.patches is not None:
                self._add_paths(answer, here, slice(low, high), weights_nW, first)
        return answer.targets(tuple(batch.input_ids_BT.shape), self._entries, batch.input_ids_BT.device)

    def _predictions(self, hidden_BUD: Tensor, here: PatchTokens) -> Iterator[tuple[int, Tensor]]:
        """Logits that speak of the patches in order, and the number of the first: the head runs on many, then few are handed over."""
        device = hidden_BUD.device
        few = max(1, _WEIGHT_BYTES.get(device.type, _WEIGHT_BYTES_ELSEWHERE) // (8 * len(self._nodes.token_W)))
        many = max(few, chunk_tokens_for(self._split.vocabulary_size, device))
        for first in range(0, len(here.row_I), many):
            part = slice(first, first + many)
            logits_NV = self._split.head(hidden_BUD[here.row_I[part].to(device), here.source_I[part].to(device)])
            _refuse_nonsense(logits_NV, self.name)
            for low, logits_nV in enumerate(logits_NV.split(few)):
                yield first + low * few, logits_nV

    def _add_symbols(self, answer: _Answer, here: PatchTokens, part: slice, weights_nW: Tensor, first: int) -> None:
        """What follows at some positions. first: the patch that the first row of the weights belongs to."""
        place_M, row_M, node_M, state_M = (
            value[part].to(weights_nW.device)
            for value in (here.place_M, here.patch_M - first, here.node_M, here.state_M)
        )
        found_MS, mass_M = node_log_conditionals(weights_nW, self._nodes, row_M=row_M, node_M=node_M, state_M=state_M)
        is_known_M = mass_M >= math.log(LEAST_MASS)
        answer.add_symbols(place_M[is_known_M], found_MS[is_known_M])

    def _add_paths(self, answer: _Answer, here: PatchTokens, part: slice, weights_nW: Tensor, first: int) -> None:
        """The likeliest contents of the patches that begin at some of the positions."""
        device = weights_nW.device
        begins_n = part.start + (here.state_M[part] == START).nonzero().flatten()
        start_n = here.node_M[begins_n]
        before_n = torch.from_numpy(self.trie.depth_M)[start_n]
        for before in before_n.unique().tolist():
            chosen = before_n == before
            row = (here.patch_M[begins_n[chosen]] - first).to(device)
            path_W = self.trie.entry_paths[before].to(device)
            *found, is_known_n = _top_paths(
                weights_nW[row], self._nodes, path_W, start_n[chosen].to(device), self._paths
            )
            place_n = here.place_M[begins_n[chosen]].to(device)
            answer.add_paths(place_n[is_known_n], *(values[is_known_n] for values in found))


def require_borders_of(tokenizer: Any, byte_tokenizer: Any, *, teacher: str) -> None:
    """Refuse a byte tokenizer whose patches do not end where this tokenizer's tokens do. Raises: VocabularyError."""
    segmenter = getattr(byte_tokenizer, "segmenter", None)
    advice = "Write tokenizer: {segmenter: teacher}, or use chunk_likelihood, which works for any two tokenizers."
    if segmenter is None:
        raise VocabularyError(
            f"the predictions of {teacher} byte by byte are for a student that reads bytes in patches, and this one's tokenizer "
            f"({type(byte_tokenizer).__name__}) does not. {advice}"
        )
    reads = getattr(tokenizer, "patch_bytes", None)
    if reads is not None:
        raise VocabularyError(
            f"{teacher} reads bytes itself, in patches of {reads} symbols cut by the rule {tokenizer.segmenter.name}; the student's "
            f"have {byte_tokenizer.patch_bytes} and the rule {segmenter.name}. Give the student the same (tokenizer: {{segmenter: teacher}}, "
            f"with tokenizer.patch_bytes and the student's own at {reads}), and any loss on predictions compares them symbol by symbol; "
            "or use chunk_likelihood, which works for any two."
        )
    if not isinstance(segmenter, BpeSegmenter):
        raise VocabularyError(
            f"the predictions of {teacher} byte by byte are for a student whose patches end where its tokens do; here they "
            f"are cut by the rule {segmenter.name}. {advice}"
        )
    if segmenter.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise VocabularyError(
            f"the student's patches end where the tokens of {segmenter.tokenizer_name} do, and {teacher} has another tokenizer. {advice}"
        )


def _top_paths(
    weights_nW: Tensor, nodes: TrieNodes, path_W: Tensor, start_n: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The likeliest contents of a patch that begins at a node: ids and log-probabilities [n, count], descending, the log of
    the mass of all others [n], and whether there is enough mass to speak of [n]."""
    inside_nW = weights_nW
    if bool((start_n > 0).any()):
        entry_W = torch.arange(len(path_W), device=path_W.device)
        low_n1, high_n1 = nodes.own_M[start_n].unsqueeze(1), nodes.high_M[start_n].unsqueeze(1)
        inside_nW = torch.where((entry_W >= low_n1) & (entry_W < high_n1), weights_nW, 0.0)
    merged_nW = path_weights(inside_nW, path_W)
    values_nK, place_nK = largest(merged_nW, k=min(count, merged_nW.shape[1]))
    rest_n = merged_nW.scatter_(1, place_nK, 0.0).sum(dim=1)
    total_n = values_nK.sum(dim=1) + rest_n
    ids_nK = torch.where(values_nK > 0, path_W[place_nK], -1)
    is_known_n = total_n >= LEAST_MASS * weights_nW.sum(dim=1)
    log_total_n = total_n.log()
    return ids_nK, values_nK.log() - log_total_n.unsqueeze(1), rest_n.log() - log_total_n, is_known_n


class _Answer:
    """Targets of a batch, gathered position by position."""

    def __init__(self, positions: int, wanted: Wanted, paths: int, *, double: bool, device: torch.device):
        dtype = torch.float64 if double else torch.float32
        shape = (positions if wanted.logits else 0, SYMBOLS)
        self.known_N = torch.zeros(positions, dtype=torch.bool, device=device)
        self.symbols_NS = torch.full(shape, -math.log(SYMBOLS), dtype=dtype, device=device)
        self.patches = nothing_known((positions,), paths, dtype, device) if wanted.aligned else None
        self._has_logits = wanted.logits

    def add_symbols(self, place_M: Tensor, log_prob_MS: Tensor) -> None:
        """What follows these positions."""
        self.symbols_NS[place_M] = log_prob_MS.to(self.symbols_NS.dtype)
        self.known_N[place_M] = True

    def add_paths(self, place_n: Tensor, ids_nK: Tensor, log_prob_nK: Tensor, tail_n: Tensor) -> None:
        """Which patches follow these positions."""
        assert self.patches is not None
        used = slice(0, ids_nK.shape[1])
        self.patches.ids_BTK[place_n, used] = ids_nK
        self.patches.log_probs_BTK[place_n, used] = log_prob_nK.to(self.patches.log_probs_BTK.dtype)
        self.patches.tail_log_prob_BT[place_n] = tail_n.to(self.patches.tail_log_prob_BT.dtype)

    def targets(self, shape: tuple[int, ...], entries: Dense | TopK, device: torch.device) -> Targets:
        """All that was added, in the form that was asked for."""
        logits: DenseTargets | SparseTargets | None = None
        known_BT = self.known_N.view(shape).to(device) if self._has_logits else None
        if known_BT is not None:
            symbols_BTS = self.symbols_NS.view(*shape, SYMBOLS).to(device)
            logits = (
                _top_symbols(symbols_BTS, known_BT, entries.k)
                if isinstance(entries, TopK)
                else DenseTargets.from_logits(symbols_BTS)
            )
        patches = None
        if self.patches is not None:
            parts = (self.patches.ids_BTK, self.patches.log_probs_BTK, self.patches.tail_log_prob_BT)
            patches = SparseTargets(*(part.unflatten(0, shape).to(device) for part in parts))
        return Targets(logits, known_BT=known_BT, patch_tokens=patches)


def nothing_known(
    shape: tuple[int, ...], count: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> SparseTargets:
    """Sparse targets that say nothing: no ids, all mass in the tail."""
    return SparseTargets(
        torch.full((*shape, count), -1, dtype=torch.long, device=device),
        torch.full((*shape, count), -math.inf, dtype=dtype, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
    )


def _top_symbols(log_prob_BTS: Tensor, known_BT: Tensor, k: int) -> SparseTargets:
    values_BTK, ids_BTK = log_prob_BTS.topk(min(k, SYMBOLS), dim=-1)
    tail_BT = log_prob_BTS.scatter(-1, ids_BTK, -math.inf).logsumexp(dim=-1)
    is_used_BTK = known_BT.unsqueeze(-1) & (values_BTK > -math.inf)
    return SparseTargets(
        torch.where(is_used_BTK, ids_BTK, -1), torch.where(is_used_BTK, values_BTK, -math.inf),
        torch.where(known_BT, tail_BT, 0.0),
    )  # fmt: skip


def _refuse_nonsense(logits_nV: Tensor, name: str) -> None:
    bad = int((~logits_nV.amax(dim=1).isfinite()).sum())
    if bad:
        raise TrainingError(
            f"the logits of the teacher {name} are not numbers (NaN or infinite) at {bad} of {len(logits_nV)} tokens. Load it in "
            "float32 or bfloat16 instead of float16, and check its weights."
        )


_: type[TargetSource] = TrieTeacher
