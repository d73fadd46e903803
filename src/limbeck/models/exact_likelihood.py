"""A teacher's exact next-token distribution in the student's tokens, where each teacher token is a run of them.

Let every teacher token be, always, the same run of student tokens: the student reads bytes, or its byte-pair merges are
the teacher's first ones. Then the teacher is a distribution over student tokens too. What the student has read, s_1 to
s_n, does not say where the teacher's last token ends: it may end at n or reach beyond it. So

    P(s_1 .. s_n, v) = sum over m <= n of P(E(m)) * sum of p(u | E(m)) over tokens u that continue s_(m+1) .. s_n, v

where E(m) are the teacher's tokens for the text up to m. All of it is one teacher reading of E(m) for every m, most of
which share their beginning. Normalised over v this is the target; cross-entropy and every divergence against it mean
what they mean between models with equal tokens.

Exact if the teacher gives no mass to token sequences that its tokenizer does not write, and if the beginning of what
it writes is always what it writes for that beginning. Byte-pair merges are of this kind; a pre-tokenizer that looks
ahead can break the second condition in rare places, and the sum then misses a term. Mass on special tokens other than
the end of text, and on sequences no tokenizer writes, is left out and the rest scaled up.

Source: the scheme of arXiv:2512.14954 for nested vocabularies; the sum above is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import VocabularyError
from limbeck.core.types import Batch
from limbeck.models.alignment import read_stretches
from limbeck.models.heads import SplitModel
from limbeck.models.token_bytes import TokenBytes, encode_text, leading_special_tokens
from limbeck.models.vocabulary import tokenizer_pipeline

NextLogProbs = Callable[[Sequence[tuple[int, ...]]], Tensor]


@dataclass(frozen=True)
class Decomposition:
    """Every token of the teacher as a run of the student's tokens.

    runs: by the teacher's token id; None for tokens that are nothing to the student. opening: what the teacher reads
    before a text. tokenizer, tokens: the teacher's. student: the student's tokens.
    """

    runs: tuple[tuple[int, ...] | None, ...]
    opening: tuple[int, ...]
    tokenizer: Any
    tokens: TokenBytes
    student: TokenBytes

    @cached_property
    def table(self) -> np.ndarray:
        """The runs as an array [teacher tokens, longest run], -1 after their end; rows of -1 where there is none."""
        width = max(len(run) for run in self.runs if run is not None)
        table = np.full((len(self.runs), width), -1, dtype=np.int64)
        for token, run in enumerate(self.runs):
            table[token, : len(run or ())] = run or ()
        return table

    def join_runs(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The student's tokens for these tokens of the teacher."""
        return tuple(piece for token in ids for piece in self.runs[token] or ())

    def continuations(self, probs_V: np.ndarray, ahead: Sequence[int], size: int) -> Iterator[tuple[int, np.ndarray]]:
        """How much mass each student token has next, if the teacher's next token begins with those `ahead`.

        probs_V: of the teacher's next token. Yields (count, mass [size]) for count = 0, 1, .. student tokens of `ahead`
        already read, while any teacher token begins with them and goes on.
        """
        candidates = np.arange(len(self.runs))
        for count in range(min(len(ahead) + 1, self.table.shape[1])):
            candidates = candidates[self.table[candidates, count] >= 0]
            if not len(candidates):
                return
            following = self.table[candidates, count]
            yield count, np.bincount(following, probs_V[candidates], minlength=size)
            if count == len(ahead):
                return
            candidates = candidates[following == ahead[count]]

    def encode_prefixes(self, text: str, ends: Sequence[int]) -> list[tuple[int, ...] | None]:
        """The teacher's tokens for the first bytes of a text, for every number of bytes; an end may split a character.

        None where the teacher's tokenizer would write other bytes than these (Unicode normalisation).
        """
        data = text.encode()
        character_ends = np.cumsum([len(character.encode()) for character in text])
        cuts = [_Cut.of(data, text, end, character_ends, self.tokenizer) for end in ends]
        heads = encode_text(self.tokenizer, [cut.head for cut in cuts])
        found: list[tuple[int, ...] | None] = []
        for cut, head, end in zip(cuts, heads, ends, strict=True):
            ids = (*head, *cut.tail)
            found.append(ids if self.tokens.join(ids) == data[:end] else None)
        return found


@dataclass(frozen=True)
class _Cut:
    """The beginning of a text: whole characters that the tokenizer reads by itself, and tokens of what follows."""

    head: str
    tail: tuple[int, ...]

    @classmethod
    def of(cls, data: bytes, text: str, end: int, character_ends: np.ndarray, tokenizer: Any) -> _Cut:
        """Cut inside a character, the merges see the beginning of the word that the whole character belongs to."""
        last = int(np.searchsorted(character_ends, end))
        if end == 0 or character_ends[last] == end:
            return cls(data[:end].decode(), ())
        backend = tokenizer.backend_tokenizer
        word = backend.pre_tokenizer.pre_tokenize_str(text[: last + 1])[-1][0]
        begin = int(character_ends[last]) - len(word)
        return cls(data[:begin].decode(), tuple(token.id for token in backend.model.tokenize(word[: end - begin])))


def decompose(
    student_tokenizer: Any, student: TokenBytes, teacher_tokenizer: Any, teacher: TokenBytes
) -> Decomposition:
    """Write every token of the teacher in tokens of the student, if that can always be done in one way.

    It can when the student's tokens are single bytes, or when both are byte-level BPE, the student's merges are the
    first of the teacher's, and text is prepared for them in the same way.

    Raises: VocabularyError with the reason when it cannot.
    """
    model = tokenizer_pipeline(teacher_tokenizer).get("model")
    if teacher.kind != "byte-level" or teacher.adds_space or not isinstance(model, dict) or model.get("type") != "BPE":
        _refuse("the teacher's tokenizer is not a byte-level BPE")
    if all(len(piece) == 1 for piece in student.pieces if piece is not None):
        runs = _runs_of_bytes(student, teacher)
    else:
        runs = _runs_of_merges(student_tokenizer, teacher_tokenizer, teacher)
    if teacher.end_id is not None and student.end_id is not None:
        runs[teacher.end_id] = (student.end_id,)
    opening = leading_special_tokens(teacher_tokenizer) or ([] if teacher.end_id is None else [teacher.end_id])
    if not opening:
        _refuse("the teacher has neither a beginning-of-text nor an end-of-text token to read before a text")
    return Decomposition(tuple(runs), tuple(opening), teacher_tokenizer, teacher, student)


def _refuse(reason: str) -> NoReturn:
    raise VocabularyError(
        f"the teacher's exact next-token distribution cannot be had in the student's tokens: {reason}. It needs a "
        "byte-level BPE teacher and a student that reads bytes or whose merges are the teacher's first ones. Use "
        "chunk_likelihood, which works for any two tokenizers."
    )


def _runs_of_bytes(student: TokenBytes, teacher: TokenBytes) -> list[tuple[int, ...] | None]:
    token_of = {piece[0]: token for token, piece in enumerate(student.pieces) if piece is not None}
    missing = sorted({byte for piece in teacher.pieces for byte in piece or b""} - token_of.keys())
    if missing:
        _refuse(f"the student has no token for the byte 0x{missing[0]:02X}")
    return [None if piece is None else tuple(token_of[byte] for byte in piece) for piece in teacher.pieces]


def _runs_of_merges(
    student_tokenizer: Any, teacher_tokenizer: Any, teacher: TokenBytes
) -> list[tuple[int, ...] | None]:
    mine, theirs = tokenizer_pipeline(student_tokenizer), tokenizer_pipeline(teacher_tokenizer)
    first, rules = mine.get("merges or scores") or [], theirs.get("merges or scores") or []
    if mine.get("model") != theirs.get("model") or theirs["model"].get("ignore_merges") or rules[: len(first)] != first:
        _refuse("the student's merges are not the first of the teacher's")
    for part in ("pre-tokenizer", "normalisation"):
        if mine.get(part) != theirs.get(part):
            _refuse(f"text is prepared differently before merging ({part})")
    if _literal_tokens(student_tokenizer) != _literal_tokens(teacher_tokenizer):
        _refuse("the two have different added tokens that stand for text")
    ids, names = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    simple = {name for name in names if len(name) == 1} | _literal_tokens(teacher_tokenizer)
    runs: dict[str, tuple[int, ...]] = {name: (ids[name],) for name in simple & ids.keys()}
    for number, rule in enumerate(rules):
        left, right = rule.split(" ")
        if left not in runs or right not in runs:
            _refuse(f"the merge of {left!r} and {right!r} comes before its parts are made")
        run = (ids[left + right],) if number < len(first) else runs[left] + runs[right]
        if runs.setdefault(left + right, run) != run:
            _refuse(f"the token {left + right!r} can come about in several ways")
    special = teacher.special_names
    by_id = {token: name for name, token in names.items()}
    return [None if token in special else runs.get(by_id.get(token, "")) for token in range(len(teacher.pieces))]


def _literal_tokens(tokenizer: Any) -> set[str]:
    return {str(added) for added in tokenizer.added_tokens_decoder.values() if not added.special}


@dataclass(frozen=True)
class ExactTargets:
    """The teacher's distribution over the student's next token.

    log_prob_BTV: nats (float32), -inf for tokens that cannot follow; position t speaks of the token at t+1. known_BT:
    True where it is known; elsewhere log_prob_BTV is uniform and must not be learnt from.
    """

    log_prob_BTV: Tensor
    known_BT: Tensor


def exact_targets(
    batch: Batch, decomposition: Decomposition, next_log_probs: NextLogProbs, *, vocabulary_size: int
) -> ExactTargets:
    """The exact distribution at every position of rows of the student's tokens where it is known.

    next_log_probs: the teacher: given token sequences, the log-probabilities [n, V] of what comes next after each. It
    is asked once for every stretch of text, for about as many sequences as the stretch has tokens. vocabulary_size: of
    the student's logits.

    As in `align_batch`, the teacher reads each stretch of text from the window's start. Not known are positions of special tokens, of
    a character that began before the window, and after bytes that are no UTF-8.
    """
    rows, width = batch.input_ids_BT.shape
    log_prob_BTV = torch.full((rows, width, vocabulary_size), -math.log(vocabulary_size))
    known_BT = torch.zeros(rows, width, dtype=torch.bool)
    for row, stretches in enumerate(read_stretches(batch, decomposition.student)):
        for stretch in stretches:
            if stretch.offsets is None or 0 not in stretch.offsets.borders:
                continue
            ends = stretch.offsets.ends
            inside = np.flatnonzero((ends > 0) & (ends <= len(stretch.text.encode())))
            if not len(inside):
                continue
            part = slice(stretch.low + int(inside[0]), stretch.low + int(inside[-1]) + 1)
            read = tuple(batch.input_ids_BT[row, part].tolist())
            found_NV = _predict(
                read, stretch.text, ends[inside].tolist(), decomposition, next_log_probs, vocabulary_size
            )
            is_known = np.isfinite(found_NV).any(axis=1)
            log_prob_BTV[row, part][is_known] = torch.from_numpy(found_NV[is_known]).float()
            known_BT[row, part] = torch.from_numpy(is_known)
    device = batch.input_ids_BT.device
    return ExactTargets(log_prob_BTV.to(device), known_BT.to(device))


def _predict(
    read: tuple[int, ...], text: str, ends: list[int], by: Decomposition, next_log_probs: NextLogProbs, size: int
) -> np.ndarray:
    """Log-probabilities [N, size] of the student's token after each of the N it has read, as float64."""
    encoded = by.encode_prefixes(text, [0, *ends])
    contexts = [
        None if ids is None or by.join_runs(ids) != read[:count] else (*by.opening, *ids)
        for count, ids in enumerate(encoded)
    ]
    asked = sorted(_with_beginnings(contexts, len(by.opening)), key=len)
    place = {context: number for number, context in enumerate(asked)}
    answers_NV = next_log_probs(asked).cpu().numpy()[:, : len(by.runs)]
    weight = {by.opening: 0.0}
    for context in asked[1:]:
        weight[context] = weight[context[:-1]] + float(answers_NV[place[context[:-1]], context[-1]])
    sums_NV = np.full((len(read) + 1, size), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        for begin, history in enumerate(contexts):
            if history is None:
                continue
            probs_V = np.exp(answers_NV[place[history]].astype(np.float64))
            for count, mass in by.continuations(probs_V, read[begin:], size):
                sums_NV[begin + count] = np.logaddexp(sums_NV[begin + count], np.log(mass) + weight[history])
        return sums_NV[1:] - np.logaddexp.reduce(sums_NV[1:], axis=1, keepdims=True)


def _with_beginnings(contexts: Sequence[tuple[int, ...] | None], opening: int) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    for context in contexts:
        for length in range(len(context or ()), opening - 1, -1):
            beginning = (context or ())[:length]
            if beginning in found:
                break
            found.add(beginning)
    return found


def read_contexts(split: SplitModel, contexts: Sequence[tuple[int, ...]], *, rows_at_once: int = 8) -> Tensor:
    """Log-probabilities [n, V] (float32) of what a live teacher says after each of these token sequences.

    Sequences that begin another one are read along with it. Rows are padded at the end, which a causal model does not
    see. Gradients are not kept.
    """
    order = sorted(range(len(contexts)), key=lambda number: contexts[number])
    longest: list[tuple[tuple[int, ...], list[int]]] = []
    for number in reversed(order):
        context = contexts[number]
        if longest and longest[-1][0][: len(context)] == context:
            longest[-1][1].append(number)
        else:
            longest.append((context, [number]))
    longest.sort(key=lambda entry: len(entry[0]))
    device = next(split.model.parameters()).device
    answers: list[Tensor | None] = [None] * len(contexts)
    for low in range(0, len(longest), rows_at_once):
        part = longest[low : low + rows_at_once]
        width = len(part[-1][0])
        ids_BT = torch.tensor([[*context, *[0] * (width - len(context))] for context, _ in part], device=device)
        with torch.no_grad():
            hidden_BTD = split.hidden(Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)))
            for row, (_, numbers) in enumerate(part):
                ends = torch.tensor([len(contexts[number]) - 1 for number in numbers], device=device)
                found_nV = split.head(hidden_BTD[row, ends]).float().log_softmax(-1)
                for number, found_V in zip(numbers, found_nV, strict=True):
                    answers[number] = found_V
    return torch.stack([answer for answer in answers if answer is not None])
