"""What each benchmark comes down to: ratios with their range, read from the results that it kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._kept import spread_of

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Headline:
    """One ratio. `more_is_better`: above 1 Limbeck's side wins; else below 1. ratio None: not run, `note` says why.

    low, high: the range over blocks and runs, None where one figure is all there is. is_main: belongs into the short table.
    """

    what: str
    ratio: float | None
    low: float | None = None
    high: float | None = None
    blocks: int = 1
    more_is_better: bool = True
    is_main: bool = False
    note: str = ""

    @property
    def has_range(self) -> bool:
        """Whether it was measured more than once."""
        return self.low is not None and self.blocks > 1

    def told(self) -> str:
        """The ratio as a person reads it."""
        if self.ratio is None:
            return f"not run: {self.note}"
        return f"x{self.ratio:.2f}" + (f" ({self.low:.2f} to {self.high:.2f})" if self.has_range else "")

    def agrees_with(self, other: Headline, *, margin: float = 0.05, single_margin: float = 0.10) -> bool:
        """Whether two measurements are the same within what they say of themselves.

        True when one median lies in the other's range, or the medians differ by no more than `margin` of the ratio, which is never
        called a difference; by `single_margin` where one of them is a single figure (peak memory of one process differs by some
        per cent from the next).
        """
        if self.ratio is None or other.ratio is None:
            return self.ratio is other.ratio
        if self._holds(other.ratio) or other._holds(self.ratio):
            return True
        allowed = margin if self.has_range and other.has_range else single_margin
        return abs(self.ratio - other.ratio) <= allowed * abs(self.ratio)

    def _holds(self, ratio: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= ratio <= self.high


@dataclass(frozen=True)
class Kept:
    """One file of results: under what it was measured, and its headlines. `problem`: why there are none."""

    name: str
    file: str
    circumstances: dict[str, Any]
    headlines: list[Headline]
    problem: str = ""

    @property
    def command(self) -> str:
        """What a person types to measure it again."""
        return str(self.circumstances.get("command", f"python -m benchmarks {self.name}"))


def _of(what: str, spread: dict[str, Any], **rest: Any) -> Headline:
    return Headline(what, spread["median"], spread["low"], spread["high"], len(spread["blocks"]), **rest)


def _single(what: str, ratio: float, **rest: Any) -> Headline:
    return Headline(what, ratio, **rest)


def peers(results: dict[str, Any]) -> Iterator[Headline]:
    """Speed and memory against each contender, by size of the vocabulary."""
    for vocabulary, found in results["sizes"].items():
        size = f"vocabulary {int(vocabulary):,}"
        for name, ratios in found["ratios"].items():
            yield _of(f"training, tokens a second against {name}, {size}", ratios["speed"], is_main=True)
            if "memory" in ratios:
                what = f"training, peak memory against {name}, {size}"
                yield _of(what, ratios["memory"], more_is_better=False, is_main=True)
        for name, reason in found["not_run"].items():
            yield Headline(f"training against {name}, {size}", None, note=reason)


def step_overhead(results: dict[str, Any]) -> Iterator[Headline]:
    """Speed and memory of one step against the loop by hand."""
    for vocabulary in (key for key in results if key.isdigit()):
        ratios, size = results[vocabulary]["ratios"], f"vocabulary {int(vocabulary):,}"
        yield _of(f"the loss alone, tokens a CPU second against a loop by hand, {size}", ratios["speed"])
        yield _of(f"the loss alone, peak memory against a loop by hand, {size}", ratios["memory"], more_is_better=False)


def whole_model(results: dict[str, Any]) -> Iterator[Headline]:
    """Prefill, decode and cache of whole models against attention with either cache, by length."""
    lengths = [length for length, ratios in results["ratios"].items() if any(ratios.values())]
    shown = {lengths[0], lengths[len(lengths) // 2], lengths[-1]}
    for length in lengths:
        for student, against in results["ratios"][length].items():
            for baseline, own in against.items():
                main = length in shown and student == "modal"
                for figure in ("prefill", "decode"):
                    what = f"{figure}, {student} Hyena model against {baseline}, {int(length):,} tokens"
                    yield _of(what, own[figure], is_main=main and (figure == "decode" or baseline == "attention"))
                what = f"cache, {student} Hyena model against {baseline}, {int(length):,} tokens"
                yield _single(what, own["cache"], more_is_better=False)


def mixers(results: dict[str, Any]) -> Iterator[Headline]:
    """Decode and prefill of the mixer alone."""
    decode, prefill = results["decode_microseconds"], results["prefill_blocks"]
    longest = list(decode["attention"])[-1]
    for baseline in ("attention", "attention, static"):
        for name in (name for name in decode if not name.startswith("attention")):
            for context, own in decode[name].items():
                pairs = zip(decode[baseline][context]["blocks"], own["blocks"], strict=True)
                what = f"decode, {name} mixer against {baseline}{'' if 'static' in baseline else ', default cache'}, {int(context):,} tokens"
                yield _of(what, spread_of([a / b for a, b in pairs]), is_main=name == "modal" and context == longest)
    for name in (name for name in prefill if name != "attention"):
        for length, own in prefill[name].items():
            ratios = [a / b for a, b in zip(prefill["attention"][length], own, strict=True)]
            yield _of(f"prefill, {name} mixer against attention, {int(length):,} tokens", spread_of(ratios))


def convolution(results: dict[str, Any]) -> Iterator[Headline]:
    """The long convolution against fla's."""
    for length, cell in results["lengths"].items():
        for kind, own in cell.items():
            if "speed" in own:
                what = f"long convolution, {kind}, against fla's LongConvolution, {int(length):,} tokens"
                yield _of(what, own["speed"], is_main=kind != "forward")
    if "not_run" in results:
        yield Headline("long convolution against fla's LongConvolution", None, note=results["not_run"])
    reason = results["attempts"].get("ShortConvolution", "runs")
    if reason != "runs":
        yield Headline("short convolution against fla's ShortConvolution", None, note=reason)


def store_capture(results: dict[str, Any]) -> Iterator[Headline]:
    """Capturing against the bare forward pass."""
    ratios = [one["capture_tokens_per_second"] / one["bare_tokens_per_second"] for one in results["rounds"]]
    yield _of("writing a teacher down, tokens a second against its bare forward pass", spread_of(ratios), is_main=True)


def tiny_speed(results: dict[str, Any]) -> Iterator[Headline]:
    """Bytes a second of byte models against token models of the same size; medians alone are kept."""
    presets = results["presets"]
    for size in sorted({name.split("-")[1] for name in presets}, key=lambda name: int(name.rstrip("m"))):
        if {f"bytepool-{size}", f"bpe-{size}"} <= set(presets):
            for figure in ("write", "read"):
                key = f"{figure}_bytes_per_second"
                ratio = presets[f"bytepool-{size}"][key] / presets[f"bpe-{size}"][key]
                yield _single(f"bytes a second, {figure}, bytepool-{size} against bpe-{size}", ratio)


def byte_pool(results: dict[str, Any]) -> Iterator[Headline]:
    """Bits per byte against tokens, paired by seed."""
    models = results["models"]
    own = models["bytes space"]["bits_per_byte"]
    for name in (name for name in models if name.startswith("bpe")):
        ratios = [a / b for a, b in zip(own, models[name]["bits_per_byte"], strict=True)]
        yield _of(f"bits per byte, a byte model against {name}, by seed", spread_of(ratios), more_is_better=False)


def trie_distillation(results: dict[str, Any]) -> Iterator[Headline]:
    """Bits per byte with a teacher against the text alone, paired by seed."""
    control = results["bits_per_byte"]["control"]
    for name, own in results["bits_per_byte"].items():
        if name != "control" and len(own) == len(control):
            ratios = [a / b for a, b in zip(own, control, strict=True)]
            what = f"bits per byte, taught through the trie ({name}) against the text alone, by seed"
            yield _of(what, spread_of(ratios), more_is_better=False)


def cross_tokenizer(results: dict[str, Any]) -> Iterator[Headline]:
    """Bits per byte with a teacher of other tokens against the text alone; one seed."""
    for name in results["weights"]:
        ratio = results[name]["bits_per_byte"] / results["control"]["bits_per_byte"]
        yield _single(f"bits per byte, {name} from other tokens against the text alone", ratio, more_is_better=False)


HEADLINES: dict[str, Callable[[dict[str, Any]], Iterator[Headline]]] = {
    "peers": peers,
    "step_overhead": step_overhead,
    "whole_model": whole_model,
    "mixers": mixers,
    "convolution": convolution,
    "store_capture": store_capture,
    "tiny_speed": tiny_speed,
    "byte_pool": byte_pool,
    "trie_distillation": trie_distillation,
    "cross_tokenizer": cross_tokenizer,
}


def name_of(path: Path) -> str | None:
    """The benchmark that a file of results belongs to: the longest name that its own begins with."""
    stem = path.stem.replace("-", "_")
    return max((name for name in HEADLINES if stem.startswith(name)), key=len, default=None)


def read_kept(path: Path) -> Kept | None:
    """One file's headlines; None for a file of a benchmark that gives no ratios."""
    name = name_of(path)
    if name is None:
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Kept(name, path.name, data["circumstances"], list(HEADLINES[name](data["results"])))
    except (KeyError, TypeError, IndexError):
        problem = "kept by an older form of this benchmark: measure it again"
        return Kept(name, path.name, data.get("circumstances", {}), [], problem)
