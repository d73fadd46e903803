"""Generation of the shipped sizes on a CPU in bytes a second, and what a fresh process needs to load and answer.

Weights are random, which costs the same, but what is written is real text: every step's choice is forced to the text's next
symbol or token, so that patches and tokens are as long as they are in use. Measured are reading a prompt in one pass, writing
with `generate()` and its cache (batch of one), and, for the smallest sizes, a fresh process that loads a folder and
answers: seconds and peak memory of `limbeck generate`, and of loading without transformers (`models/bare.py`, "bare" in the
table). The gate: step by step equals one pass.

    python -m benchmarks tiny_speed
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks import _tiny as tiny
from benchmarks._kept import keep
from limbeck.models.bare import load_bare
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.sizes import SIZES
from limbeck.models.tokenizers import encoder

PRESETS = ("bytepool-10m", "bpe-10m", "bytepool-50m", "bpe-50m", "bytepool-100m", "bpe-100m")
GOAL = {"seconds": 2.0, "peak_bytes": 300e6}
# A process tells its own peak: what its parent's accounting says includes the parent's memory at the fork.
TELL = """
import atexit, pathlib, resource, sys
def tell():
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    sys.stderr.write(f"peak {peak}\\n")
atexit.register(tell)
"""
BARE = """
from pathlib import Path
from limbeck.models.bare import continue_bytes, load_bare
list(continue_bytes(load_bare(Path(sys.argv[1])), sys.argv[2], max_new_tokens=64))
"""
COMMAND = """
sys.argv = ["limbeck", "generate", sys.argv[1], sys.argv[2], "--max-new-tokens", "64"]
from limbeck.__main__ import main
main()
"""
FRESH = {"generate": COMMAND, "without transformers": BARE, "import torch": "import torch"}
PROMPT = "The capital of"


class Forced(LogitsProcessor):
    """Lets a generation write one text, whatever the model thinks."""

    def __init__(self, ids: list[int], *, prompt: int):
        self.ids, self.prompt = ids, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Everything but the next id of the text is impossible."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.prompt]] = 0.0
        return forced  # type: ignore[return-value]


def options(arguments: list[str]) -> argparse.Namespace:
    """The options, with a test's sizes for --quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tiny_speed", description=__doc__)
    tiny.add_options(parser, folder="bench-tiny-speed")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--prompt-bytes", type=int, default=1024)
    parser.add_argument("--new-bytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.presets, chosen.prompt_bytes, chosen.new_bytes, chosen.repeats = list(PRESETS[:2]), 128, 32, 1
    return chosen


def tokenizer_of(preset: str, text: tiny.Text, chosen: argparse.Namespace) -> Any:
    """Bytes in patches that begin at spaces, or a BPE of the preset's size trained on the training text."""
    if preset.startswith("bytepool"):
        return ByteTokenizer("space")
    size = 300 if chosen.quick else SIZES[preset]["vocab_size"]
    return tiny.bpe_tokenizer(text, chosen.folder, vocab_size=size)


def cut_text(tokenizer: Any, text: tiny.Text, chosen: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Prompt and continuation in the tokenizer's ids; the prompt begins the text, as both kinds do."""
    whole = "\n".join(text.valid).encode()
    prompt = whole[: chosen.prompt_bytes].decode("utf-8", errors="ignore")
    rest = whole[len(prompt.encode()) : chosen.prompt_bytes + chosen.new_bytes].decode("utf-8", errors="ignore")
    start, later = encoder(tokenizer)([prompt, rest])
    return [tokenizer.bos_token_id, *start], later


def measure(preset: str, text: tiny.Text, chosen: argparse.Namespace) -> dict[str, Any]:
    """Reading and writing of one preset: medians over repeats."""
    tokenizer = tokenizer_of(preset, text, chosen)
    model = tiny.new_model(SIZES[preset], seed=0, device="cpu").eval()
    prompt, later = cut_text(tokenizer, text, chosen)
    if preset.endswith("-10m"):
        tiny.check_causal_and_cached(model, torch.tensor([prompt[:48]]))
    prompt_BT = torch.tensor([prompt])
    read_bytes, written_bytes = (
        len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in (prompt, later)
    )
    reading, writing = [], []
    with torch.no_grad():
        for _ in range(chosen.repeats + 1):
            begun = time.perf_counter()
            model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
            reading.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            written = model.generate(
                prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=len(later), do_sample=False,
                logits_processor=LogitsProcessorList([Forced(later, prompt=len(prompt))]),
            )  # fmt: skip
            writing.append(time.perf_counter() - begun)
        assert written[0, len(prompt) :].tolist() == later, "the generation did not write the text"
    folder = saved(preset, model, tokenizer, chosen)
    bare = statistics.median(write_bare(folder, prompt, later) for _ in range(chosen.repeats))
    shutil.rmtree(folder)
    # The first round warms up; writing includes reading the prompt, which is taken off.
    read, write = statistics.median(reading[1:]), statistics.median(writing[1:])
    return {
        "parameters": tiny.parameters_of(model), "bytes_per_token": written_bytes / len(later),
        "read_bytes_per_second": read_bytes / read, "write_bytes_per_second": written_bytes / (write - read),
        "bare_write_bytes_per_second": written_bytes / bare, "write_milliseconds_per_token": 1e3 * (write - read) / len(later),
    }  # fmt: skip


def saved(preset: str, model: Any, tokenizer: Any, chosen: argparse.Namespace) -> Path:
    """The model as a folder."""
    folder = chosen.folder / f"folder-{preset}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_bare(folder: Path, prompt: list[int], later: list[int]) -> float:
    """Seconds to write a text after its prompt, without transformers."""
    read = load_bare(folder).start()
    with torch.no_grad():
        read(prompt)
        begun = time.perf_counter()
        for symbol in later:
            read([symbol])
    return time.perf_counter() - begun


def fresh_process(code: str, arguments: list[str], *, threads: int, repeats: int) -> dict[str, float]:
    """Median seconds from start to end of a new Python process, and the largest of its peaks of memory."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    seconds, peaks = [], []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", TELL + code, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds.append(time.perf_counter() - begun)
        if done.returncode:
            raise SystemExit(f"a fresh process failed: {done.stderr[-800:]}")
        peaks.append(int(done.stderr.rpartition("peak ")[2]))
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": max(peaks)}


def fresh(preset: str, text: tiny.Text, chosen: argparse.Namespace) -> dict[str, Any]:
    """What `limbeck generate`, loading without transformers, and importing torch alone take."""
    model = tiny.new_model(SIZES[preset], seed=0, device="cpu")
    folder = saved(preset, model, tokenizer_of(preset, text, chosen), chosen)
    found = {
        name: fresh_process(code, [str(folder), PROMPT], threads=chosen.threads, repeats=chosen.repeats)
        for name, code in FRESH.items()
    }
    shutil.rmtree(folder)
    return found


def main(arguments: list[str]) -> None:
    """Measure every preset; print; keep."""
    chosen = options(arguments)
    tiny.begin(chosen)
    text = tiny.open_text(chosen)
    passing = {"folder", "json", "presets", "seeds", "device"}
    settings = {key: value for key, value in vars(chosen).items() if key not in passing}
    figures = tiny.Figures(chosen.folder, settings)
    print(
        f"{'preset':<16}{'parameters':>12}{'bytes/token':>12}{'read B/s':>10}{'write B/s':>10}{'bare B/s':>10}{'ms/token':>10}"
    )
    for preset in chosen.presets:
        of = figures.get(preset, measure, preset, text, chosen)
        print(
            f"{preset:<16}{of['parameters']:>12,}{of['bytes_per_token']:>12.2f}{of['read_bytes_per_second']:>10,.0f}"
            f"{of['write_bytes_per_second']:>10,.0f}{of['bare_write_bytes_per_second']:>10,.0f}{of['write_milliseconds_per_token']:>10.2f}",
            flush=True,
        )
    results: dict[str, Any] = {"presets": {preset: figures.runs[preset] for preset in chosen.presets}, "fresh": {}}
    for preset in (name for name in chosen.presets if name.endswith("-10m")):
        results["fresh"][preset] = figures.get(f"fresh {preset}", fresh, preset, text, chosen)
        for name, of in results["fresh"][preset].items():
            reached = all(of[key] < most for key, most in GOAL.items())
            print(
                f"{preset}, fresh process, {name}: {of['seconds']:.2f} s, {of['peak_bytes'] / 1e6:.0f} MB "
                f"({'within' if reached else 'beyond'} {GOAL['seconds']:g} s and {GOAL['peak_bytes'] / 1e6:.0f} MB)"
            )
    keep(chosen.json, {"settings": settings, **results})
