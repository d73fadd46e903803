"""Bytes pooled into patches beside a BPE model of the same blocks: at equal parameters, and at equal operations.

Every model reads the same bytes in the same number of updates, under the same recipe; all are judged in bits per byte of
the same valid text (the cost of ending each patch included), and on spoilt text. Equal parameters: the rival's
feed-forward is made as wide as needed. Equal operations: as wide as brings its forward pass over a *byte* to that of the
byte model. The gate: tokenizers lose nothing, models are causal, and step by step equals one pass.

    python -m benchmarks byte_pool --train train.txt --valid valid.txt
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks import _tiny as tiny
from benchmarks._kept import keep
from limbeck.models.tokenizers import encoder

BYTE_POOL: dict[str, Any] = {
    "model_type": "limbeck_bytepool", "local_width": 96, "encoder_layers": 2, "decoder_layers": 3, "local_heads": 3,
    "local_feed_forward": 384, "ngram_rows": 4096, "trunk": {"width": 192, "layers": 5, "heads": 3, "feed_forward": 768},
}  # fmt: skip
BPE: dict[str, Any] = {
    "model_type": "limbeck_compact",
    "trunk": {"width": 192, "layers": 5, "heads": 3, "feed_forward": 768},
}
QUICK: dict[str, Any] = {"local_width": 32, "local_heads": 1, "local_feed_forward": 64}
QUICK_TRUNK = {"width": 32, "layers": 2, "heads": 1, "feed_forward": 64}


def options(arguments: list[str]) -> argparse.Namespace:
    """The options, with a test's sizes for --quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks byte_pool", description=__doc__)
    tiny.add_options(parser, folder="bench-byte-pool")
    parser.add_argument("--train-bytes", type=int, default=1_000_000, help="bytes each model reads")
    parser.add_argument("--batch-bytes", type=int, default=2048)
    parser.add_argument("--context-bytes", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the rival, and of the segmenter bpe")
    parser.add_argument("--segmenters", nargs="+", default=["space", "bpe"])
    parser.add_argument("--points", type=int, default=8, help="points of the curve")
    parser.add_argument("--levels", type=int, nargs="*", default=[2], help="of the perturbations; none: no robustness")
    parser.add_argument("--robustness-bytes", type=int, default=16_384)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.train_bytes, chosen.batch_bytes, chosen.context_bytes, chosen.vocab_size = 12_000, 1024, 256, 400
        chosen.points, chosen.levels, chosen.robustness_bytes, chosen.valid_bytes = 2, [2], 512, 4096
        chosen.seeds = chosen.seeds[:2]
    return chosen


def shapes(chosen: argparse.Namespace, text: tiny.Text) -> dict[str, tuple[dict[str, Any], Any]]:
    """Configuration and tokenizer of every model: the byte models, and the rivals matched to them."""
    byte_pool, bpe = BYTE_POOL, BPE
    if chosen.quick:
        byte_pool, bpe = BYTE_POOL | QUICK | {"trunk": QUICK_TRUNK}, BPE | {"trunk": QUICK_TRUNK}
    rival_tokenizer = tiny.bpe_tokenizer(text, chosen.folder, vocab_size=chosen.vocab_size)
    bpe = bpe | {"vocab_size": len(rival_tokenizer)}
    rival_per_byte = tiny.tokens_per_byte(rival_tokenizer, text.valid)
    rival_context = round(chosen.context_bytes * rival_per_byte)
    found: dict[str, tuple[dict[str, Any], Any]] = {}
    rivals: dict[str, tuple[dict[str, Any], Any]] = {}
    for segmenter in chosen.segmenters:
        tokenizer = tiny.byte_tokenizer(segmenter, text, chosen.folder, vocab_size=chosen.vocab_size)
        per_byte = tiny.tokens_per_byte(tokenizer, text.valid)
        config = byte_pool | {"mean_patch_bytes": 1 / (per_byte - 1)}
        model = tiny.empty_model(config)
        found[f"bytes {segmenter}"] = config, tokenizer
        equal = tiny.matched(bpe, tiny.parameters_of(model), tiny.parameters_of)
        rivals["bpe, equal parameters"] = equal, rival_tokenizer
        flops = tiny.flops_per_byte(model, round(chosen.context_bytes * per_byte), per_byte)
        equal = tiny.matched(bpe, flops, lambda other: tiny.flops_per_byte(other, rival_context, rival_per_byte))
        rivals[f"bpe, equal operations to {segmenter}"] = equal, rival_tokenizer
    return found | rivals


def gate(models: dict[str, tuple[dict[str, Any], Any]], text: tiny.Text) -> None:
    """Refuse to compare what is not right."""
    for name, (config, tokenizer) in models.items():
        tiny.check_lossless(tokenizer, text.valid[:50])
        ids = encoder(tokenizer)([text.valid[0]])[0][:80]
        tiny.check_causal_and_cached(tiny.new_model(config, seed=0, device="cpu"), torch.tensor([ids]))
        print(f"gate: {name}: lossless, causal, step by step equals one pass")


def main(arguments: list[str]) -> None:
    """Train and judge every model under every seed; print; keep."""
    chosen = options(arguments)
    tiny.begin(chosen)
    text = tiny.open_text(chosen)
    models = shapes(chosen, text)
    gate(models, text)
    passing = {"folder", "threads", "json", "device", "seeds"}
    settings = {key: value for key, value in vars(chosen).items() if key not in passing}
    figures = tiny.Figures(chosen.folder, settings | {name: config for name, (config, _) in models.items()})
    judge = tiny.Judge(levels=tuple(chosen.levels), max_bytes=chosen.robustness_bytes, keep_models=True)
    for seed in chosen.seeds:
        for name, (config, tokenizer) in models.items():
            job = tiny.Job(
                name.replace(" ", "-").replace(",", ""), config, tokenizer, train_bytes=chosen.train_bytes,
                batch_bytes=chosen.batch_bytes, context_bytes=chosen.context_bytes, changes={},
            )  # fmt: skip
            run = figures.get(f"{name} / {seed}", _train, job, text, chosen, seed, judge)
            print(f"{name}, seed {seed}: {run['bits_per_byte']:.4f} bits per byte, {run['parameters']:,} parameters")
    results = summary(figures.runs, list(models), chosen)
    show(results)
    keep(chosen.json, {"settings": settings, **results, "runs": figures.runs})


def _train(job: tiny.Job, text: tiny.Text, chosen: argparse.Namespace, seed: int, judge: tiny.Judge) -> dict[str, Any]:
    return tiny.run_job(
        job, text, seed=seed, folder=chosen.folder, device=chosen.device, points=chosen.points, judge=judge
    )


def summary(runs: dict[str, Any], names: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Each model over seeds, and each byte model beside its two rivals, paired by seed."""

    def values(name: str, key: str = "bits_per_byte") -> list[float]:
        return [runs[f"{name} / {seed}"][key] for seed in chosen.seeds]

    table = {
        name: {key: runs[f"{name} / {chosen.seeds[0]}"][key] for key in ("parameters", "forward_flops_per_byte", "train_flops")}
        | {"bits_per_byte": values(name), "seconds": statistics.fmean(values(name, "seconds"))}
        for name in names
    }  # fmt: skip
    comparisons = []
    for segmenter in chosen.segmenters:
        mine = f"bytes {segmenter}"
        for rival in ("bpe, equal parameters", f"bpe, equal operations to {segmenter}"):
            difference = tiny.paired(values(mine), values(rival))
            share = difference["mean"] / statistics.fmean(values(rival))  # type: ignore[operator]
            comparisons.append(
                {"bytes": mine, "rival": rival, "difference_bits_per_byte": difference, "relative": share}
                | {"robustness": _beside(runs, mine, rival, chosen)}
            )
    return {"models": table, "comparisons": comparisons}


def _beside(runs: dict[str, Any], mine: str, rival: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte on spoilt text and the ratio to clean, of both, meaned over seeds, and their difference with its standard
    error over seeds; None where one cannot read it."""

    def mean(name: str, row: str, key: str) -> float | None:
        found = [runs[f"{name} / {seed}"]["robustness"][row].get(key) for seed in chosen.seeds]
        return None if None in found else statistics.fmean(found)

    def difference(row: str) -> dict[str, float | None] | None:
        found = [
            [runs[f"{name} / {seed}"]["robustness"][row].get("bits_per_byte") for seed in chosen.seeds]
            for name in (mine, rival)
        ]
        return None if None in found[0] + found[1] else tiny.paired(*found)

    rows = runs[f"{mine} / {chosen.seeds[0]}"].get("robustness", {})
    return {
        row: {key: [mean(mine, row, key), mean(rival, row, key)] for key in ("bits_per_byte", "ratio")}
        | {"difference": difference(row)}
        for row in rows
    }


def show(results: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"\n{'model':<34}{'parameters':>12}{'FLOPs/byte':>12}{'seconds':>9}  bits per byte over seeds")
    for name, of in results["models"].items():
        print(
            f"{name:<34}{of['parameters']:>12,}{of['forward_flops_per_byte']:>12.3g}{of['seconds']:>9.0f}  {tiny.spread(of['bits_per_byte'])}"
        )
    for one in results["comparisons"]:
        found = one["difference_bits_per_byte"]
        error = "one seed" if found["standard_error"] is None else f"± {found['standard_error']:.4f}"
        print(f"\n{one['bytes']} - {one['rival']}: {found['mean']:+.4f} {error} bits per byte ({one['relative']:+.2%})")
        for row, of in one["robustness"].items():
            (mine, other), (ratio, other_ratio) = of["bits_per_byte"], of["ratio"]
            if mine is None or other is None:
                print(f"  {row:<16} {'-' if mine is None else f'{mine:.3f} (x{ratio:.2f})'}  rival cannot read it")
            else:
                gap, sure = of["difference"]["mean"], of["difference"]["standard_error"]
                print(
                    f"  {row:<16} {mine:.3f} (x{ratio:.2f})  rival {other:.3f} (x{other_ratio:.2f})  {gap:+.3f}"
                    + ("" if sure is None else f" ± {sure:.3f}")
                )
