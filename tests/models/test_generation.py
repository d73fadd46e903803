"""Text as it is written: whoever wants no more of it ends the work, not only the waiting."""

import threading

import torch
from tests import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.models.generation import stream_text


def test_a_closed_stream_leaves_no_thread_behind(tmp_path):
    text = tiny.write_text(tmp_path / "text.jsonl")
    folder = tiny.make_teacher(tmp_path / "teacher", text, train_steps=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    asked = []
    model.register_forward_pre_hook(lambda *_: asked.append(1))
    before = set(threading.enumerate())
    torch.manual_seed(0)
    stream = stream_text(model, tokenizer, "the", max_new_tokens=4000, temperature=1.0)
    next(stream)
    stream.close()
    assert set(threading.enumerate()) == before
    assert len(asked) < 4000
