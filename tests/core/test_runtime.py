"""Process groups: what wraps a model is gone before its group is."""

import weakref

import pytest
import torch

from limbeck.core import runtime


@pytest.fixture
def group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Loop:
    """Holds itself, as an object with callbacks does: only the collector frees it."""

    def __init__(self, runner):
        self.runner, self.me = runner, self


def train(seen, *, fail):
    loop = Loop(torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)))
    seen.append(weakref.ref(loop.runner))
    loop.runner(torch.ones(1, 2)).sum().backward()
    if fail:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error


@pytest.mark.parametrize("fail", [False, True], ids=["done", "an error"])
def test_a_wrapper_is_freed_before_its_group_is_destroyed(group_of_one, monkeypatch, fail):
    seen, alive = [], []
    destroy = torch.distributed.destroy_process_group
    monkeypatch.setattr(
        torch.distributed, "destroy_process_group", lambda: (alive.append(seen[0]() is not None), destroy())
    )
    if fail:
        with pytest.raises(ValueError, match="outer"), runtime.process_group(torch.device("cpu")):
            train(seen, fail=True)
    else:
        with runtime.process_group(torch.device("cpu")):
            train(seen, fail=False)
    assert alive == [False]
    assert not torch.distributed.is_initialized()


def test_without_torchrun_there_is_no_group():
    with runtime.process_group(torch.device("cpu")):
        assert not torch.distributed.is_initialized()
