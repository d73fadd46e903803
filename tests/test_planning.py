"""What a recipe would cost: operations counted by hand and by torch, and estimates by hand."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import doctor, planning
from limbeck.core.errors import RecipeError, TeacherError
from limbeck.models import costs
from limbeck.models.config import HybridConfig
from limbeck.models.flops import attention_flops_per_token, forward_flops_per_token, hyena_flops_per_token
from limbeck.planning import Machine, PlanError, plan
from limbeck.recipe_io import parse_recipe

NEOX = {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 128,
        "tie_word_embeddings": False}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 100}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 100, "head_dim": 16,
         "tie_word_embeddings": True}  # fmt: skip
ROOMY = Machine(device="cpu", memory_bytes=10**12, free_disk_bytes=10**12, matmul_flops_per_second=1e9)

RECIPE = """\
name: trial
teacher: {{source: {teacher}}}
student: {{keep_attention: 1, calibration_tokens: 64}}
data: {{train: [one.txt], heldout: [one.txt], context_tokens: 16}}
stages:
  - {{kind: align, tokens: 640, batch_tokens: 64, learning_rate: 1e-3}}
  - {{kind: distil, tokens: 1290, batch_tokens: 128, micro_batch_sequences: 2, learning_rate: 1e-3}}
evaluation: {{max_tokens: 320}}
"""
SCRATCH = """\
name: scratch
teacher: null
tokenizer: {train_vocab_size: 300}
student:
  initialisation: random
  architecture: {model_type: gpt_neox, hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 4}
data: {train: [one.txt], heldout: [one.txt], context_tokens: 16}
stages: [{kind: tune, tokens: 1600, batch_tokens: 160, learning_rate: 1e-3}]
controls: {from_scratch: false, copied: false, teacher_more: false, floor: false}
"""


def config_of(words):
    options = dict(words)
    return AutoConfig.for_model(options.pop("model_type"), **options)


def build(config, device="meta"):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def hybrid(words, mixers, **hyena):
    return build(HybridConfig(backbone=config_of(words), mixers=mixers, hyena=hyena))


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("".join(f"{'words of a document ' * 110}\n\n" for _ in range(60)))


@pytest.fixture
def teacher(tmp_path):
    config_of(NEOX).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def recipe(teacher, *overrides):
    return parse_recipe(RECIPE.format(teacher=teacher), overrides)


def test_attention_by_hand():
    # 4 tokens attend to 1, 2, 3, 4 tokens: 2.5 on average, 4 operations for each of 8 channels.
    assert attention_flops_per_token(8, context_tokens=4) == 4 * 8 * 2.5
    # With a window of 2 they attend to 1, 2, 2, 2.
    assert attention_flops_per_token(8, context_tokens=4, window=2) == 4 * 8 * 7 / 4
    assert attention_flops_per_token(8, context_tokens=4, window=99) == 4 * 8 * 2.5


def test_hyena_by_hand():
    # 16 points of transform are 4 doublings: 40 + 6 + 2 a convolution; order gates; 3 taps on 3 projections.
    assert hyena_flops_per_token(10, order=2, short_conv=3, context_tokens=8) == 10 * (48 + 2 + 18)
    assert hyena_flops_per_token(10, order=3, short_conv=3, context_tokens=8) == 10 * (2 * 48 + 3 + 24)


def test_a_transformer_by_hand():
    matrices = 3 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 32 * 100
    assert forward_flops_per_token(build(config_of(NEOX)), 16) == 2 * matrices + 3 * 4 * 32 * 8.5


def test_a_hybrid_by_hand():
    student = hybrid(NEOX, ["hyena", "attention", "hyena"], order=2, short_conv=3)
    mixers = 2 * (2 * (32 * 96 + 32 * 32) + hyena_flops_per_token(32, order=2, short_conv=3, context_tokens=16))
    attention = 2 * (32 * 96 + 32 * 32) + 4 * 32 * 8.5
    rest = 2 * (3 * 2 * 32 * 64 + 32 * 100)
    assert forward_flops_per_token(student, 16) == pytest.approx(mixers + attention + rest)
    assert sum(forward_flops_per_token(mixer, 16) for mixer in student.mixers().values()) == pytest.approx(mixers)


@pytest.mark.parametrize("words", [NEOX, GPT2, LLAMA], ids=lambda words: words["model_type"])
def test_counts_agree_with_torch(words):
    # torch counts the whole square of attention; the causal half (and its diagonal) is what we count.
    tokens = 16
    model = build(config_of(words), "cpu").eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    half = config.num_hidden_layers * attention_flops_per_token(width, context_tokens=tokens) * tokens
    square = half * 2 * tokens / (tokens + 1)
    ours = tokens * forward_flops_per_token(model, tokens) - half + square
    # Rotary angles are a matrix product of positions and frequencies: 2 operations an angle, once for all layers.
    angles = counter.get_total_flops() - ours
    assert 0 <= angles <= 2 * tokens * width


def test_parameters_by_part(teacher):
    found = plan(recipe(teacher), machine=ROOMY)
    real = build(config_of(NEOX), "cpu")
    assert found["teacher"]["parameters"] == sum(parameter.numel() for parameter in real.parameters())
    assert found["teacher"]["parts"]["embeddings"] == 2 * 100 * 32
    assert found["teacher"]["parts"]["attention"] == 3 * (32 * 96 + 96 + 32 * 32 + 32)
    student = found["student"]
    assert (student["hyena_layers"], student["attention_layers"]) == (2, 1)
    assert sum(student["parts"].values()) == student["parameters"]
    assert student["parts"]["hyena"] > 0


def test_tied_parameters_count_once():
    model = build(config_of(LLAMA))
    assert planning.parameter_parts(model)["embeddings"] == 100 * 32


def test_training_rows_by_hand(teacher):
    found = plan(recipe(teacher), machine=ROOMY)
    student = forward_flops_per_token(hybrid(NEOX, ["hyena", "attention", "hyena"]), 16)
    teachers = forward_flops_per_token(build(config_of(NEOX)), 16)
    rows = {(row["arm"], row["stage"]): row for row in found["training"]}
    assert list(rows) == [
        ("student", "align"), ("student", "distil"), ("from_scratch", "tune"), ("copied", "distil"),
        ("teacher_more", "tune"),
    ]  # fmt: skip
    distil = rows["student", "distil"]
    assert (distil["tokens"], distil["steps"]) == (1280, 10)
    # The head runs where a token is predicted: at 15 of the 16 of a row.
    student, teachers = student - 2 * 32 * 100 / 16, teachers - 2 * 32 * 100 / 16
    assert distil["flops"] == pytest.approx(1280 * (3 * student + teachers))
    assert distil["seconds"] == pytest.approx(distil["flops"] / (1e9 * costs.EFFICIENCY["cpu"]))
    assert rows["from_scratch", "tune"]["flops"] == pytest.approx(1920 * 3 * student)
    assert rows["teacher_more", "tune"]["flops"] == pytest.approx(1920 * 3 * teachers)
    align = rows["student", "align"]
    teachers -= 2 * 32 * 100 * 15 / 16  # aligning asks for no logits
    assert teachers < align["flops"] / align["tokens"] < teachers + 3 * student


def test_a_progressive_stage_is_one_row(teacher):
    found = plan(recipe(teacher, "stages.align.order=progressive", "controls.copied=false"), machine=ROOMY)
    rows = [row for row in found["training"] if row["stage"] == "align"]
    assert [(row["tokens"], row["steps"]) for row in rows] == [(640, 10)]


def phase(**changes):
    words = {"arm": "student", "stage": "s", "kind": "tune", "tokens": 1, "steps": 1, "flops": 1.0}
    return costs.Phase(**words | {"trained_parameters": 1000, "micro_batch_tokens": 10} | changes)


def test_memory_of_a_phase_by_hand():
    distil = phase(kind="distil", keeps_average=True, target_bytes_per_token=3.0)
    parts = costs.training_bytes(distil, activations_per_token=50.0, vocabulary=7, width=5)
    assert parts == {
        "gradients_bytes": 4000,
        "optimizer_bytes": 12_000,
        "activations_bytes": 500,
        "targets_bytes": 30,
        "logits_bytes": 10 * 7 * 4 * costs.CHUNK_COPIES["distil"] + costs.HEAD_COPIES * 7 * 5 * 4,
    }
    align = costs.training_bytes(phase(kind="align"), activations_per_token=0, vocabulary=7, width=5)
    assert align["logits_bytes"] == 0


def test_logits_take_a_chunk_however_many_positions_there_are():
    def logits(device="cpu", **changes):
        return costs.logit_bytes(phase(kind="distil", **changes), vocabulary=150_000, width=64, device=device)

    head = 2 * 150_000 * 64 * 4
    assert logits(micro_batch_tokens=4096) == logits(micro_batch_tokens=65_536) == 48 * 2**20 * 6.5 + head
    assert logits(micro_batch_tokens=4096, device="cuda") == 256 * 2**20 * 10 + head
    assert logits(micro_batch_tokens=4096, trains_head=False) == 48 * 2**20 * 6.5
    assert logits(micro_batch_tokens=10) == 10 * 150_000 * 4 * 6.5 + head


def test_activations_by_hand():
    attention = (32 + 96) + (32 + 32)
    rest = 2 * (32 + 64)
    whole = costs.activation_bytes_per_token(build(config_of(NEOX)))
    assert whole == 3 * (attention + rest) * 4 * costs.ACTIVATION_FACTOR
    student = costs.activation_bytes_per_token(hybrid(NEOX, ["hyena"] * 3))
    features = attention * costs.MIXER_ACTIVATION_FACTOR + rest * costs.ACTIVATION_FACTOR
    assert student == pytest.approx(3 * 4 * features)


def test_calibration_memory_by_hand():
    held = costs.calibration_bytes(tokens=100, context_tokens=10, width=4, heads=2, layers=3)
    assert held == 4 * (100 * 2 * 4 * 3 + 2 * 10 * 10 * 3)


def test_disk_by_hand():
    phases = [phase(), phase(stage="t", trained_parameters=500), phase(arm="copied", keeps_average=True)]
    parts = costs.disk_bytes(phases, parameters=1000, keep_checkpoints=2, token_files=99)
    student = 2 * (4000 + 8000) + 2 * (4000 + 4000)
    copied = 2 * (4000 + 12_000)
    assert parts["checkpoints_bytes"] == max(student, copied)
    assert parts["models_bytes"] == 4 * 4000
    assert parts["total_bytes"] == parts["checkpoints_bytes"] + parts["models_bytes"] + 99


def test_the_fullest_moment_is_found(teacher):
    memory = plan(recipe(teacher), machine=ROOMY)["memory"]
    assert memory["fullest_at"] in ("student, distil", "copied, distil")
    parts = ("weights", "teacher", "gradients", "optimizer", "activations", "targets", "logits", "runtime")
    assert memory["total_bytes"] == pytest.approx(sum(memory[f"{part}_bytes"] for part in parts))
    changes = ("stages.distil.micro_batch_sequences=1", "controls.copied=false")
    smaller = plan(recipe(teacher, *changes), machine=ROOMY)["memory"]
    assert smaller["logits_bytes"] < memory["logits_bytes"]


def test_judging_may_be_the_fullest_moment(teacher):
    memory = plan(recipe(teacher, "evaluation.batch_sequences=1000"), machine=ROOMY)["memory"]
    assert memory["fullest_at"] == "judging"
    assert memory["logits_bytes"] == 1000 * 16 * 100 * 4 * 2


def test_time_grows_with_the_tokens_and_falls_with_the_speed(teacher):
    small = plan(recipe(teacher), machine=ROOMY)["time"]
    large = plan(recipe(teacher, "stages.distil.tokens=12800"), machine=ROOMY)["time"]
    assert large["training_seconds"] > 3 * small["training_seconds"]
    fast = Machine("cpu", 10**12, 10**12, 2e9)
    assert plan(recipe(teacher), machine=fast)["time"]["total_seconds"] == pytest.approx(small["total_seconds"] / 2)
    assert "estimate" in small["note"]


def test_a_recipe_without_a_teacher_is_planned_too():
    found = plan(parse_recipe(SCRATCH), machine=ROOMY)
    assert found["teacher"] is None
    assert found["student"]["parts"]["embeddings"] == 2 * 300 * 32
    assert [row["arm"] for row in found["training"]] == ["student"]
    with pytest.raises(RecipeError, match="student.architecture"):
        plan(parse_recipe(SCRATCH.replace("gpt_neox", "gpt_nox")), machine=ROOMY)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine("cpu", 10**6, 10**12, 1e9), "memory are needed.*micro_batch_sequences"),
        (Machine("cpu", None, 1000, 1e9), "disk are needed.*runtime.run_folder"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_facts(machine, words, teacher):
    with pytest.raises(PlanError, match=words) as caught:
        plan(recipe(teacher), machine=machine)
    assert caught.value.facts["memory"]["total_bytes"] > 0


def test_warnings(teacher):
    def warnings(*overrides, machine=ROOMY):
        return " ".join(plan(recipe(teacher, *overrides), machine=machine)["warnings"])

    assert warnings() == ""
    assert "no layer keeps attention" in warnings("student.keep_attention=0")
    long = ["data.context_tokens=256", "stages.align.tokens=640"]
    long += ["stages.align.batch_tokens=512", "stages.distil.batch_tokens=512"]
    assert "exceeds the teacher's 128 positions" in warnings(*long)
    assert "slow on most processors" in warnings("teacher.dtype=bfloat16")
    names = ("from_scratch", "copied", "teacher_more", "floor")
    assert "all controls are off" in warnings(*(f"controls.{name}=false" for name in names))


def test_a_recipe_that_does_not_fit_its_teacher_is_refused(teacher):
    with pytest.raises(RecipeError, match="keep_attention"):
        plan(recipe(teacher, "student.keep_attention=9"), machine=ROOMY)


def test_a_teacher_that_is_not_here_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(TeacherError, match="nobody/nothing is no folder here and not in the local cache"):
        plan(recipe("nobody/nothing"), machine=ROOMY)
    monkeypatch.setattr(doctor, "embedded_teacher", lambda: None)
    with pytest.raises(PlanError, match="missing from this installation"):
        plan(recipe("embedded"), machine=ROOMY)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(TeacherError, match=str(tmp_path)):
        plan(recipe(tmp_path), machine=ROOMY)


def test_no_weights_are_loaded(teacher, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("weights were asked for")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    for model in planning.build_models(recipe(teacher)):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_this_machine_is_measured(teacher):
    machine = planning.measure_machine(recipe(teacher, "runtime.device=cpu"))
    assert machine.device == "cpu"
    assert machine.matmul_flops_per_second > 1e6
    assert math.isfinite(machine.matmul_flops_per_second)
    assert machine.free_disk_bytes > 0


def test_controls_that_have_nothing_to_compare_with_are_told_of(teacher):
    said = "do nothing without controls.from_scratch"
    for words, is_told in (("equal_flops=true", True), ("seeds=2", True), ("floor=true", False)):
        found = plan(recipe(teacher, "controls.from_scratch=false", f"controls.{words}"))
        assert any(said in warning for warning in found["warnings"]) == is_told
        found = plan(recipe(teacher, "controls.from_scratch=true", f"controls.{words}"))
        assert not any(said in warning for warning in found["warnings"])
