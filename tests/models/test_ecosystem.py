"""The student in the hands of other tools: a fresh process, remote code, PEFT, the Trainer's habits, torch.compile."""

import subprocess
import sys

import pytest
import torch
from tests.models.families import tiny_teacher, token_ids
from transformers import AutoModelForCausalLM

from limbeck.models.hybrid import HybridForCausalLM, build_student


def tiny_student() -> HybridForCausalLM:
    return build_student(tiny_teacher("llama"), mixers=["hyena", "attention"], hyena={})


def run(code: str, *arguments: str) -> str:
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


IN_A_FRESH_PROCESS = """
import sys, torch
{before}
from transformers import AutoConfig, AutoModelForCausalLM
folder, expected = sys.argv[1], sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(folder{flag})
logits = model(torch.arange(3, 9)[None]).logits
torch.testing.assert_close(logits, torch.load(expected, weights_only=True), atol=1e-5, rtol=1e-5)
print(type(model).__name__, AutoConfig.from_pretrained(folder{flag}).model_type)
"""


@pytest.mark.parametrize(
    ("before", "flag"),
    [
        pytest.param("import limbeck", "", id="import"),
        pytest.param("", ", trust_remote_code=True", id="flag", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_loads_the_folder(before, flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    student = tiny_student()
    student.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.save(student(torch.arange(3, 9)[None]).logits, tmp_path / "expected.pt")
    code = IN_A_FRESH_PROCESS.format(before=before, flag=flag)
    assert run(code, str(tmp_path / "model"), str(tmp_path / "expected.pt")).split() == [
        "HybridForCausalLM",
        "limbeck_hybrid",
    ]


def test_lora_trains_saves_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    student, ids_BT = tiny_student(), token_ids(2, 8)
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(student, options)
    adapted.train()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), labels=ids_BT).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name and ".operator." in name for name in trained)
    adapted.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        loaded = peft.PeftModel.from_pretrained(tiny_student_again(student), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids_BT).logits, expected, atol=1e-5, rtol=1e-5)
        generated = loaded.generate(input_ids=ids_BT, max_new_tokens=5, do_sample=False)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids_BT).logits, expected, atol=1e-4, rtol=1e-4)
    assert merged.generate(ids_BT, max_new_tokens=5, do_sample=False).tolist() == generated.tolist()


def tiny_student_again(adapted: HybridForCausalLM) -> HybridForCausalLM:
    """The student as it was before it was adapted."""
    fresh = tiny_student()
    weights = {
        name.replace(".base_layer", ""): tensor for name, tensor in adapted.state_dict().items() if "lora_" not in name
    }
    fresh.load_state_dict(weights)
    return fresh


def test_a_new_model_of_the_same_architecture_can_be_made():
    student = tiny_student()
    other = AutoModelForCausalLM.from_config(student.config)
    assert isinstance(other, HybridForCausalLM)
    assert {name: tensor.shape for name, tensor in other.state_dict().items()} == {
        name: tensor.shape for name, tensor in student.state_dict().items()
    }


@pytest.mark.slow
def test_compiled_it_gives_the_same():
    student, ids_BT = tiny_student(), token_ids(2, 8)
    with torch.no_grad():
        expected = student(ids_BT, use_cache=False).logits
        found = torch.compile(student)(ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
