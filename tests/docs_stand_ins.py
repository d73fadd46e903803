"""What stands in for the world when a page is followed: a tiny hub, tiny text, small budgets, a server in this process.

Everything here patches from outside; the product knows nothing of it. What is replaced is size and origin, never the code that runs.
"""

from __future__ import annotations

import functools
import itertools
import json
import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

from tests import tiny

# Models of other tokens than the rest, so that what a page says of different tokenizers is carried out with different ones.
OTHER_TOKENS = ("stabilityai/", "Qwen/", "meta-llama/")
OWNERS = (
    "HuggingFaceTB", "Qwen", "meta-llama", "stabilityai", "EleutherAI", "openai-community", "mistralai", "google", "microsoft",
    "allenai", "facebook", "TinyLlama",
)  # fmt: skip
PROMPT_FILES = ("prompt", "question")
CONTEXT = 32


def make_hub(folder: Path, text: Path) -> dict[str, Path]:
    """Two tiny Llamas with tokenizers of their own, by the kind of tokens."""
    other = folder / "other.jsonl"
    other.write_text(text.read_text(encoding="utf-8").replace("met", "greeted").replace("saw", "noticed"))
    return {
        "usual": tiny.make_teacher(folder / "usual", text, family="llama", layers=4),
        "other": tiny.make_teacher(folder / "others", other, family="llama", layers=2),
    }


def put_into_cache(cache: Path, name: str, models: dict[str, Path]) -> None:
    """Let a hub id lead to a tiny model, as if it had been downloaded before."""
    commit = "0" * 40
    place = cache / f"models--{name.replace('/', '--')}"
    if not place.exists():
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        kind = "other" if name.startswith(OTHER_TOKENS) else "usual"
        shutil.copytree(models[kind], place / "snapshots" / commit)


def make_file(path: Path, text: Path) -> None:
    """A file that a page takes for granted, of the kind that its name promises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    elif path.suffix != ".jsonl":
        path.write_text("\n\n".join(rows), encoding="utf-8")
    elif any(word in path.name for word in PROMPT_FILES):
        path.write_text("".join(json.dumps({"prompt": row[:24]}) + "\n" for row in rows[:12]), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def make_distillkit(folder: Path) -> None:
    """Compressed logits as DistillKit's capture leaves them, of made-up predictions."""
    from tests.store.test_distillkit_rows import make_rows, write

    folder.parent.mkdir(parents=True, exist_ok=True)
    write(folder, *make_rows())


ARC = {"question": "Who met Bo?", "choices": {"text": ["Ada", "Cy"], "label": ["A", "B"]}, "answerKey": "A"}
TASK_ROWS = {
    "arc_easy.test": ARC, "arc_challenge.test": ARC, "piqa.validation": {"goal": "Meet Bo.", "sol1": "Go", "sol2": "Sit", "label": 0},
    "sciq.test": {
        "question": "Who met Bo?", "distractor1": "Cy", "distractor2": "Di", "distractor3": "Eli", "correct_answer": "Ada",
        "support": "Ada met Bo.",
    },
    "hellaswag.validation": {
        "activity_label": "Meeting", "ctx_a": "Ada met Bo.", "ctx_b": "", "endings": ["Bo left.", "Cy", "Di", "Eli"], "label": 0,
    },
    "boolq.validation": {"passage": "Ada met Bo.", "question": "did ada meet bo", "label": 1},
    "winogrande.validation": {"sentence": "Ada met Bo and _ left.", "option1": "Bo", "option2": "Cy", "answer": 1},
    "lambada_openai.test": {"text": "Ada met Bo and Bo saw Ada"},
    "wikitext.test": {"page": " = Ada = \n Ada met Bo . Bo saw Ada . \n"},
}  # fmt: skip


def make_tasks(folder: Path) -> None:
    """Files of the evaluation tasks, a few items each."""
    folder.mkdir(parents=True)
    for name in ("anaphor_gender_agreement", "principle_A_case_1"):
        pair = {"sentence_good": "Ada saw herself.", "sentence_bad": "Ada saw himself."}
        (folder / f"{name}.jsonl").write_text((json.dumps(pair) + "\n") * 3, encoding="utf-8")
    for name, row in TASK_ROWS.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")


def small_recipe(recipe: Any, *, url: str, model: Path) -> Any:
    """The same recipe in a size that takes seconds: short windows, a few updates, little to judge."""
    words = recipe.model_dump(mode="json")
    context = words["data"]["context_tokens"] = min(words["data"]["context_tokens"], CONTEXT)
    for stage in words["stages"]:
        stage |= {"batch_tokens": 2 * context, "tokens": 6 * context}
        stage["micro_batch_sequences"] = stage["micro_batch_sequences"] and 1
        if stage.get("on_policy"):
            stage["on_policy"] |= {"prompt_tokens": 8, "max_new_tokens": 8}
    words["evaluation"] |= {
        "max_tokens": 4 * context,
        "context_tokens": None,
        "stride_tokens": None,
        "sample_tokens": 4,
    }
    if words["evaluation"]["speed"]:
        words["evaluation"]["speed"] = {"context_lengths": [16], "decode_tokens": 2, "repeats": 1}
    words["student"]["calibration_tokens"] = 64
    words["controls"]["seeds"] = min(words["controls"]["seeds"], 2)
    words["capture"] |= {"tokens": words["capture"]["tokens"] and 16 * context, "check_rows": 2, "ray": None}
    words["capture"]["k"] = min(words["capture"]["k"], 16)
    words["capture"]["hidden_layers"] = [layer for layer in (1, 2) if words["capture"]["hidden_layers"]]
    words["runtime"] |= {"device": "cpu", "threads": 1, "diagnoses": 1}
    teacher = words["teacher"] or {}
    for kind in ("served", "closed"):
        if teacher.get(kind):
            teacher[kind] |= {
                "url": url,
                "max_new_tokens": 16,
                "answers": 16,
                "concurrency": 2,
                "requests_per_minute": None,
            }
    if teacher.get("served"):
        teacher["served"] |= {"top_logprobs": 8, "tokenizer": teacher["served"]["tokenizer"] and str(model)}
    if words["teacher"]:
        teacher |= {"dtype": "float32", "device": None, "quantise": None}
    if (words["tokenizer"]["source"] or "").endswith(".gguf"):
        words["tokenizer"]["source"] = str(model)
    if words["tokenizer"]["train_vocab_size"]:
        words["tokenizer"]["train_vocab_size"] = 300
    return type(recipe).model_validate(words)


def install(patch: Any, *, cache: Path, text: Path, url: str, model: Path) -> None:
    """Put the stand-ins into the places where the program reaches into the world."""
    import huggingface_hub.constants

    import limbeck.data.text
    import limbeck.recipe_io

    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    patch.setattr("webbrowser.open", lambda _: True)
    real_load, real_factbook = limbeck.recipe_io.load_recipe, limbeck.data.text.read_factbook

    @functools.wraps(real_load)
    def load_recipe(*words: Any, **options: Any) -> Any:
        return small_recipe(real_load(*words, **options), url=url, model=model)

    def read_hub(source: Any, *, split: str) -> Any:
        for line in text.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"]

    def read_factbook(split: str) -> Any:
        return (country[:2000] for country in itertools.islice(real_factbook(split), 12))

    patch.setattr(limbeck.recipe_io, "load_recipe", load_recipe)
    patch.setattr(limbeck.data.text, "_read_hub", read_hub)
    patch.setattr(limbeck.data.text, "read_factbook", read_factbook)
    _cap(patch, "limbeck.evaluation.compare_robustness", max_bytes=512, context_bytes=64)
    _cap(patch, "limbeck.evaluation.evaluate_place", max_tokens=128, context_tokens=CONTEXT, stride_tokens=CONTEXT)
    _cap(patch, "limbeck.evaluation.compare_places", max_tokens=128, context_tokens=CONTEXT, stride_tokens=CONTEXT)
    _cap(patch, "limbeck.examining.examine", limit=2)
    _cap(patch, "limbeck.paper_tables.reproduce", limit=2, max_tokens=128, context_tokens=CONTEXT)
    _cap(patch, "limbeck.costing.measure_places", contexts=(16, 24), batches=(1, 2), decode_tokens=2, repeats=1)
    _give_tasks(patch, cache.parent / "hub-tasks")
    patch.setattr("limbeck.examining._user_cache", lambda: cache.parent / "tasks")


def _give_tasks(patch: Any, folder: Path) -> None:
    """Where a page names no folder of tasks, the hub would give them; here a folder does."""
    real = pkgutil.resolve_name("limbeck.examining.examine")

    @functools.wraps(real)
    def examine(*words: Any, **options: Any) -> Any:
        if options.get("data") is None:
            if not folder.exists():
                make_tasks(folder)
            options["data"] = folder
        return real(*words, **options)

    patch.setattr("limbeck.examining.examine", examine)


def _cap(patch: Any, place: str, **caps: int | tuple[int, ...]) -> None:
    """Lower some numbers that a function is given; of lists, take as many of smaller ones."""
    real = pkgutil.resolve_name(place)

    @functools.wraps(real)
    def capped(*words: Any, **options: Any) -> Any:
        for option, most in caps.items():
            given = options.get(option)
            options[option] = most[: len(given or most)] if isinstance(most, tuple) else min(given or most, most)
        if "seeds" in options:
            options["seeds"] = options["seeds"][:1]
        return real(*words, **options)

    patch.setattr(place, capped)


def hub_ids(text: str) -> set[str]:
    """Names of hub models in a page, told by their owners."""
    return set(re.findall(rf"(?<![\w./-])(?:{'|'.join(OWNERS)})/[\w.-]*\w", text))
