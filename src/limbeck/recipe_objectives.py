"""What a distil stage learns from, as a recipe writes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from limbeck.recipe_values import Count, Part, Problems, Share, shipped_or_added

ObjectiveName = Literal[
    "cross_entropy", "forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "skewed_forward_kl",
    "skewed_reverse_kl", "adaptive_kl", "alpha_beta", "total_variation", "hinge", "logistic_ranking",
    "sorted_earth_mover", "logit_mse", "hidden_mse", "hidden_cosine", "linear_cka", "contrastive", "attention_kl",
    "value_relation", "qkv_relation", "mixing_matrix_distance", "chunk_likelihood", "byte_trie",
]  # fmt: skip
FEATURES = frozenset(
    {
        "hidden_mse", "hidden_cosine", "linear_cka", "contrastive", "attention_kl", "value_relation", "qkv_relation",
        "mixing_matrix_distance",
    }
)  # fmt: skip
HIDDEN_STATES = frozenset({"hidden_mse", "hidden_cosine", "linear_cka", "contrastive"})
CROSS_TOKENIZER = frozenset({"cross_entropy", "sorted_earth_mover", "chunk_likelihood"})
STRETCHES = frozenset({"sorted_earth_mover", "chunk_likelihood"})
BYTE_TRIE = "byte_trie"


class Ramp(Part):
    """A weight that changes over the stage."""

    start: Annotated[float, Field(ge=0)] = Field(description="Weight at the first step.")
    end: Annotated[float, Field(ge=0)] = Field(description="Weight at the last step.")
    shape: Literal["linear", "cosine"] = Field(default="linear", description="How it goes from one to the other.")

    def at(self, progress: float) -> float:
        """The weight after this share of the stage, 0 to 1."""
        import math

        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * share


def _weight(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _layers(value: Any) -> Any:
    if value in ("all", "last"):
        return value
    is_counted = isinstance(value, dict) and list(value) in (["uniform"], ["last"])
    if is_counted and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value.values()):
        return value
    is_pairs = isinstance(value, list) and value and all(_is_pair(pair) for pair in value)
    if not is_pairs:
        raise ValueError(
            "expected all, last, {uniform: 4}, {last: 2}, or pairs of [student layer, teacher layer] such as "
            f"[[6, 12]]; got {value!r}"
        )
    return [list(pair) for pair in value]


def _is_pair(pair: Any) -> bool:
    is_two = isinstance(pair, list | tuple) and len(pair) == 2
    return is_two and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in pair)


Weight = Annotated[Annotated[float, Field(ge=0)] | Ramp, BeforeValidator(_weight, json_schema_input_type=float | Ramp)]
Layers = Annotated[
    str | dict[str, int] | list[list[int]],
    BeforeValidator(
        _layers, json_schema_input_type=Literal["all", "last"] | dict[Literal["uniform", "last"], int] | list[list[int]]
    ),
]


class Objective(Part):
    """One term of the loss."""

    objective: Annotated[str, shipped_or_added("objective", ObjectiveName)] = Field(
        description="Its name; docs/objectives.md explains each."
    )
    weight: Weight = Field(default=1.0, description="Its weight, or a ramp {start, end, shape} over the stage.")
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(
        default=1.0, description="Softens both distributions; divergences are multiplied by its square."
    )
    missing: Literal["tail", "renormalise", "uniform"] = Field(
        default="tail",
        description="With top-k targets, the mass of all other tokens: one bucket more in both models (tail), left "
        "out and the rest scaled up (renormalise), or spread evenly (uniform).",
    )
    layers: Layers = Field(
        default="all",
        description="For hidden-state and relation objectives, which layers meet: all of the student's spread over the "
        "teacher's depth, {uniform: n} of them, {last: n}, or pairs of student and teacher layers (0: embeddings).",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="The objective's own options, such as beta.")


class OnPolicy(Part):
    """Learn on what the student itself writes."""

    method: Literal["mixed", "minillm", "adaptive"] = Field(
        default="mixed",
        description="mixed: GKD's share of student-written rows (arXiv:2306.13649); minillm: policy gradient of the "
        "reverse KL (arXiv:2306.08543); adaptive: DistiLLM's reuse buffer (arXiv:2402.03898).",
    )
    share: Share | None = Field(
        default=None,
        description="GKD's lambda: the share of rows that the student writes; null: a half for mixed, none at first for "
        "adaptive. minillm writes all.",
    )
    prompt_tokens: Count = Field(default=64, description="Tokens of the window that are given; the student goes on.")
    max_new_tokens: Count | None = Field(default=None, description="Most tokens written; null fills the window.")
    temperature: Annotated[float, Field(gt=0, le=5)] = Field(default=1.0, description="Sampling temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="Nucleus of the sampling.")
    teacher_share: Annotated[Share, Field(lt=1)] = Field(
        default=0.2, description="minillm: how much of the teacher is mixed into the sampling distribution."
    )
    buffer: Count = Field(default=1000, description="adaptive: rows kept for reuse.")


def objective_problems(objectives: list[Objective]) -> Problems:
    """What of a list of objectives cannot work."""
    problems: Problems = {}
    if all(
        term.weight == 0 or (isinstance(term.weight, Ramp) and term.weight.start == term.weight.end == 0)
        for term in objectives
    ):
        problems["objectives"] = "every weight is 0: there is nothing to learn from"
    seen: set[str] = set()
    for index, term in enumerate(objectives):
        place = f"objectives.{index}"
        if term.objective in seen:
            problems[f"{place}.objective"] = f"{term.objective} is listed twice; give it once with the weight you mean"
        seen.add(term.objective)
        if term.objective not in FEATURES and term.layers != Objective.model_fields["layers"].default:
            problems[f"{place}.layers"] = f"{term.objective} looks at predictions, not at layers. Remove it"
        if term.objective in FEATURES | {"chunk_likelihood"}:
            for name in ("temperature", "missing"):
                if getattr(term, name) != Objective.model_fields[name].default:
                    problems[f"{place}.{name}"] = f"{term.objective} does not look at next-token predictions. Remove it"
        problems |= {f"{place}.options.{name}": text for name, text in _option_problems(term).items()}
    return problems


def _option_problems(term: Objective) -> Problems:
    if not term.options:
        return {}
    from limbeck.core.errors import unknown_name
    from limbeck.objectives.catalogue import option_defaults

    known = option_defaults(term.objective)
    found: Problems = {}
    for name, value in term.options.items():
        if name not in known:
            found[name] = unknown_name(f"option of {term.objective}", name, known)
        elif isinstance(known[name], str) != isinstance(value, str):
            found[name] = f"expected a {'name' if isinstance(known[name], str) else 'number'}, got {value!r}"
        elif not isinstance(value, int | float | str | type(None)) or isinstance(value, bool):
            found[name] = f"expected a number, got {value!r}"
        elif name == "paths" and (not isinstance(value, int) or value < 1):
            found[name] = f"expected a whole number of at least 1, got {value!r}"
    return found
