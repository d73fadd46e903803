"""Pieces of one's own: one file, one option, and recipes may name what it adds."""

import json
import sys

import pytest
from tests import tiny
from tests.own_pieces import fresh_process
from tests.test_cli import python, run

from limbeck import plugins
from limbeck.core.errors import CheckpointError, PluginError, RecipeError
from limbeck.core.files import sha256_file
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.nn.filters import FILTERS, ExplicitFilter
from limbeck.nn.hyena import HyenaOperator
from limbeck.nn.mixers import MIXERS
from limbeck.objectives.catalogue import OBJECTIVES
from limbeck.recipe_io import dump_recipe, json_schema, parse_recipe

PIECES = """
import torch
from limbeck import plugins
from limbeck.nn.filters import ExplicitFilter
from limbeck.nn.hyena import HyenaOperator

def own_l2(student_BTV, teacher_BTV, *, scale=1.0):
    return scale * (student_BTV.exp() - teacher_BTV.exp()).square().sum(-1)

class OwnFilter(ExplicitFilter):
    pass

class OwnMixer(HyenaOperator):
    pass

class EveryOther:
    name = "own_cut"
    @classmethod
    def from_words(cls, argument): return cls()
    @classmethod
    def from_facts(cls, facts, **_): return cls()
    def facts(self): return {"kind": "own_cut"}
    def split(self, data): return [2] * (len(data) // 2) + [1] * (len(data) % 2)

plugins.add_objective("own_l2", own_l2, title="squared distance", source="a test")
plugins.add_filter("own_filter", OwnFilter)
plugins.add_segmenter("own_cut", EveryOther)
plugins.add_mixer("own_mixer", OwnMixer)
"""
RECIPE = """
name: own
teacher: {source: embedded}
student: {hyena: {filter: own_filter, filter_options: {filter_length: 8}}}
data: {train: [factbook], heldout: [factbook], context_tokens: 64}
stages:
  - {kind: distil, tokens: 1024, batch_tokens: 512, learning_rate: 1e-3, objectives: [{objective: own_l2, options: {scale: 2.0}}]}
"""
BYTES = """
name: own
teacher: null
tokenizer: {segmenter: own_cut}
student: {size: bytepool-10m, initialisation: random}
data: {train: [factbook], heldout: [factbook], context_tokens: 64}
stages: [{kind: tune, tokens: 1024, batch_tokens: 512, learning_rate: 1e-3}]
controls: {from_scratch: false, copied: false, teacher_more: false, floor: false}
"""


@pytest.fixture(autouse=True)
def alone():
    with fresh_process():
        yield


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own_pieces_file.py"
    path.write_text(PIECES, encoding="utf-8")
    return path


def test_a_file_adds_its_pieces_and_recipes_may_name_them(file):
    for text in (RECIPE, BYTES):
        with pytest.raises(RecipeError, match="--plugin FILE.py"):
            parse_recipe(text)
    plugins.load_plugin(file)
    recipe = parse_recipe(RECIPE)
    assert recipe.stages[0].objectives[0].options == {"scale": 2.0}
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert parse_recipe(BYTES).tokenizer.segmenter == "own_cut"
    assert parse_recipe(BYTES, ["tokenizer.segmenter=own_cut:3"]).tokenizer.segmenter == "own_cut:3"
    assert OBJECTIVES["own_l2"].options == {"scale": 1.0}
    assert issubclass(FILTERS["own_filter"], ExplicitFilter)
    assert HyenaOperator(4, filter="own_filter", filter_options={"filter_length": 3}).filters[0].support == 3
    assert ByteTokenizer("own_cut")("abc", add_special_tokens=False)["input_ids"].count(259) == 2
    assert "own_mixer" in MIXERS
    assert plugins.plugin_files() == {file.name: sha256_file(file)}


def test_a_warning_free_recipe_and_the_schema_of_what_ships(file, recwarn):
    before = json_schema()
    plugins.load_plugin(file)
    dump_recipe(parse_recipe(RECIPE))
    assert not recwarn.list
    assert json_schema() == before
    assert "own_l2" not in json.dumps(before)


def test_unknown_names_suggest_what_was_added(file):
    plugins.load_plugin(file)
    with pytest.raises(RecipeError, match=r'objective: unknown objective "own_l1". Did you mean "own_l2"\?'):
        parse_recipe(RECIPE.replace("own_l2", "own_l1"))
    with pytest.raises(
        RecipeError, match=r'student.hyena.filter: unknown filter "own_filtr". Did you mean "own_filter"\?'
    ):
        parse_recipe(RECIPE, ["student.hyena.filter=own_filtr"])
    with pytest.raises(
        RecipeError, match=r"hyena.filter: expected one of implicit, explicit, modal, own_filter, got 3"
    ):
        parse_recipe(RECIPE, ["student.hyena.filter=3"])
    with pytest.raises(RecipeError, match='unknown option of own_l2 "skale"'):
        parse_recipe(RECIPE.replace("scale", "skale"))


def test_the_same_file_may_be_read_again_and_from_python(file, monkeypatch):
    plugins.load_plugin(file)
    first = MIXERS["own_mixer"]
    plugins.load_plugin(file)
    assert MIXERS["own_mixer"] is first
    monkeypatch.syspath_prepend(str(file.parent))
    del sys.modules[file.stem]
    __import__(file.stem)
    assert MIXERS["own_mixer"] is not first
    assert plugins.plugin_files() == {file.name: sha256_file(file)}


def test_importing_from_python_is_all_that_is_needed(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    __import__(file.stem)
    assert parse_recipe(RECIPE).stages[0].objectives[0].objective == "own_l2"
    assert plugins.plugin_files() == {file.name: sha256_file(file)}


def distance(student_BTV, teacher_BTV):
    """Nothing."""
    return (student_BTV - teacher_BTV).abs().sum(-1)


@pytest.mark.parametrize("name", ["forward_kl", "byte_trie", "hidden_mse", "chunk_likelihood"])
def test_names_of_objectives_that_ship_are_taken(name):
    with pytest.raises(PluginError, match=f'objective "{name}": the name is taken'):
        plugins.add_objective(name, distance, title="t", source="s")


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda: plugins.add_filter("modal", ExplicitFilter), "the name is taken"),
        (lambda: plugins.add_segmenter("teacher", type("Cut", (), dict.fromkeys(METHODS, len))), "the name is taken"),
        (lambda: plugins.add_mixer("attention", HyenaOperator), "the name is taken"),
        (lambda: plugins.add_mixer("hyena", HyenaOperator), "the name is taken"),
        (lambda: plugins.add_filter("my filter", ExplicitFilter), "a name is a word of a-z"),
        (lambda: plugins.add_filter("fixed:4", ExplicitFilter), "a name is a word of a-z"),
        (lambda: plugins.add_filter("mine", dict), "is no class that extends"),
        (lambda: plugins.add_filter("mine", distance), "is no class that extends"),
        (lambda: plugins.add_segmenter("mine", dict), "dict has no from_words, from_facts, facts, split"),
        (lambda: plugins.add_mixer("mine", ExplicitFilter), "ExplicitFilter has no init_state, advance"),
        (lambda: plugins.add_objective("mine", lambda s, t, *, k: s, title="t", source="s"), "option k has no default"),
    ],
)
def test_what_cannot_be_added_is_refused(add, words):
    before = set(OBJECTIVES) | set(FILTERS) | set(MIXERS)
    with pytest.raises(PluginError, match=words):
        add()
    assert before == set(OBJECTIVES) | set(FILTERS) | set(MIXERS)
    assert plugins.plugin_files() == {}


METHODS = ("from_words", "from_facts", "facts", "split")


def test_two_pieces_of_one_name_are_refused(file, tmp_path):
    plugins.load_plugin(file)
    other = tmp_path / "other_pieces_file.py"
    other.write_text(PIECES, encoding="utf-8")
    with pytest.raises(PluginError, match='other_pieces_file.py: objective "own_l2": the name is taken'):
        plugins.load_plugin(other)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.py", None, "there is no such file"),
        ("my-loss.py", "", "a plug-in is a Python file with a plain name"),
        ("loss.txt", "", "a plug-in is a Python file with a plain name"),
        ("json.py", "", "a module json exists already"),
        ("wave.py", "", "a module wave exists already"),
        ("sys.py", "", "a module sys exists already"),
        ("own_broken.py", "x = 1\n\ny = 1 +\n", "own_broken.py, line 3: SyntaxError"),
        ("own_broken.py", "x = 1\nundefined()\n", "own_broken.py, line 2: NameError: name 'undefined' is not defined"),
        ("own_broken.py", "import no_such_package\n", "line 1: ModuleNotFoundError"),
        ("own_broken.py", "raise SystemExit(0)\n", "line 1: SystemExit"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_message(name, content, words, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_text(content, encoding="utf-8")
    done = run("--plugin", file, "presets")
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"--plugin {file}")
    assert words in lines[0]
    assert lines[-1] == "(plugin: limbeck explain plugin)"
    assert "Traceback" not in done.stderr
    assert "own_broken" not in sys.modules


def test_bytes_that_are_no_text_are_no_python(tmp_path):
    file = tmp_path / "own_bytes.py"
    file.write_bytes(b"\x00\xff\xfe")
    done = run("--plugin", file, "presets")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, "(plugin: limbeck explain plugin)")


def test_the_option_stands_before_any_command(file, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    refused = run("plan", recipe)
    assert refused.exit_code == 2
    assert 'unknown objective "own_l2"' in refused.stderr
    assert "limbeck --plugin FILE.py" in refused.stderr
    done = run("--plugin", file, "plan", recipe, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["student"]["hyena"]["filter"] == "own_filter"


def test_the_end_of_a_run_names_the_files_again(file, monkeypatch):
    from limbeck import evaluation

    report = {
        "verdict": {"headline": "It worked.", "gained": [], "lost": [], "warnings": []}, "student": {"samples": []},
    }  # fmt: skip
    monkeypatch.setattr(evaluation, "render_report", lambda folder: report)
    last = run("--plugin", file, "report", "a run").stdout.splitlines()[-1]
    assert last == f"next:   limbeck --plugin {file} generate 'a run' 'Once upon a time'"


def test_help_with_a_plugin_loads_no_torch(file):
    code = (
        "import sys\nimport limbeck.__main__\nsys.argv = ['limbeck', '--plugin', sys.argv[1], '--help']\n"
        "try: limbeck.__main__.main()\nexcept SystemExit as end: assert not end.code\nprint('torch' in sys.modules)"
    )
    assert python(code, str(file)).stdout.strip().endswith("False")


@pytest.fixture
def bytes_recipe(tmp_path):
    trunk = {
        "width": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2,
        "feed_forward": 64,
        "mixers": ["own_mixer", "attention"],
    }
    small = {
        "trunk": trunk | {"mixer_options": {"own_mixer": {"filter": "own_filter"}}}, "local_width": 32, "local_heads": 2,
        "encoder_layers": 1, "decoder_layers": 1,
    }  # fmt: skip

    def make():
        words = {"kind": "tune", "name": "tune", "tokens": 1024, "batch_tokens": 512, "learning_rate": 1e-3}
        return tiny.recipe(
            None, tiny.write_text(tmp_path / "text.jsonl"), stages=[words], tokenizer={"segmenter": "own_cut"},
            student={"size": "bytepool-10m", "architecture": small, "initialisation": "random"},
            controls={"from_scratch": False, "copied": False, "teacher_more": False, "floor": False},
        )  # fmt: skip

    return make


def test_a_run_writes_down_the_files_and_goes_on_with_the_same_ones_only(file, tmp_path, bytes_recipe):
    from limbeck import pipeline

    plugins.load_plugin(file)
    folder = tmp_path / "run"
    facts = pipeline.run(bytes_recipe(), run_folder=folder, progress=False)
    checksum = sha256_file(file)
    assert facts["run"]["machine"][f"plug-in {file.name}"] == checksum
    assert json.loads((folder / "environment.json").read_text())[f"plug-in {file.name}"] == checksum
    assert json.loads((folder / "recipe.json").read_text())["plugins"] == {file.name: checksum}
    assert pipeline.run(bytes_recipe(), run_folder=folder, progress=False) == facts

    bare = run("--plugin", file, "generate", folder, "Ada met", "--max-new-tokens", "8")
    assert bare.exit_code == 0, bare.stderr
    for command in (["generate", folder, "Ada met"], ["eval", folder, "--text", tmp_path / "text.jsonl"]):
        with fresh_process():
            refused = run(*command)
        assert refused.exit_code == 2, refused.stderr
        assert "own_" in refused.stderr
        assert "limbeck --plugin FILE.py" in refused.stderr

    with fresh_process():
        file.write_text(PIECES + "# changed\n", encoding="utf-8")
        plugins.load_plugin(file)
        with pytest.raises(
            CheckpointError, match=rf"different: plugins.{file.name}.*same ones, unchanged, with --plugin"
        ):
            pipeline.run(bytes_recipe(), run_folder=folder, progress=False)


def test_a_run_begun_with_a_file_does_not_go_on_without(file, tmp_path):
    from limbeck.assembly import claim_run_folder

    recipe = parse_recipe(BYTES.replace("own_cut", "space"))
    folder = tmp_path / "run"
    claim_run_folder(folder, recipe)
    assert "plugins" not in json.loads((folder / "recipe.json").read_text())
    (folder / "arms" / "student" / "distil").mkdir(parents=True)
    claim_run_folder(folder, recipe)
    plugins.load_plugin(file)
    with pytest.raises(CheckpointError, match="different: plugins"):
        claim_run_folder(folder, recipe)
