"""Prefill, decode and cache memory of whole models: attention with its KV cache beside Hyena students of the same shape.

Attention is transformers' own, with its default cache, which is copied as it grows, and with a static one, set aside
beforehand for prompt and answer. The gate: step-by-step logits equal parallel ones for every student and for the
static cache, and a student with nothing replaced equals the teacher exactly.

Models take turns: at each length every model is measured once in a block (after a warm-up of its own), and ratios are
formed within a block.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._kept import keep, spread_of, told
from limbeck.evaluate.efficiency import measure_speed
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
ATTENTION, STATIC = "attention", "attention, static cache"
FIGURES = {"prefill": "prefill_seconds", "decode": "decode_seconds_per_token"}


class WithStaticCache(nn.Module):
    """A model that begins every text with a static cache of `longest` tokens."""

    def __init__(self, model: Any, *, longest: int):
        super().__init__()
        self.model, self.config, self.longest = model, model.config, longest

    def get_input_embeddings(self) -> Any:
        """The model's own."""
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 0, **rest: Any) -> Any:
        """The model's own, with a fresh static cache where there is none yet."""
        from transformers import StaticCache

        if past_key_values is None:
            past_key_values = StaticCache(self.config, max_cache_len=self.longest)
        return self.model(
            input_ids=input_ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep, use_cache=True
        )


def teacher_of(shape: dict[str, int]) -> nn.Module:
    """A random GPT-NeoX of a shape; speed does not depend on the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox", **shape, max_position_embeddings=65536, bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def gate(teacher: nn.Module, models: dict[str, nn.Module]) -> None:
    """Refuse to time what is not right."""
    ids = torch.randint(teacher.config.vocab_size, (1, 70))
    plain = build_student(teacher, mixers=["attention"] * teacher.config.num_hidden_layers, hyena={}).eval()
    if not torch.equal(plain(input_ids=ids).logits, teacher(input_ids=ids).logits):
        raise SystemExit("nothing replaced, yet not the teacher")
    for name, model in models.items():
        whole = (teacher if isinstance(model, WithStaticCache) else model)(input_ids=ids).logits
        out = model(input_ids=ids[:, :37], use_cache=True)
        steps, cache = [out.logits], out.past_key_values
        for i in range(37, 70):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
        worst = float((torch.cat(steps, 1) - whole).abs().max())
        if not worst <= 1e-4:
            raise SystemExit(f"{name}: step by step differs by {worst}")
        print(f"gate: {name}: parallel = step by step, largest difference {worst:.1e}")


def measure_in_turn(models: dict[str, nn.Module], context: int, *, blocks: int, decode_tokens: int) -> dict[str, Any]:
    """Every model at one length: seconds block by block, cache and peak bytes."""
    taken: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in models}
    found: dict[str, Any] = {}
    for block in range(blocks):
        for name in models if block % 2 == 0 else reversed(list(models)):
            row = measure_speed(models[name], context_lengths=[context], repeats=1, decode_tokens=decode_tokens)[0]
            if row.skipped:
                raise SystemExit(f"{name} at {context} tokens: {row.skipped}")
            for figure, key in FIGURES.items():
                taken[name][figure].append(getattr(row, key))
            found[name] = {"cache_bytes": row.cache_bytes, "peak_memory_bytes": row.peak_memory_bytes}
    for name, own in taken.items():
        found[name] |= {FIGURES[figure]: spread_of(values) for figure, values in own.items()}
    return found


def ratios_of(row: dict[str, Any], student: str) -> dict[str, Any]:
    """Attention's time over a student's (above 1 the student is faster), block by block, for both caches."""
    found: dict[str, Any] = {}
    for baseline in (name for name in (ATTENTION, STATIC) if name in row):
        pairs = {
            figure: zip(row[baseline][key]["blocks"], row[student][key]["blocks"], strict=True)
            for figure, key in FIGURES.items()
        }
        found[baseline] = {figure: spread_of([theirs / mine for theirs, mine in own]) for figure, own in pairs.items()}
        found[baseline]["cache"] = row[student]["cache_bytes"] / row[baseline]["cache_bytes"]
    return found


def show(context: int, row: dict[str, Any], ratios: dict[str, Any]) -> None:
    """One length."""
    print(f"\n{context:,} tokens")
    for name, own in row.items():
        print(
            f"  {name:<24} prefill {own['prefill_seconds']['median']:>8.3f} s   decode "
            f"{own['decode_seconds_per_token']['median'] * 1e3:>7.2f} ms   cache {own['cache_bytes'] / 1e6:>7.2f} MB"
        )
    for name, against in ratios.items():
        for baseline, own in against.items():
            print(f"  {name} against {baseline}: prefill {told(own['prefill'])}, decode {told(own['decode'])}")


def main(arguments: list[str]) -> None:
    """Measure and print ratios (attention's time over the student's; above 1 the student is faster)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks whole_model", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--student-only", type=int, nargs="*", default=[32768], help="lengths at which attention is not run"
    )
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    teacher = teacher_of(SHAPES[chosen.shape])
    layers = teacher.config.num_hidden_layers
    students = {
        name: build_student(teacher, mixers=["hyena"] * layers, hyena=options).eval()
        for name, options in STUDENTS.items()
    }
    gate(teacher, {STATIC: WithStaticCache(teacher, longest=128), **students})
    results: dict[str, Any] = {
        "shape": chosen.shape, **SHAPES[chosen.shape], "blocks": chosen.blocks, "decode_tokens": chosen.decode_tokens,
        "contexts": {}, "ratios": {},
    }  # fmt: skip
    for context in sorted({*chosen.contexts, *chosen.student_only}):
        models: dict[str, nn.Module] = dict(students)
        if context in chosen.contexts:
            static = WithStaticCache(teacher, longest=context + chosen.decode_tokens)
            models = {ATTENTION: teacher, STATIC: static, **students}
        row = measure_in_turn(models, context, blocks=chosen.blocks, decode_tokens=chosen.decode_tokens)
        ratios = {name: ratios_of(row, name) for name in students}
        show(context, row, ratios)
        results["contexts"][str(context)], results["ratios"][str(context)] = row, ratios
    keep(chosen.json, results)
