"""Files: atomic writes, where this package keeps what it can make again, strict JSON."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)  # can only be read by setting it, which is safe while modules are imported
os.umask(_UMASK)


def cache_directory(*parts: str) -> Path:
    """`GEMMA_MULTI_CACHE`, or the user's cache directory; nothing in it is ever needed."""
    chosen = os.environ.get("GEMMA_MULTI_CACHE")
    if chosen:
        return Path(chosen, *parts)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        base = Path(tempfile.gettempdir())
    return base.joinpath("gemma_multi", *parts)


def writable_cache(*parts: str) -> Path | None:
    """The cache directory, made; None where it cannot be written."""
    path = cache_directory(*parts)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path, os.W_OK) else None


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file whole or not at all: a sibling temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def renamed_when_whole(path: Path) -> Iterator[Path]:
    """A temporary sibling file that becomes `path` when the block ends without an error.

    Who writes it forces it to the disk.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends without an error.

    `path` must be absent or an empty directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.iterdir():
            os.chmod(file, 0o666 & ~_UMASK)  # temporary names begin private
            _sync(file)
        os.chmod(temporary, 0o777 & ~_UMASK)
        _sync(temporary)
        if path.exists():
            path.rmdir()  # empty, and in the way of a rename on Windows
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Forces a file, or a directory's list of files, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot, and need not
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads`: of two values for one key it would drop the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
