"""What each option of the small models' recipe is worth: one changed at a time, beside the base's spread over seeds.

A small model of bytes and a small BPE model, each with the shipped recipe (Muon, warm-up/stable/decay, ReLU^2, norms of
queries and keys, zero-init, soft cap, residual scalars, cautious decay); then each option taken away or added. The text is
read several times when `--train-bytes` exceeds it, as dropout is meant for. All read the same bytes in as many updates;
parameters and operations stand beside the figures, since sharing weights changes them. The gate: every variant is causal
and step by step equals one pass.

    python -m benchmarks tiny_ablation --train train.txt --valid valid.txt
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import _tiny as tiny
from benchmarks._kept import keep
from benchmarks.byte_pool import BPE, BYTE_POOL, QUICK
from limbeck.core.errors import unknown_name
from limbeck.models.tokenizers import encoder
from limbeck.train.stages import DropoutSchedule

QUICK_TRUNK = {"width": 32, "layers": 4, "heads": 1, "feed_forward": 48}
# Small enough that all of it takes half an hour on one core.
SMALL: dict[str, Any] = {"local_width": 64, "local_heads": 2, "local_feed_forward": 256, "ngram_rows": 2048}
SMALL_TRUNK = {"width": 128, "layers": 4, "heads": 2, "feed_forward": 512}
KINDS = ("bytes", "bpe")


@dataclass(frozen=True)
class Variant:
    """What differs from the base: in the trunk, in the configuration (of bytes alone: `local`), in the stage, in packing."""

    trunk: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    packing: str = "stream"
    kinds: tuple[str, ...] = KINDS
    narrower: bool = False

    def of(self, config: dict[str, Any], kind: str) -> dict[str, Any]:
        """The configuration changed. narrower: a gated feed-forward has three matrices, so each is two thirds as wide."""
        local = self.local if kind == "bytes" else {}
        changed = config | self.config | local
        if self.narrower:
            changed = tiny.with_trunk(changed, feed_forward=_two_thirds(config["trunk"]["feed_forward"]))
            if kind == "bytes":
                changed["local_feed_forward"] = _two_thirds(config["local_feed_forward"])
        trunk = dict(self.trunk)
        if "mixers" in trunk:
            trunk["mixers"] = trunk["mixers"] * config["trunk"]["layers"]
        return tiny.with_trunk(changed, **trunk)


def _two_thirds(width: int) -> int:
    return max(8, round(width * 2 / 3 / 8) * 8)


VARIANTS: dict[str, Variant] = {
    "base": Variant(),
    "adamw": Variant(stage={"optimizer": "adamw"}),
    "cosine": Variant(stage={"schedule": "cosine"}),
    "swiglu": Variant(trunk={"activation": "swiglu"}, local={"local_activation": "swiglu"}, narrower=True),
    "no qk-norm": Variant(trunk={"qk_norm": False}, local={"qk_norm": False}),
    "no zero-init": Variant(trunk={"zero_init": False}, local={"zero_init": False}),
    "no soft cap": Variant(config={"logit_softcap": None}),
    "no residual scalars": Variant(trunk={"residual_scalars": False}),
    "moving average": Variant(stage={"ema_decay": 0.99}),
    "plain decay": Variant(stage={"cautious_decay": False}),
    "constant decay": Variant(stage={"decay_schedule": "constant"}),
    "embedding rate x3": Variant(stage={"embedding_learning_rate": 3e-2}),
    "scalar rate x3": Variant(stage={"scalar_learning_rate": 3e-2}),
    "dropout 0.1": Variant(stage={"dropout": 0.1}),
    "early dropout": Variant(stage={"dropout": DropoutSchedule("linear", start=0.1, end=0.0)}),
    "triangular dropout": Variant(stage={"dropout": DropoutSchedule("triangular", start=0.0, end=0.1)}),
    "length curriculum": Variant(stage={"length_curriculum": ((0.2, 4), (0.2, 2))}),
    "patch curriculum": Variant(stage={"patch_curriculum": ((0.2, 4), (0.2, 8))}, kinds=("bytes",)),
    "packed documents": Variant(packing="documents"),
    "untied head": Variant(config={"tie_embeddings": False}, kinds=("bpe",)),
    "one feed-forward inside": Variant(trunk={"share_feed_forward": "interior"}),
    "one feed-forward": Variant(trunk={"share_feed_forward": "all"}),
    "one attention output inside": Variant(trunk={"share_mixers": "output"}),
    "one block inside": Variant(trunk={"share_feed_forward": "interior", "share_mixers": "all"}),
    "one block inside, deltas": Variant(
        trunk={"share_feed_forward": "interior", "share_mixers": "all", "delta_rank": 8}
    ),
    "every block twice": Variant(trunk={"repeat": 2}),
    "two layers looped": Variant(trunk={"loop": [1, 2, 2]}),
    "hyena trunk": Variant(trunk={"mixers": ["hyena"]}),
    "pool max": Variant(local={"pool": "max"}, kinds=("bytes",)),
    "pool last": Variant(local={"pool": "last"}, kinds=("bytes",)),
    "pool attention": Variant(local={"pool": "attention"}, kinds=("bytes",)),
    "no hashed n-grams": Variant(local={"ngram_rows": 0}, kinds=("bytes",)),
    "one prefix slot": Variant(local={"prefix_slots": 1}, kinds=("bytes",)),
    "four prefix slots": Variant(local={"prefix_slots": 4}, kinds=("bytes",)),
}


def options(arguments: list[str]) -> argparse.Namespace:
    """The options, with a test's sizes for --quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tiny_ablation", description=__doc__)
    tiny.add_options(parser, folder="bench-ablation")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--variants", nargs="+", metavar="NAME", default=list(VARIANTS), help="default: all")
    parser.add_argument(
        "--variant-seeds", type=int, nargs="+", default=[0], help="of --seeds, which the base has all of"
    )
    parser.add_argument("--train-bytes", type=int, default=400_000, help="bytes each model reads")
    parser.add_argument("--text-bytes", type=int, default=0, help="distinct bytes of training text; 0: all of it")
    parser.add_argument("--batch-bytes", type=int, default=2048)
    parser.add_argument("--context-bytes", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--segmenter", default="space")
    chosen = parser.parse_args(arguments)
    for name in chosen.variants:
        if name not in VARIANTS:
            parser.error(unknown_name("variant", name, VARIANTS))
    if not set(chosen.variant_seeds) <= set(chosen.seeds):
        parser.error("--variant-seeds must be among --seeds: variants are compared with the base of their own seed")
    if chosen.quick:
        chosen.train_bytes, chosen.batch_bytes, chosen.context_bytes, chosen.vocab_size = 2048, 1024, 256, 300
        chosen.valid_bytes, chosen.seeds = 1024, chosen.seeds[:2]
    return chosen


def base_models(chosen: argparse.Namespace, text: tiny.Text) -> dict[str, tuple[dict[str, Any], Any]]:
    """Configuration and tokenizer of each kind."""
    found: dict[str, tuple[dict[str, Any], Any]] = {}
    if "bytes" in chosen.kinds:
        tokenizer = tiny.byte_tokenizer(chosen.segmenter, text, chosen.folder, vocab_size=chosen.vocab_size)
        patch = {"mean_patch_bytes": 1 / (tiny.tokens_per_byte(tokenizer, text.valid) - 1)}
        config = BYTE_POOL | (QUICK | {"trunk": QUICK_TRUNK} if chosen.quick else SMALL | {"trunk": SMALL_TRUNK})
        found["bytes"] = config | patch, tokenizer
    if "bpe" in chosen.kinds:
        tokenizer = tiny.bpe_tokenizer(text, chosen.folder, vocab_size=chosen.vocab_size)
        config = BPE | {"trunk": QUICK_TRUNK if chosen.quick else SMALL_TRUNK}
        found["bpe"] = config | {"vocab_size": len(tokenizer)}, tokenizer
    return found


def gate(models: dict[str, tuple[dict[str, Any], Any]], text: tiny.Text, names: list[str]) -> None:
    """Refuse to compare what is not right."""
    for kind, (config, tokenizer) in models.items():
        tiny.check_lossless(tokenizer, text.valid[:20])
        ids = torch.tensor([encoder(tokenizer)([text.valid[0]])[0][:32]])
        checked = {}
        for name in names:
            if kind in VARIANTS[name].kinds:
                changed = VARIANTS[name].of(config, kind)
                checked[str(changed)] = changed
        for changed in checked.values():
            tiny.check_causal_and_cached(tiny.new_model(changed, seed=0, device="cpu"), ids)
        print(f"gate: {kind}: {len(checked)} shapes are causal, step by step equals one pass")


def main(arguments: list[str]) -> None:
    """Train the base under every seed and each variant; print; keep."""
    chosen = options(arguments)
    tiny.begin(chosen)
    text = tiny.open_text(chosen)
    if chosen.text_bytes and not chosen.quick:
        text = tiny.Text(
            tiny.first_part(text.train, chosen.folder / "text.jsonl", max_bytes=chosen.text_bytes), text.valid
        )
    models = base_models(chosen, text)
    names = ["base", *(name for name in chosen.variants if name != "base")]
    gate(models, text, names)
    passing = {"folder", "threads", "json", "device", "seeds", "variants", "variant_seeds", "kinds"}
    settings = {key: value for key, value in vars(chosen).items() if key not in passing}
    figures = tiny.Figures(chosen.folder, settings)
    plan = [("base", seed) for seed in chosen.seeds]
    plan += [(name, seed) for seed in chosen.variant_seeds for name in names if name != "base"]
    for kind in models:
        for name, seed in plan:
            if kind in VARIANTS[name].kinds:
                run = figures.get(_key(kind, name, seed), _train, kind, name, seed, models, text, chosen)
                print(f"{kind}, {name}, seed {seed}: {run['bits_per_byte']:.4f} bits per byte, {run['seconds']:.0f} s")
    results = {kind: table(figures.runs, kind, names, chosen) for kind in models}
    show(results)
    keep(chosen.json, {"settings": settings, **results, "runs": figures.runs})


def _key(kind: str, name: str, seed: int) -> str:
    return f"{kind} / {name} / {seed}"


def _train(
    kind: str, name: str, seed: int, models: dict[str, Any], text: tiny.Text, chosen: argparse.Namespace
) -> dict[str, Any]:
    config, tokenizer = models[kind]
    variant = VARIANTS[name]
    job = tiny.Job(
        f"{kind}-{name}".replace(" ", "-").replace(",", ""), variant.of(config, kind), tokenizer,
        train_bytes=chosen.train_bytes, batch_bytes=chosen.batch_bytes, context_bytes=chosen.context_bytes,
        changes=variant.stage, packing=variant.packing,
    )  # fmt: skip
    return tiny.run_job(job, text, seed=seed, folder=chosen.folder, device=chosen.device)


def table(runs: dict[str, Any], kind: str, names: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """The base over seeds, and each variant's difference from the base of the same seed (negative: better)."""
    base = {seed: runs[_key(kind, "base", seed)] for seed in chosen.seeds}
    values = [run["bits_per_byte"] for run in base.values()]
    spread = statistics.stdev(values) if len(values) > 1 else None
    rows = []
    for name in names:
        if name == "base" or kind not in VARIANTS[name].kinds:
            continue
        found = [runs[_key(kind, name, seed)] for seed in chosen.variant_seeds]
        first, beside = found[0], base[chosen.variant_seeds[0]]
        bits = [run["bits_per_byte"] for run in found]
        difference = tiny.paired(bits, [base[seed]["bits_per_byte"] for seed in chosen.variant_seeds])
        ratios = {
            key: first[key] / beside[key]
            for key in ("parameters", "forward_flops_per_byte", "shipped_int8_bytes", "seconds")
        }
        rows.append({"variant": name, "bits_per_byte": bits, "difference": difference, "ratios": ratios})
    return {
        "base_bits_per_byte": values,
        "base_spread": spread,
        "parameters": base[chosen.seeds[0]]["parameters"],
        "rows": rows,
    }


def show(results: dict[str, Any]) -> None:
    """Print the tables, best first."""
    for kind, found in results.items():
        print(
            f"\n{kind}: base {tiny.spread(found['base_bits_per_byte'])} bits per byte, {found['parameters']:,} parameters"
        )
        print(f"{'variant':<30}{'difference':>11}{'of spread':>11}{'parameters':>12}{'FLOPs':>8}{'int8':>8}{'time':>8}")
        for row in sorted(found["rows"], key=lambda row: row["difference"]["mean"]):
            mean, ratios = row["difference"]["mean"], row["ratios"]
            times = f"{mean / found['base_spread']:+.1f}" if found["base_spread"] else "-"
            cells = "".join(
                f"{ratios[key]:>{width}.2f}"
                for key, width in (
                    ("parameters", 12),
                    ("forward_flops_per_byte", 8),
                    ("shipped_int8_bytes", 8),
                    ("seconds", 8),
                )
            )
            print(f"{row['variant']:<30}{mean:>+11.4f}{times:>11}{cells}")
