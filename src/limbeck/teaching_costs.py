"""What a teacher adds to the costs of a run: memory beside the student, a store on the disk, questions to an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.models.anatomy import hidden_width
from limbeck.models.costs import (
    ANSWER_ENTRY_BYTES,
    ANSWER_TOKEN_BYTES,
    FLOAT_BYTES,
    TOKEN_CHARACTERS,
    model_bytes,
    store_bytes_per_token,
)
from limbeck.preflight import layer_pairs
from limbeck.recipe import Recipe
from limbeck.recipe_objectives import FEATURES
from limbeck.recipe_teachers import Closed, Served


def teacher_bytes(recipe: Recipe, *, student: Any, teachers: Sequence[Any], device: str) -> tuple[float, str]:
    """What the teachers take of the memory that training has, and a note where they lie elsewhere ("" otherwise)."""
    words = recipe.teacher
    if words is None:
        return 0.0, ""
    if words.itself is not None:
        return model_bytes(student, dtype="float32"), ""
    held = sum(model_bytes(teacher, dtype=words.dtype, quantise=words.quantise) for teacher in teachers)
    kind = None if words.device is None else words.device.split(":")[0]
    if kind is not None and (kind != device or words.device not in (kind, recipe.runtime.device)):
        return 0.0, f"the teacher takes {held / 1e9:.1f} GB of {words.device}, which were not looked at."
    if words.offload and device != "cpu":
        return 0.0, f"the teacher takes {held / 1e9:.1f} GB of main memory, and a block at a time of the device's."
    return held, ""


def target_bytes_per_token(recipe: Recipe, stage: Any, *, student: Any, teachers: Sequence[Any]) -> float:
    """What a teacher hands over for each token of a distil stage, and what comparing it makes; logits are apart."""
    words = recipe.teacher
    if words is None or stage.kind != "distil" or words.closed is not None:
        return 0.0
    if words.kind in ("store", "served"):
        kept = recipe.capture.k if words.served is None else words.served.top_logprobs
        return kept * (8 + FLOAT_BYTES)
    width = hidden_width(teachers[0] if teachers else student)
    total = float(width * FLOAT_BYTES) * max(1, len(teachers))
    for term in stage.terms():
        if term.objective not in FEATURES:
            continue
        pairs = len(layer_pairs(term, student, teachers[0] if teachers else student))
        if term.objective.startswith(("hidden", "linear", "contrastive")):
            total += 3 * pairs * width * FLOAT_BYTES  # the teacher's, the projected student's, and their difference
        else:
            heads = student.config.num_attention_heads
            total += (
                4 * pairs * heads * recipe.data.context_tokens * FLOAT_BYTES
            )  # maps of both, as they are and compared
    return total


def written_store(recipe: Recipe, *, teachers: Sequence[Any]) -> dict[str, Any] | None:
    """The store that a run writes (served, closed) or `limbeck capture` would (source), in bytes; None for no store.

    A run with a live teacher writes none: `in_this_run` says so.
    """
    words, keep = recipe.teacher, recipe.capture
    if words is None or words.kind not in ("source", "served", "closed"):
        return None
    tokens = keep.tokens or recipe.total_tokens
    if words.closed is not None:
        size = tokens * TOKEN_CHARACTERS
        facts: dict[str, Any] = {"tokens": tokens, "kept_entries": 0, "store_bytes": size, "answers_bytes": 2 * size}
    elif words.served is not None:
        k = words.served.top_logprobs
        per_token = store_bytes_per_token(k=k + 1, values=keep.values)
        answers = tokens * (k * ANSWER_ENTRY_BYTES + ANSWER_TOKEN_BYTES)
        facts = {
            "tokens": tokens,
            "kept_entries": k,
            "store_bytes": round(tokens * per_token),
            "answers_bytes": answers,
        }
    else:
        k = keep.draws if keep.targets == "sampled" else keep.k
        hidden = len(keep.hidden_layers) * (hidden_width(teachers[0]) if teachers else 0)
        per_token = store_bytes_per_token(
            k=k, values=keep.values, sampled=keep.targets == "sampled", hidden_features=hidden
        )
        facts = {"tokens": tokens, "kept_entries": k, "store_bytes": round(tokens * per_token), "answers_bytes": 0}
    return facts | {"in_this_run": words.kind != "source"}


def asking(recipe: Recipe) -> dict[str, Any] | None:
    """Questions put to an endpoint, how long they take at least, and what they may cost; None when none is asked."""
    words = None if recipe.teacher is None else recipe.teacher.served or recipe.teacher.closed
    if words is None:
        return None
    context = recipe.data.context_tokens
    prompt = context if words.prompts else min(context, -(-words.prompt_characters // TOKEN_CHARACTERS))
    wanted = recipe.capture.tokens or recipe.total_tokens
    if isinstance(words, Served) and words.mode == "score":
        questions = -(-wanted // context)
    elif words.answers is not None:
        questions = words.answers
    elif isinstance(words, Closed):
        questions = -(-wanted // words.max_new_tokens)
    else:
        questions = -(-wanted // min(context, prompt + words.max_new_tokens))
    limit = words.requests_per_minute
    facts: dict[str, Any] = {
        "questions_at_least": questions,
        "least_seconds": None if limit is None else 60 * questions / limit,
        "note": "how fast the endpoint answers was not asked",
    }
    if isinstance(words, Closed) and words.input_price is not None and words.output_price is not None:
        spent = prompt * words.input_price + words.max_new_tokens * words.output_price
        facts["cost_at_most"] = questions * spent / 1e6
    return facts
