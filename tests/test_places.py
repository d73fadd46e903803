"""What a place means: runs, their arms, the ends of their stages, and what bad ones get."""

import pytest
import torch
from tests import tiny
from torch.testing import assert_close

from limbeck import evaluation, pipeline
from limbeck.core.errors import CheckpointError
from limbeck.places import open_place, run_of
from limbeck.train.checkpoint import load_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    text = tiny.write_text(folder / "text.jsonl")
    teacher = tiny.make_teacher(folder / "teacher", text)
    words = tiny.recipe(teacher, text).model_dump(mode="json")
    words["runtime"]["keep_stages"] = True
    recipe = type(tiny.recipe(teacher, text))(**words)
    pipeline.run(recipe, run_folder=folder / "run", progress=False)
    return folder / "run"


def weights(folder):
    return load_checkpoint(next(folder.glob("step-*"))).tensors["model"]


@pytest.mark.parametrize("arm", ["from_scratch", "copied", "teacher_more", "student"])
def test_an_arm_is_its_own_weights(run, arm):
    found = dict(open_place(str(run / "arms" / arm), device=CPU).model.named_parameters())
    for name, saved in weights(run / "arms" / arm / "final").items():
        if name in found:
            assert_close(found[name].detach(), saved, rtol=0, atol=0)


def test_the_student_of_an_arm_is_the_student(run):
    whole = open_place(str(run), device=CPU)
    arm = open_place(str(run / "arms" / "student"), device=CPU)
    assert whole.fingerprint == arm.fingerprint
    assert open_place(str(run / "arms" / "from_scratch"), device=CPU).fingerprint != whole.fingerprint


def test_the_end_of_a_stage(run):
    ends = [open_place(str(run / "arms" / "student" / stage), device=CPU) for stage in ("align", "distil")]
    assert ends[0].fingerprint != ends[1].fingerprint
    assert ends[1].fingerprint == open_place(str(run), device=CPU).fingerprint


def test_an_arm_is_scored_as_its_run_was(run):
    facts = evaluation.evaluate_place(str(run / "arms" / "from_scratch"), device="cpu")
    report = evaluation.render_report(run)
    assert facts["texts"][0]["perplexity"] == pytest.approx(report["controls"]["from_scratch"]["perplexity"], rel=1e-5)


def test_which_run_a_place_lies_in(run, tmp_path):
    assert run_of(run) == run_of(run / "arms" / "copied") == run_of(run / "arms" / "student" / "align") == run
    assert run_of(run / "model") is None
    assert run_of(tmp_path) is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("arms/from_scrach", 'Did you mean "from_scratch"'),
        ("arms", "unknown finished arm"),
        ("arms/student/alin", 'Did you mean "align"'),
        ("arms/student/align/end", "unknown stage of student"),
    ],
)
def test_what_is_not_there_is_refused(run, place, message):
    with pytest.raises(CheckpointError, match=message):
        open_place(str(run / place), device=CPU)


def test_a_run_that_kept_no_stages_says_how_to(run, tmp_path):
    import shutil

    other = tmp_path / "run"
    shutil.copytree(run, other)
    for end in other.glob("arms/*/*/end"):
        shutil.rmtree(end)
    with pytest.raises(CheckpointError, match="runtime.keep_stages=true"):
        open_place(str(other / "arms" / "student" / "align"), device=CPU)


def test_weights_of_another_model_are_refused(run, tmp_path):
    import shutil

    other = tmp_path / "run"
    shutil.copytree(run, other)
    shutil.rmtree(other / "arms" / "from_scratch" / "final")
    shutil.copytree(run / "arms" / "teacher_more" / "final", other / "arms" / "from_scratch" / "final")
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        open_place(str(other / "arms" / "from_scratch"), device=CPU)
