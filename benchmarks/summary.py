"""Draw the kept results: tables in docs/benchmarks.md, a chart in docs/figures, the short table between README's marks.

Nothing is measured: `python -m benchmarks summary` reads benchmarks/results/*.json. With `--print` nothing is written either.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from benchmarks._headlines import HEADLINES, RESULTS, Headline, Kept, read_kept
from limbeck.core.files import write_atomic

ROOT = Path(__file__).parents[1]
OPEN, CLOSE = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ACROSS = "Ratios are medians, with the lowest and highest block in brackets; **bold** where the range lies on the better side of 1."


def read_all(folder: Path) -> list[Kept]:
    """All results that give ratios, in the order of the table of benchmarks."""
    found = [kept for path in sorted(folder.glob("*.json")) if (kept := read_kept(path)) is not None]
    order = list(HEADLINES)
    return sorted(found, key=lambda kept: (order.index(kept.name), kept.file))


def measured(kept: Kept) -> str:
    """Machine, date and commit in a few words."""
    facts = kept.circumstances
    place = facts.get("processor", "?") if facts.get("device", "cpu") == "cpu" else facts["device"]
    return f"{place}, {facts.get('threads', '?')} thread(s), {facts.get('date', '?')}, {facts.get('commit', '?')}"


def side(headline: Headline) -> int:
    """1 where the whole range is on the better side of 1, -1 where it is on the worse, 0 between. Single figures count as 0."""
    if headline.ratio is None or headline.low is None or headline.high is None or not headline.has_range:
        return 0
    low, high = headline.low, headline.high
    if not headline.more_is_better:
        low, high = 1 / high, 1 / low
    return 1 if low > 1 else -1 if high < 1 else 0


def cell(headline: Headline) -> str:
    """A ratio for a table, in bold where it is clearly won."""
    text = headline.told().replace("|", "\\|")
    return f"**{text}**" if side(headline) == 1 else text


def better(headline: Headline) -> str:
    """Which way is up."""
    return "above 1" if headline.more_is_better else "below 1"


def long_tables(all_kept: Sequence[Kept]) -> str:
    """A table for every file."""
    parts = [ACROSS, ""]
    for kept in all_kept:
        facts = kept.circumstances
        versions = f"torch {facts.get('torch', '?')}, transformers {facts.get('transformers', '?')}"
        parts += [
            f"### `{kept.command}`",
            "",
            f"{measured(kept)}; {versions}; kept in `benchmarks/results/{kept.file}`.",
            "",
        ]
        if facts.get("note"):
            parts += [facts["note"], ""]
        if kept.problem:
            parts += [f"{kept.problem[0].upper()}{kept.problem[1:]}.", ""]
            continue
        parts += ["| what | ratio | better | blocks |", "| --- | --- | --- | --- |"]
        parts += [f"| {one.what} | {cell(one)} | {better(one)} | {one.blocks} |" for one in kept.headlines]
        parts.append("")
    return "\n".join(parts)


def short_table(all_kept: Sequence[Kept]) -> str:
    """The main ratios of all files in one table."""
    rows = ["| what | ratio | better | command | measured on |", "| --- | --- | --- | --- | --- |"]
    for kept in all_kept:
        rows += [
            f"| {one.what} | {cell(one)} | {better(one)} | `{kept.command}` | {measured(kept)} |"
            for one in kept.headlines
            if one.is_main
        ]
    return "\n".join([*rows, "", ACROSS])


def chart(all_kept: Sequence[Kept]) -> str:
    """The main ratios as an SVG: to the right of 1 Limbeck is better, lines show the range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for kept in all_kept for one in kept.headlines if one.is_main and one.ratio is not None]
    style = {"svg.hashsalt": "limbeck", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.24 * max(1, len(shown))))
        for place, one in enumerate(reversed(shown)):
            middle, low, high = (_turned(value, one) for value in (one.ratio, one.low, one.high))
            colour = {1: "#2b7a4b", 0: "#777777", -1: "#b5442e"}[side(one)]
            axes.plot([min(low, high), max(low, high)], [place, place], color=colour, linewidth=2)
            axes.plot([middle], [place], "o", color=colour, markersize=4)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        lowest, highest = axes.get_xlim()
        ticks = [
            tick for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100) if lowest <= tick <= highest
        ]
        axes.set_xticks(ticks, [f"x{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(shown)), [one.what for one in reversed(shown)])
        axes.set_xlabel("times better (right of 1); memory: times smaller; lines: range")
        for edge in ("top", "right", "left"):
            axes.spines[edge].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    return stream.getvalue()


def _turned(value: float | None, one: Headline) -> float:
    """A ratio so that more is better; a missing end of the range is the ratio itself."""
    known = value if value is not None else one.ratio
    assert known is not None
    return known if one.more_is_better else 1 / known


def between_marks(text: str, block: str, *, where: str) -> str:
    """The text with what lies between the marks replaced. Raises: SystemExit when the marks are not there once, in order."""
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or text.index(OPEN) > text.index(CLOSE):
        raise SystemExit(
            f"{where}: expected one {OPEN} and one {CLOSE} after it, each on a line of its own; put them in."
        )
    before, _, rest = text.partition(OPEN)
    return f"{before}{OPEN}\n{block}\n{CLOSE}{rest.partition(CLOSE)[2]}"


def main(arguments: list[str]) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks summary", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and docs/")
    parser.add_argument("--print", action="store_true", dest="prints", help="show the short table, write nothing")
    chosen = parser.parse_args(arguments)
    all_kept = read_all(chosen.results)
    if not all_kept:
        raise SystemExit(
            f"{chosen.results}: no results in it. Measure first, with --json {chosen.results}/NAME-cpu.json."
        )
    if chosen.prints:
        print(short_table(all_kept))
        return
    write_atomic(chosen.root / "docs" / "figures" / "benchmarks.svg", chart(all_kept))
    for name, block in (("docs/benchmarks.md", long_tables(all_kept)), ("README.md", short_table(all_kept))):
        page = chosen.root / name
        text = page.read_text(encoding="utf-8")
        if name == "README.md" and OPEN not in text:
            print(f"{name} has no {OPEN} mark: left as it is")
            continue
        write_atomic(page, between_marks(text, block, where=name))
        print(f"written: {name}")
    for kept in all_kept:
        print(f"{kept.file}: {kept.problem or f'{len(kept.headlines)} ratios'}")
