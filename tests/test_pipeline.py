"""End to end on a tiny teacher: everything the run folder promises, and what bad input gets."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny

from limbeck import evaluation, pipeline, students, writing
from limbeck.core.errors import CheckpointError, DataError, LimbeckError, RecipeError, TeacherError
from limbeck.core.files import read_json
from limbeck.evaluate.facts import read_facts
from limbeck.planning import Machine, plan
from limbeck.recipe import Recipe


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    text = tiny.write_text(folder / "text.jsonl")
    teacher = tiny.make_teacher(folder / "teacher", text, train_steps=200)
    recipe = tiny.recipe(teacher, text)
    facts = pipeline.run(recipe, run_folder=folder / "run", progress=False)
    return folder, recipe, facts


def test_the_report_has_every_part(job):
    folder, recipe, facts = job
    assert read_facts(folder / "run" / "report.json").model_dump(mode="json") == facts
    assert facts["teacher"]["perplexity"] > 1
    for name in ("from_scratch", "copied", "teacher_more"):
        control = facts["controls"][name]
        assert control["perplexity"] > 1
        assert control["tokens_spent"] == facts["student"]["tokens_spent"] == recipe.total_tokens
        assert control["flops_spent"] > 0
    assert facts["floor"]["ratio_to_teacher"] > 0
    assert facts["student"]["kl_to_teacher"] >= 0
    assert [layer["mixer"] for layer in facts["layers"]] == ["hyena", "hyena"]
    assert all(layer["nmse_after_align"] < 1 for layer in facts["layers"])
    assert facts["verdict"]["headline"]
    for name in ("report.html", "report.md", "recipe.yaml", "environment.json", "metrics.jsonl"):
        assert (folder / "run" / name).stat().st_size > 0


def test_what_was_counted_is_what_the_plan_foretold(job):
    _, recipe, facts = job
    machine = Machine("cpu", 10**12, 10**12, 1e9)
    rows = {(row["arm"], row["stage"]): row["flops"] for row in plan(recipe, machine=machine)["training"]}
    models = {"student": facts["student"], **{name: one for name, one in facts["controls"].items() if one}}
    counted = {(arm, stage["name"]): stage["flops"] for arm, model in models.items() for stage in model["stages"]}
    assert counted.keys() == rows.keys()
    for name, flops in counted.items():
        # A look at the hidden states runs the head on one position; packed documents can leave one unscored.
        assert flops == pytest.approx(rows[name], rel=0.01), name
    assert facts["run"]["energy_note"]
    for stage in facts["student"]["stages"]:
        assert (stage["energy_joules"] is None) == (facts["run"]["energy_joules"] is None)


def test_the_student_beats_its_start_and_the_control(job):
    _, _, facts = job
    losses = [loss for _tokens, loss in facts["student"]["stages"][-1]["loss_curve"]]
    assert sum(losses[-8:]) < sum(losses[:8])
    assert facts["student"]["perplexity"] < facts["controls"]["from_scratch"]["perplexity"]
    assert facts["student"]["perplexity"] < facts["floor"]["perplexity"]


def test_the_model_folder_is_a_plain_one(job):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _, facts = job
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    ids = tokenizer("Ada met", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    again = evaluation.evaluate_place(str(folder / "run"), device="cpu")
    assert again["texts"][0]["perplexity"] == pytest.approx(facts["student"]["perplexity"], rel=1e-6)


def test_later_commands(job):
    folder, _, facts = job
    text = "".join(writing.generate_from(str(folder / "run"), "Ada met", max_new_tokens=4, device="cpu"))
    assert text == facts["student"]["samples"][0]["text"]
    rows = evaluation.compare_places([str(folder / "run"), str(folder / "teacher")], device="cpu")
    assert rows[1]["texts"][0]["perplexity"] == pytest.approx(facts["teacher"]["perplexity"], rel=1e-6)
    assert evaluation.render_report(folder / "run")["verdict"] == facts["verdict"]


def test_a_finished_run_is_shown_not_repeated(job, monkeypatch):
    folder, recipe, facts = job
    monkeypatch.setattr(pipeline, "open_run", lambda *args, **kwargs: pytest.fail("ran again"))
    assert pipeline.run(recipe, run_folder=folder / "run", progress=False) == facts


def test_a_run_folder_of_another_recipe_is_left_alone(job):
    folder, recipe, _ = job
    other = recipe.model_copy(update={"seed": 5})
    with pytest.raises(CheckpointError, match=r"another recipe \(different: seed\).*--run-folder"):
        pipeline.run(other, run_folder=folder / "run", progress=False)
    occupied = folder / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("do not touch")
    with pytest.raises(CheckpointError, match="not a run folder"):
        pipeline.run(recipe, run_folder=occupied, progress=False)


def test_a_recipe_that_fails_before_training_may_be_corrected_in_its_folder(job, tmp_path):
    folder, recipe, _ = job
    words = recipe.model_dump(mode="json")
    stage = {"kind": "distil", "name": "distil", "tokens": 256, "batch_tokens": 128, "learning_rate": 1e-3}
    controls = {"from_scratch": False, "copied": False, "teacher_more": False, "floor": False}
    words |= {"controls": controls}

    def with_layers(layers, student):
        term = {"objective": "hidden_cosine", "layers": layers}
        return Recipe.model_validate(words | {"stages": [stage | {"objectives": [term]}], "student": student})

    with pytest.raises(RecipeError, match="stages.distil: hidden_cosine: layers: uniform: 9"):
        pipeline.run(
            with_layers({"uniform": 9}, {"calibration_tokens": 512}), run_folder=tmp_path / "run", progress=False
        )
    assert (tmp_path / "run" / "arms" / "student" / "initial").exists()
    right = with_layers({"uniform": 1}, {"calibration_tokens": 512, "keep_attention": 1})
    facts = pipeline.run(right, run_folder=tmp_path / "run", progress=False)
    assert facts["layers"], "the start is made anew"
    assert len(read_json(tmp_path / "run" / "layers.json")["initial"]) == 1
    with pytest.raises(CheckpointError, match="another recipe"):
        pipeline.run(with_layers({"uniform": 2}, {}), run_folder=tmp_path / "run", progress=False)


def test_progressive_student_fed_with_attention_kept(job, tmp_path):
    folder, recipe, _ = job
    words = recipe.model_dump(mode="json")
    words["student"] |= {"keep_attention": 1, "keep_rule": "measured", "initialisation": "calibrated"}
    words["stages"][0] |= {"order": "progressive", "inputs": "student"}
    words["controls"] = {"from_scratch": False, "copied": False, "teacher_more": False, "floor": True}
    facts = pipeline.run(type(recipe).model_validate(words), run_folder=tmp_path / "run", progress=False)
    assert sorted(layer["mixer"] for layer in facts["layers"]) == ["attention", "hyena"]
    (swapped,) = [layer for layer in facts["layers"] if layer["mixer"] == "hyena"]
    assert swapped["nmse_calibrated"] < swapped["nmse_initial"], (
        "the error of the start is that of before the calibration"
    )
    assert not any(facts["controls"].values())


@pytest.mark.parametrize(("failed_layers", "mixers"), [("keep", ["attention"] * 2), ("swap", ["hyena"] * 2)])
def test_layers_that_do_not_fit_are_never_swapped_silently(job, tmp_path, capsys, failed_layers, mixers):
    _, recipe, _ = job
    words = recipe.model_dump(mode="json")
    words["student"] |= {"initialisation": "random", "failed_layers": failed_layers}
    words["stages"][0] |= {"learning_rate": 1e-9, "tokens": 128}
    words["controls"] = {"from_scratch": False, "copied": False, "teacher_more": False, "floor": False}
    facts = pipeline.run(type(recipe).model_validate(words), run_folder=tmp_path / "run", progress=False)
    assert [layer["mixer"] for layer in facts["layers"]] == mixers
    assert all("fits no better than zero" in layer["note"] for layer in facts["layers"])
    assert "fit no better than zero" in capsys.readouterr().out


@pytest.mark.parametrize(("initialisation", "blames"), [("calibrated", True), ("random", False)])
def test_an_align_stage_that_did_harm_is_named(job, tmp_path, capsys, monkeypatch, initialisation, blames):
    _, recipe, _ = job
    words = recipe.model_dump(mode="json")
    words["student"] |= {"initialisation": initialisation}
    words["controls"] = {"from_scratch": False, "copied": False, "teacher_more": False, "floor": False}
    monkeypatch.setattr(students, "layer_errors", lambda work, student: {0: 6.0, 1: 2.0})
    pipeline.run(type(recipe).model_validate(words), run_folder=tmp_path / "run", progress=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "layers 0 (6.00), 1 (2.00) fit no better than zero" in said
    assert ("Before `align` 2 of these 2 did fit" in said) == blames


def test_pretraining_without_a_teacher(tmp_path):
    text = tiny.write_text(tmp_path / "text.jsonl")
    recipe = tiny.recipe(
        None, text, tokenizer={"train_vocab_size": 300},
        student={"initialisation": "random", "architecture": {
            "model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        }},
        stages=[{"kind": "tune", "name": "tune", "tokens": 2560, "batch_tokens": 128, "learning_rate": 3e-3}],
        controls={"from_scratch": False, "copied": False, "teacher_more": False, "floor": False},
    )  # fmt: skip
    facts = pipeline.run(recipe, run_folder=tmp_path / "run", progress=False)
    assert facts["teacher"] is None
    assert facts["student"]["perplexity"] < 300


def test_a_tampered_checkpoint_is_passed_over_and_the_run_ends_the_same(job, tmp_path):
    folder, recipe, _ = job
    target = tmp_path / "run"
    with pytest.raises(SystemExit):
        stop_in_stage(recipe, target)
    checkpoints = sorted(target.glob("arms/student/align/checkpoints/step-*"))
    assert len(checkpoints) == 2
    state = checkpoints[-1] / "state.json"
    state.write_text(state.read_text().replace("1", "2"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pipeline.run(recipe, run_folder=target, progress=False)
    assert any("checksum differs" in str(warning.message) for warning in told)
    expected = load_file(folder / "run" / "model" / "model.safetensors")
    found = load_file(target / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def stop_in_stage(recipe, target):
    """Run until the second checkpoint of the first stage, then stop as a signal would."""
    from limbeck.train import trainer

    original = trainer.save_checkpoint
    calls = []

    def save_and_stop(*args, **kwargs):
        original(*args, **kwargs)
        calls.append(args)
        if len(calls) == 2:
            raise SystemExit(143)

    trainer.save_checkpoint = save_and_stop
    try:
        pipeline.run(recipe, run_folder=target, progress=False)
    finally:
        trainer.save_checkpoint = original


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": {"source": "./nowhere"}}, TeacherError, "nowhere"),
        ({"data": {"train": ["./none.txt"], "heldout": ["factbook"], "context_tokens": 32}}, DataError, "no such file"),
    ],
)
def test_what_is_missing_is_named(job, tmp_path, change, error, message):
    _, recipe, _ = job
    words = recipe.model_dump(mode="json") | change
    with pytest.raises(error, match=message):
        pipeline.run(type(recipe).model_validate(words), run_folder=tmp_path / "run", progress=False)


def test_a_corpus_smaller_than_one_window(job, tmp_path):
    _, recipe, _ = job
    (tmp_path / "short.txt").write_text("too short")
    words = recipe.model_dump(mode="json")
    words["data"]["train"] = [{"source": str(tmp_path / "short.txt"), "split": "train"}]
    with pytest.raises(DataError, match="fewer than one window of 32"):
        pipeline.run(type(recipe).model_validate(words), run_folder=tmp_path / "run", progress=False)


def test_an_unfinished_run_cannot_be_generated_from(job, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({}))
    with pytest.raises(LimbeckError, match="has not finished"):
        list(writing.generate_from(str(tmp_path), "x", device="cpu"))
