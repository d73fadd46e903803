"""The tokenizers and models that several tests of this room share."""

from __future__ import annotations

import pytest
from tests.evaluate.small_models import build_model, build_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(bos=True)


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return build_model()


@pytest.fixture(scope="session")
def other_model() -> nn.Module:
    return build_model("llama", seed=1)
