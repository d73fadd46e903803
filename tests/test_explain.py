"""Every error has a code, every code a page, and what a page quotes is what the program says."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.console import explain_fault
from limbeck.explain import EXIT_CODES, page, page_names, summary

PACKAGE = Path(__file__).parents[1] / "src" / "limbeck"
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def run(*words):
    return CliRunner().invoke(app, list(words))


def error_classes():
    """All subclasses, wherever in the package they are written."""
    known, grown = {"LimbeckError"}, True
    while grown:
        found = {
            node.name: path
            for path, tree in SOURCES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] in known for base in node.bases)
        }
        grown = not set(found) <= known
        known |= set(found)
    for name, path in found.items():
        module = ".".join(("limbeck", *path.relative_to(PACKAGE).with_suffix("").parts))
        yield getattr(importlib.import_module(module), name)


def test_every_subclass_has_a_page_and_every_page_its_meaning():
    classes = list(error_classes())
    assert len(classes) > 10
    assert {one.code for one in classes} | set(EXIT_CODES.values()) == set(page_names())


def test_no_error_is_without_a_kind():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                assert ast.unparse(node.exc.func) != "LimbeckError", (
                    f"{path}:{node.lineno}: raise one of its subclasses"
                )


@pytest.mark.parametrize("one", error_classes(), ids=lambda one: one.__name__)
def test_a_refusal_names_its_code_last(one):
    code, message = explain_fault(one.__new__(one))
    assert code == 2
    assert message.splitlines()[-1] == f"({one.code}: limbeck explain {one.code})"


@pytest.mark.parametrize("name", page_names())
def test_a_page_is_shown_whole_and_has_its_parts(name):
    text = page(name)
    assert run("explain", name).stdout == text
    assert text.startswith(f"# {name}: ")
    assert "## How to go on" in text
    assert 10 < len(summary(name)) < 200
    assert not re.search(r"\]\(", text), "a link leads nowhere in a terminal"
    facts = json.loads(run("explain", name, "--json").stdout)
    assert facts == {"code": name, "summary": summary(name), "page": text}


def test_exit_codes_lead_to_pages_and_unknown_ones_are_refused():
    assert run("explain", "130").stdout == run("explain", "143").stdout == page("stopped")
    assert run("explain", "1").stdout == page("fault")
    listed = run("explain").stdout
    assert all(name in listed for name in page_names())
    refused = run("explain", "recipy")
    assert refused.exit_code == 2
    assert 'Did you mean "recipe"?' in " ".join(refused.stderr.replace("│", " ").split())


def test_a_terminal_gets_the_page_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr("limbeck.explain.print_markdown", drawn.append)
    monkeypatch.setattr("limbeck.explain._is_terminal", lambda: True)
    run("explain", "store")
    assert drawn == [page("store")]


def texts(tree):
    """The literal texts of a file; \0 stands for what is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


ALL_TEXTS = {path: list(texts(tree)) for path, tree in SOURCES.items()}


def where_said(words):
    """The files in which one text has all the parts of a quotation, in order; `...` stands for anything."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in words.split("...")), re.DOTALL)
    return [path for path, told in ALL_TEXTS.items() if any(pattern.search(text) for text in told)]


@pytest.mark.parametrize("name", page_names())
def test_what_a_page_quotes_is_said_by_the_program(name):
    classes = [one.__name__ for one in error_classes() if one.code == name]
    for row in re.findall(r"^\| (.+?) \| .+ \| .+ \|$", page(name), re.MULTILINE):
        for words in re.findall(r"`([^`]+)`", row):
            files = where_said(words)
            assert files, f"{name}.md quotes what nothing says: {words}"
            if name not in EXIT_CODES.values() and not {"recipe_messages.py", "console.py"} & {
                one.name for one in files
            }:
                assert any(one in path.read_text(encoding="utf-8") for path in files for one in classes), words


def test_the_command_reference_is_of_this_version():
    from limbeck.cli_reference import render

    page_text = (PACKAGE.parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page_text == render(), "run: python -m limbeck.cli_reference > docs/cli.md"


def test_the_site_has_a_page_for_every_code():
    folder = PACKAGE.parents[1] / "docs" / "errors"
    assert {file.stem for file in folder.glob("*.md")} == {"index", *page_names()}
    listed = (folder / "index.md").read_text(encoding="utf-8")
    assert all(f"[{name}]({name}.md)" in listed for name in page_names())
