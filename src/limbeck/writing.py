"""Continuing a prompt: with torch alone where the model is a small one of Limbeck's own, else through transformers.

Loading transformers takes longer than a small model takes to answer, so nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

from limbeck.core.lean_torch import import_lean_torch, import_the_rest
from limbeck.models.bare_folder import WEIGHTS_FILE, is_bare

# Weights of about 20 million parameters.
_ONE_THREAD_BYTES = 80_000_000


def generate_from(
    place: str,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> Generator[str, None, None]:
    """Continue a prompt, piece by piece. place: as for `places.open_place`."""
    from limbeck.core.runtime import pick_device, seed_everything

    where = pick_device(device)
    choice = {"temperature": temperature, "top_p": top_p}
    folder = small_model(place)
    if folder is not None and where.type == "cpu":
        from limbeck.models.bare import load_bare, stream_bare

        model = load_bare(folder)
        seed_everything(seed)
        yield from stream_bare(model, prompt, max_new_tokens=max_new_tokens, **choice)
        return
    import_the_rest()
    from limbeck.models.generation import stream_text
    from limbeck.places import open_place

    loaded = open_place(place, device=where)
    seed_everything(seed)
    yield from stream_text(loaded.model, loaded.tokenizer, prompt, max_new_tokens=max_new_tokens, **choice)


def small_model(place: str) -> Path | None:
    """The folder of a model that can be read without transformers: the place itself, or the student of a run."""
    return next((folder for folder in (Path(place), Path(place) / "model") if is_bare(folder)), None)


def prepare_process(place: str) -> None:
    """Make this process as light as the model at `place` allows, if it is a small one; for one that does nothing else.

    torch is imported without what can wait. One thread answers: the steps of so small a network are too short to be shared
    out, and threads that wait for each other beside another busy process take several times as long. OMP_NUM_THREADS wins.
    """
    folder = small_model(place)
    if folder is None:
        return
    import_lean_torch()
    if "OMP_NUM_THREADS" not in os.environ and (folder / WEIGHTS_FILE).stat().st_size <= _ONE_THREAD_BYTES:
        from limbeck.core.runtime import set_threads

        set_threads(1)
