"""Losses on logits, a chunk of positions at a time: no [N, V] tensor lives beyond its chunk.

The gradients with respect to the hidden states and the head's parameters are worked out in the forward pass, while a
chunk's logits exist, and kept; the backward pass only scales them. So nothing is computed twice, and a vocabulary of
150,000 needs no more memory for logits than one of 5,000. Source of the idea: Hsu et al. 2024 (Liger), arXiv:2410.10989,
section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from limbeck.core.errors import TrainingError, VocabularyError
from limbeck.core.types import DenseTargets, SparseTargets
from limbeck.objectives.divergences import at_least_float32, log_probs
from limbeck.objectives.terms import LogitTerm, term_values

Head = Callable[[Tensor], Tensor]
LogitTargets = DenseTargets | SparseTargets | None

# Logits of one chunk. More rows make the head's products and the sum of its gradients cheaper, fewer need less memory.
CHUNK_BYTES = {"cpu": 48 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
# On a CPU the terms of a chunk are worked out a block of rows at a time, which stays in its cache. With V = 49,152, 341
# rows at a time and D = 64 that took 0.86 s instead of 1.5 s for 1,024 positions; with D = 576, 3.2 s instead of 4.0 s.
BLOCK_BYTES = 3 * 2**19


def logit_terms(
    student_hidden_ND: Tensor,
    head: Head,
    target_ids_N: Tensor,
    targets: LogitTargets,
    terms: Sequence[LogitTerm],
    *,
    head_parameters: Sequence[Tensor] = (),
    row_weight_N: Tensor | None = None,
    teacher_weight_N: Tensor | None = None,
    chunk_tokens: int | None = None,
    diagnose: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of terms over N scored positions, and each term's own sum.

    student_hidden_ND: what the student's head is fed. head: [n, D] to logits [n, V], each row by itself.
    head_parameters: the tensors in the head that gradients shall reach, each once; they may be tied to other places.
    targets: rows [N, ...] that belong to the positions. row_weight_N: how much a position counts in every term;
    teacher_weight_N: in the terms that look at the targets. chunk_tokens: positions at a time; None bounds the memory.

    The total is the sum of weight * temperature**2 (for divergences) * value; divide by the number of positions for nats
    per token. Gradients flow to hidden states and head parameters; the total can be propagated back once. The sums are
    detached, weighted by row but neither by the term's weight nor by temperature**2. `diagnose` adds sums of
    `entropy.student`, of `entropy.teacher` (dense targets) and of `agreement`, the positions where both models' likeliest
    token is the same (not for sampled targets), without weights. Accumulated in float32 or wider.

    Raises: ValueError for terms of the same name or that need a teacher that is missing; VocabularyError when the two
    do not fit; TrainingError for NaN or infinity in the teacher's logits.
    """
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"each term needs a name of its own, got {', '.join(names)}")
    rows = student_hidden_ND.shape[0]
    if chunk_tokens is None:
        chunk_tokens = _rows_within(student_hidden_ND, head, head_parameters)
    job = _Job(
        head, target_ids_N, targets, terms, row_weight_N, teacher_weight_N,
        chunks=[slice(low, min(low + chunk_tokens, rows)) for low in range(0, rows, chunk_tokens)],
        diagnose=diagnose, needs_gradient=torch.is_grad_enabled(),
    )  # fmt: skip
    total = _ChunkedTerms.apply(job, student_hidden_ND, *head_parameters)
    return total, job.sums


@dataclass
class _Job:
    """One call of `logit_terms`: what to do, and the sums found on the way."""

    head: Head
    target_ids_N: Tensor
    targets: LogitTargets
    terms: Sequence[LogitTerm]
    row_weight_N: Tensor | None
    teacher_weight_N: Tensor | None
    chunks: list[slice]
    diagnose: bool
    needs_gradient: bool
    sums: dict[str, Tensor] = field(default_factory=dict)
    suspects: list[Tensor] = field(default_factory=list)

    def teacher_of(self, rows: slice, like_NV: Tensor) -> Tensor | SparseTargets | None:
        """What the teacher says at these rows: its logits, or its sparse targets. `like_NV` is the student's answer."""
        if not any(term.about.needs_targets for term in self.terms) and not self.diagnose:
            return None
        if isinstance(self.targets, SparseTargets):
            if rows.start == 0 and int(self.targets.ids_BTK.max()) >= like_NV.shape[-1]:
                raise VocabularyError(
                    f"the targets speak of token {int(self.targets.ids_BTK.max())}, but the student has only "
                    f"{like_NV.shape[-1]}. Its tokenizer must be the one that the targets were captured with"
                )
            return take_rows(self.targets, rows, like_NV.device)
        if self.targets is None:
            return None
        logits_NV = self.targets.head(self.targets.hidden_BTD[rows]).to(like_NV.device)
        if logits_NV.shape[-1] != like_NV.shape[-1]:
            raise VocabularyError(
                f"the teacher gives {logits_NV.shape[-1]} logits a position and the student {like_NV.shape[-1]}. Compared "
                "token by token they must be equal: use the tokens that both have, or an objective for other tokenizers"
            )
        return logits_NV

    def block_loss(self, student_NV: Tensor, teacher: Tensor | SparseTargets | None, rows: slice) -> Tensor:
        """The weighted sum over a block of rows; adds to `sums` on the way."""
        values = term_values(self.terms, student_NV, target_ids_N=self.target_ids_N[rows], teacher=teacher)
        total = at_least_float32(student_NV).new_zeros(())
        for term, value_N in zip(self.terms, values, strict=True):
            if self.row_weight_N is not None:
                value_N = value_N * self.row_weight_N[rows]
            if self.teacher_weight_N is not None and term.about.needs_targets:
                value_N = value_N * self.teacher_weight_N[rows]
            sum_ = value_N.sum()
            self.add(term.name, sum_)
            if term.weight:
                total = total + term.factor * sum_
        if isinstance(teacher, Tensor):
            self.suspects.append(teacher.detach().amax(-1))
        if self.diagnose:
            for name, value_N in diagnoses(student_NV.detach(), teacher).items():
                self.add(name, value_N.sum())
        return total

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def check_teacher(self) -> None:
        """Refuse a teacher that does not give numbers: one look, after the last chunk."""
        if isinstance(self.targets, SparseTargets):
            rows = self.targets
            last = rows.tail_log_prob_BT if rows.weights_BTK is None else rows.weights_BTK.sum(-1).log()
            kept = torch.where(rows.ids_BTK < 0, -torch.inf, rows.log_probs_BTK)
            self.suspects = [torch.cat((kept, last.unsqueeze(-1)), dim=-1).logsumexp(-1)]
        if not self.suspects:
            return
        bad_N = ~torch.isfinite(torch.cat(self.suspects))
        if bad_N.any():
            first = int(bad_N.int().argmax())
            raise TrainingError(
                f"the teacher's logits hold NaN or infinity, or nothing at all, at {int(bad_N.sum())} of {bad_N.numel()} "
                f"scored positions, first at scored position {first} of the batch. Nothing was learned from this batch. Run the "
                "teacher in bfloat16 or float32 rather than float16, or verify the target store"
            )


class _ChunkedTerms(torch.autograd.Function):
    """Values and gradients in one pass; see the top of the file."""

    @staticmethod
    def forward(ctx: FunctionCtx, job: _Job, hidden_ND: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        needs = [job.needs_gradient and needed for needed in ctx.needs_input_grad[1:]]  # type: ignore[attr-defined]
        sources = [tensor for tensor, needed in zip(parameters, needs[1:], strict=True) if needed]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if needs[0] else None
        grads: list[Tensor | None] = [None] * len(sources)
        total = at_least_float32(hidden_ND).new_zeros(())
        for rows in job.chunks:
            grad_hidden_nD = None if grad_hidden_ND is None else grad_hidden_ND[rows]
            total = total + _learn_chunk(job, rows, hidden_ND[rows].detach(), sources, grad_hidden_nD, grads)
        job.check_teacher()
        for term in job.terms:
            job.sums.setdefault(term.name, torch.zeros_like(total))
        reached = iter(grads)
        ctx.gradients = [grad_hidden_ND] + [next(reached) if needed else None for needed in needs[1:]]  # type: ignore[attr-defined]
        ctx.dtypes = [tensor.dtype for tensor in (hidden_ND, *parameters)]  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients: list[Tensor | None] | None = ctx.gradients  # type: ignore[attr-defined]
        if gradients is None:
            raise RuntimeError("the sum of logit terms was already propagated back; its gradients are not kept")
        # In place, since a copy of the head's gradient would be as large as the head.
        ctx.gradients = None  # type: ignore[attr-defined]
        scaled = (None if part is None else part.mul_(grad) for part in gradients)
        return None, *(
            None if part is None else part.to(dtype)
            for part, dtype in zip(scaled, ctx.dtypes, strict=True)  # type: ignore[attr-defined]
        )


def _learn_chunk(
    job: _Job,
    rows: slice,
    hidden_nD: Tensor,
    sources: Sequence[Tensor],
    grad_hidden_nD: Tensor | None,
    grads: list[Tensor | None],
) -> Tensor:
    """One chunk's loss; its gradients are written to `grad_hidden_nD` and added to `grads`. Its logits end here."""
    hidden_nD.requires_grad_(grad_hidden_nD is not None)
    needs_gradient = grad_hidden_nD is not None or bool(sources)
    with torch.set_grad_enabled(needs_gradient):
        student_nV = job.head(hidden_nD)
    teacher = job.teacher_of(rows, student_nV)
    loss, grad_nV = _chunk_gradient(job, student_nV.detach(), teacher, rows, needs_gradient=needs_gradient)
    if grad_nV is None or not student_nV.requires_grad:
        return loss
    del teacher
    wanted = ([] if grad_hidden_nD is None else [hidden_nD]) + list(sources)
    found = list(torch.autograd.grad(student_nV, wanted, grad_nV, allow_unused=True))
    if grad_hidden_nD is not None and (part := found.pop(0)) is not None:
        grad_hidden_nD.copy_(part)
    _accumulate(grads, found)
    return loss


def _accumulate(sums: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    """Add a chunk's gradients in place, in float32 or wider. Autograd may hand out one tensor twice (for a + b), which must not be shared."""
    own: set[int] = set()
    for index, (so_far, part) in enumerate(zip(sums, parts, strict=True)):
        if part is None:
            continue
        if so_far is not None:
            so_far.add_(part)
            continue
        first = at_least_float32(part)
        sums[index] = first.clone() if first.data_ptr() in own else first
        own.add(first.data_ptr())


def _chunk_gradient(
    job: _Job, student_nV: Tensor, teacher: Tensor | SparseTargets | None, rows: slice, *, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk and its gradient with respect to the logits, block by block."""
    total = at_least_float32(student_nV).new_zeros(())
    grad_nV = torch.empty_like(student_nV) if needs_gradient else None
    for block in _blocks(student_nV):
        leaf = student_nV[block].requires_grad_(needs_gradient)
        part = take_rows(teacher, block, leaf.device) if isinstance(teacher, SparseTargets) else teacher
        part = part[block] if isinstance(part, Tensor) else part
        with torch.set_grad_enabled(needs_gradient):
            loss = job.block_loss(leaf, part, slice(rows.start + block.start, rows.start + block.stop))
        total = total + loss.detach()
        if grad_nV is not None:
            if loss.requires_grad:
                (grad_nV[block],) = torch.autograd.grad(loss, leaf)
            else:
                grad_nV[block] = 0
    return total, grad_nV


def diagnoses(student_NV: Tensor, teacher: Tensor | SparseTargets | None) -> dict[str, Tensor]:
    """Entropies in nats, [N], and 1 where both models' likeliest token is the same, as far as the targets tell."""
    found = {"entropy.student": _entropy(student_NV)}
    if isinstance(teacher, Tensor):
        found["entropy.teacher"] = _entropy(teacher)
        best_N = teacher.argmax(-1)
    elif isinstance(teacher, SparseTargets) and teacher.weights_BTK is None:
        place_N1 = teacher.log_probs_BTK.argmax(-1, keepdim=True)
        best_N = teacher.ids_BTK.gather(-1, place_N1).squeeze(-1)
    else:
        return found
    found["agreement"] = (student_NV.argmax(-1) == best_N).to(found["entropy.student"].dtype)
    return found


def take_rows(targets: SparseTargets, rows: slice, device: torch.device) -> SparseTargets:
    """Some rows of sparse targets, on a device."""
    weights = targets.weights_BTK
    return replace(
        targets,
        ids_BTK=targets.ids_BTK[rows].to(device), log_probs_BTK=targets.log_probs_BTK[rows].to(device),
        tail_log_prob_BT=targets.tail_log_prob_BT[rows].to(device),
        weights_BTK=None if weights is None else weights[rows].to(device),
    )  # fmt: skip


def _entropy(logits_NV: Tensor) -> Tensor:
    logp_NV = log_probs(logits_NV)
    return -torch.where(logp_NV == -torch.inf, 0.0, logp_NV.exp() * logp_NV).sum(-1)


def _rows_within(hidden_ND: Tensor, head: Head, head_parameters: Sequence[Tensor]) -> int:
    """Rows of a chunk. The vocabulary is the longest first dimension of the head's parameters; a frozen head is tried."""
    vocabulary = max([hidden_ND.shape[-1], *(tensor.shape[0] for tensor in head_parameters if tensor.dim())])
    if not head_parameters and len(hidden_ND):
        with torch.no_grad():
            vocabulary = head(hidden_ND[:1]).shape[-1]
    budget = CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES_ELSEWHERE)
    return max(1, budget // (vocabulary * hidden_ND.element_size()))


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    rows, width = logits_NV.shape
    step = rows
    if logits_NV.device.type == "cpu":
        step = max(1, BLOCK_BYTES // (width * logits_NV.element_size()))
    return (slice(low, min(low + step, rows)) for low in range(0, rows, step))
