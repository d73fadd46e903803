"""What the stages of a recipe will cost, in operations, before anything has run: pass by pass, for what each loss needs.

A run counts what it does (`models.metering`). This foretells it from the same counts of a model's parts, as far as it can be
told: how long the student's own writing gets, how many tokens a teacher needs for a text in which the student reads others,
and how long patches turn out is known when they are there. The functions say what they assume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.assembly import StagePlan, freeze
from limbeck.models.costs import TOKEN_CHARACTERS
from limbeck.models.flops import PassCosts, pass_costs
from limbeck.recipe import Recipe
from limbeck.recipe_agreement import reads_teachers_trie
from limbeck.recipe_objectives import BYTE_TRIE, FEATURES, STRETCHES
from limbeck.train.on_policy import HELDOUT_CHECKS
from limbeck.train.trainer import StageSettings

# Held-out rows by which an adaptive share of the student's own writing is set.
ADAPTIVE_ROWS = 16
# Paths that a byte_trie stage follows, unless the recipe says otherwise.
TRIE_PATHS = 8


@dataclass(frozen=True)
class _Rows:
    """So many rows of equal width, in all updates of a stage together."""

    rows: float
    width: int

    @property
    def tokens(self) -> float:
        return self.rows * self.width

    @property
    def scored(self) -> float:
        """Positions that predict a token of their row."""
        return self.rows * (self.width - 1)

    def times(self, share: float) -> _Rows:
        return _Rows(self.rows * share, self.width)


def stage_flops(recipe: Recipe, plan: StagePlan, student: Any, teachers: Sequence[Any]) -> float:
    """Operations of a phase, the teachers' included. Leaves gradients to what the phase trains, as training it does."""
    freeze(student, plan)
    spec, total = plan.spec, 0.0
    costs = _student_costs(student, plan.settings, again=recipe.runtime.gradient_checkpointing)
    for rows in _rows_of(plan.settings, recipe.data.context_tokens):
        if spec.kind == "align":
            total += _align(rows, plan, student, teachers[0])
        elif spec.kind == "tune" or not _asks(spec):
            total += _learning(rows, costs)
        elif spec.on_policy is not None:
            total += _on_policy(rows, recipe, plan, costs, teachers)
        else:
            total += _distil(rows, recipe, plan, student, costs, teachers)
    return total


def stages_flops(recipe: Recipe, plans: Sequence[StagePlan], student: Any, teachers: Sequence[Any]) -> float:
    """Of several phases of one model."""
    return sum(stage_flops(recipe, plan, student, teachers) for plan in plans)


def _rows_of(settings: StageSettings, width: int) -> list[_Rows]:
    """The rows of a stage by their width, as its length curriculum cuts them."""
    rows, steps = settings.batch_tokens // width, settings.steps
    found, passed, done = [], 0.0, 0
    for share, divisor in settings.length_curriculum:
        passed += share
        until = min(steps, round(passed * steps))
        found.append(_Rows((until - done) * rows * divisor, width // divisor))
        done = until
    return [*found, _Rows((steps - done) * rows, width)]


def _student_costs(student: Any, settings: StageSettings, *, again: bool) -> PassCosts:
    """Of the student. With a patch curriculum its patches are taken to be as long as the average of it lets them be."""
    if not settings.patch_curriculum:
        return pass_costs(student, again=again)
    usual, left = student.config.mean_patch_bytes, 1.0
    mean = 0.0
    for share, most in settings.patch_curriculum:
        mean += share * min(usual, most - 1)
        left -= share
    return pass_costs(student, mean_patch_bytes=mean + max(0.0, left) * usual)


def _asks(spec: Any) -> bool:
    return spec.kind == "distil" and any(term.objective != "cross_entropy" for term in spec.terms())


def _learning(
    rows: _Rows, costs: PassCosts, *, heads: int = 1, heads_again: int = 0, scored: float | None = None
) -> float:
    """A pass forth and back, the head at so many positions (None: all that predict a token of their row).

    heads: how many times it runs there. heads_again: how many more with logits that are worked out again in the backward pass.
    """
    scored = rows.scored if scored is None else scored
    head = heads * costs.learning_head + heads_again * (costs.learning_head + costs.head)
    return rows.tokens * costs.learning(rows.width) + scored * head


def _reading(rows: _Rows, costs: PassCosts, *, heads: float) -> float:
    """A pass forth, the head at some positions."""
    return rows.tokens * costs.body(rows.width) + heads * costs.head


def _align(rows: _Rows, plan: StagePlan, student: Any, teacher: Any) -> float:
    """The teacher without its head; the chosen mixers forth and back, and with their own inputs the whole student forth."""
    mixers: dict[int, Any] = student.mixers()
    total = _reading(rows, pass_costs(teacher), heads=0)
    if plan.spec.inputs == "student":
        total += _reading(rows, pass_costs(student), heads=rows.tokens)
    for layer in plan.layers or ():
        forth = pass_costs(mixers[layer]).body(rows.width)
        into = 2 * mixers[layer].operator.in_proj.weight.numel()
        total += rows.tokens * ((plan.spec.inputs != "student") * forth + 2 * forth - into)
    return total


def _distil(
    rows: _Rows, recipe: Recipe, plan: StagePlan, student: Any, costs: PassCosts, teachers: Sequence[Any]
) -> float:
    """Each objective's passes: of the body one forth and back, whatever the terms; of the head what each kind needs."""
    terms = plan.spec.terms()
    names = {term.objective for term in terms}
    crossed = names & STRETCHES if _is_crossed(recipe) and not _is_exact(recipe) else set()
    heads = int(bool(names - FEATURES - crossed - {BYTE_TRIE}))
    total = _learning(rows, costs, heads=heads, heads_again=len(crossed))
    total += _teaching(rows, recipe, student, costs, teachers, names)
    for term in terms:
        if term.objective == BYTE_TRIE:
            mean = student.config.mean_patch_bytes
            paths = int(term.options.get("paths") or TRIE_PATHS) * rows.tokens / (mean + 1)
            total += 3 * paths * student.network.flops_per_path(mean)
    return total


def _is_crossed(recipe: Recipe) -> bool:
    """Whether the student reads other tokens than its teacher, as far as the recipe tells."""
    words = recipe.tokenizer
    own = words.segmenter is not None or words.train_vocab_size is not None or words.source is not None
    return own or any(
        term.objective in STRETCHES for stage in recipe.stages if stage.kind == "distil" for term in stage.terms()
    )


def _is_exact(recipe: Recipe) -> bool:
    return recipe.teacher is not None and recipe.teacher.exact


def _teaching(
    rows: _Rows, recipe: Recipe, student: Any, costs: PassCosts, teachers: Sequence[Any], names: set[str]
) -> float:
    """What is asked of the teacher about some rows; nothing where what it says was written down."""
    words = recipe.teacher
    if words is None or words.kind in ("store", "served", "closed"):
        return 0.0
    if reads_teachers_trie(recipe):
        share = 1 / (1 + student.config.mean_patch_bytes)
        theirs = _Rows(rows.rows, max(1, round(rows.width * share)))
        return _reading(theirs, pass_costs(teachers[0]), heads=theirs.tokens)
    if _is_crossed(recipe) and words.exact:
        return _exact(rows, pass_costs(teachers[0]))
    if _is_crossed(recipe) and names & STRETCHES:
        theirs = _Rows(rows.rows, max(1, round(rows.width * _tokens_of_teacher(student))))
        # The head runs for the text's own tokens, and again for the sorted probabilities at common borders.
        return _reading(theirs, pass_costs(teachers[0]), heads=2 * theirs.scored)
    return _same_tokens(rows, recipe, costs, teachers, names, scored=rows.scored)


def _same_tokens(
    rows: _Rows, recipe: Recipe, costs: PassCosts, teachers: Sequence[Any], names: set[str], *, scored: float
) -> float:
    """Teachers that read the rows as they are; each is asked about the texts that it teaches."""
    words = recipe.teacher
    assert words is not None
    asked = [costs] if words.itself is not None else [pass_costs(teacher) for teacher in teachers]
    needs_logits = bool(names - FEATURES - {"cross_entropy"})
    heads = needs_logits * (scored if words.targets == "dense" else rows.tokens)
    shares = _taught_shares(recipe, len(asked))
    return sum(share * _reading(rows, one, heads=heads) for one, share in zip(asked, shares, strict=True))


def _tokens_of_teacher(student: Any) -> float:
    """Tokens of a teacher for one of the student's: bytes by the usual length of a token, other tokens one by one."""
    mean = getattr(student.config, "mean_patch_bytes", None)
    return 1.0 if mean is None else mean / (mean + 1) / TOKEN_CHARACTERS


def _exact(rows: _Rows, costs: PassCosts) -> float:
    """A context for every token of the student, but those that begin another one: on average half a row is read for each.

    The student is taken to need two tokens for one of the teacher's.
    """
    theirs = _Rows(rows.rows, max(1, rows.width // 2))
    half = max(1, theirs.width // 2)
    again = _Rows(rows.rows * (rows.width - theirs.width), half)
    return _reading(theirs, costs, heads=0) + _reading(again, costs, heads=rows.tokens)


def _taught_shares(recipe: Recipe, teachers: int) -> list[float]:
    """The share of the rows that each teacher is asked about: of the texts it teaches, by their weights."""
    several = None if recipe.teacher is None else recipe.teacher.several
    if several is None:
        return [1.0] * teachers
    weights = [source.weight for source in recipe.data.train]
    whole = sum(weights) or 1.0
    return [
        1.0 if one.texts is None else sum(weights[text] for text in one.texts if text < len(weights)) / whole
        for one in several
    ]


def _on_policy(rows: _Rows, recipe: Recipe, plan: StagePlan, costs: PassCosts, teachers: Sequence[Any]) -> float:
    """Writing, and learning from what was written. Rows are taken to be written to their last place, never ended before."""
    words, names = plan.spec.on_policy, {term.objective for term in plan.spec.terms()}
    is_minillm = words.method == "minillm"
    share = 1.0 if is_minillm else (words.share if words.share is not None else 0.5 * (words.method == "mixed"))
    prompt = min(words.prompt_tokens, rows.width - 1)
    new = min(words.max_new_tokens or rows.width, rows.width - prompt)
    written, text = rows.times(share), rows.times(1 - share)
    scored = written.rows * new
    # The last token that is written is never read.
    read = _Rows(written.rows, prompt + new - 1)
    total = _reading(read, costs, heads=scored)
    if is_minillm:
        if words.teacher_share:
            total += _reading(read, pass_costs(teachers[0]), heads=scored)
        total += _learning(written, costs, heads=0, heads_again=1, scored=scored)
        total += _same_tokens(written, recipe, costs, teachers, names, scored=2 * scored)
        return total + ("cross_entropy" in names) * _learning(rows, costs)
    for part, at in ((written, scored), (text, text.scored)):
        total += _learning(part, costs, scored=at)
        total += _same_tokens(part, recipe, costs, teachers, names, scored=at)
    if words.method == "adaptive":
        looks = (
            min(HELDOUT_CHECKS, plan.settings.steps) * rows.tokens / (plan.settings.steps * plan.settings.batch_tokens)
        )
        heldout = _Rows(ADAPTIVE_ROWS * looks, recipe.data.context_tokens)
        total += _reading(heldout, costs, heads=heldout.scored)
    return total
