"""Saying in plain words why a teacher could not be loaded, and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors as hub
from safetensors import SafetensorError

from limbeck.core.errors import LimbeckError, TeacherError

_UNREACHED = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)
_FIRST_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_SECONDS_TO_ANSWER = 10
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def refuse_folder(folder: Path, *, weights: bool) -> None:
    """Refuse a folder that holds no model, before anything is loaded.

    weights: also ask for a file of weights. Raises: TeacherError.
    """
    config = folder / "config.json"
    if not config.exists() and weights:
        raise TeacherError(
            f"{folder} holds no model: config.json is missing. Give a folder written by save_pretrained."
        )
    if config.exists():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise TeacherError(f"{config} is not readable JSON ({error}). Get the file again.") from error
        if not isinstance(content, dict) or "model_type" not in content:
            raise TeacherError(f"{config} names no model_type, so its family is unknown. Get the file again.")
    if weights and not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise TeacherError(
            f"{folder} has a config.json but no weights (model.safetensors). Was the download interrupted? "
            "Get it again."
        )


@contextmanager
def explain_loading(name: str, kind: str) -> Iterator[None]:
    """Turn whatever transformers raises while loading into a TeacherError with a way out."""
    try:
        yield
    except LimbeckError:
        raise
    except ImportError as error:
        raise TeacherError(
            f"{name} needs a package that is not installed: {_first_line(error)}{_install_hint(kind)}"
        ) from error
    except Exception as error:
        raise TeacherError(_reason(error, name, kind)) from error


def _install_hint(kind: str) -> str:
    return ' GGUF files need: pip install "limbeck[gguf]".' if kind == "gguf" else ""


def _reason(error: Exception, name: str, kind: str) -> str:
    chain = list(_chain(error))
    detail = f"({type(error).__name__}: {_first_line(error)})"
    from_hub = hub_reason(error, name)
    if from_hub is not None:
        return from_hub
    if any(isinstance(link, SafetensorError) for link in chain):
        return f"{name}: a weights file cannot be read {detail}; it is truncated or damaged. Get it again."
    if "trust_remote_code" in str(error):
        return f"{name} needs code that its authors ship, which is not run unless trust_remote_code is asked for."
    if "AutoModelForCausalLM" in str(error):
        return f"{name} is not a causal language model {detail}. Choose a decoder-only model."
    what = "GGUF file" if kind == "gguf" else "model"
    return (
        f"{name}: the {what} cannot be loaded {detail}. It is damaged, incomplete, or of a kind that the installed "
        "transformers does not know."
    )


def ask_hub_once(name: str, *, revision: str) -> None:
    """Refuse a Hub id at once when it is not in the local cache and the Hub does not answer: transformers would ask a dozen times.

    Raises: TeacherError. Whatever the Hub does answer is left to transformers.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _FIRST_FILES):
            return
        HfApi().model_info(name, revision=revision, timeout=_SECONDS_TO_ANSWER)
    except (hub.HfHubHTTPError, ValueError):
        return
    except Exception as error:
        raise TeacherError(_not_reached(name, error)) from error


def _not_reached(name: str, error: BaseException) -> str:
    why = "HF_HUB_OFFLINE is set" if isinstance(error, hub.OfflineModeIsEnabled) else _first_line(error)
    return (
        f"{name} is no folder here and not in the local cache, and the Hub cannot be reached to ask for it ({why}). Check the "
        "spelling; get it once where there is a network, or give a folder or .gguf file instead."
    )


def hub_reason(error: BaseException, name: str) -> str | None:
    """What the Hub's answer means, in words; None when the error is none of the Hub's."""
    chain = list(_chain(error))
    detail = f"({type(error).__name__}: {_first_line(error)})"
    if any(isinstance(link, hub.GatedRepoError) for link in chain):
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then log in with `hf auth login` "
            "and give the same command again."
        )
    if any(isinstance(link, hub.RevisionNotFoundError) for link in chain):
        return f"{name} exists on the Hub, but not in this revision. Check teacher.revision {detail}."
    if any(isinstance(link, hub.RepositoryNotFoundError) for link in chain):
        return (
            f"{name} is neither a folder here nor a public model on the Hub. Check the spelling (owner/name); if the "
            "model is private, log in with `hf auth login`."
        )
    if any(isinstance(link, _UNREACHED) for link in chain):
        return _not_reached(name, next(link for link in chain if isinstance(link, _UNREACHED)))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"
