"""A finished run with a made-up report, a saved model of a few kilobytes, and a hub that is only a dictionary."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

from tests.evaluate.sample_facts import sample_facts
from tests.evaluate.small_models import build_model, build_tokenizer

from limbeck.evaluate.verdict import verdict

RECIPE = """name: made-up
seed: 0
teacher:
  source: {teacher}
student:
  keep_attention: 0
  initialisation: calibrated
  hyena: {{order: 2, short_conv: 3, filter: modal}}
data:
  train:
  - {{source: {text}, split: train}}
  heldout:
  - {{source: factbook, split: heldout}}
  context_tokens: 256
stages:
- {{kind: align, name: align, tokens: 300000}}
- {{kind: distil, name: distil, tokens: 900000, objectives: [{{objective: skewed_forward_kl}}]}}
{more}"""


@functools.cache
def saved_student() -> Path:
    """A hybrid of two layers with its tokenizer, saved once."""
    from limbeck.models.hybrid import build_student

    folder = Path(tempfile.mkdtemp())
    build_student(build_model().float(), mixers=["hyena", "hyena"], hyena={}).save_pretrained(folder)
    build_tokenizer(bos=False).save_pretrained(folder)
    return folder


def make_run(folder: Path, *, teacher: str = "embedded", text: str = "factbook", more: str = "", facts=None) -> Path:
    """Write a run folder as `limbeck run` leaves it."""
    run = folder / "run"
    run.mkdir(parents=True)
    shutil.copytree(saved_student(), run / "model")
    recipe = RECIPE.format(teacher=teacher, text=text, more=more)
    (run / "recipe.yaml").write_text(recipe)
    (run / "recipe.json").write_text("{}")
    facts = facts or sample_facts()
    facts.run.recipe = recipe
    facts.verdict = facts.verdict or verdict(facts)
    (run / "report.json").write_text(json.dumps(facts.model_dump(mode="json")))
    return run


class FakeHub:
    """The part of the hub's client that publishing uses; `failing` raises at the call of that name."""

    def __init__(self, *, failing: dict[str, Exception] | None = None, private: bool = False) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.calls: list[str] = []
        self.messages: list[str] = []
        self.failing = failing or {}
        self.private = private

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        self._note("create_repo")
        assert exist_ok
        assert repo_type == "model"
        if repo_id not in self.repositories:
            self.repositories[repo_id] = {".gitattributes": b""}
            self.private = bool(private)
        return f"https://hub.example/{repo_id}"

    def repo_info(self, repo_id, *, repo_type):
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, repo_id, *, repo_type):
        self._note("list_repo_files")
        return list(self.repositories[repo_id])

    def hf_hub_download(self, repo_id, name, *, repo_type, revision=None):
        path = Path(tempfile.mkdtemp()) / name
        path.write_bytes(self.repositories[repo_id][name])
        return str(path)

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        self._note("upload_folder")
        self.messages.append(commit_message)
        for path in Path(folder_path).iterdir():
            if path.name in allow_patterns:
                self.repositories[repo_id][path.name] = path.read_bytes()
