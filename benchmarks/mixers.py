"""Prefill and decode of one mixer: Hyena operators beside the attention layer they replace, same width.

The gate: each mixer's step-by-step outputs equal its parallel ones. Attention decodes with transformers' default cache,
which is copied as it grows, and again with a static one, which is not; ratios are to the default. Times are CPU
time of this process, which other work on the machine disturbs least. Filters are evaluated before the clock starts, as in
any generation after the first token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks._kept import keep
from limbeck.nn.hyena import HyenaOperator

WIDTH, HEADS = 512, 8
STUDENTS: dict[str, dict[str, Any]] = {
    "modal": {"filter": "modal"},
    "explicit": {"filter": "explicit", "filter_options": {"filter_length": 32768}},
    "explicit-1024": {"filter": "explicit", "filter_options": {"filter_length": 1024}},
}
Step = Callable[[Tensor], Tensor]


class Attention:
    """The self-attention of a transformers Llama layer with rotary positions worked out beforehand, as a model does."""

    def __init__(self, longest: int):
        config = LlamaConfig(
            vocab_size=8, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=HEADS,
            max_position_embeddings=longest, attn_implementation="sdpa",
        )  # fmt: skip
        self.config = config
        model = LlamaForCausalLM(config).eval()
        self.layer: nn.Module = model.model.layers[0].self_attn
        self.cos, self.sin = model.model.rotary_emb(torch.zeros(1, 1, WIDTH), torch.arange(longest)[None])

    def prefill(self, hidden_BTD: Tensor) -> Tensor:
        """All tokens at once, without a cache."""
        return self._run(hidden_BTD, first=0, cache=None)

    def begin(self, context: int) -> Step:
        """A step function after `context` tokens: the cache is filled with random keys and values."""
        cache, past = self._cache(context), context
        if context:
            cache.update(*torch.randn(2, 1, HEADS, context, WIDTH // HEADS).unbind(0), 0)

        def step(hidden_BTD: Tensor) -> Tensor:
            nonlocal past
            past += 1
            return self._run(hidden_BTD, first=past - 1, cache=cache)

        return step

    def _cache(self, context: int) -> Cache:
        return DynamicCache()

    def _mask(self, cache: Cache | None, *, tokens: int) -> Tensor | None:
        return None

    def _run(self, hidden_BTD: Tensor, *, first: int, cache: Cache | None) -> Tensor:
        last = first + hidden_BTD.shape[1]
        position_embeddings = self.cos[:, first:last], self.sin[:, first:last]
        mask = self._mask(cache, tokens=last)
        return self.layer(hidden_BTD, position_embeddings, mask, past_key_values=cache)[0]


class StaticAttention(Attention):
    """The same with a cache whose place is set aside beforehand: nothing is copied, unused places are masked."""

    def _cache(self, context: int) -> Cache:
        return StaticCache(self.config, max_cache_len=max(256, context + 128))

    def _mask(self, cache: Cache | None, *, tokens: int) -> Tensor | None:
        if cache is None:
            return None
        return (torch.arange(cache.layers[0].max_cache_len) < tokens)[None, None, None]


class Hyena:
    """A Hyena operator."""

    def __init__(self, options: dict[str, Any]):
        self.operator = HyenaOperator(WIDTH, **options).eval()

    def prefill(self, hidden_BTD: Tensor) -> Tensor:
        """All tokens at once, without a state."""
        return self.operator(hidden_BTD)

    def begin(self, context: int) -> Step:
        """A step function after `context` random tokens."""
        state = self.operator.init_state(1, device="cpu", dtype=torch.float32)
        if context:
            self.operator.advance(torch.randn(1, context, WIDTH), state)
        return lambda hidden_BTD: self.operator.advance(hidden_BTD, state)[0]


def gate(mixers: dict[str, Attention | Hyena]) -> None:
    """Refuse to time what is not right."""
    hidden_BTD = torch.randn(1, 200, WIDTH)
    for name, mixer in mixers.items():
        step = mixer.begin(0)
        stepped = torch.cat([step(hidden_BTD[:, t : t + 1]) for t in range(200)], dim=1)
        worst = float((stepped - mixer.prefill(hidden_BTD)).abs().max())
        if not worst <= 1e-4:
            raise SystemExit(f"{name}: step by step differs from all at once by {worst}")
    print("gate passed: step by step equals all at once, for every mixer")


def decode_microseconds(
    mixers: dict[str, Attention | Hyena], *, context: int, blocks: int
) -> dict[str, dict[str, Any]]:
    """Each mixer's single tokens after a context, in blocks and in turn: median of the blocks' medians, mean, worst."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in mixers}
    for _ in range(blocks):
        for name, mixer in mixers.items():
            taken[name].append(decode_block(mixer, context=context))
    return {
        name: {
            "median": statistics.median(block["median"] for block in own), "mean": statistics.fmean(block["mean"] for block in own),
            "worst": max(block["worst"] for block in own), "tokens": own[0]["tokens"], "blocks": [block["median"] for block in own],
        }
        for name, own in taken.items()
    }  # fmt: skip


def decode_block(mixer: Attention | Hyena, *, context: int) -> dict[str, float]:
    """Median, mean and worst time of single tokens after a context, in microseconds.

    Hyena runs as many tokens as the context has, so that the rare dear steps of the exact long convolution are among
    them; attention, whose steps are alike, runs 64.
    """
    step = mixer.begin(context)
    tokens = torch.randn(64, 1, 1, WIDTH)
    for token in tokens[:8]:
        step(token)
    taken = []
    for index in range(64 if isinstance(mixer, Attention) else context):
        token = tokens[index % 64]
        begun = time.process_time_ns()
        step(token)
        taken.append((time.process_time_ns() - begun) / 1e3)
    return {
        "median": statistics.median(taken),
        "mean": statistics.fmean(taken),
        "worst": max(taken),
        "tokens": len(taken),
    }


def prefill_milliseconds(mixers: dict[str, Attention | Hyena], *, length: int, blocks: int) -> dict[str, list[float]]:
    """Times of the whole layer over a text, in turn; the first of each warms up and is left out."""
    hidden_BTD = torch.randn(1, length, WIDTH)
    taken: dict[str, list[float]] = {name: [] for name in mixers}
    for _ in range(blocks + 1):
        for name, mixer in mixers.items():
            begun = time.process_time_ns()
            mixer.prefill(hidden_BTD)
            taken[name].append((time.process_time_ns() - begun) / 1e6)
    return {name: own[1:] for name, own in taken.items()}


def show(title: str, times: dict[str, dict[int, float]]) -> None:
    """A table by length, each student with its ratio to attention, then where students are slower."""
    lengths = list(times["attention"])
    print(f"\n{title}\n{'':<20}" + "".join(f"{length:>18,}" for length in lengths))
    for name, by_length in times.items():
        cells = [f"{value:,.1f}" for value in by_length.values()]
        if name != "attention":
            ratios = [times["attention"][length] / by_length[length] for length in lengths]
            cells = [f"{cell} (x{ratio:.2f})" for cell, ratio in zip(cells, ratios)]
        print(f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells))
    for name in times:
        slower = [f"{length:,}" for length in lengths if times[name][length] > times["attention"][length]]
        if name != "attention":
            print(
                f"  {name}: "
                + (f"slower than attention at {', '.join(slower)}" if slower else "faster at every length")
            )


def main(arguments: list[str]) -> None:
    """Run the gate, measure, print ratios (x2 = twice as fast as attention), keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mixers", description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--blocks", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="keep the figures in this file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    mixers: dict[str, Attention | Hyena] = {"attention": Attention(max([*chosen.contexts, *chosen.prefill]) + 256)}
    longest = max(chosen.contexts) + 256
    mixers |= {"attention, static": StaticAttention(longest)}
    mixers |= {name: Hyena(options) for name, options in STUDENTS.items()}
    with torch.no_grad():
        gate(mixers)
        by_context = {n: decode_microseconds(mixers, context=n, blocks=chosen.blocks) for n in chosen.contexts}
        reading = {name: mixer for name, mixer in mixers.items() if not isinstance(mixer, StaticAttention)}
        by_length = {n: prefill_milliseconds(reading, length=n, blocks=chosen.blocks) for n in chosen.prefill}
    decode = {name: {n: row[name] for n, row in by_context.items()} for name in mixers}
    blocks = {name: {n: row[name] for n, row in by_length.items()} for name in reading}
    prefill = {name: {n: statistics.median(own) for n, own in row.items()} for name, row in blocks.items()}
    for figure in ("median", "mean", "worst"):
        times = {name: {n: cell[figure] for n, cell in row.items()} for name, row in decode.items()}
        show(f"decode, us a token, {figure}, by context", times)
    show("prefill, ms, by length", prefill)
    results = {"decode_microseconds": decode, "prefill_milliseconds": prefill, "prefill_blocks": blocks}
    keep(chosen.json, {**results, "width": WIDTH, "heads": HEADS})


if __name__ == "__main__":
    main(sys.argv[1:])
