"""Files: atomic writes, outputs that are free, locks, strict JSON.

Everything is written to a temporary sibling first and renamed when it is whole, so a killed
process leaves the old file or none. Temporary names are created with the permissions that any
file of the user would have; nothing here asks for or changes the process's umask.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_multi.errors import CheckpointError, GemmaError, OptionError, TrainingError

_TRIES = 100


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file whole or not at all: a sibling temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_whole(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def renamed_when_whole(path: Path) -> Iterator[Path]:
    """A temporary sibling file that becomes `path` when the block ends without an error.

    Who writes it forces it to the disk.
    """
    temporary = _sibling(path, lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o666)))
    mode = temporary.stat().st_mode
    try:
        yield temporary
        os.chmod(temporary, mode)  # a writer may have put a private file in its place
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends without an error.

    `path` must be absent or an empty directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, os.mkdir)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for inside in temporary.rglob("*"):
            if inside.is_file():
                os.chmod(inside, mode)  # some writers make theirs private
            _sync(inside)
        _sync(temporary)
        if path.exists():
            path.rmdir()  # empty, and in the way of a rename on Windows
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(
    path: Path, busy: str, error: type[GemmaError] = TrainingError
) -> Iterator[None]:  # fmt: skip
    """Holds a lock file, which goes again in the end; a killed process holds nothing. Raises
    `error`, saying `busy`, where another process holds it."""
    from filelock import FileLock, Timeout  # few need it

    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise error(busy) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps what is open
            path.unlink(missing_ok=True)
        lock.release()


def _sibling(path: Path, create: Any) -> Path:
    """Creates a new hidden name beside `path`."""
    for _ in range(_TRIES):
        temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}")
        with contextlib.suppress(FileExistsError):
            create(temporary)
            return temporary
    raise FileExistsError(f"no free temporary name beside {path}")


def check_output(path: Path, *, directory: bool) -> None:
    """Refuses, before any work, an output that is in use or cannot be written.

    An empty directory is free for a directory. Raises OptionError, CheckpointError.
    """
    if "\0" in str(path):  # which some calls report as absent, and others not at all
        raise OptionError(f"{str(path)!r} is not a path: it holds a null character")
    try:
        if path.exists() and not (directory and path.is_dir() and not any(path.iterdir())):
            raise OptionError(f"{path}: exists already; choose another name or remove it first")
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:  # a name too long, a directory that may not be entered
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{path}: cannot be written: no permission in {parent}")


def _sync(path: Path) -> None:
    """Forces a file, or a directory's list of files, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot, and need not
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begins_with(path: Path, mark: bytes, at: int = 0) -> bool:
    """Whether a file has these bytes at this place."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(len(mark)) == mark
    except OSError:
        return False


def file_stamp(file: Path) -> str:
    """Another whenever a file was changed or replaced; reads nothing of it."""
    status = file.stat()
    times = f"{status.st_mtime_ns}:{status.st_ctime_ns}"
    return f"{file.resolve()}:{status.st_ino}:{status.st_size}:{times}"


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, received {type(data).__name__}")
    return data


def write_json(path: Path, data: Any) -> None:
    """As people read it; not atomic, for directories that are."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads`: of two values for one key it would drop the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
