"""Budgets of the arms by hand: what the teacher costs, and tokens that cost as much without it."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import arms, assembly
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
    (plan,) = assembly.stage_plans(words, words.stages, student, big)
    extra = {0: 0, 1: BLOCK + HEAD, 2: 2 * BLOCK + HEAD, 4: 2 * (2 * BLOCK + HEAD)}[passes]
    assert plan.settings.flops_per_token == 3 * (BLOCK + HEAD) + extra


def test_tokens_of_equal_operations_by_hand(tmp_path):
    words = recipe(tmp_path, {"source": "t"})
    (stage,) = arms.equal_flops_stages(words, model_of(1), model_of(2))
    # Six batches of 150 fit into 1,000 tokens; each token costs three passes of the student and one of the teacher.
    spent = 900 * (3 * (BLOCK + HEAD) + 2 * BLOCK + HEAD)
    assert stage.tokens == round(spent / (3 * (BLOCK + HEAD)) / 150) * 150 == 1350
    assert stage.kind == "tune"


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
