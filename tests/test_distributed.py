"""Two processes on half the batch each give what one gives on the whole."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tests import tiny
from torch.testing import assert_close

from limbeck.recipe_io import dump_recipe

# What `limbeck run` does, by processes of which one looks at the disk late each time: at what the other has written since.
_LATE = """
import os, sys, time
from pathlib import Path
from limbeck import students
from limbeck.train import checkpoint

late, recipe, folder = sys.argv[1:]

def delayed(look):
    def slowly(*arguments):
        if os.environ["RANK"] == late:
            time.sleep(1.5)
        return look(*arguments)
    return slowly

checkpoint.newest_checkpoint = delayed(checkpoint.newest_checkpoint)
students.newest_checkpoint = checkpoint.newest_checkpoint
exists = Path.exists
Path.exists = lambda path: delayed(exists)(path) if path.name == "done.json" else exists(path)
from limbeck import pipeline
from limbeck.recipe_io import load_recipe
pipeline.run(load_recipe(recipe), run_folder=Path(folder), progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["keep_attention", "shrink"])
def test_a_process_that_looks_late_goes_the_same_way(tmp_path, start):
    text = tiny.write_text(tmp_path / "text.jsonl")
    teacher = tiny.make_teacher(tmp_path / "teacher", text)
    recipe = tiny.recipe(teacher, text)
    if start == "shrink":
        controls = {"from_scratch": False, "without_teacher": True, "teacher_more": False, "floor": False}
        stages = [recipe.stages[1].model_dump(exclude_unset=True)]
        recipe = tiny.recipe(teacher, text, student={"shrink": {"layers": 0.5}}, stages=stages, controls=controls)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "late.py").write_text(_LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run(
        [*command, str(tmp_path / "late.py"), "1", str(tmp_path / "recipe.yaml"), str(tmp_path / "run")],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
def test_two_gloo_processes_equal_one(tmp_path):
    text = tiny.write_text(tmp_path / "text.jsonl")
    teacher = tiny.make_teacher(tmp_path / "teacher", text)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny.recipe(teacher, text)))
    start = {
        "one": [sys.executable, "-m", "limbeck"],
        "two": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            "-m",
            "limbeck",
        ],
    }
    weights = {}
    for name, command in start.items():
        folder = tmp_path / name
        subprocess.run(
            [*command, "run", str(tmp_path / "recipe.yaml"), "--run-folder", str(folder)],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        weights[name] = load_file(folder / "model" / "model.safetensors")
    assert weights["one"].keys() == weights["two"].keys()
    for name, one in weights["one"].items():
        assert_close(
            weights["two"][name], one, atol=2e-4, rtol=1e-3, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.slow
def test_a_refusal_is_said_once():
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29512", "-m", "limbeck"]
    done = subprocess.run(
        [sys.executable, *command, "run", "demo", "sed=1"], capture_output=True, text=True, timeout=250
    )
    assert done.returncode
    assert done.stderr.count("Did you mean") == 1
    assert "rank 1:" not in done.stderr
