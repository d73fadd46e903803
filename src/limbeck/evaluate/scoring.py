"""One walk over a text with one or more models: the same windows, the same positions, the same protocol.

Every number of `quality` comes from this walk, so two models that are compared have read the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import DataError, EvaluationError, TeacherError
from limbeck.evaluate.windows import ScoredDocument, Window, position_limit, prepare_documents, sliding_windows

TEMPORARY_BYTES = 64 * 2**20
MIN_DOCUMENT_BLOCKS = 8


class NonFiniteLogits(EvaluationError):
    """A model answered with NaN or infinity.

    `document` (its place in the list given) and `token` say what was being predicted; a beginning-of-text token that
    was put in front counts as token 0.
    """

    def __init__(self, model: str, *, document: int, token: int) -> None:
        super().__init__(
            f"the {model} gives logits that are not finite when it predicts token {token} of document {document}. "
            "Its weights hold NaN or infinity, or its number type overflows: load it in float32, or go back to an "
            "earlier checkpoint."
        )
        self.document = document
        self.token = token


@dataclass(frozen=True)
class ScoringPlan:
    """The documents and windows of one evaluation, and the blocks its standard error rests on."""

    documents: list[ScoredDocument]
    windows: list[Window]
    batch_sequences: int
    device: torch.device
    protocol: dict[str, Any]
    blocks: torch.Tensor

    def sum_blocks(self, per_window: torch.Tensor) -> torch.Tensor:
        """Add up window sums within each block."""
        sums = torch.zeros(int(self.blocks.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, self.blocks, per_window.double())

    @property
    def window_tokens(self) -> torch.Tensor:
        """Scored tokens of each window."""
        return torch.tensor([window.tokens for window in self.windows], dtype=torch.float64)


def make_plan(
    models: Sequence[nn.Module],
    tokenizer: Any,
    documents: list[str],
    *,
    context: int,
    stride: int | None,
    max_tokens: int | None,
    batch_sequences: int,
    device: torch.device,
) -> ScoringPlan:
    """Tokenise, cut into windows and choose the blocks: whole documents when there are enough of them, else windows.

    Raises: DataError when nothing can be scored, the window does not fit the models, or the tokenizer is not theirs.
    """
    stride = context if stride is None else stride
    if context < 1 or not 1 <= stride <= context:
        raise DataError(
            f"context_tokens is {context} and stride_tokens {stride}: expected a context of at least 1 and a stride "
            "between 1 and the context."
        )
    for model in models:
        if (limit := position_limit(model)) is not None and context > limit:
            raise DataError(
                f"context_tokens is {context}, but {type(model).__name__} has learned positions for {limit} tokens "
                f"only. Set evaluation.context_tokens to {limit} or less."
            )
    prepared = prepare_documents(tokenizer, documents, max_tokens=max_tokens)
    _check_vocabulary(models, prepared)
    windows = [
        window
        for place, document in enumerate(prepared)
        for window in sliding_windows(
            len(document.ids), document=place, first_target=document.first_target, context=context, stride=stride
        )
    ]
    by_document = len(prepared) >= MIN_DOCUMENT_BLOCKS
    blocks = [window.document for window in windows] if by_document else list(range(len(windows)))
    protocol = {
        "context_tokens": context,
        "stride_tokens": stride,
        "max_tokens": max_tokens,
        "documents_given": len(documents),
        "documents_scored": len(prepared),
        **_fixed_protocol(tokenizer),
        "standard_error": f"between {len(set(blocks))} "
        + ("documents" if by_document else f"windows of {stride} tokens; neighbours are alike, so it may be too small"),
    }
    return ScoringPlan(prepared, windows, max(1, batch_sequences), device, protocol, torch.tensor(blocks))


def _fixed_protocol(tokenizer: Any) -> dict[str, str]:
    has_bos = getattr(tokenizer, "bos_token_id", None) is not None
    return {
        "documents": "scored separately, no context across documents; documents beyond max_tokens are left out",
        "first_token": "scored, after the beginning-of-text token"
        if has_bos
        else "context only: neither it nor its bytes are scored, as the tokenizer has no beginning-of-text token",
        "bytes_and_words": "UTF-8 bytes and whitespace words of the scored text, "
        + ("by character offsets" if getattr(tokenizer, "is_fast", False) else "by decoding its tokens"),
        "arithmetic": "logits in float32 (float64 where the model is), sums in float64",
    }


def _check_vocabulary(models: Sequence[nn.Module], documents: Sequence[ScoredDocument]) -> None:
    largest = max(max(document.ids) for document in documents)
    for model in models:
        getter = getattr(model, "get_input_embeddings", None)
        embeddings = getter() if callable(getter) else None
        if isinstance(embeddings, nn.Embedding) and largest >= embeddings.num_embeddings:
            raise DataError(
                f"the tokenizer gives token {largest}, but {type(model).__name__} knows {embeddings.num_embeddings} "
                "tokens only. Use the tokenizer the model was trained with."
            )


@torch.no_grad()
def scored_logits(
    models: dict[str, nn.Module], plan: ScoringPlan, *, temporaries: int, vocabulary_size: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """Yield (window number [N], target [N], [logits [N, V] of each model]) in pieces small enough that `temporaries`
    tensors of a piece's size stay within `TEMPORARY_BYTES`. vocabulary_size: rows of the logits to use; None: all."""
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        order = sorted(range(len(plan.windows)), key=lambda number: -plan.windows[number].length)
        for start in range(0, len(order), plan.batch_sequences):
            yield from _batch_logits(
                models, plan, order[start : start + plan.batch_sequences], temporaries, vocabulary_size
            )
    finally:
        for name, model in models.items():
            model.train(was_training[name])


def _batch_logits(
    models: dict[str, nn.Module], plan: ScoringPlan, numbers: list[int], temporaries: int, vocabulary_size: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    windows = [plan.windows[number] for number in numbers]
    longest = max(window.length for window in windows)
    input_ids_BT = torch.zeros(len(windows), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(input_ids_BT)
    places: list[tuple[int, int, int, int]] = []
    for row, (number, window) in enumerate(zip(numbers, windows, strict=True)):
        ids = plan.documents[window.document].ids
        input_ids_BT[row, : window.length] = torch.tensor(ids[window.start : window.stop])
        mask_BT[row, : window.length] = 1
        places += [
            (number, row, target - 1 - window.start, ids[target])
            for target in range(window.first_target, window.stop + 1)
        ]
    padded = {} if bool(mask_BT.all()) else {"attention_mask": mask_BT.to(plan.device)}
    logits = [
        model(input_ids=input_ids_BT.to(plan.device), use_cache=False, **padded).logits[..., :vocabulary_size]
        for model in models.values()
    ]
    sizes = {name: output.shape[-1] for name, output in zip(models, logits, strict=True)}
    if len(set(sizes.values())) > 1:
        raise TeacherError(f"the models do not share a vocabulary ({sizes}): their predictions cannot be compared.")
    width = max(4, logits[0].element_size()) * logits[0].shape[-1]
    for piece_N4 in torch.tensor(places).split(max(1, TEMPORARY_BYTES // (width * temporaries))):
        window_N, row_N, time_N, target_N = piece_N4.unbind(1)
        pieces = [output[row_N.to(output.device), time_N.to(output.device)] for output in logits]
        pieces = [piece if piece.dtype == torch.float64 else piece.float() for piece in pieces]
        for name, piece_NV in zip(models, pieces, strict=True):
            _check_finite(name, piece_NV, plan, window_N, time_N)
        yield window_N, target_N.to(plan.device), pieces


def _check_finite(
    name: str, logits_NV: torch.Tensor, plan: ScoringPlan, window_N: torch.Tensor, time_N: torch.Tensor
) -> None:
    bad_N = ~logits_NV.isfinite().all(-1).cpu()
    if bad_N.any():
        first = int(bad_N.nonzero()[0, 0])
        window = plan.windows[int(window_N[first])]
        raise NonFiniteLogits(
            name, document=plan.documents[window.document].index, token=window.start + int(time_N[first]) + 1
        )


def ratio_standard_error(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Standard error of sum(sums) / sum(counts) over independent blocks of unequal size (linearised ratio estimate)."""
    blocks = len(sums)
    if blocks < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    return float((blocks / (blocks - 1) * residuals.square().sum()).sqrt() / counts.sum())
