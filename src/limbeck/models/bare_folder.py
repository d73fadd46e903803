"""Which folders hold a model that is read with torch alone. Looking needs not even torch."""

from __future__ import annotations

from pathlib import Path

from limbeck.core.errors import CheckpointError
from limbeck.core.files import read_json

WEIGHTS_FILE = "model.safetensors"
SEGMENTER_FILE = "segmenter.json"
TOKENIZER_FILE = "tokenizer.json"
MODEL_TYPES = ("limbeck_bytepool", "limbeck_compact")


def is_bare(folder: Path) -> bool:
    """Whether `load_bare` can read this folder: a model of ours in one file, with its tokenizer beside it."""
    try:
        if not all((folder / name).is_file() for name in ("config.json", WEIGHTS_FILE)):
            return False
        if not any((folder / name).is_file() for name in (SEGMENTER_FILE, TOKENIZER_FILE)):
            return False
        return read_json(folder / "config.json").get("model_type") in MODEL_TYPES
    except (CheckpointError, AttributeError, OSError):  # a prompt in a folder's place may be too long for a name
        return False
