"""Two processes on half the batch each give what one gives on the whole."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tests import tiny
from torch.testing import assert_close

from limbeck.recipe_io import dump_recipe


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
            "--master-port=29511",
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
