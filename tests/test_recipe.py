"""Recipes: what is refused and how it is said, overrides, and the way out and back in."""

import re

import pytest
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.core.errors import RecipeError
from limbeck.recipe import Recipe, with_budget
from limbeck.recipe_io import dump_recipe, load_recipe, parse_recipe

GOOD = """\
name: trial
seed: 3
teacher:
  source: some/teacher
  dtype: float32
student:
  keep_attention: 0.25
  keep_rule: even
  hyena: {order: 2, short_conv: 3, filter: modal}
  initialisation: calibrated
  calibration_tokens: 16_384
data:
  train: [{source: one.txt}]
  heldout:
    - {source: two.txt, split: all}
  context_tokens: 128
stages:
  - kind: align
    tokens: 300_000
    batch_tokens: 1024
    learning_rate: 3e-3
  - kind: distil
    tokens: 3e5
    batch_tokens: 2048
    learning_rate: 1e-3
    betas: [0.9, 0.95]
evaluation:
  max_tokens: 4096
  speed: {context_lengths: [64, 128]}
runtime:
  device: cpu
"""
SCRATCH = """\
name: scratch
teacher: null
tokenizer: {train_vocab_size: 512}
student:
  initialisation: random
  architecture: {model_type: gpt_neox, hidden_size: 32}
data: {train: [one.txt], heldout: [one.txt], context_tokens: 64}
stages:
  - {kind: tune, tokens: 1024, batch_tokens: 128, learning_rate: 1e-3}
controls: {from_scratch: false, copied: false, teacher_more: false, floor: false}
"""

# What is replaced by what, the line and the key that the message must name, and words that it must hold.
MUTATIONS = [
    # typos in keys
    ("seed: 3", "sed: 3", 2, "sed", 'Did you mean "seed"?'),
    ("teacher:\n", "techer:\n", 3, "techer", 'Did you mean "teacher"?'),
    ("source: some", "sorce: some", 4, "teacher.sorce", 'Did you mean "source"?'),
    ("dtype:", "dtyp:", 5, "teacher.dtyp", 'Did you mean "dtype"?'),
    ("keep_attention:", "keep_atention:", 7, "student.keep_atention", 'Did you mean "keep_attention"?'),
    ("keep_rule:", "keeprule:", 8, "student.keeprule", 'Did you mean "keep_rule"?'),
    ("order: 2", "ordr: 2", 9, "student.hyena.ordr", 'Did you mean "order"?'),
    ("filter: modal", "filtr: modal", 9, "student.hyena.filtr", 'Did you mean "filter"?'),
    ("context_tokens: 128", "contxt_tokens: 128", 16, "data.contxt_tokens", 'Did you mean "context_tokens"?'),
    ("heldout:", "held_out:", 14, "data.held_out", 'Did you mean "heldout"?'),
    ("learning_rate: 3e-3", "learning_rat: 3e-3", 21, "stages[0].learning_rat", 'Did you mean "learning_rate"?'),
    ("tokens: 3e5", "tokns: 3e5", 23, "stages[1].tokns", 'Did you mean "tokens"?'),
    ("betas:", "beta:", 26, "stages[1].beta", 'Did you mean "betas"?'),
    ("max_tokens: 4096", "max_token: 4096", 28, "evaluation.max_token", 'Did you mean "max_tokens"?'),
    ("context_lengths:", "context_length:", 29, "evaluation.speed.context_length", '"context_lengths"?'),
    ("device: cpu", "devise: cpu", 31, "runtime.devise", 'Did you mean "device"?'),
    ("{source: one.txt}", "{source: one.txt, wight: 2}", 13, "data.train[0].wight", 'Did you mean "weight"?'),
    # typos in values
    ("kind: align", "kind: allign", 18, "stages[0].kind", 'Did you mean "align"?'),
    ("kind: distil", "kind: distill", 22, "stages[1].kind", 'Did you mean "distil"?'),
    ("filter: modal", "filter: modl", 9, "student.hyena.filter", 'Did you mean "modal"?'),
    ("keep_rule: even", "keep_rule: evn", 8, "student.keep_rule", 'Did you mean "even"?'),
    ("dtype: float32", "dtype: float23", 5, "teacher.dtype", 'Did you mean "float32"?'),
    ("calibrated", "calibratd", 10, "student.initialisation", 'Did you mean "calibrated"?'),
    # keys in the wrong place
    ("seed: 3", "context_tokens: 128", 2, "context_tokens", "belongs to data.context_tokens or evaluation"),
    ("keep_rule: even", "filter: modal", 8, "student.filter", "belongs to student.hyena.filter"),
    ("    betas", "    device: cpu\n    betas", 26, "stages[1].device", "unknown key"),
    ("    betas", "    run_folder: x\n    betas", 26, "stages[1].run_folder", "belongs to runtime.run_folder"),
    ("    tokens: 300_000", "    kl: 1.0\n    tokens: 300_000", 19, "stages[0].kl", "to stages[kind=distil].kl"),
    ("seed: 3", "learning_rate: 1", 2, "learning_rate", "belongs to stages[kind=align].learning_rate or stages[kind="),
    # missing keys
    ("name: trial\n", "", 1, "name", "missing"),
    ("teacher:\n  source: some/teacher\n  dtype: float32\n", "", 1, "teacher", "missing"),
    ("  source: some/teacher\n", "", 3, "teacher.source", "Give one of source, store"),
    ("  context_tokens: 128\n", "", 12, "data.context_tokens", "missing"),
    ("    batch_tokens: 1024\n", "", 18, "stages[0].batch_tokens", "missing"),
    ("    learning_rate: 3e-3\n", "", 18, "stages[0].learning_rate", "missing"),
    ("  - kind: align\n    tokens", "  - tokens", 18, "stages[0].kind", "missing"),
    ("{source: one.txt}", "{split: train}", 13, "data.train[0].source", "missing"),
    # wrong types
    ("seed: 3", "seed: three", 2, "seed", 'whole number, got the text "three"'),
    ("seed: 3", "seed: 3.5", 2, "seed", "whole number, got 3.5"),
    ("seed: 3", "seed: true", 2, "seed", "whole number, got true"),
    ("seed: 3", "seed:", 2, "seed", "whole number, got nothing"),
    ("name: trial", "name: 5", 1, "name", 'expected text, got 5. Put it in quotes: "5"'),
    ("name: trial", "name: [a]", 1, "name", "expected text, got a list of 1"),
    ("source: some/teacher", "source: 1.5", 4, "teacher.source", "expected text, got 1.5"),
    ("{order: 2, short_conv: 3, filter: modal}", "modal", 9, "student.hyena", 'mapping (key: value), got the text'),
    ("order: 2", "order: '2'", 9, "student.hyena.order", "Write it without quotes"),
    ("filter: modal", "filter: [modal]", 9, "student.hyena.filter", "one of implicit, explicit, modal"),
    ("tokens: 300_000", "tokens: '300,000'", 19, "stages[0].tokens", "without quotes or commas"),
    ("tokens: 300_000", "tokens: lots", 19, "stages[0].tokens", 'whole number, got the text "lots"'),
    ("learning_rate: 1e-3", "learning_rate: high", 25, "stages[1].learning_rate", 'number, got the text "high"'),
    ("betas: [0.9, 0.95]", "betas: 0.9", 26, "stages[1].betas", "a list of two numbers, got 0.9"),
    ("betas: [0.9, 0.95]", "betas: [0.9]", 26, "stages[1].betas[1]", "missing. Two numbers"),
    ("betas: [0.9, 0.95]", "betas: [0.9, 0.9, 0.9]", 26, "stages[1].betas", "at most 2"),
    ("context_tokens: 128", "context_tokens: 128\n  cross_documents: yes", 17, "data.cross_documents", "true or false"),
    ("train: [{source: one.txt}]", "train: one.txt", 13, "data.train", "expected a list, got the text"),
    ("train: [{source: one.txt}]", "train: [5]", 13, "data.train[0]", "expected a mapping (key: value), got 5"),
    ("speed: {context_lengths: [64, 128]}", "speed: fast", 29, "evaluation.speed", "expected a mapping"),
    # values that cannot work
    ("name: trial", "name: ../trial", 1, "name", "becomes a folder name"),
    ("name: trial", "name: ''", 1, "name", "becomes a folder name"),
    ("name: trial", "name: .hidden", 1, "name", "becomes a folder name"),
    ("seed: 3", "seed: -1", 2, "seed", "at least 0, got -1"),
    ("source: some/teacher", "source: ''", 4, "teacher.source", "must not be empty"),
    ("keep_attention: 0.25", "keep_attention: -1", 7, "student.keep_attention", "a share between 0 and 1"),
    ("keep_attention: 0.25", "keep_attention: 1.0", 7, "student.keep_attention", "a share between 0 and 1"),
    ("keep_attention: 0.25", "keep_attention: all", 7, "student.keep_attention", "a list of layer indices"),
    ("keep_attention: 0.25", "keep_attention: true", 7, "student.keep_attention", "a number of layers"),
    ("keep_attention: 0.25", "keep_attention: [1, 1]", 7, "student.keep_attention", "a layer is listed twice"),
    ("keep_attention: 0.25", "keep_attention: [-1]", 7, "student.keep_attention", "negative ones are not allowed"),
    ("order: 2", "order: 1", 9, "student.hyena.order", "at least 2, got 1"),
    ("context_tokens: 128", "context_tokens: 0", 16, "data.context_tokens", "at least 8, got 0"),
    ("batch_tokens: 1024", "batch_tokens: 1000", 20, "stages[0].batch_tokens", "(128). Nearest: 896 or 1024"),
    ("batch_tokens: 1024", "batch_tokens: 100", 20, "stages[0].batch_tokens", "(128). Nearest: 128."),
    ("tokens: 300_000", "tokens: 1000", 19, "stages[0].tokens", "less than one step of 1024"),
    ("tokens: 300_000", "tokens: -5", 19, "stages[0].tokens", "greater than 0, got -5"),
    ("learning_rate: 3e-3", "learning_rate: 0", 21, "stages[0].learning_rate", "greater than 0, got 0"),
    ("learning_rate: 3e-3", "learning_rate: .nan", 21, "not a finite number", ""),
    ("    betas", "    temperature: 0\n    betas", 26, "stages[1].temperature", "greater than 0, got 0"),
    ("    betas", "    kl: 0\n    betas", 26, "stages[1].kl", "both 0: there is nothing to learn from"),
    ("    betas", "    name: align\n    betas", 26, "stages[1].name", 'another stage is named "align" too'),
    ("    betas", "    name: a/b\n    betas", 26, "stages[1].name", "becomes a folder name"),
    ("    betas", "    micro_batch_sequences: 99\n    betas", 26, "stages[1].micro_batch_sequences", "16 windows"),
    ("    betas", "    schedule wsd\n    betas", 26, "not YAML", "could not find expected ':'"),
    ("source: some/teacher", "source: 'some/teacher", 4, "not YAML", "quoted scalar"),
    ("keep_attention: 0.25", "keep_attention: [1, 2", 8, "not YAML", "(begun on line 7)"),
    ("betas: [0.9, 0.95]", "betas: [0.9, 1.0]", 26, "stages[1].betas[1]", "less than 1, got 1.0"),
    ("{source: two.txt, split: all}", "{source: one.txt, split: train}", 15, "data.heldout[0]", "also trained on"),
    ("{source: two.txt, split: all}", "{source: one.txt, split: all}", 15, "data.heldout[0]", "also trained on"),
    ("max_tokens: 4096", "stride_tokens: 4096", 28, "evaluation.stride_tokens", "exceeds the context (128)"),
    ("context_lengths: [64, 128]", "context_lengths: []", 29, "evaluation.speed.context_lengths", "at least 1 item"),
    ("device: cpu", "device: tpu", 31, "runtime.device", "auto, cpu, cuda, cuda:0 or mps"),
    ("  source: some/teacher\n  dtype: float32\n", "", 3, "teacher", "nothing to build"),
    ("hyena: {", "architecture: {model_type: gpt2}\n  hyena: {", 7, "student.keep_attention", "keeps its own mixers"),
    ("seed: 3", "tokenizer: {train_vocab_size: 300}", 2, "tokenizer.train_vocab_size", "only a student of a new size"),
    ("seed: 3", "tokenizer: {train_vocab_size: 300, source: x}", 2, "tokenizer.train_vocab_size", "not both"),
    # YAML
    ("seed: 3", "seed: 3\nseed: 4", 3, 'duplicate key "seed"', "first on line 2"),
    ("  keep_rule", "\tkeep_rule", 8, "not YAML", "Indent with spaces, never with tabs"),
    ("seed: 3", "seed: 3: 4", 2, "not YAML", "mapping values are not allowed"),
    ("seed: 3", "seed: !!python/object:os.system x", 2, "tag", "plain values only"),
    ("seed: 3", "seed: *other", 2, "not YAML", "undefined alias"),
    ("seed: 3", "? [a]\n: 3", 2, "a key must be a word", ""),
    ("seed: 3", "7: 3", 2, "a key must be a word", ""),
    ("seed: 3", "seed: " + "9" * 5000, 2, "not a usable number", ""),
    ("seed: 3", "seed: " + "[" * 80 + "]" * 80, 2, "nested deeper than 64", ""),
    ("seed: 3", "seed: 3\n---\nmore: 1", 3, "not YAML", "single document"),
    ("name: trial", "%YAML 1.1\n---\nname: trial", 1, "YAML 1.2", ""),
]  # fmt: skip


def write(folder, text):
    path = folder / "trial.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(text, *overrides, name="R"):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, name=name)
    return str(caught.value)


def run_cli(*words):
    result = CliRunner().invoke(app, ["plan", *map(str, words)])
    return result.exit_code, result.output


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), MUTATIONS, ids=lambda value: str(value)[:24])
def test_every_fault_names_its_line_its_key_and_the_way_out(old, new, line, key, words, tmp_path):
    assert GOOD.count(old) >= 1
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    about = [text for text in message.splitlines() if text.startswith(f"{path}:{line}: ") and key in text]
    assert about, message
    assert words in about[0]
    code, output = run_cli(path)
    assert code == 2
    assert "Traceback" not in output
    assert f"{path}:{line}: " in output


def test_there_are_enough_mutations():
    assert len(MUTATIONS) >= 60


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ":1: the recipe is empty. Start from a preset"),
        (b"# nothing\n", ":1: the recipe is empty"),
        (b"- a\n- b\n", ":1: a recipe is a mapping"),
        (b"just words\n", ":1: a recipe is a mapping"),
        (b"\x80\x02}q\x00.", ":1: not UTF-8 text"),
        (b"name: x\nseed: \xff\n", ":2: not UTF-8 text"),
        (b"name: x\nseed: \x00\n", ":2: a character that YAML does not allow"),
        (b"[" * 20_000, ":1: nested deeper than 64 levels"),
        (b"name: " + b"x" * 1_000_001, ": larger than 1,000,000 bytes"),
        (b"".join(b"k%d: 1\n" % i for i in range(20_000)), "more than 10,000 values"),
        (BOMB.encode(), "aliases expand to too many values"),
        (b"a: &a [*a]\n", "aliases expand to too many values"),
        (("a: &a x\n" + "".join(f"b{i}: *a\n" for i in range(200))).encode(), "100 aliases"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_files_that_are_no_recipe(content, words, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    code, output = run_cli(path)
    assert code == 2
    assert "Traceback" not in output


def test_a_missing_file_says_where_it_was_looked_for_and_suggests_a_preset(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe file dmo or dmo.recipe\.yaml.*Did you mean \"demo\"\?"):
        load_recipe("dmo")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe("x" * 5000)
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path)


def test_a_file_wins_over_a_preset_and_a_run_folder_stands_for_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text(GOOD)
    assert load_recipe("demo").name == "trial"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(GOOD)
    assert load_recipe("run") == load_recipe("demo")


def test_problems_come_in_the_order_of_the_file():
    broken = GOOD.replace("seed: 3", "seed: x").replace("order: 2", "order: 1").replace("device: cpu", "device: gpu")
    lines = refusal(broken).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["R:2", "R:9", "R:31"]


def test_a_misspelt_key_is_not_reported_as_missing_too():
    assert len(refusal(GOOD.replace("batch_tokens: 1024", "batch_tokns: 1024")).splitlines()) == 1


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ("weight: {start: 0, end: 1, shap: linear}", 'weight.shap: unknown key "shap". Did you mean "shape"?'),
        ("weight: {start: -1, end: 1}", "weight.start: must be at least 0"),
        ("weight: -1", "weight: must be at least 0"),
        ("weight: lots", "weight: expected a number"),
        ("weigth: 1", 'weigth: unknown key "weigth". Did you mean "weight"?'),
    ],
)
def test_a_fault_in_a_term_of_the_loss_is_told_once_and_by_its_own_keys(term, words):
    stage = f"{{kind: distil, tokens: 512, batch_tokens: 256, learning_rate: 1e-3, objectives: [{{objective: forward_kl, {term}}}]}}"
    message = refusal(
        "name: x\nteacher: {source: embedded}\ndata: {train: [factbook], heldout: [factbook], context_tokens: 64}\nstages:\n"
        f"  - {stage}\n"
    )
    assert f"stages[0].objectives[0].{words}" in message
    assert "constrained" not in message
    assert len(message.splitlines()) == 1


def test_numbers_and_defaults():
    recipe = parse_recipe(GOOD)
    assert recipe.stages[0].tokens == recipe.stages[1].tokens == 300_000
    assert isinstance(recipe.stages[1].tokens, int)
    assert recipe.stages[0].learning_rate == 0.003
    assert [stage.name for stage in recipe.stages] == ["align", "distil"]
    assert recipe.stages[0].steps == 292
    assert recipe.total_tokens == 292 * 1024 + 146 * 2048
    assert recipe.run_folder == "runs/trial"
    assert recipe.data.train[0].split == "train"


def test_a_bare_string_is_a_source_and_heldout_means_the_heldout_part():
    recipe = parse_recipe(SCRATCH)
    assert (recipe.data.train[0].source, recipe.data.train[0].split) == ("one.txt", "train")
    assert (recipe.data.heldout[0].source, recipe.data.heldout[0].split) == ("one.txt", "heldout")


def test_keep_attention_takes_a_number_a_share_or_a_list():
    for given, kept in {"3": 3, "0.5": 0.5, "[5, 2]": [2, 5], "0": 0}.items():
        assert parse_recipe(GOOD, [f"student.keep_attention={given}"]).student.keep_attention == kept


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kind: tune", "kind: align", "stages[0].kind: align needs a teacher"),
        ("kind: tune", "kind: distil", "stages[0].kind: distil needs a teacher"),
        ("{train_vocab_size: 512}", "{}", "give tokenizer.source, train_vocab_size or segmenter"),
        ("initialisation: random", "initialisation: copied", "copied needs a teacher's weights"),
        ("model_type: gpt_neox, ", "", "model_type is missing"),
        ("initialisation: random", "initialisation: random\n  keep_attention: 2", "keep_attention: without a teacher"),
        ("copied: false", "copied: true", "Write controls: {copied: false}"),
        ("  architecture: {model_type: gpt_neox, hidden_size: 32}\n", "", "nothing to build"),
    ],
)
def test_pre_training_refuses_what_needs_a_teacher(old, new, words):
    parse_recipe(SCRATCH)
    assert words in refusal(SCRATCH.replace(old, new, 1))


@pytest.mark.parametrize("text", [GOOD, SCRATCH], ids=["teacher", "scratch"])
def test_a_dumped_recipe_reads_back_equal(text):
    recipe = parse_recipe(text)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert parse_recipe(dump_recipe(recipe)).model_dump() == recipe.model_dump()


def test_awkward_values_survive_the_round_trip():
    recipe = parse_recipe(GOOD)
    words = recipe.model_dump(mode="json")
    prompts = ["yes", "1e-4", "a: b # c", "two\nlines", "ünï ✓", "'quoted'", " padded ", "null", "- x"]
    words["evaluation"]["prompts"] = prompts
    words["stages"][0] |= {"learning_rate": 1e-7, "weight_decay": 0.1 + 0.2, "dropout": 0.0}
    words["student"]["hyena"]["filter_options"] = {"nested": {"list": [1, 2.5, None, True, "x"]}}
    recipe = Recipe.model_validate(words)
    assert parse_recipe(dump_recipe(recipe)) == recipe


OVERRIDES = [
    ("stages.1.tokens=4096", lambda r: r.stages[1].tokens == 4096),
    ("stages[1].tokens=4096", lambda r: r.stages[1].tokens == 4096),
    ("stages.distil.tokens=4_096", lambda r: r.stages[1].tokens == 4096),
    ("stages[align].tokens=1e6", lambda r: r.stages[0].tokens == 1_000_000),
    ("seed=7", lambda r: r.seed == 7),
    ("data.train.0.source=other.txt", lambda r: r.data.train[0].source == "other.txt"),
    ("data.train=[a.txt, b.txt]", lambda r: [s.source for s in r.data.train] == ["a.txt", "b.txt"]),
    ("data.train.0=plain.txt", lambda r: r.data.train[0].source == "plain.txt"),
    ("evaluation.speed=null", lambda r: r.evaluation.speed is None),
    ("evaluation.speed.repeats=2", lambda r: r.evaluation.speed.model_dump()["repeats"] == 2),
    ("controls.floor=false", lambda r: not r.controls.floor),
    ("student.hyena.filter_options.modes=8", lambda r: r.student.hyena.filter_options == {"modes": 8}),
    ("student.hyena={filter: implicit}", lambda r: r.student.hyena.filter == "implicit"),
    ("evaluation.prompts=['x = y']", lambda r: r.evaluation.prompts == ["x = y"]),
]  # fmt: skip


@pytest.mark.parametrize(("override", "holds"), OVERRIDES, ids=lambda value: value if isinstance(value, str) else "")
def test_overrides(override, holds):
    assert holds(parse_recipe(GOOD, [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sed=5", 'sed: unknown key "sed". Did you mean "seed"?'),
        ("stages.align.tokns=5", 'stages[0].tokns: unknown key "tokns". Did you mean "tokens"?'),
        ("stages.algn.tokens=5", 'unknown item "algn". Did you mean "align"?'),
        ("stages.7.tokens=5", "stages has 2 items; indices count from 0"),
        ("evalution.max_tokens=50", 'unknown key "evalution". Did you mean "evaluation"?'),
        ("data.train.x=5", "data.train is a list; name an item by its index from 0, not x"),
        ("seed.x=5", "seed is a single value; it has no x"),
        ("seed=-1", "seed: must be at least 0, got -1"),
        ("seed", "expected key=value. For example seed=1"),
        ("stages.0.tokens:100", "expected key=value. Write stages.0.tokens=100."),
        ("stages[0].tokens: 100", "Write 'stages[0].tokens=100'."),
        ("stages.0.tokens 100", "Write stages.0.tokens=100."),
        ("student:{keep_attention: 2}", "Write 'student={keep_attention: 2}'."),
        ("student={keep_attention:0.25}", "Write {keep_attention: 0.25}, not {keep_attention:0.25}."),
        ("student={keep_attention: 1, keep_rule:even}", "a blank is missing after the colon. Write {keep_rule: even}"),
        ("data.train=[{source:a.txt}]", "Write {source: a.txt}, not {source:a.txt}."),
        ("student={keep_attention:}", "keep_attention"),
        ("=5", "expected key=value"),
        ("seed=", "no value after ="),
        ("seed=[1", "not YAML"),
        ("stages=[]", "stages: needs at least 1 item"),
        ("stages.0.batch_tokens=1000", "Nearest: 896 or 1024"),
        ("data.train.5=x", "data.train has 1 items"),
        ("teacher=null", "nothing to build"),
    ],
)
def test_a_wrong_override_is_named(override, words):
    lines = [line for line in refusal(GOOD, override).splitlines() if line.startswith(f'override "{override}"')]
    assert any(words in line for line in lines), refusal(GOOD, override)


def test_a_replaced_part_no_longer_points_to_the_file():
    message = refusal(GOOD, "student={keep_rule: evn}")
    assert message.startswith('override "student={keep_rule: evn}": student.keep_rule: unknown choice')


def test_later_overrides_win():
    assert parse_recipe(GOOD, ["seed=1", "seed=2"]).seed == 2


def test_budget_scales_the_tokens_of_every_stage_and_keeps_one_step():
    recipe = parse_recipe(GOOD)
    assert with_budget(recipe, 1) is recipe
    assert [stage.tokens for stage in with_budget(recipe, 10).stages] == [3_000_000, 3_000_000]
    assert [stage.tokens for stage in with_budget(recipe, 1e-6).stages] == [1024, 2048]
    assert recipe.stages[0].tokens == 300_000


def test_a_recipe_does_not_change_once_made():
    recipe = parse_recipe(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5
