"""To the hub: one folder, one commit. A stopped upload is taken up by the same command, for the hub keeps what arrived."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.core.errors import EnvironmentFault, PublishError
from limbeck.deploy.card import MARK
from limbeck.deploy.folder import Upload

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,94}")
_MADE_BY_THE_HUB = {".gitattributes"}
_MOST_CARD_BYTES = 2_000_000


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the hub would refuse. Raises: PublishError."""
    owner, slash, name = repo_id.partition("/")
    parts = (owner, name)
    if (
        not slash
        or not all(_NAME.fullmatch(part) and "--" not in part and part[-1] not in "-." for part in parts)
        or name.endswith(".git")
    ):
        raise PublishError(
            f'"{repo_id}" is no name for a model on the hub. Expected OWNER/NAME of letters, digits, "-", "_" and ".", '
            "such as ada/tiny-student (you, or an organisation you may write to, and the model's name)."
        )


def open_hub() -> Any:
    """The hub's client, with the person's own token.

    Raises: PublishError when offline, or when there is no token.
    """
    from huggingface_hub import HfApi, constants, get_token

    from limbeck import __version__

    if constants.is_offline_mode():
        raise PublishError(
            "HF_HUB_OFFLINE is set, so nothing can be published. Unset it, or give --dry-run to write the folder only."
        )
    token = get_token()
    if not token:
        raise PublishError(
            "no token for the hub. Log in with `hf auth login`, or set HF_TOKEN to a token that may write; --dry-run needs none."
        )
    return HfApi(token=token, library_name="limbeck", library_version=__version__)


def push_folder(api: Any, upload: Upload, repo_id: str, *, private: bool, message: str | None) -> str:
    """Create the repository if there is none, and commit the folder's files; returns the model's address.

    message: the commit's message. A repository that holds another model, or another run's, is only written to when a
    message is given; nothing that is there is deleted, and its history keeps what is replaced.

    Raises: PublishError with what to do.
    """
    with explain_hub(repo_id):
        url = str(api.create_repo(repo_id, repo_type="model", private=True if private else None, exist_ok=True))
        if private and not getattr(api.repo_info(repo_id, repo_type="model"), "private", True):
            raise PublishError(
                f"--private was given, but {repo_id} exists and is public. Make it private on its page, or take another name."
            )
        if message is None:
            _refuse_other_content(api, upload, repo_id)
        api.upload_folder(
            repo_id=repo_id, repo_type="model", folder_path=str(upload.folder), allow_patterns=sorted(upload.files),
            commit_message=message or f"Limbeck: {repo_id.partition('/')[2]}",
        )  # fmt: skip
    return url


def _refuse_other_content(api: Any, upload: Upload, repo_id: str) -> None:
    there = set(api.list_repo_files(repo_id, repo_type="model")) - _MADE_BY_THE_HUB
    if not there:
        return
    if "README.md" in there:
        path = Path(api.hf_hub_download(repo_id, "README.md", repo_type="model"))
        with open(path, encoding="utf-8", errors="replace") as stream:
            theirs = MARK.search(stream.read(_MOST_CARD_BYTES))
        ours = MARK.search((upload.folder / "README.md").read_text(encoding="utf-8"))
        if theirs and ours and theirs[1] == ours[1]:
            return
    some = ", ".join(sorted(there)[:5]) + (", ..." if len(there) > 5 else "")
    raise PublishError(
        f"{repo_id} already holds something else ({some}). To add this model to it, say why with --message TEXT (what is replaced stays in its "
        "history); or take another name."
    )


# What the hub's client has used for its connections, of late httpx2.
_NETWORK_PACKAGES = ("httpx2", "httpcore2", "httpx", "httpcore", "requests", "urllib3", "hf_xet")


@contextmanager
def explain_hub(repo_id: str) -> Iterator[None]:
    """Turn what the hub's client raises into what the person can do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (PublishError, EnvironmentFault):
        raise
    except LocalTokenNotFoundError as error:
        raise PublishError("no token for the hub. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except HFValidationError as error:
        raise PublishError(
            f'"{repo_id}" is no name for a model on the hub: {_first_line(error)}. Expected OWNER/NAME.'
        ) from error
    except OfflineModeIsEnabled as error:
        raise PublishError(
            "the hub's client is set to be offline (HF_HUB_OFFLINE). Unset it and give the same command again."
        ) from error
    except HfHubHTTPError as error:
        raise PublishError(_http_words(error, repo_id)) from error
    except (OSError, RuntimeError) as error:
        raise PublishError(_cut_off(repo_id, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _NETWORK_PACKAGES:
            raise
        raise PublishError(_cut_off(repo_id, error)) from error


def _http_words(error: Any, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    owner = repo_id.partition("/")[0]
    told = _first_line(error)
    if status == 401:
        return f"the hub does not know the token ({told}). Log in again with `hf auth login`, or set HF_TOKEN anew."
    if status in (403, 404):
        return (
            f'no right to write to {repo_id} ({told}). Is "{owner}" you, or an organisation you may write to, and may the token write '
            "(not read only)?"
        )
    if status in (400, 422):
        return f"the hub refused what was sent to {repo_id}: {told}. Give --dry-run --out DIR and look at the card's metadata."
    if status == 429:
        return f"the hub asks to wait ({told}). Give the same command again later; what has arrived is not sent again."
    return _cut_off(repo_id, error)


def _cut_off(repo_id: str, error: Exception) -> str:
    return (
        f"the hub could not be reached, or the upload to {repo_id} was cut off ({_first_line(error)}). Give the same command again: "
        "what has arrived is not sent again."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[0] if lines else type(error).__name__
    token = os.environ.get("HF_TOKEN")
    words = words.replace(token, "...") if token else words
    return words[:200].rstrip(".")


def card_from_hub(repo_id: str, revision: str | None, *, api: Any = None) -> str | None:
    """The card of a hub model: from the cache, else through the client when one is given; None when it cannot be had."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repo_id, "README.md", revision=revision)
        if isinstance(cached, str):
            return _head_of(Path(cached))
        if api is None:
            return None
        return _head_of(Path(api.hf_hub_download(repo_id, "README.md", repo_type="model", revision=revision)))
    except Exception:  # whatever is wrong with it: then its licence is not known, and the person is asked
        return None


def _head_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return stream.read(256_000).decode("utf-8", errors="replace")
