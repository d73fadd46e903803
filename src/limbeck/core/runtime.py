"""Seeds, devices, threads and ranks: the facts of the machine, decided in one place."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from limbeck.core.errors import EnvironmentFault


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators (all devices)."""
    random.seed(seed)
    torch.manual_seed(seed)


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of its own for each named purpose, stable across machines and Python versions."""
    digest = hashlib.sha256("/".join([str(seed), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def pick_device(name: str = "auto") -> torch.device:
    """Turn a recipe's word into a device. `auto` takes an accelerator when there is one.

    Raises: EnvironmentFault when the device asked for is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        device = accelerator or torch.device("cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise EnvironmentFault(
                f'runtime.device: "{name}" is not a device. Use auto, cpu, cuda, cuda:0 or mps.'
            ) from error
        if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
            raise EnvironmentFault(
                f'runtime.device: "{name}" was asked for but this machine has none. Use auto or cpu.'
            )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def set_threads(count: int | None) -> int:
    """Set torch's threads for CPU work (None leaves the default) and return how many there are."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def rank() -> int:
    """This process's number among those of the run; 0 when there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def start_distributed(device: torch.device) -> bool:
    """Join the process group that torchrun announced through the environment. False when the run is one process."""
    if world_size() == 1:
        return False
    if not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=timedelta(hours=6))
    return True


def stop_distributed() -> None:
    """Leave the process group, if one was joined. What wraps a model for it must be gone by then, see `process_group`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Be one of the processes that torchrun started, if it did, until the block ends.

    A `DistributedDataParallel` that is freed after its group is destroyed can wait for ever (gloo's threads ask for the
    interpreter while it waits for them), and the frames of an error hold one: they are cleared first.
    """
    start_distributed(device)
    try:
        yield
    except BaseException as error:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _forget_locals(error)
        raise
    finally:
        stop_distributed()


def _forget_locals(error: BaseException | None) -> None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def wait_for_all() -> None:
    """Wait until every process of the run is here."""
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()


def agreed(value: int) -> int:
    """The first process's value, on every process. All must call it.

    What a process finds on the disk decides which way it goes, and another may write there between two looks: whoever
    comes late would take another way, and all would wait for each other for ever. Hence one looks and all follow.
    """
    return _together(value, lambda box: torch.distributed.broadcast(box, src=0))


def highest(value: int) -> int:
    """The highest value of any process, on every process. All must call it."""
    return _together(value, lambda box: torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX))


def _together(value: int, exchange: Callable[[torch.Tensor], object]) -> int:
    if world_size() == 1 or not torch.distributed.is_initialized():
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    box = torch.tensor([value], device=device)
    exchange(box)
    return int(box)


class StopRequest:
    """Set by a signal; loops look at it between steps, save, and leave with `exit_code`."""

    exit_code: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop cleanly; a second one stops at once."""
    request = StopRequest()

    def ask(number: int, _frame: object) -> None:
        if request.exit_code is not None:
            raise KeyboardInterrupt
        request.exit_code = 128 + number
        print("stopping after this step; the same command will go on from here (once more to stop at once)", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
