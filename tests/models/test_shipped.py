"""Costs of a model, and the table of ways to share weights."""

import pytest
import torch

from limbeck.models.compact import CompactConfig, CompactForCausalLM
from limbeck.models.shipped import folder_bytes, model_costs, tying_menu, tying_table
from limbeck.models.sizes import SIZES

TRUNK = {"width": 8, "layers": 4, "heads": 2, "feed_forward": 16, "qk_norm": False, "residual_scalars": False}
MATRICES = 4 * 8 * 8 + 2 * 8 * 16
NORMS = 2 * 8


def costs_of(trunk=None, *, bytes_per_token=None, **options):
    config = CompactConfig(vocab_size=11, trunk=TRUNK | (trunk or {}), **options)
    return model_costs(CompactForCausalLM(config), context_tokens=7, bytes_per_token=bytes_per_token)


def test_by_hand():
    costs = costs_of(bytes_per_token=4.0)
    distinct = 11 * 8 + 4 * (MATRICES + NORMS) + 8
    assert costs["parameters"] == distinct
    assert costs["parameters_run"] == distinct + 11 * 8
    flops = 4 * (2 * MATRICES + 4 * 8 * (7 + 1) / 2) + 2 * 11 * 8
    assert costs["forward_flops_per_token"] == flops
    assert costs["forward_flops_per_byte"] == flops / 4
    rows = 11 + 4 * (4 * 8 + 16 + 8)
    assert costs["shipped_bytes"] == {
        "float32": 4 * distinct,
        "float16": 2 * distinct,
        "int8": 11 * 8 + 4 * MATRICES + 2 * rows + 2 * (4 * NORMS + 8),
    }
    assert costs_of()["forward_flops_per_byte"] is None


def test_what_is_shared_is_shipped_once_and_run_often():
    plain, untied = costs_of(), costs_of(tie_embeddings=False)
    assert untied["parameters"] == untied["parameters_run"] == plain["parameters_run"]
    assert untied["forward_flops_per_token"] == plain["forward_flops_per_token"]
    shared = costs_of({"share_feed_forward": "all"})
    assert shared["parameters"] == plain["parameters"] - 3 * 2 * 8 * 16
    assert shared["parameters_run"] == plain["parameters_run"]
    assert shared["forward_flops_per_token"] == plain["forward_flops_per_token"]
    twice = costs_of({"repeat": 2})
    assert twice["parameters"] == plain["parameters"]
    assert twice["parameters_run"] == plain["parameters_run"] + 4 * (MATRICES + NORMS)
    head = 2 * 11 * 8
    assert twice["forward_flops_per_token"] - head == 2 * (plain["forward_flops_per_token"] - head)


def test_the_table_covers_the_menu_and_compares_with_the_base():
    rows = tying_table(SIZES["bpe-10m"], context_tokens=512, bytes_per_token=4.0)
    by_name = {row["name"]: row for row in rows}
    assert rows[0]["name"] == "base"
    assert list(by_name) == ["base", *tying_menu(8)]
    assert rows[0]["parameters_ratio"] == rows[0]["flops_ratio"] == rows[0]["int8_ratio"] == 1
    for name, row in by_name.items():
        assert row["parameters_ratio"] == row["parameters"] / rows[0]["parameters"]
        repeats = "twice" in name and "half" not in name
        assert (row["flops_ratio"] > 1.2) == repeats, name
        assert (row["parameters_ratio"] < 0.96) == (not repeats and name != "base"), name
    deltas, whole = by_name["whole interior, deltas of rank 16"], by_name["whole interior"]
    assert deltas["parameters"] > whole["parameters"]


def test_a_table_of_one_s_own():
    config = CompactConfig(vocab_size=11, trunk=TRUNK)
    base, untied, narrow = tying_table(
        config, {"untied": {"tie_embeddings": False}, "narrow": {"trunk": {"feed_forward": 8}}}, context_tokens=8
    )
    assert untied["parameters"] == base["parameters"] + 11 * 8
    assert narrow["parameters"] == base["parameters"] - 4 * 2 * 8 * 8
    assert config.trunk_settings.feed_forward == 16


@pytest.mark.parametrize("mixers", [["hyena"] * 4, ["attention", "hyena", "hyena", "attention"]])
def test_hyena_counts_too(mixers):
    with torch.device("meta"):
        model = CompactForCausalLM(
            CompactConfig(vocab_size=11, trunk=TRUNK | {"mixers": mixers, "share_mixers": "all"})
        )
    costs = model_costs(model, context_tokens=7)
    assert costs["parameters_run"] > costs["parameters"]


def test_a_folder_weighs_what_loading_it_needs(tmp_path):
    assert folder_bytes(tmp_path) is None
    sizes = {
        "config.json": 10,
        "tokenizer.json": 20,
        "model.safetensors": 400,
        "pytorch_model.bin": 401,
        "README.md": 5,
        ".hidden.json": 9,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"x" * 400)
    assert folder_bytes(tmp_path) == 430
    (tmp_path / "model.safetensors").unlink()
    assert folder_bytes(tmp_path) == 431
    assert folder_bytes(tmp_path / "pytorch_model.bin") == 401
    assert folder_bytes(tmp_path / "nowhere") is None
