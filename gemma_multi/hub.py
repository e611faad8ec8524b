"""Downloads from the Hugging Face hub, through huggingface_hub and its shared cache; uploads to it.

Only what a checkpoint is read from is fetched. `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and
`HF_HUB_OFFLINE` work as everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.errors import HubError

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.weights.h5",  # these three of a Keras preset
    "metadata.json",
    "assets/tokenizer/vocabulary.spm",
    "provenance.json",
    "NOTICE",
    "README.md",  # the card, which states the licence
)
# whose errors may come out of a download, beside OSError
_THEIRS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "hf_xet")
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def is_repository_id(name: str) -> bool:
    return bool(_ID.fullmatch(name)) and ".." not in name and not name.startswith(".")


@dataclass(frozen=True)
class Snapshot:
    """A repository's files at one commit, in the shared cache."""

    path: Path
    commit: str
    license: str | None  # as its card states it


def download(
    repository: str, revision: str | None = None, local_files_only: bool = False,
    bars: bool = True,
) -> Snapshot:  # fmt: skip
    """Fetches what is not in the shared cache. `bars` shows progress on a terminal.

    Raises HubError saying what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = repository + (f" at revision {revision!r}" if revision else "")
    try:
        path = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(FILES),
                local_files_only=local_files_only,
                tqdm_class=None if bars else _no_bar(),
            )
        )
    except GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise HubError(
            f"{repository} is gated: log in (hf auth login, or set HF_TOKEN) and accept the "
            f"licence at {page}"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{repository} has no revision {revision!r}; use a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repository} was not found; check the spelling, or log in (hf auth login, or set "
            "HF_TOKEN) if it is private"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{named} is not in the local cache, and HF_HUB_OFFLINE is set") from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        # offline, asked to stay local, cannot connect, or an answer that is wrapped as a cause
        status = _status(error)
        if status in (401, 403):
            raise HubError(
                f"{repository}: the hub answered {status}: log in (hf auth login, or set "
                f"HF_TOKEN) and accept the licence at https://huggingface.co/{repository}"
            ) from error
        if status is not None:
            raise HubError(f"{named}: the hub answered {status}; try again later") from error
        raise HubError(
            f"{named} is not in the local cache and was not downloaded (offline, or the hub was "
            "not reached); load it once with a connection, or pass a directory"
        ) from error
    except Exception as error:
        if not isinstance(error, OSError) and _package(error) not in _THEIRS:
            raise  # a bug of ours
        raise HubError(f"{named} could not be downloaded: {error}") from error
    return Snapshot(path, path.name, stated_license(path / "README.md"))


def upload(
    directory: Path, repository: str, *, private: bool = False, revision: str | None = None,
    bars: bool = True,
) -> tuple[str, str]:  # fmt: skip
    """Uploads a directory's files as one commit, to a repository and a branch that are made where
    there are none: (the commit, its address). Raises HubError saying what to do."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    login = "log in with a token that may write (hf auth login, or set HF_TOKEN)"
    if get_token() is None:
        raise HubError(f"{repository}: uploading needs a login; {login}")
    api = HfApi()
    try:
        with _bars(bars):
            api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository,
                folder_path=directory,
                revision=revision,
                commit_message=f"Upload {directory.absolute().name}",
                ignore_patterns=[".*"],
            )
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repository}: HF_HUB_OFFLINE is set; unset it to upload") from error
    except Exception as error:
        status = _status(error)
        if status in (401, 403):
            raise HubError(
                f"{repository}: the hub answered {status}: no permission to write there; {login}, "
                "or choose a repository of your own"
            ) from error
        if status is not None:
            reason = getattr(error, "server_message", None) or "no reason given"
            raise HubError(f"{repository}: the hub answered {status}: {reason}") from error
        if not isinstance(error, OSError) and _package(error) not in _THEIRS:
            raise  # a bug of ours
        raise HubError(
            f"{repository}: the upload failed ({error}); check the connection, and push again"
        ) from error
    return done.oid, str(done.commit_url)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Within, huggingface_hub shows its bars, or none."""
    from huggingface_hub import utils

    theirs: Any = utils  # which does not list what it documents
    hide = not shown and not theirs.are_progress_bars_disabled()
    if hide:
        theirs.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            theirs.enable_progress_bars()


def _no_bar() -> type:
    from tqdm.auto import tqdm

    class NoBar(tqdm):
        def __init__(self, *given: object, **options: object) -> None:
            super().__init__(*given, **{**options, "disable": True})

    return NoBar


def stated_license(card: Path) -> str | None:
    """The licence that a model card states in its header."""
    from huggingface_hub import metadata_load

    try:
        stated = (metadata_load(card) or {}).get("license")
    except Exception:  # no card, or one that nobody can read, states nothing
        return None
    return stated if isinstance(stated, str) else None


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if the hub answered at all."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None
