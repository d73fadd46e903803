"""What the documents say is true: recipes validate, Python compiles, commands exist, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from limbeck.cli import app
from limbeck.recipe_io import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(kind):
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (found, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if found == kind
    ]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_validate(text):
    assert parse_recipe(text, name="recipe.yaml").name


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text):
    compile(text, "block", "exec")


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_exist(text):
    commands = get_command(app).commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["limbeck"]:
            assert words[1] in commands, line
            options = {name for parameter in commands[words[1]].params for name in parameter.opts}
            assert all(word.split("=")[0] in options for word in words[2:] if word.startswith("--")), line
        elif words[:1] == ["make"]:
            assert f"\n{words[1]}:" in makefile, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_recipe_reference_is_of_this_version():
    from limbeck.recipe_reference import render

    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == render(), (
        "run: python -m limbeck.recipe_reference"
    )
