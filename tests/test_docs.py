"""What the documents say is true: recipes validate, Python compiles, commands exist, links lead somewhere, tables are those of the code.

Quick; that the blocks can be carried out is shown by test_pages.py.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tests.docs_runner import LANGUAGES, Reader, read_blocks
from typer.main import get_command

from limbeck.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{block.line}") for page in PAGES for block in read_blocks(page)
]


def blocks(*languages):
    return [one for one in BLOCKS if one.values[0].language in languages]


@pytest.mark.parametrize("block", blocks("yaml", "json"))
def test_data_are_what_they_should_be(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Reader(lambda path: False).follow(block)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles(block):
    compile(block.text, "block", "exec")


@pytest.mark.parametrize("block", BLOCKS)
def test_languages_are_known_to_the_runner(block):
    assert block.language in (*LANGUAGES, "text"), "sh, python, yaml and json are run; what is to be read only is text"


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_exist(block):
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["limbeck"]:
            continue
        command, words = get_command(app), words[1:]
        while words[:1] == ["--plugin"]:
            words = words[2:]
        for word in words:
            if not hasattr(command, "commands"):
                break
            assert word in command.commands, line
            command = command.commands[word]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert all(word.split("=")[0] in options for word in words if word.startswith("--")), line


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-E", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, "docs", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    fetched = re.compile(
        r"<(?:script|img|iframe)[^>]*src=.(?:https?:)?//|<link[^>]*href=.(?:https?:)?//|url\(.?https?:"
    )
    for file in (tmp_path / "site").rglob("*.html"):
        assert not fetched.search(file.read_text(encoding="utf-8")), file
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()


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
