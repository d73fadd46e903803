"""What the student looks like, as a recipe writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.recipe_values import Count, KeepAttention, NonEmpty, Part, RecipeProblems, Share, Whole, shipped_or_added

FilterName = Literal["implicit", "explicit", "modal"]


class Hyena(Part):
    """The operator that takes the place of attention (Poli et al. 2023, arXiv:2302.10866)."""

    order: Annotated[int, Field(ge=2, le=8), Whole] = Field(
        default=2,
        description="Number of gates N; there are N-1 long convolutions. 2 is the order the papers use for language.",
    )
    expand: Annotated[int, Field(ge=1, le=16), Whole] = Field(
        default=1, description="Inner channels, as a multiple of the attention's heads times head width."
    )
    short_conv: Annotated[int, Field(ge=1, le=128), Whole] = Field(
        default=3, description="Taps of the short causal convolution on every projection (arXiv:2302.10866 uses 3)."
    )
    filter: Annotated[str, shipped_or_added("filter", FilterName)] = Field(
        default="modal",
        description="How the long filter is written: implicit (a sine network over positions, arXiv:2302.10866), "
        "explicit (one number a tap), modal (a sum of damped oscillations, which decodes in constant memory).",
    )
    filter_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the chosen filter, passed to its class as they are."
    )


class Shrink(Part):
    """What remains of the teacher's size. What is left out is chosen by importance on calibration text."""

    layers: Annotated[int, Field(ge=1), Whole] | Annotated[Share, Field(gt=0)] | None = Field(
        default=None, description="Layers kept: a number, or a share below 1; null keeps all."
    )
    intermediate: Annotated[int, Field(ge=1), Whole] | Annotated[Share, Field(gt=0)] | None = Field(
        default=None, description="Feed-forward neurons kept in each layer: a number, or a share below 1."
    )
    layer_rule: Literal["importance", "even", "first"] = Field(
        default="importance",
        description="Which layers stay: those that change their input most (arXiv:2403.03853), evenly spaced, or the "
        "first.",
    )

    @model_validator(mode="after")
    def _shrinks(self) -> Shrink:
        if self.layers is None and self.intermediate is None:
            raise RecipeProblems({"layers": "neither layers nor intermediate is given: nothing would shrink"})
        return self


class Student(Part):
    """The model that is made."""

    keep_attention: KeepAttention = Field(
        default=0,
        description="Layers that keep attention: a number of layers, a share between 0 and 1, or a list of layer "
        "indices from 0. A quarter is the usual hybrid; 0 gives up exact recall.",
    )
    keep_rule: Literal["even", "first", "last", "measured"] = Field(
        default="even",
        description="Which layers keep attention when a number or share is given: evenly spaced, the first, the last, "
        "or those whose fitted mixer leaves the largest held-out error.",
    )
    hyena: Hyena = Field(default=Hyena(), description="Options of the operator in every other layer.")
    initialisation: Literal["calibrated", "copied", "random"] = Field(
        default="calibrated",
        description="Start of the new mixers: projections scaled and filters fitted to the teacher's attention on real "
        "text, projections copied as they are, or random.",
    )
    calibration_tokens: Count = Field(default=16_384, description="Tokens of text that the calibrated start looks at.")
    failed_layers: Literal["keep", "swap"] = Field(
        default="keep",
        description="A layer that fits no better than an output of zero after alignment (held-out normalised MSE of 1 "
        "or more) keeps its attention, or is swapped all the same; the report says which.",
    )
    source: NonEmpty | None = Field(
        default=None,
        description="A trained model of any family to be taught as it is (hub id, folder, .gguf file, `embedded`); "
        "null makes the student from the teacher.",
    )
    size: NonEmpty | None = Field(
        default=None,
        description="A new model of a size that ships: bytepool-10m, -50m, -100m (bytes), bpe-10m, -50m, -100m (tokens), "
        "stlm-parallel, stlm-parallel-shared.",
    )
    architecture: dict[str, Any] | None = Field(
        default=None,
        description="A new model from random weights: its configuration for transformers (model_type and its keys); with "
        "size, the keys that differ from it.",
    )
    shrink: Shrink | None = Field(
        default=None, description="A smaller copy of the teacher, its least used parts left out (arXiv:2407.14679)."
    )

    @model_validator(mode="after")
    def _known_size(self) -> Student:
        if self.size is not None:
            from limbeck.core.errors import unknown_name
            from limbeck.models.sizes import SIZES

            if self.size not in SIZES:
                raise RecipeProblems({"size": unknown_name("size", self.size, SIZES)})
        return self

    @property
    def is_new(self) -> bool:
        """Whether it starts from random weights of an architecture of its own."""
        return self.size is not None or self.architecture is not None

    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration of a new model: its size's, with the keys of `architecture` in their place."""
        if self.size is None:
            return dict(self.architecture or {})
        from limbeck.models.sizes import SIZES

        return _merged(SIZES[self.size], self.architecture or {})


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if both else value
    return found
