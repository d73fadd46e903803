"""Loading a teacher: from the Hub, a folder, a GGUF file, or the small one that ships with Limbeck."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from limbeck.core.errors import TeacherError, unknown_name
from limbeck.models.bare_folder import SEGMENTER_FILE
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.hybrid import register_model
from limbeck.models.large import quantised_options
from limbeck.models.teacher_errors import ask_hub_once, explain_loading, hub_reason, refuse_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = "embedded"

_MOST_LAYERS = 10_000
_SAMPLES_PER_TENSOR = 64
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "dtype", "architectures", "auto_map"})


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher ready to be asked.

    source: what was asked for. fingerprint: SHA-256 over configuration, tensor names and shapes, and a sample of the
    weights as loaded. kind: "hub", "folder", "gguf" or "embedded".
    """

    model: Any
    tokenizer: Any
    source: str
    fingerprint: str
    kind: str


@dataclass(frozen=True)
class _Place:
    """Where transformers has to look: its first argument, and further ones."""

    kind: str
    name: str
    options: dict[str, Any]


def load_teacher(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    quantise: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedTeacher:
    """Load a causal language model and its tokenizer, in evaluation mode.

    source: a Hub id ("EleutherAI/pythia-70m"), a folder written by save_pretrained (a student of ours included), a
    .gguf file (dequantised on loading), or "embedded". quantise: "int8" or "int4" to hold the weights of linear layers in
    so many bits, None to hold them in `dtype`; a quantised model can teach, but not start a student. trust_remote_code:
    run code that the model's authors ship; never set by a recipe alone.

    Raises: TeacherError when it is missing, damaged, incomplete, no causal language model, or its tokenizer does not
    fit. EnvironmentFault when `quantise` needs a package that is missing. The message says what to do.
    """
    if dtype not in DTYPES:
        raise TeacherError("teacher.dtype: " + unknown_name("dtype", dtype, DTYPES))
    register_model()
    place = _locate_to_load(source, revision=revision)
    options = {} if quantise is None else _quantised_options(place, quantise, DTYPES[dtype], torch.device(device))
    model = _load_model(place, options, revision=revision, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    tokenizer = _load_tokenizer(place, revision=revision, trust_remote_code=trust_remote_code)
    _check_vocabulary(model, tokenizer, source)
    model = (model if quantise else model.to(device)).eval()
    return LoadedTeacher(model, tokenizer, source, fingerprint(model), place.kind)


def load_tokenizer(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of anything `load_teacher` takes, without the model.

    Raises: TeacherError when there is none.
    """
    place = _locate_to_load(source, revision=revision, weights=False)
    return _load_tokenizer(place, revision=revision, trust_remote_code=trust_remote_code)


def _locate(source: str, *, weights: bool = True) -> _Place:
    if source == EMBEDDED:
        folder = Path(str(files("limbeck"))) / "embedded_teacher"
        if not (folder / "config.json").exists():
            raise TeacherError(
                'the teacher "embedded" is not part of this installation. Reinstall limbeck from a wheel, or name '
                "another teacher (a Hub id, a folder or a .gguf file)."
            )
        return _Place(EMBEDDED, str(folder), {})
    path = Path(source).expanduser()
    if path.is_dir():
        refuse_folder(path, weights=weights)
        return _Place("folder", str(path), {})
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise TeacherError(f"teacher.source: there is no file {path}. Check the path of the GGUF file.")
        return _Place("gguf", str(path.parent), {"gguf_file": path.name})
    if path.is_file():
        raise TeacherError(
            f"teacher.source: {path} is a file of an unknown kind. Give a folder, a .gguf file or a Hub id."
        )
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise TeacherError(f"teacher.source: there is no folder {path}. Check the path, or give a Hub id (owner/name).")
    return _Place("hub", source, {})


def _locate_to_load(source: str, *, revision: str | None, weights: bool = True) -> _Place:
    place = _locate(source, weights=weights)
    if place.kind == "hub":
        ask_hub_once(place.name, revision=revision or "main")
    return place


def _quantised_options(place: _Place, quantise: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    if place.kind == "gguf":
        raise TeacherError(
            f"{place.options['gguf_file']}: a GGUF file is dequantised on loading and cannot be quantised again. Leave "
            "teacher.quantise out, or give the model's folder or Hub id."
        )
    return quantised_options(quantise, dtype=dtype, device=device)


def _load_model(
    place: _Place, options: dict[str, Any], *, revision: str | None, dtype: torch.dtype, trust_remote_code: bool
) -> Any:
    shared = {"revision": revision or "main", "trust_remote_code": trust_remote_code, **place.options}
    with explain_loading(place.name, place.kind):
        config = AutoConfig.from_pretrained(place.name, **shared)
    _check_config(config, place)
    with explain_loading(place.name, place.kind), quietly():
        options = _gguf_options() if place.kind == "gguf" else options
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place.name, config=config, dtype=dtype, output_loading_info=True, **shared, **options
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise TeacherError(
            f"{place.name}: {len(missing)} weights are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), so the model would be partly random. "
            "The files are incomplete, or belong to another configuration: get them again."
        )
    _check_causal(model, place.name)
    return model


def _gguf_options() -> dict[str, Any]:
    """Ask for plain weights: blocks left as they are could be neither trained nor saved."""
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and its table of missing weights: we refuse those in words."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _check_config(config: Any, place: _Place) -> None:
    if config.is_encoder_decoder:
        raise TeacherError(
            f"{place.name} is an encoder-decoder ({config.model_type}); only decoder-only language models can be "
            "teachers."
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if not 0 <= layers <= _MOST_LAYERS:
        raise TeacherError(f"{place.name}: its config.json asks for {layers} layers; that cannot be right.")
    for part in (config, getattr(config, "backbone", None)):
        wanted = str(getattr(part, "_attn_implementation", None))
        if "/" in wanted:
            raise TeacherError(
                f"{place.name}: its config.json asks for attention code from the Hub ({wanted}), "
                "which is never fetched. Remove the key attn_implementation from it."
            )


def _check_causal(model: Any, name: str) -> None:
    """A later token must not change an earlier prediction."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 9, device=model.device).remainder(vocabulary).repeat(2, 1)
    ids[1, 4:] = 0
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits[:, :4].float()
    rounding = 10 * torch.finfo(model.dtype).eps * float(logits.abs().max())
    if float((logits[0] - logits[1]).abs().max()) > rounding:
        raise TeacherError(
            f"{name} is not a causal language model: its predictions look at later tokens ({model.config.model_type}). "
            "Choose a decoder-only model."
        )


def _load_tokenizer(place: _Place, *, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        with quietly():
            # Some families' own classes would be taken in the place of ours.
            is_bytes = (Path(place.name) / SEGMENTER_FILE).is_file()
            tokenizer = (ByteTokenizer if is_bytes else AutoTokenizer).from_pretrained(
                place.name, revision=revision or "main", trust_remote_code=trust_remote_code, **place.options
            )
    except Exception as error:
        if (reason := hub_reason(error, place.name)) is not None:
            raise TeacherError(reason) from error
        raise TeacherError(
            f"{place.name} has no usable tokenizer ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). Save the teacher's tokenizer into "
            "the same folder (tokenizer.save_pretrained), or name one under tokenizer.source."
        ) from error
    if not len(tokenizer):
        raise TeacherError(
            f"{place.name} has an empty tokenizer. Save the teacher's own tokenizer into the same folder."
        )
    return tokenizer


def _check_vocabulary(model: Any, tokenizer: Any, source: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise TeacherError(
            f"{source}: wrong tokenizer. It has {len(tokenizer)} tokens, but the model knows only {rows}. "
            "Put the tokenizer that the model was trained with beside it."
        )
    cut, read = (getattr(of, "patch_bytes", None) for of in (tokenizer, model.config))
    if cut and read and cut > read:
        raise TeacherError(
            f"{source}: wrong tokenizer. It makes patches of up to {cut} symbols, and the model reads no more than {read}. "
            "Put the tokenizer that the model was trained with beside it."
        )


def fingerprint(model: Any) -> str:
    """SHA-256 that tells two models apart: configuration, names and shapes of all tensors, and a sample of each."""
    digest = hashlib.sha256(json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = _plain(tensor.detach()).flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)][:_SAMPLES_PER_TENSOR]
        digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A quantised tensor of torchao as an ordinary one; any other as it is."""
    return tensor.dequantize() if type(tensor).__module__.startswith("torchao") else tensor


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return value
