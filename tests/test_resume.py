"""kill -9 anywhere, the same command again: the same weights, bit for bit."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests import tiny

from limbeck import pipeline


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    text = tiny.write_text(folder / "text.jsonl")
    teacher = tiny.make_teacher(folder / "teacher", text)
    return folder, tiny.recipe(teacher, text)


def run_apart(recipe, folder) -> multiprocessing.Process:
    """Start the run in a process of its own (forked: what is imported stays imported)."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(recipe, folder))
    process.start()
    return process


def quietly(recipe, folder):
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    pipeline.run(recipe, run_folder=folder, progress=False)


def weights(folder: Path):
    found = {"model": load_file(folder / "model" / "model.safetensors")}
    for arm in ("from_scratch", "copied", "teacher_more"):
        found[arm] = load_file(folder / "arms" / arm / "final" / "step-00000000" / "model.safetensors")
    return {f"{arm}.{name}": tensor for arm, tensors in found.items() for name, tensor in tensors.items()}


@pytest.mark.slow
def test_twenty_kills_change_nothing(job):
    folder, recipe = job
    begun = time.monotonic()
    whole = run_apart(recipe, folder / "whole")
    whole.join()
    seconds = time.monotonic() - begun
    assert whole.exitcode == 0
    expected = weights(folder / "whole")
    chance = random.Random(11)
    kills = runs = 0
    while kills < 20:
        target = folder / f"killed-{runs}"  # a new one even after a run that no kill reached: it is done
        runs += 1
        while True:
            process = run_apart(recipe, target)
            process.join(timeout=chance.uniform(0.02, 0.8) * seconds)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        assert process.exitcode == 0
        found = weights(target)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(job, number, code):
    folder, recipe = job
    target = folder / f"signal-{code}"
    process = run_apart(recipe, target)
    while process.is_alive() and not list(target.glob("arms/student/*/checkpoints/step-*")):
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode == code
    assert list(target.glob("arms/*/*/checkpoints/step-*")) or list(target.glob("arms/*/done.json"))
