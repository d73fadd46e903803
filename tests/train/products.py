"""Matrix products as torch itself counts them, forth, back and worked out again."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from limbeck.models import metering

_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")


class Products(TorchDispatchMode):
    """Torch's own counts of operations, by kind. Its `FlopCounterMode` cannot look into a gradient taken inside a forward pass."""

    def __init__(self):
        super().__init__()
        self.by_kind = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.by_kind[str(packet)] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out

    @property
    def total(self):
        """Operations of matrix products."""
        return sum(count for kind, count in self.by_kind.items() if kind in _PRODUCTS)


def as_torch_counts(monkeypatch):
    """Let a meter count attention's whole square, and no transforms, as torch does; all else as always."""
    monkeypatch.setattr(metering, "attended_tokens", lambda past, new, window=None: new * (past + new))
    monkeypatch.setattr(metering, "hyena_flops", lambda *args, **options: 0)
