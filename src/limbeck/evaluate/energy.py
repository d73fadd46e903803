"""Energy as the machine itself reports it: Linux's power capping (RAPL) for processors, NVML for NVIDIA cards.

Both are counters that only go up, of everything the processor or the card did meanwhile, other programs included. Where
there is no counter, or it may not be read, there is no figure: nothing is estimated here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
NOT_REPORTED = "not reported by this machine"
# A counter that steps every millisecond or so is read to a few per cent over this time.
_RAPL_SHORTEST_SECONDS = 0.05
# NVML's counter steps ten to fifty times a second.
_NVML_SHORTEST_SECONDS = 0.5
# More than a processor can draw: in less time than this takes to fill its range, a counter wraps once at most.
_MOST_WATTS = 1000.0


@dataclass(frozen=True)
class EnergyMeter:
    """Counters of joules that are read together.

    read: the counters now, in joules. ranges: where each goes back to zero (None: it does not). shortest_seconds: over
    less than this the counters are too coarse.
    """

    method: str
    read: Callable[[], list[float]]
    ranges: list[float | None]
    shortest_seconds: float

    @property
    def longest_seconds(self) -> float | None:
        """Over more than this a counter might have gone round twice."""
        ranges = [one for one in self.ranges if one is not None]
        return min(ranges) / _MOST_WATTS if ranges else None

    def joules(self, start: list[float], end: list[float]) -> float:
        """What was spent between two readings; a counter that went back to zero between them has gone round once."""
        total = 0.0
        for before, after, top in zip(start, end, self.ranges, strict=True):
            total += after - before if after >= before or top is None else after + top - before
        return total


@dataclass(frozen=True)
class Energy:
    """What some work took; None with the reason in `note` when it cannot be told."""

    joules: float | None
    note: str = ""


def find_meter(device: torch.device) -> EnergyMeter | str:
    """The counter of what a device spends, or why there is none, in words."""
    if device.type == "cpu":
        return find_rapl()
    if device.type == "cuda":
        return find_nvml(device)
    return f"{NOT_REPORTED} (no counter is known for {device.type})"


def find_rapl(folder: Path = POWERCAP) -> EnergyMeter | str:
    """The processors' packages and, where they are apart, their memory, as Linux shows them.

    Parts of a package (core, uncore) are in its figure already, and a platform's total (psys) holds the packages, so
    neither is added.
    """
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _name(zone).startswith(("package", "dram"))]
    if not any(_name(zone).startswith("package") for zone in zones):
        return f"{NOT_REPORTED} (it shows no energy counter of a processor under {folder})"
    try:
        ranges: list[float | None] = [_microjoules(zone / "max_energy_range_uj") for zone in zones]
        read = [zone / "energy_uj" for zone in zones]
        meter = EnergyMeter(
            f"RAPL: {', '.join(_name(zone) for zone in zones)}; everything that ran on them meanwhile",
            lambda: [_microjoules(file) for file in read], ranges, _RAPL_SHORTEST_SECONDS,
        )  # fmt: skip
        meter.read()
    except PermissionError as error:
        return (
            f"{NOT_REPORTED} to this user ({error.filename or folder} may not be read: an administrator can allow it with "
            f"chmod a+r on each energy_uj, or run this as root)"
        )
    except (OSError, ValueError) as error:
        return f"{NOT_REPORTED} (its counter cannot be read: {error})"
    return meter


def find_nvml(device: torch.device) -> EnergyMeter | str:
    """The total energy counter of an NVIDIA card (Volta and newer), through nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return f"{NOT_REPORTED} (an NVIDIA card may do so: pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        meter = EnergyMeter(
            "NVML: the whole card, whatever ran on it meanwhile; the processor is not in it",
            lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000], [None], _NVML_SHORTEST_SECONDS,
        )  # fmt: skip
        meter.read()
    except (pynvml.NVMLError, AttributeError) as error:
        return f"{NOT_REPORTED} (NVML: {error})"
    return meter


def measure(meter: EnergyMeter, work: Callable[[], Any], *, clock: Callable[[], float] = time.perf_counter) -> Energy:
    """What a piece of work takes once, measured around the whole of it. `clock` must wait for the device."""
    begun, start = clock(), meter.read()
    work()
    seconds = clock() - begun
    joules = meter.joules(start, meter.read())
    if seconds < meter.shortest_seconds:
        return Energy(None, f"{seconds:.3g} s is too short for the counter, which needs {meter.shortest_seconds:g} s")
    if meter.longest_seconds is not None and seconds > meter.longest_seconds:
        return Energy(
            None,
            f"in {seconds:.0f} s the counter may have gone round more than once ({meter.longest_seconds:.0f} s at most)",
        )
    return Energy(joules)


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6
