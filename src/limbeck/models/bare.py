"""Text from a small model of ours with nothing but torch loaded: a tenth of the time and half the memory.

Importing transformers costs more than running a model of ten million parameters. The networks themselves are torch
modules and a model's folder is JSON and safetensors, so that to continue a prompt both are read here directly. What
comes out is what `models/generation.py` gives for the same folder, prompt and seed.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck.core.errors import CheckpointError
from limbeck.core.files import read_json
from limbeck.core.symbols import EOD, SYMBOLS
from limbeck.models.bare_folder import SEGMENTER_FILE, TOKENIZER_FILE, WEIGHTS_FILE, is_bare
from limbeck.models.bpe_segmenter import Pipeline
from limbeck.models.segmenters import read_segmenter
from limbeck.models.symbol_streams import encode_document, open_prompt, text_to_bytes
from limbeck.models.token_bytes import read_token_bytes
from limbeck.nn.byte_pool import BytePoolNetwork
from limbeck.nn.byte_pool_settings import BytePoolSettings
from limbeck.nn.compact import CompactNetwork
from limbeck.nn.trunk_cache import TrunkCache

_PREFIX = "network."
# What generate() of transformers keeps when it draws and nobody says otherwise.
_TOP_K = 50

Read = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class BareModel:
    """A model ready to continue prompts.

    network: in evaluation mode. start: gives a function that reads ids on and returns the logits [V] of the next one.
    encode: a prompt as ids. pieces: the bytes of every id, none for special ones. end_ids: ids that end a text.
    """

    network: BytePoolNetwork | CompactNetwork
    start: Callable[[], Read]
    encode: Callable[[bytes], list[int]]
    pieces: tuple[bytes, ...]
    end_ids: frozenset[int]


def load_bare(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> BareModel:
    """Load a byte model or a small model over tokens, as `save_pretrained` wrote it with its tokenizer.

    Raises: CheckpointError when the folder is none (see `is_bare`), or its parts are damaged or do not fit together.
    """
    if not is_bare(folder):
        raise CheckpointError(
            f"{folder} is no byte model or small model of Limbeck's with config.json, {WEIGHTS_FILE} and its tokenizer. Load it "
            "with transformers."
        )
    config = read_json(folder / "config.json")
    network = _read_network(config, folder / WEIGHTS_FILE)
    network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    encode, pieces = _read_text(folder, config)
    rows = config.get("vocab_size", len(pieces))
    if len(pieces) > rows:
        raise CheckpointError(
            f"{folder}: wrong tokenizer. It has {len(pieces)} tokens, but the model knows only {rows}. Put the tokenizer "
            "that the model was trained with beside it."
        )
    return BareModel(network, _reader_of(network), encode, pieces, _end_ids(folder, config))


@torch.inference_mode()
def continue_bytes(
    model: BareModel, prompt: str | bytes, *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> Iterator[bytes]:
    """Yield the bytes that follow a prompt, as they come, until the model ends the text.

    max_new_tokens: ids that are read, ends of patches included. Temperature 0 is greedy; seed torch before for
    repeatable sampling, which keeps the 50 most probable ids and of these `top_p` of the mass.

    Raises: CheckpointError when the model gives something that is not a number.
    """
    read, ids = model.start(), model.encode(text_to_bytes(prompt) if isinstance(prompt, str) else prompt)
    for _ in range(max_new_tokens):
        logits_V = read(ids).float()
        if bool(logits_V.isnan().any()):
            raise CheckpointError("the model gives logits that are not numbers: its weights are damaged.")
        ids = [_choose(logits_V, temperature, top_p)]
        if ids[0] in model.end_ids:
            return
        if ids[0] < len(model.pieces) and model.pieces[ids[0]]:
            yield model.pieces[ids[0]]


def stream_bare(
    model: BareModel, prompt: str | bytes, *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> Iterator[str]:
    """`continue_bytes` as text, character by character; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in continue_bytes(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p):
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _choose(logits_V: Tensor, temperature: float, top_p: float) -> int:
    """The most probable id, or one drawn as transformers draws it."""
    if temperature <= 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    least = logits_V.topk(min(_TOP_K, len(logits_V))).values[-1]
    logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    if top_p < 1:
        rising_V, order_V = logits_V.sort()
        is_tail_V = rising_V.softmax(-1).cumsum(-1) <= 1 - top_p
        is_tail_V[-1] = False
        logits_V = logits_V.masked_fill(torch.zeros_like(is_tail_V).scatter(0, order_V, is_tail_V), -torch.inf)
    return int(torch.multinomial(logits_V.softmax(-1), 1))


def _reader_of(network: BytePoolNetwork | CompactNetwork) -> Callable[[], Read]:
    weight = next(network.parameters())

    def start() -> Read:
        if isinstance(network, BytePoolNetwork):
            state = network.start(1, device=weight.device, dtype=weight.dtype)
            return lambda ids: network.advance(torch.tensor([ids], device=weight.device), state, keep=1)[0, -1]
        cache = TrunkCache.empty(network.trunk, 1, weight.device, weight.dtype)
        return lambda ids: network(torch.tensor([ids], device=weight.device), cache=cache)[0, -1]

    return start


def _read_network(config: dict[str, Any], weights: Path) -> BytePoolNetwork | CompactNetwork:
    """The network with the weights of a file, which stay on the disk until they are used."""
    try:
        with _nothing_drawn():
            network = _NETWORKS[config["model_type"]](config)
    # Numbers that cannot be: of another kind, or so large that there is no memory for it.
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise _damaged(weights.parent / "config.json", error) from error
    try:
        tensors = load_file(weights)
    except Exception as error:  # the library raises kinds of its own for damaged files
        raise CheckpointError(f"{weights} is damaged ({error}). Save the model again.") from error
    stripped = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    try:
        network.load_state_dict(stripped, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{weights} does not hold what its config.json describes: {reason}") from error
    return network


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Make modules without filling their tensors, whose memory is then never taken: their weights come from a file.

    The meta device would do the same, and load half of torch.
    """
    fills = [name for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    kept = {name: getattr(torch.nn.init, name) for name in fills}
    try:
        with torch.random.fork_rng(devices=[]):
            for name in fills:
                setattr(torch.nn.init, name, lambda tensor, *_args, **_options: tensor)
            yield
    finally:
        for name, fill in kept.items():
            setattr(torch.nn.init, name, fill)


def _damaged(path: Path, error: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({error}). Save the model again.")


def _byte_pool(config: dict[str, Any]) -> BytePoolNetwork:
    if config.get("vocab_size", SYMBOLS) != SYMBOLS:
        raise ValueError(f"vocab_size is {config['vocab_size']!r}; a byte model has {SYMBOLS} symbols")
    known = BytePoolSettings.__dataclass_fields__
    return BytePoolNetwork(BytePoolSettings.read({name: config[name] for name in known if name in config}))


def _compact(config: dict[str, Any]) -> CompactNetwork:
    names = ("vocab_size", "trunk", "tie_embeddings", "logit_softcap")
    return CompactNetwork(**{name: config[name] for name in names if name in config})


def _read_text(folder: Path, config: dict[str, Any]) -> tuple[Callable[[bytes], list[int]], tuple[bytes, ...]]:
    """How a prompt becomes ids, and the bytes of every id."""
    if (folder / SEGMENTER_FILE).is_file():
        segmenter, patch_bytes = read_segmenter(folder)
        if patch_bytes > config.get("patch_bytes", patch_bytes):
            raise CheckpointError(
                f"{folder}: wrong tokenizer. It makes patches of up to {patch_bytes} symbols, and the model reads no more than "
                f"{config['patch_bytes']}. Put the tokenizer that the model was trained with beside it."
            )
        return (
            lambda data: open_prompt(encode_document(data, segmenter, patch_bytes=patch_bytes)),
            tuple(bytes([byte]) for byte in range(256)),
        )
    pipeline = Pipeline((folder / TOKENIZER_FILE).read_text(encoding="utf-8"), str(folder))
    pieces = tuple(piece or b"" for piece in read_token_bytes(pipeline).pieces)
    # Like `stream_text`: what is special in a prompt is read as such, and an empty one begins a text.
    pipeline.backend_tokenizer.encode_special_tokens = False
    opening = next((config[role] for role in ("bos_token_id", "eos_token_id") if isinstance(config.get(role), int)), 0)
    return lambda data: pipeline.backend_tokenizer.encode(data.decode(errors="replace")).ids or [opening], pieces


def _end_ids(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """The ids that end a text: what generation_config.json says, else config.json."""
    path = folder / "generation_config.json"
    words = read_json(path) if path.is_file() else {}
    ends = words.get("eos_token_id") if isinstance(words, dict) else None
    ends = config.get("eos_token_id", EOD) if ends is None else ends
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not (isinstance(words, dict) and all(type(end) is int for end in found)):
        raise _damaged(path if path.is_file() else folder / "config.json", f"eos_token_id is {found!r}")
    return frozenset(found)


_NETWORKS: dict[str, Callable[[dict[str, Any]], BytePoolNetwork | CompactNetwork]] = {
    "limbeck_bytepool": _byte_pool,
    "limbeck_compact": _compact,
}
