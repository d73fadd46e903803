"""Text after a prompt, whole or as it comes."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import torch


def stream_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Generator[str, None, None]:
    """Yield the continuation piece by piece. Temperature 0 is greedy; seed torch before for repeatable sampling.

    Whoever wants no more closes the iterator, and the model stops after the token it is at.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    device = next(model.parameters()).device
    ids_BT = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"].to(device)
    if ids_BT.shape[1] == 0:
        ids_BT = torch.tensor(
            [[tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]], device=device
        )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    choice = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    failure: list[BaseException] = []
    is_enough = threading.Event()

    def enough(ids_BT: torch.Tensor, _scores: Any, **_others: Any) -> torch.Tensor:
        return torch.full((ids_BT.shape[0],), is_enough.is_set(), device=ids_BT.device, dtype=torch.bool)

    def work() -> None:
        try:
            model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=max_new_tokens, streamer=streamer,
                stopping_criteria=StoppingCriteriaList([enough]),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id, **choice,
            )  # fmt: skip
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:  # a thread that computes while the interpreter ends aborts the whole process
        is_enough.set()
        thread.join()
    if failure:
        raise failure[0]


def continue_text(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float = 0.0) -> str:
    """The whole continuation as one string."""
    return "".join(stream_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature))
