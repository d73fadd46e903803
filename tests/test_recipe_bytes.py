"""Recipes of students that read bytes, of new sizes, and of training courses: what is understood and what is refused."""

import pytest

from limbeck.core.errors import RecipeError
from limbeck.new_models import scratch_config
from limbeck.recipe_io import load_recipe, parse_recipe

BYTES = """\
name: bytes
teacher: null
tokenizer: {segmenter: space}
student: {size: bytepool-10m, initialisation: random}
data: {train: [one.txt], heldout: [two.txt], context_tokens: 64}
stages:
  - {kind: tune, tokens: 1024, batch_tokens: 128, learning_rate: 1e-3}
controls: {from_scratch: false, copied: false, teacher_more: false, floor: false}
"""
TAUGHT = """\
name: taught
teacher: {source: some/teacher}
tokenizer: {segmenter: teacher}
student: {size: bytepool-10m, initialisation: random}
data: {train: [one.txt], heldout: [two.txt], context_tokens: 64}
stages:
  - {kind: distil, tokens: 1024, batch_tokens: 128, learning_rate: 1e-3}
"""

REFUSED = {
    "unknown rule": (BYTES, "segmenter: space", "segmenter: spaces", '"spaces" is no rule'),
    "rule without width": (BYTES, "segmenter: space", "segmenter: 'fixed:0'", "is no rule"),
    "trained needs a size": (BYTES, "segmenter: space", "segmenter: trained", "belong together"),
    "a size needs trained": (BYTES, "segmenter: space", "segmenter: space, train_vocab_size: 300", "belong together"),
    "no teacher's borders": (BYTES, "segmenter: space", "segmenter: teacher", "there is no teacher"),
    "bytes have no tokenizer": (BYTES, "segmenter: space", "segmenter: space, source: a/b", "segmenter: bpe:a/b"),
    "length of nothing": (BYTES, "segmenter: space", "source: a/b, patch_bytes: 8", "Give segmenter too"),
    "mean length of words": (BYTES, "segmenter: space", "segmenter: space, bytes_per_patch: 6.0", "only ngram_entropy"),
    "unknown size": (BYTES, "bytepool-10m", "bytepool-11m", 'Did you mean "bytepool-10m"'),
    "bytes without a rule": (BYTES, "{segmenter: space}", "{source: a/b}", "say how they are cut"),
    "shares too large": (
        BYTES, "learning_rate: 1e-3", "learning_rate: 1e-3, length_curriculum: [{share: 0.6, divisor: 4}, {share: 0.6, divisor: 2}]",
        "exceed the whole stage",
    ),
    "divisor that does not divide": (
        BYTES, "learning_rate: 1e-3", "learning_rate: 1e-3, length_curriculum: [{share: 0.6, divisor: 3}]", "does not divide",
    ),
    "patches of tokens": (
        BYTES.replace("{segmenter: space}", "{source: a/b}").replace("bytepool-10m", "bpe-10m"), "learning_rate: 1e-3",
        "learning_rate: 1e-3, patch_curriculum: [{share: 0.5, symbols: 4}]", "reads no bytes",
    ),
    "curriculum of a store": (
        TAUGHT, "source: some/teacher", "store: some/store", "whole windows",
    ),
    "several through one trie": (
        TAUGHT, "{source: some/teacher}", "{several: [{source: a/b}, {source: c/d}]}", "trie of one tokenizer",
    ),
    "no checkpointing": (
        BYTES, "name: bytes", "name: bytes\nruntime: {gradient_checkpointing: true}", "micro_batch_sequences lower",
    ),
    "infinite in the trie": (
        TAUGHT, "learning_rate: 1e-3", "learning_rate: 1e-3, objectives: [{objective: reverse_kl}]", "Use forward_kl",
    ),
    "trie without borders": (
        TAUGHT.replace("segmenter: teacher", "segmenter: space"), "learning_rate: 1e-3",
        "learning_rate: 1e-3, objectives: [{objective: byte_trie}]", "byte_trie needs",
    ),
    "a course without its end": (
        BYTES, "learning_rate: 1e-3", "learning_rate: 1e-3, dropout: {start: 0.1}", "dropout.end: missing. Dropout at the last step",
    ),
    "too much dropout": (BYTES, "learning_rate: 1e-3", "learning_rate: 1e-3, dropout: 1.5", "dropout: must be less than 1"),
    "patches that stay": (
        BYTES, "learning_rate: 1e-3", "learning_rate: 1e-3, patch_curriculum: [{share: 0.5, symbols: 16}]", "would cut none",
    ),
    "length in words": (BYTES, "random}", "random, architecture: {patch_bytes: abc}}", "whole number from 2 to 256"),
    "size of another family": (BYTES, "random}", "random, architecture: {model_type: gpt2}}", "bytepool-10m is no gpt2"),
    "no path": (
        TAUGHT, "learning_rate: 1e-3", "learning_rate: 1e-3, objectives: [{objective: byte_trie, options: {paths: 0}}]",
        "at least 1, got 0",
    ),
    "written bytes": (
        TAUGHT, "learning_rate: 1e-3", "learning_rate: 1e-3, on_policy: {share: 0.5}", "needs a teacher with the student's tokens",
    ),
    "states of patches": (
        TAUGHT, "learning_rate: 1e-3", "learning_rate: 1e-3, objectives: [{objective: hidden_mse}]", "hidden states are of patches",
    ),
    "bytes of the teacher's own model": (TAUGHT, "size: bytepool-10m, initialisation: random", "keep_attention: 1", "only a student of a new"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(name):
    text, old, new, told = REFUSED[name]
    if name == "curriculum of a store":
        text = text.replace("learning_rate: 1e-3", "learning_rate: 1e-3, length_curriculum: [{share: 0.5, divisor: 2}]")
    assert old in text
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.replace(old, new))
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 or name not in ("a course without its end", "too much dropout")


ARCHITECTURES = {
    "trunk: 3": "trunk: expected a mapping",
    "trunk: {width: abc}": "trunk.width: expected a whole number, got 'abc'",
    "trunk: {layers: 2.5}": "trunk.layers: expected a whole number, got 2.5",
    "trunk: {hyena: modal}": "trunk.hyena: expected a mapping (key: value), got 'modal'",
    "trunk: {mixer_options: {mine: 3}}": "trunk.mixer_options: expected a mapping",
    "trunk: {qk_norm: maybe}": "trunk.qk_norm: expected true or false, got 'maybe'",
    "trunk: {loop: abc}": "trunk.loop: expected a list, got 'abc'",
    "logit_softcap: abc": "architecture.logit_softcap: expected a number, got 'abc'",
}


@pytest.mark.parametrize("words", ARCHITECTURES)
def test_values_of_another_type_are_refused_by_their_key(words):
    recipe = parse_recipe(BYTES.replace("random}", f"random, architecture: {{{words}}}}}"))
    with pytest.raises(RecipeError) as caught:
        scratch_config(recipe)
    assert ARCHITECTURES[words] in str(caught.value)


def test_shapes_of_every_kind_are_understood():
    trunk = "{layers: 6, loop: [2, 4, 3], dropout: 0, kv_heads: null, rope_theta: 10000, share_feed_forward: interior}"
    recipe = parse_recipe(BYTES.replace("random}", f"random, architecture: {{trunk: {trunk}, logit_softcap: null}}}}"))
    assert scratch_config(recipe).trunk["loop"] == [2, 4, 3]


def test_a_size_is_a_configuration_and_single_keys_of_it_can_be_changed():
    plain = parse_recipe(BYTES).student.configuration
    assert plain["model_type"] == "limbeck_bytepool"
    changed = parse_recipe(BYTES.replace("initialisation", "architecture: {trunk: {layers: 2}}, initialisation"))
    assert changed.student.configuration["trunk"]["layers"] == 2
    assert changed.student.configuration["trunk"]["width"] == plain["trunk"]["width"]
    assert parse_recipe(BYTES).student.configuration == plain


def test_courses_of_training_are_read():
    text = BYTES.replace(
        "learning_rate: 1e-3",
        "learning_rate: 1e-3, dropout: {kind: triangular, start: 0.0, end: 0.2}, cautious_decay: true, "
        "decay_schedule: linear, embedding_learning_rate: 5e-3, length_curriculum: [{share: 0.3, divisor: 4}], "
        "patch_curriculum: [{share: 0.5, symbols: 4}]",
    )
    stage = parse_recipe(text).stages[0]
    assert (stage.dropout.kind, stage.dropout.end, stage.dropout.cycles) == ("triangular", 0.2, 4)
    assert stage.length_curriculum[0].divisor == 4
    assert stage.patch_curriculum[0].symbols == 4


@pytest.mark.parametrize("name", ["bytepool-10m", "bytepool-50m", "bytepool-100m", "bpe-10m", "bpe-50m", "bpe-100m"])
def test_every_size_has_its_preset(name):
    recipe = load_recipe(name)
    assert recipe.student.size == name
    assert (recipe.tokenizer.segmenter is not None) == name.startswith("bytepool")
    assert recipe.stages[0].optimizer == "muon"
