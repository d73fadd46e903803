"""Measure something again and say whether the ratios agree with the kept ones, within the range that both state.

    python -m benchmarks again step_overhead
    python -m benchmarks again --compare OLD.json NEW.json
    python -m benchmarks again --pool ONE.json OTHER.json --json RESULT.json

Two ratios agree when the median of one lies in the range of the other, or they differ by no more than 5 %; single figures may
differ by 10 %. The range is that over blocks (and over fresh processes, where a benchmark starts them), so it is what one
machine does within minutes. Some figures differ more between whole runs: `--pool` makes one result of several, whose medians
and ranges are over the blocks of all. Another machine may well differ, and is told apart here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._headlines import HEADLINES, RESULTS, Kept, read_kept
from benchmarks._kept import spread_of
from limbeck.core.files import write_atomic

SAME_PLACE = ("processor", "device", "threads", "torch", "transformers")


def rerun(old: Kept, target: Path) -> None:
    """Run the command that a result was measured with, into another file. Raises: SystemExit when it fails."""
    words = shlex.split(old.command)[1:]
    done = subprocess.run([sys.executable, *words, "--json", str(target)], check=False)
    if done.returncode:
        raise SystemExit(f"{old.command} ended with code {done.returncode}: nothing to compare")


def compare(old: Kept, new: Kept) -> tuple[list[str], bool]:
    """Lines to print, and whether all ratios that both have agree."""
    lines, agrees = [], True
    for key in SAME_PLACE:
        if old.circumstances.get(key) != new.circumstances.get(key):
            lines.append(f"{key}: {old.circumstances.get(key)} then, {new.circumstances.get(key)} now")
    theirs = {one.what: one for one in new.headlines}
    for one in old.headlines:
        other = theirs.get(one.what)
        if other is None:
            lines.append(f"not measured now   {one.what}")
            continue
        same = one.agrees_with(other)
        agrees = agrees and same
        lines.append(f"{'agrees' if same else 'DIFFERS':<18} {one.what}: {one.told()} then, {other.told()} now")
    if not any(one.what in theirs for one in old.headlines):
        lines.append("nothing was measured in both")
        agrees = False
    return lines, agrees


def pool(results: Sequence[Any]) -> Any:
    """One result of several of the same benchmark: blocks together, single figures of the first."""
    first = results[0]
    if isinstance(first, list) and any(one != first for one in results):
        return [value for one in results for value in one]
    if not isinstance(first, dict):
        return first
    if "blocks" in first and "median" in first:
        return spread_of([value for one in results for value in one["blocks"]])
    return {key: pool([one[key] for one in results]) for key in first}


def pool_files(paths: Sequence[Path], target: Path) -> None:
    """Keep one result of several files. Raises: SystemExit when they are not of one place, or of one form."""
    files = [json.loads(path.read_text()) for path in paths]
    places = [{key: one["circumstances"].get(key) for key in (*SAME_PLACE, "command")} for one in files]
    if any(place != places[0] for place in places):
        raise SystemExit("--pool: these were not measured by one command on one machine with the same versions.")
    try:
        results = pool([one["results"] for one in files])
    except (KeyError, TypeError) as error:
        raise SystemExit(f"--pool: not all of these have {error}.") from error
    facts = files[-1]["circumstances"] | {"runs": len(files)}
    write_atomic(target, json.dumps({"circumstances": facts, "results": results}, indent=2) + "\n")
    print(f"kept in {target}")


def load(path: Path) -> Kept:
    """A file's headlines. Raises: SystemExit when it has none."""
    kept = read_kept(path) if path.exists() else None
    if kept is None or kept.problem:
        reason = "there is no such file" if not path.exists() else kept.problem if kept else "no ratios are known of it"
        raise SystemExit(f"{path}: {reason}.")
    return kept


def main(arguments: list[str]) -> None:
    """Rerun or compare; ends with 1 where a ratio differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks again", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=sorted(HEADLINES), help="a benchmark with kept results")
    parser.add_argument("--device", default="cpu", help="which kept results: those whose file ends in -cpu, -cuda")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files; nothing is run")
    parser.add_argument("--pool", nargs="+", type=Path, metavar="FILE", help="make one result of these; nothing is run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the new results here")
    chosen = parser.parse_args(arguments)
    if chosen.pool:
        if chosen.json is None:
            parser.error("--pool needs --json FILE")
        pool_files(chosen.pool, chosen.json)
        return
    if chosen.compare:
        old, new = (load(path) for path in chosen.compare)
    elif chosen.name:
        old = load(RESULTS / f"{chosen.name.replace('_', '-')}-{chosen.device}.json")
        with tempfile.TemporaryDirectory() as scratch:
            target = chosen.json or Path(scratch) / old.file
            rerun(old, target)
            new = load(target)
    else:
        parser.error("give the name of a benchmark, or --compare OLD NEW")
    lines, agrees = compare(old, new)
    print("\n".join(lines))
    print("all ratios agree within their ranges" if agrees else "not all ratios agree: see DIFFERS above")
    raise SystemExit(0 if agrees else 1)
