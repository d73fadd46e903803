"""The sizes that ship have the parameters that were promised."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.models.sizes import SIZES

# Millions: everything, and all but the trunk.
PROMISED = {
    "bytepool-10m": ("9.75", "1.14"),
    "bytepool-50m": ("49.1", "3.05"),
    "bytepool-100m": ("99.8", "5.39"),
    "bpe-10m": ("9.84", "1.31"),
    "bpe-50m": ("49.0", "4.19"),
    "bpe-100m": ("99.1", "10.49"),
    "stlm-parallel": ("55.9", "5.77"),
    "stlm-parallel-shared": ("18.0", "5.12"),
}


def millions(count, like):
    return f"{count / 1e6:.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize("name", PROMISED)
def test_parameters(name):
    options = dict(SIZES[name])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = total - sum(parameter.numel() for parameter in model.network.trunk.parameters())
    assert (millions(total, PROMISED[name][0]), millions(outside, PROMISED[name][1])) == PROMISED[name]


def test_every_size_is_promised():
    assert set(SIZES) == set(PROMISED)


@pytest.mark.parametrize("name", ["bpe-10m", "bpe-50m", "bpe-100m", "bytepool-10m", "bytepool-50m", "bytepool-100m"])
def test_heads_are_64_wide(name):
    trunk = SIZES[name]["trunk"]
    assert trunk["width"] == 64 * trunk["heads"]
