"""Every block of every page is carried out: what the documentation says works, in its own order, with small models.

A page that fails names itself: one test a page, each in a class of its own, so that pages run side by side.
"""

import re
import shutil

import pytest
from tests import docs_stand_ins, tiny
from tests.docs_runner import LANGUAGES, ROOT, Reader, read_blocks
from tests.own_pieces import fresh_process
from tests.teachers.fake_server import TEMPLATE, FakeServer

from limbeck.recipe_io import dump_recipe

PAGES = [path for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]) if read_blocks(path)]
TEXTS = re.compile(r"(?<![\w/{.-])((?:\./)?\w[\w./-]*\.(?:jsonl|txt|parquet))\b")


class Stock:
    """What pages take for granted, each made once: a text, models, a finished run, stores."""

    def __init__(self, folder):
        from transformers import AutoTokenizer

        self.folder, self.text = folder, tiny.write_text(folder / "text.jsonl")
        self.models = docs_stand_ins.make_hub(folder, self.text)
        self.tokenizer = AutoTokenizer.from_pretrained(self.models["usual"])
        self.tokenizer.chat_template = TEMPLATE

    def recipe(self, teacher=None):
        recipe = tiny.recipe(teacher or self.models["usual"], self.text)
        few = {"tokens": 256, "batch_tokens": 128}
        controls = recipe.controls.model_copy(update={"copied": False, "teacher_more": False})
        return recipe.model_copy(
            update={"stages": [stage.model_copy(update=few) for stage in recipe.stages], "controls": controls}
        )

    def finished_run(self):
        from limbeck import pipeline

        place = self.folder / "run"
        if not place.exists():
            pipeline.run(self.recipe(), run_folder=place, progress=False)
        return place

    def store(self):
        from limbeck.capturing import capture_recipe

        place = self.folder / "store"
        if not place.exists():
            capture_recipe(self.recipe(), folder=place, progress=False)
        return place

    def provide(self, path):
        """Make what stands at a path of a page. The first part of the path says what it is."""
        if path.suffix in (".yaml", ".yml"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dump_recipe(self.recipe("embedded")), encoding="utf-8")
        elif len(path.parts) == 2 and path.parts[0] == "runs":
            shutil.copytree(self.finished_run(), path)
        elif len(path.parts) == 2 and path.parts[0] == "stores":
            shutil.copytree(self.store(), path)
        elif "task" in path.name and not path.suffix:
            docs_stand_ins.make_tasks(path)
        elif path.parts[:1] == ("downloaded",):
            docs_stand_ins.make_distillkit(path)
        else:
            return False
        return True


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    return Stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def page_folder(stock, tmp_path, monkeypatch):
    with FakeServer(stock.tokenizer).running() as server, fresh_process():
        docs_stand_ins.install(
            monkeypatch, cache=tmp_path / "hub", text=stock.text, url=server.url, model=stock.models["usual"]
        )
        folder = tmp_path / "page"
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        yield folder


def prepare(page, stock, folder, monkeypatch):
    """Lay out what a page names and does not make: its texts, the hub's models, keys in the environment."""
    text = page.read_text(encoding="utf-8")
    for name in docs_stand_ins.hub_ids(text) | {"HuggingFaceTB/SmolLM2-135M"}:
        docs_stand_ins.put_into_cache(folder.parent / "hub", name, stock.models)
    code = "\n".join(block.text for block in read_blocks(page))
    for name in set(TEXTS.findall(code)):
        docs_stand_ins.make_file(folder / name, stock.text)
    for variable in re.findall(r"api_key_variable: (\w+)", code):
        monkeypatch.setenv(variable, "a-key-that-opens-nothing")


def follow(page):
    def test_blocks(self, stock, page_folder, monkeypatch):
        prepare(page, stock, page_folder, monkeypatch)
        reader = Reader(stock.provide)
        for block in read_blocks(page):
            assert block.language in (*LANGUAGES, "text"), (
                f"{block.page}:{block.line}: unknown language {block.language!r}"
            )
            if block.language in LANGUAGES:
                reader.follow(block)

    return test_blocks


for _page in PAGES:
    _name = "Test_" + re.sub(r"\W", "_", _page.relative_to(ROOT).with_suffix("").as_posix())
    _mark = pytest.mark.slow if "limbeck " in _page.read_text(encoding="utf-8") else lambda test: test
    globals()[_name] = type(_name, (), {"test_blocks": _mark(follow(_page))})
