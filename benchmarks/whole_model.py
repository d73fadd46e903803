"""Prefill, decode and cache memory of whole models: an attention teacher beside its Hyena students, one shape.

The gate: each student's step-by-step logits equal its parallel ones, and a student with nothing replaced equals the
teacher exactly.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from benchmarks._kept import keep
from limbeck.evaluate.efficiency import compare_speed
from limbeck.models.hybrid import build_student

SHAPES = {
    "demo": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "vocab_size": 2048,
    },
    "pythia-70m": {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 50304,
    },
}
STUDENTS = {
    "modal": {"filter": "modal"},
    "explicit": {"filter": "explicit", "filter_options": {"filter_length": 32768}},
}


def teacher_of(shape: dict[str, int]) -> nn.Module:
    """A random GPT-NeoX of a shape; speed does not depend on the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox", **shape, max_position_embeddings=65536, bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


def gate(teacher: nn.Module, students: dict[str, nn.Module]) -> None:
    """Refuse to time what is not right."""
    ids = torch.randint(teacher.config.vocab_size, (1, 70))
    with torch.no_grad():
        plain = build_student(teacher, mixers=["attention"] * teacher.config.num_hidden_layers, hyena={}).eval()
        assert torch.equal(plain(input_ids=ids).logits, teacher(input_ids=ids).logits), (
            "nothing replaced, yet not the teacher"
        )
        for name, student in students.items():
            whole = student(input_ids=ids).logits
            out = student(input_ids=ids[:, :37], use_cache=True)
            steps, cache = [out.logits], out.past_key_values
            for i in range(37, 70):
                out = student(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                steps.append(out.logits)
            worst = float((torch.cat(steps, 1) - whole).abs().max())
            assert worst <= 1e-4, f"{name}: step by step differs by {worst}"
            print(f"gate: {name}: parallel = step by step, largest difference {worst:.1e}")


def main(arguments: list[str]) -> None:
    """Measure and print ratios (teacher's time over the student's; above 1 the student is faster)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--student-only", type=int, nargs="*", default=[32768], help="lengths at which the teacher is not run"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    teacher = teacher_of(SHAPES[chosen.shape])
    layers = teacher.config.num_hidden_layers
    students = {
        name: build_student(teacher, mixers=["hyena"] * layers, hyena=options).eval()
        for name, options in STUDENTS.items()
    }
    gate(teacher, students)
    results: dict[str, Any] = {"shape": chosen.shape, **SHAPES[chosen.shape]}
    for name, student in students.items():
        facts = compare_speed(
            teacher,
            student,
            context_lengths=chosen.contexts,
            repeats=chosen.repeats,
            decode_tokens=chosen.decode_tokens,
        )
        print(f"\n{name}, shape {chosen.shape}: {facts.note}")
        print(
            "{:>8} {:>10} {:>10} {:>7} {:>10} {:>10} {:>7} {:>11} {:>11}".format(
                "context",
                "prefill t",
                "prefill s",
                "ratio",
                "decode t",
                "decode s",
                "ratio",
                "cache t MB",
                "cache s MB",
            )
        )
        for row in facts.rows:
            print(
                f"{row.context:>8} {row.teacher.prefill_seconds:>10.3f} {row.student.prefill_seconds:>10.3f} {row.prefill_speedup:>7.2f} "
                f"{row.teacher.decode_seconds_per_token * 1e3:>8.2f}ms {row.student.decode_seconds_per_token * 1e3:>8.2f}ms "
                f"{row.decode_speedup:>7.2f} {row.teacher.cache_bytes / 1e6:>11.2f} {row.student.cache_bytes / 1e6:>11.2f}"
            )
        print(
            f"student slower: prefill at {facts.slower_prefill_at or 'no length'}, decode at {facts.slower_decode_at or 'no length'}"
        )
        results[name] = facts.model_dump(mode="json")
        if chosen.student_only:
            alone = compare_speed(
                None, student, context_lengths=chosen.student_only, repeats=1, decode_tokens=chosen.decode_tokens
            )
            for row in alone.rows:
                print(
                    f"{row.context:>8} student alone: prefill {row.student.prefill_seconds:.3f} s, decode "
                    f"{row.student.decode_seconds_per_token * 1e3:.2f} ms, cache {row.student.cache_bytes / 1e6:.2f} MB"
                )
            results[f"{name}_alone"] = alone.model_dump(mode="json")
    keep(chosen.json, results)
