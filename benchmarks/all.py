"""The set that is measured together, one after the other, each kept in benchmarks/results; then the summary.

What takes longer than minutes (byte_pool, tiny_ablation, trie_distillation, cross_tokenizer) or needs a model that is not shipped
(real_teacher, target_codecs, store_capture on SmolLM2) is left out: see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import summary
from benchmarks._headlines import RESULTS

# In the order of running, with the options that are not the default.
SET: dict[str, list[str]] = {
    "peers": [],
    "step_overhead": ["--threads", "2"],
    "whole_model": [],
    "mixers": [],
    "convolution": [],
}
QUICK: dict[str, list[str]] = {
    "peers": ["--vocabularies", "512", "--block", "1", "--blocks", "1", "--runs", "1", "--teacher-steps", "1", "--documents", "4",
              "--rows", "2", "--context", "16", "--width", "64", "--layers", "1", "--threads", "1", "--contenders", "by hand", "limbeck"],
    "step_overhead": ["--vocabularies", "512", "--rows", "2", "--context", "16", "--width", "64", "--layers", "1", "--repeats", "2"],
    "whole_model": ["--contexts", "64", "--student-only", "--blocks", "1", "--decode-tokens", "1"],
    "mixers": ["--contexts", "32", "--prefill", "32", "--blocks", "1"],
    "convolution": ["--lengths", "64", "--channels", "8", "--calls", "1", "--blocks", "1", "--without-fla"],
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Run the set; a benchmark that fails is told of at the end, the others go on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=list(SET), default=list(SET))
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes that show the machinery works; figures mean nothing"
    )
    chosen = parser.parse_args(arguments)
    if chosen.quick and chosen.results == RESULTS:
        parser.error(
            "--quick needs --results FOLDER: its figures mean nothing and must not take the place of kept ones"
        )
    chosen.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in chosen.only:
        begun = time.monotonic()
        file = chosen.results / f"{name.replace('_', '-')}-cpu.json"
        options = (QUICK if chosen.quick else SET)[name]
        print(f"\n== {name} {' '.join(options)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "benchmarks", name, *options, "--json", str(file)], check=False)
        print(
            f"== {name}: {'failed, ' if done.returncode else ''}{(time.monotonic() - begun) / 60:.1f} minutes",
            flush=True,
        )
        failed += [name] if done.returncode else []
    if chosen.results == RESULTS:
        summary.main([])
    else:
        summary.main(["--results", str(chosen.results), "--print"])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
