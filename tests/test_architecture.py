"""The shape that must survive change: layers, sizes, and what may be imported where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "limbeck"

# A room may import itself and anything in a lower row; rooms in one row do not see each other.
LAYERS = [
    {
        "cli",
        "cli_costs",
        "cli_generate",
        "cli_judge",
        "cli_paper",
        "cli_share",
        "cli_store",
        "cli_tasks",
        "cli_reference",
        "console",
        "explain",
    },
    {
        "pipeline",
        "judging",
        "students",
        "teaching",
        "lessons",
        "reading",
        "capturing",
        "arms",
        "assembly",
        "new_models",
        "evaluation",
        "examining",
        "costing",
        "paper_tables",
        "places",
        "publishing",
        "publishing_words",
        "writing",
        "planning",
        "planning_texts",
        "preflight",
        "plugins",
        "teaching_costs",
        "stage_costs",
        "doctor",
    },
    {
        "recipe",
        "recipe_io",
        "recipe_reference",
        "recipe_messages",
        "recipe_stages",
        "recipe_agreement",
        "recipe_objectives",
        "recipe_student",
        "recipe_teachers",
        "recipe_tokenizer",
        "recipe_values",
        "recipe_yaml",
        "presets",
    },
    {"evaluate", "deploy"},
    {"train"},
    {"teachers"},
    {"models", "data", "store"},
    {"nn", "objectives"},
    {"core"},
]
# Rows that are one room written in several files.
ONE_ROOM = LAYERS[:3]
LEVEL = {room: number for number, row in enumerate(LAYERS) for room in row}
PURE = {"core", "nn", "objectives"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "limbeck" else (node.module,)
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in LEVEL, f"{room} is not a room; see ARCHITECTURE.md"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "limbeck" or len(parts) == 1 or parts[1] not in LEVEL:
            continue
        other = parts[1]
        same = other == room or any(room in row and other in row for row in ONE_ROOM)
        assert same or LEVEL[other] > LEVEL[room], f"{room} may not import {other}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if room_of(path) in PURE], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_pure_rooms_import_torch_and_the_standard_library_only(path):
    for name in imported(path):
        top = name.split(".")[0]
        assert top in ("torch", "limbeck", "safetensors", "__future__") or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_and_names(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, "look for the second idea in this file"
    assert path.stem not in ("utils", "helpers", "misc", "common")
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 70, f"{node.name} is {length} lines long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_things_are_documented_and_typed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            assert node.returns is not None, f"{node.name} does not say what it returns"
            assert all(argument.annotation for argument in arguments), f"{node.name} has untyped arguments"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unpickles_or_runs_foreign_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "os.system"), (
            called
        )
        if called.endswith(("np.load", "numpy.load")):
            assert "allow_pickle=False" in ast.unparse(node)


def test_importing_limbeck_is_light():
    code = "import sys, limbeck; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
