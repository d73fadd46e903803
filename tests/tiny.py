"""A tiny teacher, a tiny text and a tiny recipe, all made on the spot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from limbeck.recipe import Recipe


def write_text(path: Path, *, documents: int = 120) -> Path:
    """A text with structure a model can learn: names that come back within a document."""
    chance = random.Random(7)
    names = ["Ada", "Bo", "Cy", "Di", "Eli", "Flo", "Gus", "Hal"]
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(documents):
            one, two = chance.sample(names, 2)
            stream.write(
                f'{{"text": "{one} met {two}. " }}\n'.replace(
                    '. "', ". " + f"{two} saw {one} and {one} saw {two}. " * 6 + '"'
                )
            )
    return path


def make_teacher(folder: Path, text: Path, *, family: str = "gpt_neox", train_steps: int = 0, layers: int = 2) -> Path:
    """A small random (or briefly trained) causal LM with its own tokenizer, saved as a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from limbeck.data.text import TextSource, read_documents
    from limbeck.models.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(read_documents(TextSource(str(text), split="train")), vocab_size=300)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if train_steps:
        ids = torch.tensor(tokenizer(" ".join(read_documents(TextSource(str(text))))).input_ids[: 64 * 32]).view(-1, 32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(train_steps):
            optimizer.zero_grad()
            rows = ids[(step * 8) % ids.shape[0] :][:8]
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(teacher: Path | None, text: Path, **changes: Any) -> Recipe:
    """A recipe that runs in seconds: a few updates of every stage, all controls."""
    stage = {"batch_tokens": 128, "learning_rate": 1e-3}
    words: dict[str, Any] = {
        "name": "tiny", "teacher": None if teacher is None else {"source": str(teacher)},
        "student": {"calibration_tokens": 512},
        "data": {
            "train": [{"source": str(text), "split": "train"}], "heldout": [{"source": str(text), "split": "heldout"}],
            "context_tokens": 32,
        },
        "stages": [
            {"kind": "align", "name": "align", "tokens": 1280} | stage,
            {"kind": "distil", "name": "distil", "tokens": 3840, "kl": 0.9, "ce": 0.1} | stage,
        ],
        "evaluation": {"speed": None, "prompts": ["Ada met"], "sample_tokens": 4, "max_tokens": 512},
        "runtime": {"checkpoint_every_tokens": 384, "device": "cpu", "threads": 1},
    }  # fmt: skip
    return Recipe.model_validate(words | changes)
