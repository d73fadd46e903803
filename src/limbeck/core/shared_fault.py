"""One message for a fault that all processes of a run meet: rank 0 says it, and the others keep quiet.

What rank 0 says is left in the store that torchrun keeps for its processes, where the others look. A fault of one rank
alone is not there, and so is said by that rank.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

SECONDS = 10.0


def is_said_by_rank_0(message: str, *, rank: int) -> bool:
    """Leave the message for the others (rank 0, which gets False), or look whether rank 0 left the same within `SECONDS`.

    False as well where there is no such store, so that a fault is rather said twice than never.
    """
    with contextlib.suppress(Exception), _unstopped():
        store = _open_store(timedelta(seconds=SECONDS))
        key = f"limbeck/fault/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if rank == 0:
            store.set(key, message)
            return False
        store.wait([key], timedelta(seconds=SECONDS))
        return bool(store.get(key).decode() == message)
    return False


def _open_store(timeout: timedelta) -> Any:
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)


@contextlib.contextmanager
def _unstopped() -> Iterator[None]:
    """torchrun stops all processes once one has ended; what is said, and the exit code, must not depend on who was first."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
