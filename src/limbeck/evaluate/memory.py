"""How much memory a piece of work takes: a cache's tensors, and the highest use while it runs."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESIDENT_PAGES = Path("/proc/self/statm")
SAMPLING_SECONDS = 0.001


@dataclass
class MemoryWatch:
    """The highest memory use above the start, known when the `with` block has ended, and how it was found.

    lap(), within the block: the highest use since the last lap, above the block's start; None where it cannot be told.
    """

    method: str
    peak_bytes: int | None = None
    lap: Callable[[], int | None] = lambda: None


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors held by a cache object, whatever its kind, each counted once.

    Walks attributes, sequences and mappings; modules are left out, since their weights belong to the model.
    """
    seen: set[int] = set()
    total = 0
    waiting = [cache]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (nn.Module, str, bytes, int, float, type, torch.dtype, torch.device)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        else:
            waiting += getattr(item, "__dict__", {}).values()
            waiting += [getattr(item, name, None) for name in getattr(type(item), "__slots__", ())]
    return total


@contextmanager
def watch_memory(device: torch.device) -> Iterator[MemoryWatch]:
    """Measure the peak memory of the `with` block above its start.

    On CUDA the allocator's own count; on a CPU the resident set, sampled every millisecond by a helper thread (free
    pages are given back to the system first where glibc can do so), or the process's high-water mark where there is
    no /proc. The CPU figures miss what fits into pages the process already held, so small ones are too low.
    """
    if device.type == "cuda":
        watcher = _watch_cuda(device)
    elif device.type == "cpu":
        watcher = _watch_resident() if RESIDENT_PAGES.exists() else _watch_high_water(device)
    else:
        watcher = _watch_nothing(device)
    with watcher as watch:
        yield watch


@contextmanager
def _watch_nothing(device: torch.device) -> Iterator[MemoryWatch]:
    yield MemoryWatch(f"not measured on {device.type}")


@contextmanager
def _watch_cuda(device: torch.device) -> Iterator[MemoryWatch]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    laps: list[int] = []

    def lap() -> int:
        torch.cuda.synchronize(device)
        laps.append(torch.cuda.max_memory_allocated(device) - start)
        torch.cuda.reset_peak_memory_stats(device)
        return laps[-1]

    watch = MemoryWatch("CUDA allocator, above the start", lap=lap)
    yield watch
    lap()
    watch.peak_bytes = max(laps)


@contextmanager
def _watch_resident() -> Iterator[MemoryWatch]:
    _give_free_pages_back()
    start = highest = _resident_bytes()
    laps: list[int] = []
    done, lock = threading.Event(), threading.Lock()

    def sample() -> None:
        nonlocal highest
        while not done.wait(SAMPLING_SECONDS):
            with lock:
                highest = max(highest, _resident_bytes())

    def lap() -> int:
        nonlocal highest
        with lock:
            now = _resident_bytes()
            laps.append(max(highest, now) - start)
            highest = now
        return laps[-1]

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    watch = MemoryWatch("resident set, sampled every millisecond, above the start", lap=lap)
    try:
        yield watch
    finally:
        lap()
        done.set()
        thread.join()
    watch.peak_bytes = max(laps)


@contextmanager
def _watch_high_water(device: torch.device) -> Iterator[MemoryWatch]:
    try:
        import resource
    except ImportError:
        yield MemoryWatch(f"not measured on {device.type} of this system")
        return
    unit = 1 if sys.platform == "darwin" else 1024
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch = MemoryWatch("rise of the process's high-water mark (0 when an earlier step took more)")
    yield watch
    watch.peak_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * unit


def _resident_bytes() -> int:
    return int(RESIDENT_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_free_pages_back() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
