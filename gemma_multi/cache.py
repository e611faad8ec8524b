"""The user's cache: what this package can make again. Nothing in it is ever needed.

Design choices:
- `GEMMA_MULTI_CACHE`, else the user's cache directory. A user without a home gets a directory
  under the system's temporary one that only this user can enter; a name that somebody else has
  taken there is not used.
- Exports for LiteRT are large, so `exports/` is bounded: 10 GB, or `GEMMA_MULTI_CACHE_LIMIT`. What
  was used longest ago goes first. The time of use is the file's access time, set here, because its
  modification time tells whether it was changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gemma_multi.errors import OptionError

EXPORTS, TOKENIZERS, COMPILED, CALIBRATED = "exports", "tokenizers", "jax", "calibrated"
LIBRARIES = "libraries"  # JavaScript from npm, for pages
# directories that are ours
KINDS = (EXPORTS, TOKENIZERS, COMPILED, CALIBRATED, LIBRARIES, "test-data", "benchmarks")
_DEFAULT_LIMIT = 10_000_000_000
_ABANDONED = 24 * 3600.0  # seconds after which a temporary file is taken for a killed process's
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_directory(*parts: str) -> Path:
    """Where things are kept; it may not exist yet."""
    return (_chosen() or _homeless()).joinpath(*parts)


def _chosen() -> Path | None:
    """As the user wants it, or under the user's home; None without one, as in some containers."""
    if own := os.environ.get("GEMMA_MULTI_CACHE"):
        return Path(own)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return base / "gemma_multi"


def _homeless() -> Path:
    return Path(tempfile.gettempdir(), f"gemma_multi-{_user()}")


def writable_cache(*parts: str) -> Path | None:
    """The cache directory, made; None where it cannot be written or is not this user's own."""
    try:
        if _chosen() is None and not _own_private(_homeless()):
            return None
        path = cache_directory(*parts)
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path, os.W_OK) else None


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _own_private(root: Path) -> bool:
    """Makes a directory in a place that everybody can write to, or says that it is somebody's."""
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return False
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return own and not found.st_mode & 0o077


def limit() -> int:
    """The most bytes that exports may take. Raises OptionError for a limit that is none."""
    given = os.environ.get("GEMMA_MULTI_CACHE_LIMIT", "").strip()
    if not given:
        return _DEFAULT_LIMIT
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", given, re.IGNORECASE)
    if parts is None:
        raise OptionError(
            f"GEMMA_MULTI_CACHE_LIMIT is {given!r}, expected a size such as 500MB or 20GB"
        )
    return int(float(parts[1]) * _UNITS[parts[2].upper()])


def used(path: Path) -> None:
    """Notes that a file was needed just now."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


@dataclass(frozen=True)
class CachedFile:
    """One file of the cache."""

    path: Path
    kind: str  # the directory it lies in
    nbytes: int
    used: float  # seconds since 1970


def cached_files() -> list[CachedFile]:
    """All of them, the longest unused first. What else lies in the directory is not ours."""
    root, found = cache_directory(), []
    for kind in KINDS:
        for path in (root / kind).rglob("*"):
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode):
                    found.append(CachedFile(path, kind, facts.st_size, facts.st_atime))
    return sorted(found, key=lambda file: file.used)


def trim(keep: Path | None = None) -> None:
    """Brings the exports below their limit, and removes what killed processes left. `keep` is
    what somebody is about to use."""
    most, now = limit(), time.time()
    for kind in KINDS:
        for path in cache_directory(kind).glob(".*"):
            with contextlib.suppress(OSError):
                if path.is_dir() and now - path.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(path)
    files = [file for file in cached_files() if file.kind == EXPORTS]
    total = sum(file.nbytes for file in files)
    for file in files:
        abandoned = file.path.name.startswith(".") and now - file.used > _ABANDONED
        if abandoned or (total > most and file.path != keep):
            with contextlib.suppress(OSError):  # in use, on Windows
                file.path.unlink()
                total -= file.nbytes


def clear(kind: str | None = None) -> int:
    """Empties the cache, or one kind of it; the bytes that were freed."""
    freed = 0
    for file in cached_files():
        if kind in (None, file.kind):
            with contextlib.suppress(OSError):
                file.path.unlink()
                freed += file.nbytes
    for name in KINDS if kind is None else [kind]:
        shutil.rmtree(cache_directory(name), ignore_errors=True)
    with contextlib.suppress(OSError):  # unless something of somebody else's is there
        cache_directory().rmdir()
    return freed
