"""Students with other tokens than their teacher, on little text: chunk likelihood and sorted earth mover beside cross entropy alone.

The embedded GPT-NeoX teacher, a small Llama student with a byte-level BPE of its own, the first countries of the factbook
read several times. The control is the same student trained from scratch on the same tokens without the teacher; everything is
judged in bits per byte on countries that neither has seen.

    python -m benchmarks cross_tokenizer
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._kept import keep
from limbeck import pipeline
from limbeck.data.factbook import read_factbook
from limbeck.recipe import Recipe

WEIGHTS = {"chunk_likelihood": 1.0, "sorted_earth_mover": 0.3}  # chosen on the factbook's valid split


def write_text(path: Path, *, characters: int) -> None:
    """The first documents of the factbook, until they hold so many characters."""
    total = 0
    with open(path, "w", encoding="utf-8") as stream:
        for document in read_factbook("train"):
            stream.write(json.dumps({"text": document}) + "\n")
            total += len(document)
            if total > characters:
                return


def recipe(text: Path, objective: str, *, tokens: int, threads: int, is_first: bool) -> Recipe:
    """The job of one objective; the control, which is the same for all, runs beside the first."""
    architecture = {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 256,
    }  # fmt: skip
    terms = [{"objective": objective, "weight": WEIGHTS[objective]}, {"objective": "cross_entropy"}]
    words: dict[str, Any] = {
        "name": objective, "teacher": {"source": "embedded"}, "tokenizer": {"train_vocab_size": 1024},
        "student": {"architecture": architecture},
        "data": {
            "train": [{"source": str(text), "split": "all"}], "heldout": [{"source": "factbook", "split": "heldout"}],
            "context_tokens": 128,
        },
        "stages": [{"kind": "distil", "tokens": tokens, "batch_tokens": 1024, "learning_rate": 3e-3, "objectives": terms}],
        "controls": {"from_scratch": is_first, "copied": False, "teacher_more": False, "floor": False},
        "evaluation": {"max_tokens": 32_768, "speed": None, "sample_tokens": 1},
        "runtime": {"threads": threads, "device": "cpu"},
    }  # fmt: skip
    return Recipe.model_validate(words)


def main(arguments: list[str]) -> None:
    """Run both objectives and the control, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cross_tokenizer", description=__doc__)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--characters", type=int, default=250_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    results: dict[str, Any] = {"tokens": chosen.tokens, "characters": chosen.characters, "weights": WEIGHTS}
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        write_text(text, characters=chosen.characters)
        for number, objective in enumerate(WEIGHTS):
            job = recipe(text, objective, tokens=chosen.tokens, threads=chosen.threads, is_first=number == 0)
            facts = pipeline.run(job, run_folder=Path(scratch) / objective)
            folder = Path(scratch) / objective / "metrics.jsonl"
            lines = [json.loads(line) for line in folder.read_text(encoding="utf-8").splitlines()]
            taught = [line[objective] for line in lines if line["arm"] == "student"]
            results[objective] = {
                "bits_per_byte": facts["student"]["bits_per_byte"], "loss_to_teacher_first": taught[0], "loss_to_teacher_last": taught[-1],
            }  # fmt: skip
            if number == 0:
                results["control"] = {"bits_per_byte": facts["controls"]["from_scratch"]["bits_per_byte"]}
                results["teacher"] = {"bits_per_byte": facts["teacher"]["bits_per_byte"]}
    for name in (*WEIGHTS, "control", "teacher"):
        print(f"{name:<20}{results[name]['bits_per_byte']:.3f} bits per byte")
    keep(chosen.json, results)
