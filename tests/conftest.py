"""Shared by all tests: one thread, no network, a fixed seed."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the processor: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import limbeck  # noqa: F401  (registers the student with the Auto classes)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
