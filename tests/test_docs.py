"""What the documents say is true: recipes validate, Python compiles, commands exist, links lead somewhere.

A YAML block without a name is a piece of a recipe: it must fit into a small one.
"""

import ast
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from limbeck.cli import app
from limbeck.recipe_io import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL_RECIPE = {
    "name": "name: piece",
    "teacher": "teacher: {source: embedded}",
    "data": "data: {train: [factbook], heldout: [factbook], context_tokens: 128}",
    "stages": "stages: [{kind: distil, tokens: 1024, batch_tokens: 1024, learning_rate: 1e-3}]",
}


def blocks(kind):
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (found, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if found == kind
    ]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_validate(text):
    given = re.findall(r"^(\w+):", text, re.MULTILINE)
    missing = [] if "name" in given else [line for key, line in SMALL_RECIPE.items() if key not in given]
    assert parse_recipe("\n".join([text, *missing]), name="recipe.yaml").name


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text):
    compile(text, "block", "exec")


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_exist(text):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["limbeck"]:
            command = get_command(app)
            for word in words[1:]:
                if not hasattr(command, "commands"):
                    break
                assert word in command.commands, line
                command = command.commands[word]
            options = {name for parameter in command.params for name in parameter.opts}
            assert all(word.split("=")[0] in options for word in words if word.startswith("--")), line
        elif words[:1] == ["make"]:
            assert f"\n{words[1]}:" in makefile, line


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(other), f"{page.name} links to {target}#{anchor}"


def test_the_recipe_reference_is_of_this_version():
    from limbeck.recipe_reference import render

    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == render(), (
        "run: python -m limbeck.recipe_reference"
    )


def rows_of(name):
    """The rows of a page's tables, as lists of cells."""
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| ") and "| --- |" not in line
    ]


def _said(default):
    return "none" if default is None else default if isinstance(default, str) else f"{default:g}"


def test_every_objective_has_its_row():
    from limbeck.objectives.catalogue import OBJECTIVES

    rows = {row[0].strip("`"): row for row in rows_of("objectives.md") if len(row) == 5}
    rows.pop("objective")
    assert set(rows) == set(OBJECTIVES)
    for name, about in OBJECTIVES.items():
        told = dict(re.findall(r"`(\w+)` ([\w.]+)", rows[name][3]))
        expected = {option: _said(default) for option, default in about.options.items()}
        assert told == expected, name
        assert rows[name][4] == about.source, name


def test_what_is_said_of_top_k_and_layers():
    from limbeck.models.layer_maps import layer_map
    from limbeck.objectives.sparse import MISSING

    rows = {row[0]: row[1] for row in rows_of("objectives.md")}
    assert all(any(row.startswith(f"`{mode}`") for row in rows) for mode in MISSING)
    for words, key in {"all": "`all` (default)", ("uniform", 2): "`{uniform: 2}`"}.items():
        pairs = layer_map(dict([words]) if isinstance(words, tuple) else words, 4, 12)
        assert rows[key].startswith(", ".join(map(str, pairs)))
    last = [layer_map(words, 4, 12) for words in ("last", {"last": 2})]
    assert rows["`last`, or `{last: 2}`"] == ", or ".join(", ".join(map(str, pairs)) for pairs in last)


def test_the_store_page_names_what_is_in_a_store():
    from limbeck.store.codec import FORMAT, CodecSettings
    from limbeck.store.manifest import SCHEMA, Manifest, ShardFacts
    from limbeck.store.shards import RowFormat

    page = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
    assert f"`{FORMAT}`" in page
    assert f"version of this list, {SCHEMA} |" in page
    form = RowFormat(CodecSettings(2**16, sampled=True, k=300), {3: 8}, "float16")
    families = [re.sub(r"_\d$", "_*", name) for name in form.schema().names if name.startswith("target_")]
    plain = [name for name in form.schema().names if not name.startswith(("target_", "layer_"))]
    for name in [
        *(item.name for item in (*fields(Manifest), *fields(ShardFacts), *fields(CodecSettings))),
        *plain,
        *families,
    ]:
        assert f"`{name}`" in page, name


def test_the_store_page_has_the_measured_sizes():
    file = ROOT / "benchmarks" / "results" / "target-codecs-cpu.json"
    measured = json.loads(file.read_text(encoding="utf-8"))["results"]["codecs"]
    expected = [
        [
            name,
            f"{of['bytes_per_token']:.1f}",
            f"{of['mean_kl_nats']:.1e}",
            f"{of['p99_kl_nats']:.1e}",
            f"{of['mass']:.3f}",
        ]
        for name, of in measured.items()
    ]
    found = [row for row in rows_of("store.md") if row[0] in measured]
    assert found == expected, "\n".join(f"| {' | '.join(row)} |" for row in expected)


def test_fidelity_figures_are_explained():
    import numpy as np

    from limbeck.teachers.fidelity import report_fidelity

    class Store:
        class manifest:
            bytes, tokens = 1, 1

    nothing = {name: np.ones(2) for name in ("kl", "agreement", "mass", "kept", "tail_kl")}
    page = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in report_fidelity(nothing, Store))


def test_every_dependency_has_its_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    extras = project["optional-dependencies"]
    for needed in (*project["dependencies"], *(one for group in extras.values() for one in group)):
        assert re.match(r"[\w-]+", needed)[0] in page, needed
    assert all(f"`{name}`" in page for name in extras)


def texts_in_the_code():
    for path in (ROOT / "src" / "limbeck").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "\0".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_those_of_the_code():
    said = "\n".join(texts_in_the_code())
    for message in rows_of("troubleshooting.md"):
        for words in re.findall(r"`([^`]+)`", message[0]):
            assert all(part.strip() in said for part in words.split("...")), words


def test_presets_that_are_named_exist():
    from limbeck.presets import preset_names

    named = {name for row in rows_of("choosing.md") if len(row) == 2 for name in re.findall(r"`([\w-]+)`", row[0])}
    assert {"distillkit", "gkd", "llama-70b-stablelm"} <= named & set(preset_names())
    assert set(preset_names()) - named == {"embedded-teacher"}
