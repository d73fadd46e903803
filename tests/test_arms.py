"""Budgets of the arms by hand: what the teacher costs, and tokens that cost as much without it."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import arms, assembly, stage_costs
from limbeck.evaluate.facts import ModelFacts
from limbeck.evaluate.quality import TextScore
from limbeck.judging import restate_per_token
from limbeck.recipe import Recipe

CONTEXT = 15
# A block: qkv 2·16·48, its output 2·16·16, the MLP 2·2·16·32, and attention 4·16·8 at 15 tokens, which see 8 on average.
BLOCK, HEAD = 1536 + 512 + 2048 + 512, 2 * 16 * 100


def model_of(layers):
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def recipe(tmp_path, teacher, **stage):
    words = {"kind": "distil", "tokens": 1000, "batch_tokens": 150, "learning_rate": 1e-3} | stage
    source = "s" if "store" in teacher else str(tmp_path)
    return Recipe.model_validate(
        {
            "name": "arms", "teacher": teacher, "stages": [words], "tokenizer": {"train_vocab_size": 300},
            "data": {"train": [source], "heldout": [str(tmp_path)], "context_tokens": CONTEXT},
            "student": {"architecture": {"model_type": "gpt_neox", "hidden_size": 16}, "initialisation": "random"},
            "controls": {"from_scratch": True, "copied": False, "teacher_more": False, "floor": False, "equal_flops": True},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "stage", "passes"),
    [
        ({"source": "t"}, {}, 2),
        ({"source": "t"}, {"kl": 0.0, "ce": 1.0}, 0),
        ({"several": [{"source": "a"}, {"source": "b"}]}, {}, 4),
        ({"store": "s"}, {}, 0),
        ({"served": {"url": "http://localhost:1/v1", "model": "m", "top_logprobs": 5}}, {}, 0),
        ({"itself": {"rule": "average"}}, {}, 1),
    ],
)
def test_what_the_teacher_costs_for_a_token(tmp_path, teacher, stage, passes):
    words = recipe(tmp_path, teacher, **stage)
    student, big = model_of(1), model_of(2)
    (plan,) = assembly.stage_plans(words, words.stages, student)
    several = [big] * (2 if "several" in teacher else 1)
    # Six batches of 150 fit into 1,000 tokens, ten rows each, of which all tokens but the first are predicted.
    read, scored = 6 * 150, 6 * 10 * 14
    extra = {0: 0, 1: read * BLOCK + scored * HEAD, 2: read * 2 * BLOCK + scored * HEAD}.get(passes)
    extra = 2 * (read * 2 * BLOCK + scored * HEAD) if extra is None else extra
    found = stage_costs.stage_flops(words, plan, student, several)
    assert found == 3 * (read * BLOCK + scored * HEAD) + extra


def test_tokens_of_equal_operations_by_hand(tmp_path):
    words = recipe(tmp_path, {"source": "t"})
    student = model_of(1)
    # Each token costs three passes of the student and one of the teacher; the head runs where a token is predicted.
    a_batch = 3 * (150 * BLOCK + 140 * HEAD)
    spent = 6 * (a_batch + 150 * 2 * BLOCK + 140 * HEAD)
    (stage,) = arms.equal_flops_stages(words, student, spent=spent)
    assert stage.tokens == round(spent / a_batch) * 150 == 1350
    assert stage.kind == "tune"
    # Whatever was counted beyond that, a student's own writing for example, is the control's too.
    assert arms.equal_flops_stages(words, student, spent=spent + 4 * a_batch)[0].tokens == 1350 + 4 * 150


def test_own_writing_is_foretold_pass_by_pass(tmp_path):
    words = recipe(tmp_path, {"source": "t"}, on_policy={"share": 1.0, "prompt_tokens": 5})
    student, big = model_of(1), model_of(2)
    (plan,) = assembly.stage_plans(words, words.stages, student)
    # 60 rows: 5 tokens given and 10 written, the last of which is never read; then 15 are learned, the head at 10 of them.
    matrices = BLOCK - 512
    reading = 60 * (14 * (matrices + 64 * 7.5) + 10 * HEAD)
    learning = 3 * 60 * (15 * BLOCK + 10 * HEAD)
    teaching = 60 * (15 * 2 * BLOCK + 10 * HEAD)
    assert stage_costs.stage_flops(words, plan, student, [big]) == pytest.approx(reading + learning + teaching)


def test_a_length_curriculum_costs_less_attention(tmp_path):
    words = recipe(tmp_path, {"source": "t"}, kl=0.0, ce=1.0)
    student = model_of(1)
    (plan,) = assembly.stage_plans(words, words.stages, student)
    plan = replace(plan, settings=replace(plan.settings, length_curriculum=((0.5, 3),)))
    short = 3 * 30 * 3 * (5 * (BLOCK - 512 + 64 * 3) + 4 * HEAD)
    whole = 3 * 30 * (15 * BLOCK + 14 * HEAD)
    assert stage_costs.stage_flops(words, plan, student, ()) == pytest.approx(short + whole)


def test_perplexity_of_a_teacher_with_other_tokens_by_hand():
    # 2 bits per byte and 3 bytes a token of the student's: 6 bits a token, perplexity 2 ** 6.
    teacher = ModelFacts(parameters=1, parameter_bytes=4, bits_per_byte=2.0, perplexity=5.0)
    student = TextScore(nats=70.0, tokens=100, words=60, bytes=300, standard_error_nats=None, protocol={})
    restate_per_token(teacher, student)
    assert math.isclose(teacher.perplexity, 64.0)
    # A model that is as good as the teacher has the teacher's perplexity, whatever its tokens.
    teacher.bits_per_byte = 70 / math.log(2) / 300
    restate_per_token(teacher, student)
    assert math.isclose(teacher.perplexity, student.perplexity)
