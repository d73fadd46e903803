"""Importing torch without the parts that only training, tracing and the meta device need.

To continue a short prompt takes less than `import torch` does, a third of which goes into such parts. They are put off
here: they are modules that load themselves when something of one is asked for. What they do by being loaded is missing until
then (torch's meta device has few of its kernels, torch's compiler cannot be imported), so that this is for a process that
runs one of our own networks and then ends; whoever goes on to do more calls `import_the_rest` first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

PUT_OFF = (
    "torch._meta_registrations",
    "torch.ao",
    "torch.distributions",
    "torch.export",
    "torch.masked",
    "torch.optim",
    "torch.quantization",
    "torch.utils.data",
)
# Where parts were put off and all that Limbeck does with a network of its own was tried; others are imported whole.
_TRIED = ("2.13.",)


def import_lean_torch() -> bool:
    """Import torch without what can wait. False when it is loaded already, or of a version this was not tried with."""
    if "torch" in sys.modules or not _is_tried():
        return False
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import torch  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
    return True


def import_the_rest() -> None:
    """Load the parts of torch that were put off; nothing when none were."""
    for name in PUT_OFF:
        waiting = vars(sys.modules[name]).get("__getattr__") if name in sys.modules else None
        if isinstance(waiting, _Waiting):
            waiting.load()


def _is_tried() -> bool:
    try:
        return version("torch").startswith(_TRIED)
    except PackageNotFoundError:
        return False


class _Finder(MetaPathFinder):
    """Finds the modules that can wait."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As an ordinary import finds it, with a loader that waits; None leaves it to the others."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in PUT_OFF else None
        if spec is not None and spec.loader is not None:
            spec.loader = _LaterLoader(spec.loader)
        return spec


class _LaterLoader(Loader):
    """Makes a module that is carried out when a name in it is asked for."""

    def __init__(self, real: Loader):
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The empty module."""
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty for now."""
        vars(module)["__getattr__"] = _Waiting(module, self.real)


class _Waiting:
    """The `__getattr__` of an empty module: fills it, and then looks again."""

    def __init__(self, module: ModuleType, loader: Loader):
        self.module, self.loader = module, loader

    def __call__(self, name: str) -> Any:
        # Whoever goes through all modules asks for names like __file__ and __wrapped__; that is no use of this one.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.module.__name__!r} has no attribute {name!r}")
        import_the_rest()  # all of it: the parts expect each other to have been loaded in torch's own order
        return getattr(self.module, name)

    def load(self) -> None:
        """Carry the module out."""
        del vars(self.module)["__getattr__"]
        if self.module.__spec__ is not None:
            self.module.__spec__.loader = self.module.__loader__ = self.loader
        self.loader.exec_module(self.module)
