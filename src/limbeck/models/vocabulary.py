"""Do two models speak of the same tokens? Asked before anything is trained, answered with a table.

Losses on logits compare token by token, so the id of every token must mean the same string on both sides; equal sizes
prove nothing, and unequal ones need not matter: model files are often padded with rows that no token uses.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from limbeck.core.errors import VocabularyError
from limbeck.models.token_bytes import PROBES, encode_text

Verdict = Literal["identical", "padded", "subset", "different"]
_SHOWN = 3
_MODEL_KEYS = ("type", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_WITHOUT_EFFECT = ("trim_offsets",)


class ComparedFact(NamedTuple):
    """One line of the table. is_same: whether the two agree; matters: whether a difference forbids losses on logits."""

    what: str
    student: str
    teacher: str
    is_same: bool
    matters: bool = False


@dataclass(frozen=True)
class TokenizerComparison:
    """What two tokenizers, and the models that use them, have in common.

    verdict:
    - "identical": every id is the same string, text is cut in the same way, and the models have equally many rows.
    - "padded": the same, but the models' embeddings have different numbers of rows, and the rows that only one of them
      has stand for no token.
    - "subset": the same on all ids below `usable_vocabulary`; the ids above are special tokens that only one of the two
      has.
    - "different": anything else. Ids must not be exchanged.
    usable_vocabulary: ids below it may be compared between the models' logits; 0 if the verdict is "different".
    facts: the table.
    """

    verdict: Verdict
    usable_vocabulary: int
    facts: tuple[ComparedFact, ...]

    @property
    def can_share_logits(self) -> bool:
        """Whether losses on logits have a meaning."""
        return self.verdict != "different"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: what, student, teacher, and "same", "differs" or "forbids" (the last rules out losses on logits)."""
        return [
            (
                fact.what,
                fact.student,
                fact.teacher,
                "same" if fact.is_same else "forbids" if fact.matters else "differs",
            )
            for fact in self.facts
        ]

    def table(self) -> str:
        """The table as text."""
        lines = [("", "student", "teacher", ""), *self.rows()]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    def explain(self) -> str:
        """The verdict in a sentence or two, with what to do."""
        usable = self.usable_vocabulary
        return {
            "identical": "The tokenizers are identical.",
            "padded": f"The tokenizers are identical; the models are padded to different sizes. The first {usable} rows "
            "of both are used.",
            "subset": f"The tokenizers agree on the first {usable} ids and cut text in the same way; the others are "
            "special tokens that only one of them has. The first rows of both are used, and text must not hold the "
            "other special tokens.",
            "different": "The tokenizers differ, so the same id means different text. Use the objectives for teachers "
            "with other tokens (chunk_likelihood, or sorted_earth_mover), train on the teacher's text alone, or give "
            "the student the teacher's tokenizer.",
        }[self.verdict]


def compare_tokenizers(
    student: Any, teacher: Any, *, student_rows: int | None = None, teacher_rows: int | None = None
) -> TokenizerComparison:
    """Compare the tokenizers of a student and a teacher.

    student_rows, teacher_rows: rows of the models' embeddings (or logits); None: as many as the tokenizer needs.

    Raises: VocabularyError when a model has fewer rows than its tokenizer has ids.
    """
    names = _names(student), _names(teacher)
    needed = max(names[0]) + 1, max(names[1]) + 1
    rows = student_rows or needed[0], teacher_rows or needed[1]
    for who, has, needs in zip(("student", "teacher"), rows, needed, strict=True):
        if has < needs:
            raise VocabularyError(
                f"the {who}'s tokenizer has ids up to {needs - 1}, but the model has only {has} rows. Give the {who} the "
                "tokenizer that it was trained with."
            )
    clashes = sorted(token for token in names[0].keys() & names[1].keys() if names[0][token] != names[1][token])
    alone = names[0].keys() - names[1].keys(), names[1].keys() - names[0].keys()
    first_extra = min((min(ids) for ids in alone if ids), default=None)
    common = max(names[0].keys() & names[1].keys(), default=-1) + 1
    extra_matters = (first_extra is not None and first_extra < common) or not all(
        _is_special(tokenizer, token) for tokenizer, ids in zip((student, teacher), alone) for token in ids
    )
    facts = (
        *_size_facts(rows, needed), *_id_facts(names, clashes, alone, extra_matters), *_behaviour_facts(student, teacher),
        *_role_facts(student, teacher),
    )  # fmt: skip
    is_different = any(fact.matters and not fact.is_same for fact in facts)
    return TokenizerComparison(*_verdict(is_different, first_extra, rows), facts)


def require_same_tokens(comparison: TokenizerComparison, *, asked_for: str) -> int:
    """How many rows of both models' logits to use.

    asked_for: what needs it, such as "forward_kl". Raises: VocabularyError, with the table, when ids mean different text.
    """
    if comparison.can_share_logits:
        return comparison.usable_vocabulary
    raise VocabularyError(f"{asked_for} compares logits token by token. {comparison.explain()}\n\n{comparison.table()}")


def _verdict(is_different: bool, first_extra: int | None, rows: tuple[int, int]) -> tuple[Verdict, int]:
    if is_different:
        return "different", 0
    if first_extra is not None:
        return "subset", min(first_extra, *rows)
    return ("identical" if rows[0] == rows[1] else "padded"), min(rows)


def _names(tokenizer: Any) -> dict[int, str]:
    return {token: name for name, token in tokenizer.get_vocab().items()}


def _is_special(tokenizer: Any, token: int) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(token)
    return token in tokenizer.all_special_ids or bool(added is not None and added.special)


def _size_facts(rows: tuple[int, int], needed: tuple[int, int]) -> list[ComparedFact]:
    return [
        ComparedFact("tokens", str(needed[0]), str(needed[1]), needed[0] == needed[1]),
        ComparedFact("rows of the model", str(rows[0]), str(rows[1]), rows[0] == rows[1]),
    ]


def _id_facts(
    names: tuple[dict[int, str], dict[int, str]],
    clashes: list[int],
    alone: tuple[set[int], set[int]],
    extra_matters: bool,
) -> list[ComparedFact]:
    facts = [
        ComparedFact(f"id {token}", repr(names[0][token]), repr(names[1][token]), False, True)
        for token in clashes[:_SHOWN]
    ]
    if clashes:
        mine, theirs = set(names[0].values()), set(names[1].values())
        shared = len(mine & theirs)
        facts += [
            ComparedFact("ids that differ", str(len(clashes)), str(len(clashes)), False, True),
            ComparedFact(
                "strings the other has", f"{shared} of {len(mine)}", f"{shared} of {len(theirs)}", mine == theirs
            ),
        ]
    if any(alone):
        one, other = (_some(ids, names[side]) for side, ids in enumerate(alone))
        facts.append(ComparedFact("ids only one has", one, other, False, extra_matters))
    return facts


def _some(ids: set[int], names: dict[int, str]) -> str:
    if not ids:
        return "none"
    shown = [repr(names[token]) for token in sorted(ids)[:_SHOWN]]
    return f"{len(ids)}: {', '.join(shown)}{', ...' if len(ids) > _SHOWN else ''}"


def _behaviour_facts(student: Any, teacher: Any) -> list[ComparedFact]:
    """How text is cut. A pipeline that is written in another way matters only if it does something else."""
    pipelines = tokenizer_pipeline(student), tokenizer_pipeline(teacher)
    cuts = [[encode_text(tokenizer, [probe])[0] for probe in PROBES.values()] for tokenizer in (student, teacher)]
    agreeing = f"{sum(one == other for one, other in zip(*cuts))} of {len(PROBES)}"
    facts = [ComparedFact("test sentences cut alike", agreeing, agreeing, cuts[0] == cuts[1], True)]
    for part, matters in (
        ("model", True),
        ("merges or scores", True),
        ("pre-tokenizer", False),
        ("normalisation", False),
    ):
        one, other = pipelines[0].get(part), pipelines[1].get(part)
        facts.append(ComparedFact(part, _short(one), _short(other), one == other, matters))
    return facts


def tokenizer_pipeline(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does to text, part by part, without what changes no token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"model": type(tokenizer).__name__}
    words = json.loads(backend.to_str())
    model = words["model"]
    rules = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    if isinstance(model.get("vocab"), list):
        rules = [f"{piece} {score}" for piece, score in model["vocab"]]
    return {
        "model": {key: model[key] for key in _MODEL_KEYS if model.get(key)},
        "merges or scores": rules or None,
        "pre-tokenizer": _without_effect_removed(words.get("pre_tokenizer")),
        "normalisation": _without_effect_removed(words.get("normalizer")),
    }


def _without_effect_removed(words: Any) -> Any:
    """The same settings without those that change no token."""
    if isinstance(words, dict):
        return {key: _without_effect_removed(value) for key, value in words.items() if key not in _WITHOUT_EFFECT}
    return [_without_effect_removed(value) for value in words] if isinstance(words, list) else words


def _role_facts(student: Any, teacher: Any) -> list[ComparedFact]:
    facts = []
    for role in ("bos", "eos", "pad", "unk"):
        one, other = (getattr(tokenizer, f"{role}_token", None) for tokenizer in (student, teacher))
        facts.append(ComparedFact(f"{role} token", str(one or "none"), str(other or "none"), one == other))
    one, other = (getattr(tokenizer, "chat_template", None) for tokenizer in (student, teacher))
    facts.append(ComparedFact("chat template", _short(one), _short(other), one == other))
    return facts


def _short(value: Any) -> str:
    """A value as a cell of the table: in full when short, else its size and the beginning of its SHA-256."""
    if not value:
        return "none"
    if isinstance(value, dict) and set(value) <= {"type"}:
        return str(value.get("type"))
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(text) <= 32 and "\n" not in text:
        return text
    size = f"{len(value)} rules" if isinstance(value, list) else f"{len(text)} characters"
    kind = f"{value['type']}, " if isinstance(value, dict) and "type" in value else ""
    return f"{kind}{size}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"
