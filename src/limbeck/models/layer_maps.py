"""Which layer of the student learns from which layer of the teacher.

Layers are counted as hidden states are: 0 is the embeddings, i the state after block i (its attention, values and so on
are those of block i), so that a model of L blocks ends with L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.core.errors import RecipeError

LayerPair = tuple[int, int]

_FORMS = (
    'Write "all", "last", {last: 2}, {uniform: 3}, or pairs of student and teacher layers such as [[2, 4], [6, 12]]'
)


def layer_map(
    words: str | Mapping[str, int] | Sequence[Sequence[int]], student_layers: int, teacher_layers: int
) -> list[LayerPair]:
    """Pairs (student layer, teacher layer) in the student's order.

    words: "all": every block of the student, spread over the teacher's whole depth, the last to the last.
    {"uniform": n}: n of those pairs, evenly spaced in the student and ending with the last. {"last": n}: the last n
    blocks of both, one to one; "last" is {"last": 1}. Or explicit pairs, where 0 is the embeddings and negative numbers
    count from the end (-1 is the last layer).

    Raises: RecipeError when the words are none of these, or name layers that a model does not have.
    """
    if words in ("all", "last"):
        words = {"uniform": student_layers} if words == "all" else {"last": 1}
    if not isinstance(words, (str, Mapping)):
        return _explicit(words, student_layers, teacher_layers)
    if isinstance(words, str) or len(words) != 1 or next(iter(words)) not in ("last", "uniform"):
        raise RecipeError(f"layers: {words!r} is no layer map. {_FORMS}.")
    [(form, count)] = words.items()
    most = min(student_layers, teacher_layers) if form == "last" else student_layers
    if not _is_number(count) or not 1 <= count <= most:
        raise RecipeError(
            f"layers: {form}: {count!r} must be a whole number from 1 to {most}: the student has {student_layers} layers, the "
            f"teacher {teacher_layers}."
        )
    if form == "last":
        return [(student_layers - back, teacher_layers - back) for back in reversed(range(count))]
    chosen = [_spread(step, count, student_layers) for step in range(1, count + 1)]
    return [(layer, _spread(layer, student_layers, teacher_layers)) for layer in chosen]


def _spread(step: int, steps: int, layers: int) -> int:
    """The layer at `step / steps` of the depth, rounded half up and at least 1."""
    return max(1, (2 * step * layers + steps) // (2 * steps))


def _explicit(words: Any, student_layers: int, teacher_layers: int) -> list[LayerPair]:
    pairs: list[LayerPair] = []
    if not isinstance(words, Sequence) or not words:
        raise RecipeError(f"layers: {words!r} is no layer map. {_FORMS}.")
    for pair in words:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(_is_number(layer) for layer in pair):
            raise RecipeError(f"layers: {pair!r} is no pair of a student and a teacher layer. {_FORMS}.")
        resolved = (_existing(pair[0], student_layers, "student"), _existing(pair[1], teacher_layers, "teacher"))
        if resolved in pairs:
            raise RecipeError(
                f"layers: the pair {list(resolved)} is given twice; remove one, or raise the term's weight."
            )
        pairs.append(resolved)
    return sorted(pairs)


def _existing(layer: int, layers: int, whose: str) -> int:
    if not -layers <= layer <= layers:
        raise RecipeError(
            f"layers: the {whose} has no layer {layer}; it has {layers} blocks: 0 is the embeddings, 1 to {layers} come "
            f"after each block, -1 is the last."
        )
    return layer if layer >= 0 else layers + 1 + layer


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
