"""PrefixCache: what prompts have in common is read once.

An instruction, examples, a system text and the turns before the last one come again and again. The
session that has read them is kept, and each later prompt goes on from a fork of it.

Design choices:
- Keys are token ids, not texts: what counts is what a session has read. A prompt takes the entry
  that shares the longest beginning with it, cut to what they share.
- Saved, an entry is its ids and what its session `held`, in a safetensors file; only an engine of
  the same weights takes it.
- Least recently used entries go when the caches of all take more than the limit. How much one takes
  is what its session could ever hold, since engines allocate in advance.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_multi.engines import NOTHING, Engine, Session
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.files import renamed_when_whole
from gemma_multi.safetensors_file import DTYPES, read_safetensors, write_safetensors

_LEAST = 8  # tokens; a fork for fewer saves nothing
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class PrefixCache:
    """Sessions that have read beginnings of prompts."""

    def __init__(self, limit: str | int) -> None:
        """`limit` is in bytes, or a text such as `"256 MB"`; where it is less than one session may
        take, nothing is kept."""
        self.limit = _bytes(limit)
        self._entries: list[Session] = []  # the least recently used first
        self._lock = threading.Lock()  # of the list

    @property
    def nbytes(self) -> int:
        return sum(session.nbytes for session in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets all, for example because the weights have changed."""
        with self._lock:
            self._entries.clear()

    def save(self, path: Path, weights: str) -> None:
        """Writes all to a file. `weights` is an identity of what they were read with."""
        arrays: dict[str, np.ndarray] = {}
        for i, session in enumerate(self._entries):
            arrays[f"{i}.ids"] = session.ids
            arrays |= {f"{i}.held.{name}": array for name, array in session.held().items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with renamed_when_whole(path) as temporary:
                contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
                write_safetensors(contiguous, temporary, {"weights": weights})
        except OSError as error:
            raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from error

    def load(self, path: Path, weights: str, engine: Engine, context_length: int) -> int:
        """Takes in what a file has, as long as there is room; how many. Raises CheckpointError for
        a file that is damaged, OptionError for one of other weights or another engine."""
        arrays, about = read_safetensors(path, {**DTYPES, "I32": np.dtype("<i4"),
                                                "I8": np.dtype("i1")})  # fmt: skip
        if about.get("weights") != weights:
            raise OptionError(
                f"{path}: was read with other weights, another backend or precision; save it again"
            )
        sessions = []
        for i in range(sum(name.endswith(".ids") for name in arrays)):
            beginning = f"{i}.held."
            session = engine.session(context_length)
            if f"{i}.ids" not in arrays:
                raise CheckpointError(f"{path}: {i}.ids is missing")
            session.restore(arrays[f"{i}.ids"], {
                name.removeprefix(beginning): array for name, array in arrays.items()
                if name.startswith(beginning)
            })  # fmt: skip
            sessions.append(session)
        for session in sessions:
            self._add(session)
        return sum(session in self._entries for session in sessions)

    def start(
        self, engine: Engine, ids: Sequence[int], keep: int, context_length: int
    ) -> tuple[Session, int]:
        """A session that has read a beginning of `ids`, never all of them, and how many of those
        tokens were read for an earlier prompt. Their first `keep` are kept for the next."""
        wanted = np.asarray(ids, np.int32)
        session, reused = self._best(wanted, context_length)
        if session is None:
            session = engine.session(context_length)
        keep = min(keep, len(ids) - 1)
        fits = session.nbytes <= self.limit
        if keep >= _LEAST and fits and session.length < keep:
            session.read(wanted[session.length : keep], NOTHING)
            self._add(session.fork())
        return session, reused

    def _best(self, wanted: np.ndarray, context_length: int) -> tuple[Session | None, int]:
        best, most = None, _LEAST - 1
        with self._lock:
            for entry in self._entries:
                shared = shared_beginning(entry.ids, wanted[:-1])
                if shared > most and entry.context_length == context_length:
                    best, most = entry, shared
            if best is None:
                return None, 0
            self._entries.remove(best)
            self._entries.append(best)
            session = best.fork()
        session.truncate(most)
        return session, most

    def _add(self, session: Session) -> None:
        with self._lock:
            self._entries.append(session)
            while self._entries and self.nbytes > self.limit:
                del self._entries[0]


def shared_beginning(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens two rows have in common at their beginning."""
    length = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(different[0]) if len(different) else length


def _bytes(limit: str | int) -> int:
    if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
        return limit
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB|)\s*", str(limit), re.IGNORECASE)
    if not isinstance(limit, str) or not found:
        raise OptionError(f"prefix_cache is {limit!r}, expected a size such as '256 MB', or 0")
    return int(float(found[1]) * _UNITS[found[2].upper()])
