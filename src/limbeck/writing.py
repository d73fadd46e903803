"""Continuing a prompt: with torch alone where the model is a small one of Limbeck's own, else through transformers.

Loading transformers takes longer than a small model takes to answer, so nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from limbeck.core.runtime import pick_device, seed_everything


def generate_from(
    place: str,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> Iterator[str]:
    """Continue a prompt, piece by piece. place: as for `places.open_place`."""
    where = pick_device(device)
    choice = {"temperature": temperature, "top_p": top_p}
    folder = _small_model(place)
    if folder is not None and where.type == "cpu":
        from limbeck.models.bare import load_bare, stream_bare

        model = load_bare(folder)
        seed_everything(seed)
        yield from stream_bare(model, prompt, max_new_tokens=max_new_tokens, **choice)
        return
    from limbeck.models.generation import stream_text
    from limbeck.places import open_place

    loaded = open_place(place, device=where)
    seed_everything(seed)
    yield from stream_text(loaded.model, loaded.tokenizer, prompt, max_new_tokens=max_new_tokens, **choice)


def _small_model(place: str) -> Path | None:
    """The folder of a model that can be read without transformers: the place itself, or the student of a run."""
    from limbeck.models.bare import is_bare

    return next((folder for folder in (Path(place), Path(place) / "model") if is_bare(folder)), None)
