"""A real teacher keeps a quarter of its attention: intact, zeroed, uncalibrated, calibrated, and after `align` alone.

The gate: with no layer replaced the student's logits equal the teacher's exactly. Give a model (folder, GGUF or hub id) and
plain text to train on and to score on:

    python -m benchmarks real_teacher --teacher model.gguf --train train.txt --heldout valid.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks._kept import keep
from limbeck import assembly, pipeline, students
from limbeck.core.files import read_json
from limbeck.core.runtime import StopRequest, pick_device, set_threads
from limbeck.data.text import TextSource, read_documents
from limbeck.evaluate.quality import score_text, zeroed_mixers
from limbeck.models.hybrid import build_student
from limbeck.models.initialise import copy_projections
from limbeck.models.surgery import find_attention
from limbeck.recipe import Recipe


def recipe_of(chosen: argparse.Namespace) -> Recipe:
    """Calibrate, keep attention where the fit is worst, align the rest; nothing else is trained."""
    return Recipe.model_validate(
        {
            "name": "real-teacher",
            "teacher": {"source": chosen.teacher},
            "student": {
                "keep_attention": chosen.keep,
                "keep_rule": "measured",
                "calibration_tokens": chosen.calibration_tokens,
            },
            "data": {
                "train": [{"source": chosen.train, "split": "all"}],
                "heldout": [{"source": chosen.heldout, "split": "all"}],
                "context_tokens": chosen.context,
            },
            "stages": [
                {
                    "kind": "align",
                    "tokens": chosen.tokens,
                    "batch_tokens": 4 * chosen.context,
                    "learning_rate": chosen.learning_rate,
                    "final_share": 0.02,
                    "warmup_share": 0.1,
                }
            ],
            "controls": {"from_scratch": False, "copied": False, "teacher_more": False, "floor": True},
            "evaluation": {"speed": None, "max_tokens": chosen.score_tokens, "prompts": ["The capital of France is"]},
            "runtime": {
                "threads": chosen.threads,
                "checkpoint_every_tokens": 10 * 4 * chosen.context,
                "keep_checkpoints": 1,
            },
        }
    )


def main(arguments: list[str]) -> None:
    """Run, score and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--learning-rate", type=float, default=8e-6)
    parser.add_argument("--score-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--run-folder", type=Path, default=Path("runs/real-teacher"))
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    recipe = recipe_of(chosen)
    report = pipeline.run(recipe, run_folder=chosen.run_folder)
    set_threads(chosen.threads)
    results = results_of(recipe, chosen, report)
    for name, perplexity in results["perplexity"].items():
        print(f"{name:<34}{perplexity:>12.2f}")
    for layer in results["layers"]:
        print("layer {index:>2} {mixer:<10} calibrated {nmse_calibrated} aligned {nmse_after_align}".format(**layer))
    keep(chosen.json, results)


def results_of(recipe: Recipe, chosen: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Perplexities of all variants on the same tokens."""
    work = pipeline.open_run(recipe, chosen.run_folder, pick_device("cpu"), StopRequest(), show_progress=False)
    teacher = work.teacher.model
    mixers = read_json(chosen.run_folder / "layers.json")["mixers"]
    documents = list(read_documents(TextSource(chosen.heldout, split="all")))

    def perplexity(model: Any) -> float:
        score = score_text(
            model, work.tokenizer, documents, context_tokens=chosen.context, max_tokens=chosen.score_tokens
        )
        return score.perplexity

    ids = torch.randint(teacher.config.vocab_size, (1, 64))
    plain = build_student(teacher, mixers=["attention"] * len(mixers), hyena={}).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, teacher(input_ids=ids).logits), (
            "nothing replaced, yet not the teacher"
        )
    del plain
    copied = build_student(teacher, mixers=mixers, hyena=assembly.hyena_options(recipe, teacher)).eval()
    sites = {site.layer_index: site for site in find_attention(teacher)}
    for layer, mixer in copied.mixers().items():
        copy_projections(mixer.operator, sites[layer])
    found = {"uncalibrated (projections copied)": perplexity(copied)}
    replaced = list(copied.mixers())
    with zeroed_mixers(teacher, layers=replaced):
        found["replaced layers zeroed"] = perplexity(teacher)
    found["calibrated, not trained"] = perplexity(students.initial_student(work).eval())
    found["after align"] = report["student"]["perplexity"]
    found["intact teacher"] = report["teacher"]["perplexity"]
    return {
        "arguments": {
            key: str(value)
            for key, value in vars(chosen).items()
            if key not in ("teacher", "train", "heldout", "run_folder", "json")
        }
        | {key: Path(str(getattr(chosen, key))).name for key in ("teacher", "train", "heldout")},
        "perplexity": found,
        "layers": report["layers"],
        "tokens": report["student"]["tokens_spent"],
        "align_seconds": report["run"]["wall_seconds"].get("student"),
    }
