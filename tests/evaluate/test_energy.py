"""Energy counters on folders made up to look like a machine's."""

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from limbeck.evaluate import energy
from limbeck.evaluate.energy import EnergyMeter, find_meter, find_nvml, find_rapl, measure


def zone(folder, name, called, microjoules, *, top=1000_000_000):
    place = folder / name
    place.mkdir()
    (place / "name").write_text(f"{called}\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{top}\n")
    return place


def test_packages_and_memory_are_added_and_what_is_in_them_is_not(tmp_path):
    places = [zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", 5_000_000) for n in (0, 1)]
    places.append(zone(tmp_path, "intel-rapl:0:1", "dram", 1_000_000))
    for number, called in enumerate(("core", "uncore")):
        zone(tmp_path, f"intel-rapl:0:{number + 2}", called, 9_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 9_000_000)
    (tmp_path / "intel-rapl").mkdir()
    meter = find_rapl(tmp_path)
    assert meter.method.startswith("RAPL: package-0, dram, package-1;")
    start = meter.read()
    assert sorted(start) == [1.0, 5.0, 5.0]
    for place in places:
        (place / "energy_uj").write_text("8000000")
    assert meter.joules(start, meter.read()) == pytest.approx(3 + 3 + 7)


def test_a_counter_that_goes_round_is_followed(tmp_path):
    place = zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000, top=1000_000_000)
    meter = find_rapl(tmp_path)
    start = meter.read()
    (place / "energy_uj").write_text("2000000")
    assert meter.joules(start, meter.read()) == pytest.approx(1 + 2)
    assert meter.joules(start, start) == 0
    assert meter.longest_seconds == 1.0


def test_a_machine_without_counters_says_so(tmp_path):
    assert energy.NOT_REPORTED in find_rapl(tmp_path)
    assert energy.NOT_REPORTED in find_rapl(tmp_path / "nowhere")
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert "shows no energy counter" in find_rapl(tmp_path)
    assert energy.NOT_REPORTED in find_meter(torch.device("meta"))


def test_a_counter_that_may_not_be_read_says_what_to_do(tmp_path, monkeypatch):
    place = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    plain = Path.read_text

    def guarded(self, *args, **options):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", guarded)
    reason = find_rapl(tmp_path)
    assert str(place / "energy_uj") in reason
    assert "chmod a+r" in reason


@pytest.mark.parametrize("content", ["", "many"])
def test_a_counter_that_makes_no_sense_is_no_counter(tmp_path, content):
    place = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (place / "energy_uj").write_text(content)
    assert "cannot be read" in find_rapl(tmp_path)


def metered(values, *, top=100.0, shortest=0.5):
    left = iter(values)
    return EnergyMeter("made up", lambda: [next(left)], [top], shortest)


def ticking(*times):
    left = iter(times)
    return lambda: next(left)


def test_work_is_measured_from_end_to_end():
    done = []
    found = measure(metered([3.0, 9.0], top=10_000.0), lambda: done.append(1), clock=ticking(10.0, 12.0))
    assert (found.joules, found.note, done) == (6.0, "", [1])


def test_what_the_counter_cannot_tell_gets_no_figure():
    short = measure(metered([3.0, 9.0]), lambda: None, clock=ticking(0.0, 0.4))
    assert short.joules is None
    assert "too short" in short.note
    long = measure(metered([3.0, 9.0], top=1000.0), lambda: None, clock=ticking(0.0, 1.1))
    assert long.joules is None
    assert "more than once" in long.note


def fake_nvml(monkeypatch, *, fault=None):
    class NVMLError(Exception):
        pass

    spent = iter([5_000, 12_500])
    asked = []

    def total(handle):
        if fault:
            raise NVMLError(fault)
        asked.append(handle)
        return 5_000 if len(asked) == 1 else next(spent)

    module = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="1-2-3"))
    return asked


def test_a_card_is_asked_by_its_own_name(monkeypatch):
    asked = fake_nvml(monkeypatch)
    meter = find_meter(torch.device("cuda", 0))
    start = meter.read()
    assert meter.joules(start, meter.read()) == pytest.approx(7.5)
    assert set(asked) == {"GPU-1-2-3"}
    assert meter.longest_seconds is None


def test_a_card_that_reports_nothing_says_so(monkeypatch):
    fake_nvml(monkeypatch, fault="Not Supported")
    assert "NVML: Not Supported" in find_nvml(torch.device("cuda", 0))


def test_without_the_package_its_name_is_given(monkeypatch):
    plain = builtins.__import__

    def guarded(name, *args, **options):
        if name == "pynvml":
            raise ImportError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert "nvidia-ml-py" in find_nvml(torch.device("cuda", 0))
