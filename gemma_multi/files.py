"""Files: atomic writes, and where this package keeps what it can make again."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_directory(*parts: str) -> Path:
    """`GEMMA_MULTI_CACHE`, or the user's cache directory; nothing in it is ever needed."""
    chosen = os.environ.get("GEMMA_MULTI_CACHE")
    if chosen:
        base = Path(chosen)
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gemma_multi"
    return base.joinpath(*parts)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: a sibling temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends without an error.

    `path` must be absent or an empty directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        mask = _umask()
        for file in temporary.iterdir():
            os.chmod(file, 0o666 & ~mask)  # temporary names begin private
            _sync(file)
        os.chmod(temporary, 0o777 & ~mask)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
