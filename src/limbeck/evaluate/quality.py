"""How well a model predicts text: perplexity, bits per byte, and nearness to its teacher.

Two models may only be compared when they scored the same text in the same way, so every result carries its protocol.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import DataError, TeacherError
from limbeck.evaluate.scoring import MIN_DOCUMENT_BLOCKS, make_plan, ratio_standard_error, scored_logits


@dataclass(frozen=True)
class TextScore:
    """What a model paid for a text.

    `nats` is summed over `tokens` scored tokens; `words` (whitespace) and `bytes` (UTF-8) count the scored text.
    `standard_error_nats` belongs to the mean nats per token and comes from the spread between blocks (the protocol
    says which); None with a single block. `block_nats` and `block_tokens` let two models be compared block by block.
    """

    nats: float
    tokens: int
    words: int
    bytes: int
    standard_error_nats: float | None
    protocol: dict[str, Any]
    block_nats: tuple[float, ...] = field(default=(), repr=False)
    block_tokens: tuple[int, ...] = field(default=(), repr=False)

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per token; depends on the tokenizer."""
        return _exponential(self.nats_per_token)

    @property
    def word_perplexity(self) -> float:
        """exp of the nats per whitespace word; comparable across tokenizers for languages that write spaces."""
        return _exponential(self.nats / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; comparable across all tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass(frozen=True)
class ModelComparison:
    """How near a student is to its teacher on a text: mean KL(teacher || student) in nats per token, and the share of
    positions at which both rank the same token first. Standard errors as in `TextScore`."""

    kl_nats: float
    kl_standard_error: float | None
    top1_agreement: float
    top1_standard_error: float | None
    tokens: int
    protocol: dict[str, Any]


@dataclass(frozen=True)
class PairedDifference:
    """Mean nats per token of one model minus those of another on the same blocks, and its standard error."""

    nats: float
    standard_error: float | None


def score_text(
    model: nn.Module,
    tokenizer: Any,
    documents: list[str],
    *,
    context_tokens: int,
    stride_tokens: int | None = None,
    max_tokens: int | None = None,
    batch_sequences: int = 8,
    device: str | torch.device = "cpu",
) -> TextScore:
    """Score documents with a sliding window; documents do not see each other.

    `stride_tokens` (default: `context_tokens`) trades cost for context: each scored token but those of a document's
    first window has at least `context_tokens - stride_tokens + 1` tokens before it. `max_tokens` cuts the text, in
    the order of the documents. The model stays on its device, which must be `device`.

    Raises: DataError when there is nothing to score or the window does not fit; NonFiniteLogits.
    """
    plan = make_plan(
        [model],
        tokenizer,
        documents,
        context=context_tokens,
        stride=stride_tokens,
        max_tokens=max_tokens,
        batch_sequences=batch_sequences,
        device=torch.device(device),
    )
    nats = torch.zeros(len(plan.windows), dtype=torch.float64)
    for window_N, target_N, (logits_NV,) in scored_logits({"model": model}, plan, temporaries=4):
        gold_N = logits_NV.gather(1, target_N[:, None])[:, 0]
        nats.index_add_(0, window_N, (logits_NV.logsumexp(-1) - gold_N).cpu().double())
    block_nats, block_tokens = plan.sum_blocks(nats), plan.sum_blocks(plan.window_tokens)
    return TextScore(
        nats=float(nats.sum()),
        tokens=sum(document.tokens for document in plan.documents),
        words=sum(document.words for document in plan.documents),
        bytes=sum(document.bytes for document in plan.documents),
        standard_error_nats=ratio_standard_error(block_nats, block_tokens),
        protocol=plan.protocol,
        block_nats=tuple(block_nats.tolist()),
        block_tokens=tuple(int(count) for count in block_tokens),
    )


def compare_models(
    teacher: nn.Module,
    student: nn.Module,
    tokenizer: Any,
    documents: list[str],
    *,
    context_tokens: int,
    stride_tokens: int | None = None,
    max_tokens: int | None = None,
    batch_sequences: int = 8,
    device: str | torch.device = "cpu",
    vocabulary_size: int | None = None,
) -> ModelComparison:
    """Compare two models' next-token distributions on the tokens that `score_text` would score.

    KL(teacher || student) is exact over the whole vocabulary and zero on equals. vocabulary_size: rows of the logits that
    stand for the same tokens in both, where embeddings are padded differently; None takes all.

    Raises: DataError as `score_text`; TeacherError when the vocabularies differ; NonFiniteLogits.
    """
    models = {"teacher": teacher, "student": student}
    plan = make_plan(
        list(models.values()),
        tokenizer,
        documents,
        context=context_tokens,
        stride=stride_tokens,
        max_tokens=max_tokens,
        batch_sequences=batch_sequences,
        device=torch.device(device),
    )
    kl, agreement = torch.zeros(2, len(plan.windows), dtype=torch.float64)
    for window_N, _, (teacher_NV, student_NV) in scored_logits(
        models, plan, temporaries=8, vocabulary_size=vocabulary_size
    ):
        same_N = teacher_NV.argmax(-1) == student_NV.argmax(-1)
        teacher_NV, student_NV = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
        kl_N = (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)
        kl.index_add_(0, window_N, kl_N.cpu().double())
        agreement.index_add_(0, window_N, same_N.cpu().double())
    tokens = plan.window_tokens
    blocks = plan.sum_blocks(tokens)
    return ModelComparison(
        kl_nats=float(kl.sum() / tokens.sum()),
        kl_standard_error=ratio_standard_error(plan.sum_blocks(kl), blocks),
        top1_agreement=float(agreement.sum() / tokens.sum()),
        top1_standard_error=ratio_standard_error(plan.sum_blocks(agreement), blocks),
        tokens=int(tokens.sum()),
        protocol=plan.protocol,
    )


def pool_scores(scores: Sequence[TextScore]) -> TextScore:
    """One score for several texts together: every token counts the same, whichever text it is from.

    The blocks of all texts make the standard error; the protocol is the first text's, with the counts added up.

    Raises: DataError when there is no score.
    """
    if not scores:
        raise DataError("there is no score to pool: expected at least one text.")
    if len(scores) == 1:
        return scores[0]
    block_nats = tuple(nats for score in scores for nats in score.block_nats)
    block_tokens = tuple(tokens for score in scores for tokens in score.block_tokens)
    added = {key: sum(score.protocol[key] for score in scores) for key in ("documents_given", "documents_scored")}
    error = {
        "standard_error": f"between {len(block_nats)} blocks of {len(scores)} texts: documents where a text has "
        f"{MIN_DOCUMENT_BLOCKS} or more, else windows"
    }
    return TextScore(
        nats=sum(score.nats for score in scores),
        tokens=sum(score.tokens for score in scores),
        words=sum(score.words for score in scores),
        bytes=sum(score.bytes for score in scores),
        standard_error_nats=ratio_standard_error(
            torch.tensor(block_nats, dtype=torch.float64), torch.tensor(block_tokens, dtype=torch.float64)
        ),
        protocol=scores[0].protocol | {"texts": len(scores)} | added | error,
        block_nats=block_nats,
        block_tokens=block_tokens,
    )


def paired_difference(score: TextScore, other: TextScore) -> PairedDifference:
    """Mean nats per token of `score` minus those of `other`, with a standard error from the paired blocks.

    Pairing removes what makes some blocks harder for every model, so this is sharper than two separate errors.

    Raises: DataError when the two did not score the same tokens.
    """
    if score.block_tokens != other.block_tokens or score.bytes != other.bytes:
        raise DataError(
            f"two scores can only be compared on the same text: one has {score.tokens} tokens in "
            f"{len(score.block_tokens)} blocks ({score.bytes} bytes), the other {other.tokens} in "
            f"{len(other.block_tokens)} ({other.bytes} bytes). Use the same tokenizer, texts and window for both."
        )
    mine, others = torch.tensor([score.block_nats, other.block_nats], dtype=torch.float64)
    differences = mine - others
    blocks = torch.tensor(score.block_tokens, dtype=torch.float64)
    return PairedDifference(
        nats=float(differences.sum() / blocks.sum()), standard_error=ratio_standard_error(differences, blocks)
    )


@contextmanager
def zeroed_mixers(model: nn.Module, *, layers: Collection[int] | None = None) -> Iterator[int]:
    """Make every attention (and every Hyena mixer), or those of some layers, add nothing within the `with` block.

    What the model still predicts is the floor: a student far above the floor owes that to its mixers, and a text on
    which floor and teacher are close says little about them. Yields how many modules are silenced.

    Raises: TeacherError when the model has none.
    """
    from limbeck.models.surgery import find_attention

    found = [(site.layer_index, site.module) for site in find_attention(model)]
    if callable(own_mixers := getattr(model, "mixers", None)):
        found += list(own_mixers().items())
    distinct = {id(module): module for layer, module in found if layers is None or layer in layers}
    if not distinct:
        raise TeacherError(f"{type(model).__name__} has no attention that could be set to zero.")
    handles = [module.register_forward_hook(_silence) for module in distinct.values()]
    try:
        yield len(handles)
    finally:
        for handle in handles:
            handle.remove()


def _silence(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *(None for _ in output[1:]))


def _exponential(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
