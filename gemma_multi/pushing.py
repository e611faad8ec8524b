"""`push`: an exported directory to the Hugging Face hub.

What Gemma's terms ask of whoever passes weights on is checked before anything leaves the machine:
the NOTICE, and a card that states the licence. A directory that does not say what it is made of is
taken to be Gemma's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_multi.checkpoint import Provenance
from gemma_multi.checkpoint.provenance import GEMMA, NOTICE_FILE
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.formats import formats
from gemma_multi.formats.directory import CARD_FILE
from gemma_multi.hub import is_repository_id, stated_license, upload


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, as one commit."""

    repository: str
    commit: str
    url: str  # of the commit, for people


def push(
    directory: str | Path, repository: str, *, private: bool = False, revision: str | None = None,
    progress: bool = True,
) -> PushReport:  # fmt: skip
    """Uploads a directory that `export`, `quantize` or `Model.save` wrote; hidden files stay.

    repository: its id, "owner/name"; made where there is none.
    private: whether one that is made is private; one that is there stays as it is.
    revision: a branch, made where there is none; else the main one.
    progress: bars on a terminal.

    Raises OptionError for what is no id, CheckpointError for what is no exported directory or
    lacks what its licence asks for, HubError where the hub does not take it.
    """
    directory = Path(directory)
    if not is_repository_id(repository):
        raise OptionError(f"repository is {repository!r}, expected an id like 'you/your-model'")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; export a model first")
    if not any(one.is_directory and one.looks_like(directory) for one in formats().values()):
        raise CheckpointError(
            f"{directory}: holds no model; push a directory that export, quantize or save wrote"
        )
    if Provenance.read(directory).license == GEMMA:
        _check_duties(directory)
    commit, url = upload(directory, repository, private=private, revision=revision, bars=progress)
    return PushReport(repository, commit, url)


def _check_duties(directory: Path) -> None:
    """Raises CheckpointError naming what is missing."""
    for name in (NOTICE_FILE, CARD_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory}: has no {name}, but Gemma's terms go along with its weights; export "
                "the model again, which writes it"
            )
    if (stated := stated_license(directory / CARD_FILE)) != GEMMA:
        raise CheckpointError(
            f"{directory / CARD_FILE}: states the licence {stated!r}, but these weights are under "
            f"Gemma's terms; put 'license: {GEMMA}' in its header"
        )
