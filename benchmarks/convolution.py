"""The long convolution alone: Limbeck's FFT convolution beside flash-linear-attention's LongConvolution, same filter, same input.

fla (pinned, installed into a folder of its own on first use) is written for GPUs: without triton it cannot be imported, and
triton, a gigabyte, is installed beside it for the attempt. What cannot be run on this machine is kept with its real
error. The gate: both equal the definition, a slow sum in float64, at odd lengths, and each other's outputs and gradients.

Times are CPU time of this process on one thread, medians of single calls in blocks, in turn; forward alone, and forward with backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._kept import keep, spread_of, told
from benchmarks._peers.packages import NotInstalled, environment, last_line, packages_root, private_folder
from limbeck.nn.fftconv import causal_convolution
from limbeck.nn.reference import convolve_slowly

FLA = ["fla-core==0.6.0", "flash-linear-attention==0.6.0", "einops==0.8.2"]
TRITON = ["triton==3.9.0"]
Convolution = Callable[[Tensor, Tensor], Tensor]


def by_limbeck(u_BTC: Tensor, h_CK: Tensor) -> Tensor:
    """What fla's module does, with Limbeck's convolution: tokens in the middle, and the input added."""
    u_BCT = u_BTC.transpose(1, 2)
    return (causal_convolution(u_BCT, h_CK) + u_BCT).transpose(1, 2)


def by_fla(u_BTC: Tensor, h_CK: Tensor) -> Tensor:
    """fla's own module, its filter set to the given one."""
    module = _fla_module(h_CK.shape[0])
    module.filter = h_CK
    return module(u_BTC)


@lru_cache
def _fla_module(channels: int) -> Any:
    """A module whose filter is no parameter any more, so that the gradient of a given one can be asked for."""
    from fla.modules import LongConvolution

    module = LongConvolution(hidden_size=channels, max_len=1)
    del module.filter
    return module


CONVOLUTIONS: dict[str, Convolution] = {"limbeck": by_limbeck, "fla": by_fla}


def gate(names: list[str], *, tolerance: float = 1e-4) -> None:
    """Refuse to time what is not right: outputs equal the definition, gradients equal each other's."""
    for length in (1, 37, 130):
        torch.manual_seed(length)
        u_BTC = torch.randn(2, length, 5, requires_grad=True)
        h_CK = torch.randn(5, length, requires_grad=True)
        expected = (convolve_slowly(u_BTC.transpose(1, 2), h_CK) + u_BTC.transpose(1, 2)).transpose(1, 2)
        weights_BTC = torch.randn(2, length, 5)
        wanted = torch.autograd.grad((expected * weights_BTC).sum(), (u_BTC, h_CK))
        for name in names:
            found = CONVOLUTIONS[name](u_BTC, h_CK)
            gradients = torch.autograd.grad((found * weights_BTC).sum(), (u_BTC, h_CK))
            for got, right in zip((found, *gradients), (expected, *wanted), strict=True):
                worst = float((got - right).abs().max())
                if not worst <= tolerance * max(1.0, float(right.abs().max())):
                    raise SystemExit(f"{name}: {length} tokens: differs from the definition by {worst}")
    print("gate passed: outputs and gradients equal the definition in float64")


def milliseconds(name: str, u_BTC: Tensor, h_CK: Tensor, *, backward: bool) -> float:
    """One call."""
    begun = time.process_time()
    if backward:
        torch.autograd.grad(CONVOLUTIONS[name](u_BTC, h_CK).sum(), (u_BTC, h_CK))
    else:
        with torch.no_grad():
            CONVOLUTIONS[name](u_BTC, h_CK)
    return (time.process_time() - begun) * 1e3


def measure(names: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """By length: milliseconds of each, and fla's time over Limbeck's, block by block."""
    found: dict[str, Any] = {}
    for length in chosen.lengths:
        torch.manual_seed(length)
        u_BTC = torch.randn(chosen.rows, length, chosen.channels, requires_grad=True)
        h_CK = torch.randn(chosen.channels, length, requires_grad=True)
        cell: dict[str, Any] = {}
        for kind, backward in (("forward", False), ("forward and backward", True)):
            blocks: dict[str, list[float]] = {name: [] for name in names}
            for number in range(chosen.blocks + 1):
                taken: dict[str, list[float]] = {name: [] for name in names}
                for _ in range(chosen.calls):
                    for name in names if number % 2 else reversed(names):
                        taken[name].append(milliseconds(name, u_BTC, h_CK, backward=backward))
                for name in names if number else ():
                    blocks[name].append(statistics.median(taken[name]))
            cell[kind] = {"milliseconds": {name: spread_of(own) for name, own in blocks.items()}}
            if "fla" in names:
                ratios = [other / own for own, other in zip(blocks["limbeck"], blocks["fla"], strict=True)]
                cell[kind]["speed"] = spread_of(ratios)
        found[str(length)] = cell
    return found


def attempts(chosen: argparse.Namespace, fla: Path, triton: Path | None) -> dict[str, str]:
    """What each part of fla says when it is run here: 'runs', or its own error."""
    tries = {
        "import without triton": (fla, "import fla.modules"),
        "LongConvolution": (triton, "from fla.modules import LongConvolution as C; C(8, 64)(torch.randn(1, 64, 8))"),
        "ShortConvolution": (triton, "from fla.modules import ShortConvolution as C; C(8, 4)(torch.randn(1, 64, 8))"),
    }
    found = {}
    for name, (folder, code) in tries.items():
        if folder is None:
            found[name] = "not tried: triton could not be installed"
            continue
        places = _places(fla, folder, threads=chosen.threads)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import torch; {code}"], env=places, capture_output=True, text=True, check=False
        )  # fmt: skip
        found[name] = "runs" if done.returncode == 0 else last_line(done.stderr)
        print(f"fla, {name}: {found[name]}", flush=True)
    return found


def _places(fla: Path, other: Path, *, threads: int) -> dict[str, str]:
    """The environment with fla's folder, and triton's where that is another one."""
    found = environment(fla, threads=threads)
    if other != fla:
        found["PYTHONPATH"] = f"{other}:{found['PYTHONPATH']}"
    return found


def install(chosen: argparse.Namespace) -> tuple[Path | None, Path | None, str | None]:
    """(fla's folder, triton's folder, why one of them is missing)."""
    root = chosen.packages or packages_root()
    fla = None
    try:
        fla = private_folder("fla-0.6.0", FLA, root=root)
        return fla, private_folder("triton", TRITON, root=root), None
    except NotInstalled as error:
        return fla, None, str(error)


def main(arguments: list[str]) -> None:
    """Try fla, run the gate, measure, print ratios (x2 = Limbeck twice as fast), keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks convolution", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--calls", type=int, default=5, help="calls of each in a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--packages", type=Path, default=None, help=f"folder for fla (default: {packages_root()})")
    parser.add_argument("--without-fla", action="store_true", help="install nothing, measure Limbeck's alone")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.inside:
        names = list(CONVOLUTIONS)
        gate(names)
        print(json.dumps(measure(names, chosen)))
        return
    words = {word: getattr(chosen, word) for word in ("rows", "channels", "calls", "blocks", "threads")}
    results: dict[str, Any] = {**words, "packages": [*FLA, *TRITON]}
    fla, triton, missing = (None, None, "not asked for") if chosen.without_fla else install(chosen)
    tried = attempts(chosen, fla, triton) if fla is not None else {}
    results["attempts"] = tried
    if tried.get("LongConvolution") == "runs":
        assert fla is not None
        assert triton is not None
        inner = [sys.executable, "-W", "ignore", "-m", "benchmarks.convolution", "--inside", *arguments]
        done = subprocess.run(
            inner, env=_places(fla, triton, threads=chosen.threads), stdout=subprocess.PIPE, text=True, check=True
        )
        print("\n".join(done.stdout.splitlines()[:-1]))
        results["lengths"] = json.loads(done.stdout.splitlines()[-1])
    else:
        results["not_run"] = missing or tried["LongConvolution"]
        print(f"fla: not run here: {results['not_run']}")
        gate(["limbeck"])
        results["lengths"] = measure(["limbeck"], chosen)
    for length, cell in results["lengths"].items():
        for kind, own in cell.items():
            times = ", ".join(f"{name} {spread['median']:.2f} ms" for name, spread in own["milliseconds"].items())
            print(f"{int(length):>7,} tokens, {kind:<21} {times}   {told(own['speed']) if 'speed' in own else ''}")
    keep(chosen.json, results)


if __name__ == "__main__":
    main(sys.argv[1:])
