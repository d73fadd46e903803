"""Importing torch without what can wait: nothing is lost, it only comes later."""

import subprocess
import sys

import pytest
import torch

from limbeck.core.lean_torch import _TRIED, import_lean_torch

START = "import sys; from limbeck.core.lean_torch import PUT_OFF, import_lean_torch, import_the_rest; "
tried = pytest.mark.skipif(not torch.__version__.startswith(_TRIED), reason="torch of this version is imported whole")


def fresh(code):
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_that_has_torch_keeps_it():
    assert not import_lean_torch()


def test_a_version_that_was_not_tried_is_imported_whole():
    code = "from limbeck.core import lean_torch; lean_torch._TRIED = ('0.1.',); print(import_lean_torch(), 'torch' in sys.modules)"
    assert fresh(code) == "False False"


@tried
def test_what_is_put_off_is_not_carried_out():
    code = "print(import_lean_torch()); print(sorted(n for n in PUT_OFF if len(vars(sys.modules.get(n, sys))) > 15), 'torch._prims' in sys.modules)"
    assert fresh(code).splitlines() == ["True", "[] False"]


@tried
def test_what_is_put_off_comes_when_it_is_asked_for():
    code = (
        "import_lean_torch(); import torch, inspect; inspect.getmodule(torch.nn); assert 'torch._prims' not in sys.modules\n"
        "model = torch.nn.Linear(2, 2); optimiser = torch.optim.AdamW(model.parameters()); model(torch.ones(1, 2)).sum().backward()\n"
        "optimiser.step(); from torch.utils.data import DataLoader; print(len(DataLoader([1, 2]))); from torch.distributions import *\n"
        "print(Normal(0.0, 1.0).mean.item(), torch.export.__name__, torch.optim.__spec__.loader.__class__.__name__)"
    )
    assert fresh(code).splitlines() == ["2", "0.0 torch.export SourceFileLoader"]


@tried
def test_the_rest_can_be_loaded():
    code = (
        "import_lean_torch(); import_the_rest(); import_the_rest(); import torch; assert 'torch._prims' in sys.modules\n"
        "print(torch.nn.functional.gelu(torch.ones(3, device='meta')).shape, torch.ones(2, 3, device='meta').logcumsumexp(0).shape)"
    )
    assert fresh(code) == "torch.Size([3]) torch.Size([2, 3])"


def test_nothing_when_nothing_was_put_off():
    assert fresh("import_the_rest(); print(any(n in sys.modules for n in PUT_OFF))") == "False"
