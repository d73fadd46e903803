"""Follows a page of the documentation from top to bottom, as a reader would, in an empty folder.

`sh`: every line that calls `limbeck` is run through the real command line in this process; lines of other programs are checked
(the extra exists, the target exists, the module exists) and not run. `python`: all blocks of a page share one namespace.
`yaml`: a first line `# name.yaml` makes it a file; without one it must fit into a recipe. `json` must be JSON. `text` is output.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tests.own_pieces import fresh_process
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.presets import preset_names
from limbeck.recipe import Recipe
from limbeck.recipe_io import parse_recipe

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```([^\s`]*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:yaml|yml|py|json|jsonl))(?:\s.*)?$")
LANGUAGES = ("sh", "python", "yaml", "json")
MADE = ("--into", "--run-folder", "--folder", "--out", "--to", "--cache")  # options that name what a command makes
SMALL_RECIPE = {
    "name": "name: piece",
    "teacher": "teacher: {source: embedded}",
    "data": "data: {train: [factbook], heldout: [factbook], context_tokens: 128}",
    "stages": "stages: [{kind: distil, tokens: 1024, batch_tokens: 1024, learning_rate: 1e-3}]",
}
# Small programs that are simply run; what reaches the network or other machines is not among them.
RUN = ("ls", "cat", "head", "tail", "mkdir", "cp", "mv", "echo", "printf", "wc", "grep", "sort", "cd", "test")
# Programs whose lines are left alone: they belong to other machines, or would install or serve something.
FOREIGN = (
    "git", "ray", "unzip", "vllm", "docker", "ssh", "scp", "rsync", "curl", "wget", "sbatch", "srun", "source", "export", "llama-server",
    "nvidia-smi", "trackio", "tensorboard", "wandb", "hf", "xdg-open", "open", ".", "kill", "sphinx-build", "lm_eval", "conda", "uv",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, in what language, and its lines."""

    page: str
    line: int
    language: str
    text: str


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; directives of the site (`{...}`) are left out."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent, language, inner = match.groups()
        if not language.startswith("{"):
            lines = [line.removeprefix(indent) for line in inner.splitlines()]
            number = text.count("\n", 0, match.start()) + 1
            found.append(Block(page.name, number, language, "\n".join(lines) + "\n"))
    return found


class Reader:
    """Does what the blocks of one page say, in the current folder, which is empty at the start.

    provide: makes what a page takes for granted (a text, a finished run, a store, a recipe), given its path; false when it cannot.
    """

    def __init__(self, provide: Callable[[Path], bool]) -> None:
        self.provide = provide
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self.output = ""

    def follow(self, block: Block) -> None:
        """Carry out or check one block. Raises: AssertionError that names page and line."""
        try:
            {"sh": self._shell, "python": self._python, "yaml": self._yaml, "json": self._json}[block.language](
                block.text
            )
        except Exception as error:
            told = f"{block.page}:{block.line} ({block.language}): {type(error).__name__}: {error}"
            raise AssertionError(f"{told}\n{block.text}") from error

    def _yaml(self, text: str) -> None:
        named = _write_named(text)
        words = YAML(typ="safe", pure=True).load(text)
        if named and not (isinstance(words, dict) and set(words) & set(Recipe.model_fields)):
            return
        missing = [] if named or "name" in words else [line for key, line in SMALL_RECIPE.items() if key not in words]
        recipe = parse_recipe("\n".join([text, *missing]), name=named or "recipe.yaml")
        if not named and not missing:
            Path(f"{recipe.name}.yaml").write_text(text, encoding="utf-8")

    def _json(self, text: str) -> None:
        if not _write_named(text):
            try:
                json.loads(text)
            except ValueError:
                for line in text.splitlines():
                    json.loads(line)

    def _python(self, text: str) -> None:
        tree = ast.parse(text)
        if _write_named(text):
            return
        if _lacks(tree):
            return
        with redirect_stdout(io.StringIO()) as told:
            exec(compile(tree, "page", "exec"), self.namespace)
        self.output = told.getvalue()

    def _shell(self, text: str) -> None:
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words = words[1:]
            if words:
                self._command(words, line)

    def _command(self, words: list[str], line: str) -> None:
        words, target = _redirected(words)
        program = Path(words[0]).name or words[0]
        if words[:3] in (["python", "-m", "limbeck"], ["python3", "-m", "limbeck"]) and len(words) > 2:
            words, program = ["limbeck", *words[3:]], "limbeck"
        if program == "torchrun":
            words, program = _without_torchrun(words), "limbeck"
        if program == "limbeck":
            self._limbeck(words[1:], target)
        elif program in CHECKS:
            CHECKS[program](words, self)
        elif program in RUN:
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        else:
            assert program in FOREIGN, (
                f"{program}: no one checks this program. Write the block as text, or teach the runner"
            )

    def _limbeck(self, words: list[str], target: str | None) -> None:
        words = words[: words.index("|")] if "|" in words else words
        start = next((2 * n for n, word in enumerate(words[::2]) if word != "--plugin"), 0)
        command = words[start]
        for before, word in zip(["", *words[start:]], words[start:], strict=False):
            if before in MADE or (before == "--store" and command == "capture"):
                continue
            if before == "--task-data":
                word = f"{word}/tasks-of-the-suite"
            self._provide(word.partition("=")[2].strip("[]") if "=" in word and not word.startswith("-") else word)
        if command == "push" and "--dry-run" not in words:
            words = [*words, "--dry-run"]  # everything but the sending
        with fresh_process():
            done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"limbeck {shlex.join(words)}\n{done.stderr[-3000:]}\n{done.exception!r}"
        self.output = done.stdout
        if target:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).write_text(done.stdout, encoding="utf-8")

    def _provide(self, word: str) -> None:
        path = Path(word.removeprefix("./"))
        if word not in preset_names() and not path.exists() and not path.is_absolute():
            self.provide(path)


def _write_named(text: str) -> str | None:
    """Write a block whose first line is `# name.ext` to that file, and say its name."""
    match = FILE_NAME.match(text.splitlines()[0]) if text.strip() else None
    if match:
        path = Path(match[1])
        assert not path.is_absolute()
        assert ".." not in path.parts
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return match[1] if match else None


def _lacks(tree: ast.AST) -> list[str]:
    """Packages that a block imports and this machine has not: such a block is compiled, not run."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return sorted(name for name in names if not Path(f"{name}.py").exists() and importlib.util.find_spec(name) is None)


def _redirected(words: list[str]) -> tuple[list[str], str | None]:
    if ">" in words:
        place = words.index(">")
        return words[:place], words[place + 1]
    return words, None


def _without_torchrun(words: list[str]) -> list[str]:
    """The command that each process runs; torchrun's own options must exist."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words[1:])
    assert parsed.module, "torchrun without -m"
    assert parsed.training_script == "limbeck", f"torchrun of {parsed.training_script}"
    return ["limbeck", *parsed.training_script_args]


def _check_pip(words: list[str], reader: Reader) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        for group in re.findall(r"^(?:limbeck|\.)\[([\w,]+)\]", word):
            assert set(group.split(",")) <= set(extras), f"{word}: extras are {sorted(extras)}"


def _check_make(words: list[str], reader: Reader) -> None:
    """The target exists; what it runs of limbeck is run here, without a new environment."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [word for word in words[1:] if "=" not in word]:
        rule = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", text, re.MULTILINE)
        assert rule, f"the Makefile has no target {target}"
        for line in re.findall(r"^\t\$\(BIN\)/limbeck (.*)$", rule[1], re.MULTILINE):
            reader._limbeck(shlex.split(line), None)


def _check_python(words: list[str], reader: Reader) -> None:
    if words[1] == "-m":
        module = words[2].split(".")[0]
        known = (ROOT / module).is_dir() or importlib.util.find_spec(words[2]) is not None
        assert known, f"there is no module {words[2]}"
        if module == "benchmarks" and len(words) > 3 and not words[3].startswith("-"):
            assert (ROOT / "benchmarks" / f"{words[3]}.py").exists(), f"there is no benchmark {words[3]}"
    elif words[1] == "-c":
        compile(words[2], "command", "exec")
    elif not words[1].startswith("-"):
        path = Path(words[1])
        wanted = Path.cwd() / path
        if not wanted.exists():  # named in the text of the page, as "this as serve.py"
            return
        tree = ast.parse(wanted.read_text(encoding="utf-8"))
        if not _lacks(tree):
            done = subprocess.run([shutil.which("python3") or "python3", "-m", "py_compile", str(wanted)], check=False)
            assert done.returncode == 0


def _check_pytest(words: list[str], reader: Reader) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    known = {marker.partition(":")[0] for marker in settings["markers"]}
    if "-m" in words:
        assert set(re.findall(r"\w+", words[words.index("-m") + 1])) - {"not", "and", "or"} <= known
    for word in words[1:]:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), word


CHECKS: dict[str, Callable[[list[str], Reader], None]] = {
    "pip": _check_pip, "make": _check_make, "python": _check_python, "python3": _check_python, "pytest": _check_pytest,
}  # fmt: skip
