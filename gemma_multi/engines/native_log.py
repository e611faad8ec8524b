"""What native code says on C's standard error stream, caught without touching file descriptor 2.

LiteRT reports a page of its internals whenever a model is loaded or dropped, and has no switch for
it. It prints to `stderr`, the C library's stream: a pointer in a variable. While something of
LiteRT's starts or ends, that variable points to a stream in memory. Python writes to the descriptor
and so is not affected, nor are other processes; what other native libraries print meanwhile is
printed afterwards. Where the C library has no such variable (Windows), LiteRT is heard.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_VARIABLES = ("stderr", "__stderrp")  # glibc's and macOS's name for it
# "INFO: [environment.cc:36] ...", "INFO: Created TensorFlow Lite XNNPACK delegate", what follows it
_THEIRS = re.compile(
    rb"(VERBOSE|INFO|WARNING|ERROR): |\xe2\x94\x94 "
    # the GPU delegate's: "I0000 00:00:17 delegate_webgpu.cc:751] ...", and where it was
    rb"|[IWEF]\d{4} [^\]]*\b(delegate_\w+|environment)\.cc:"
    rb"|=== Source Location Trace|third_party/odml/"
    rb"|Warning: Couldn't load Vulkan|    at .*third_party/dawn|$"
)


class _Stream:
    """One C stream over a temporary file, made once: a stream that another thread may be about to
    use must never be closed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a collection inside may end another model
        self.depth = 0
        self._c = ctypes.CDLL(None)
        self.variable = self._find()
        self._kept = tempfile.TemporaryFile()  # noqa: SIM115  for as long as the process lives
        self._c.fdopen.restype = ctypes.c_void_p
        descriptor = os.dup(self._kept.fileno())
        self.pointer = self._c.fdopen(descriptor, b"w")
        if not self.pointer:
            raise OSError("no stream")
        self._c.setvbuf(ctypes.c_void_p(self.pointer), None, 2, 0)  # 2: unbuffered

    def _find(self) -> ctypes.c_void_p:
        for name in _VARIABLES:
            with contextlib.suppress(ValueError):
                return ctypes.c_void_p.in_dll(self._c, name)
        raise OSError("no stderr variable")

    def text(self) -> bytes:
        size = os.fstat(self._kept.fileno()).st_size
        return os.pread(self._kept.fileno(), size, 0)

    def clear(self) -> None:
        os.ftruncate(self._kept.fileno(), 0)
        os.lseek(self._kept.fileno(), 0, os.SEEK_SET)


_stream: _Stream | None = None
_making = threading.RLock()  # a collection inside may end a model


def _get_stream() -> _Stream | None:
    global _stream
    if sys.platform == "win32" or _stream is not None:
        return _stream
    with _making:
        if _stream is None:
            try:
                _stream = _Stream()
            except (OSError, AttributeError):
                return None
        return _stream


@contextmanager
def caught() -> Iterator[Callable[[], list[str]]]:
    """Keeps what is said within; yields a function that gives its lines so far."""
    stream = None if sys.is_finalizing() else _get_stream()
    if stream is None:
        yield list
        return
    with stream.lock:
        before = stream.variable.value
        stream.depth += 1
        stream.variable.value = stream.pointer
        try:
            yield lambda: stream.text().decode(errors="replace").splitlines()
        finally:
            stream.variable.value = before
            stream.depth -= 1
            if not stream.depth:
                _pass_on(stream.text(), 2)
                stream.clear()


@contextmanager
def standard_output_caught() -> Iterator[None]:
    """Keeps off standard output what the GPU delegate says there as it starts, by C++'s `cout`,
    which has no variable: the descriptor itself points elsewhere for that time."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as kept:
        before = os.dup(1)
        os.dup2(kept.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(before, 1)
            os.close(before)
            _pass_on(os.pread(kept.fileno(), os.fstat(kept.fileno()).st_size, 0), 1)


def _pass_on(text: bytes, descriptor: int) -> None:
    others = [line for line in text.splitlines(keepends=True) if not _THEIRS.match(line)]
    if others:
        with contextlib.suppress(OSError):
            os.write(descriptor, b"".join(others))


@atexit.register
def _silence_the_end(*_: Any) -> None:
    """As the process ends, what is dropped says so where nobody can catch it any more."""
    if _stream is not None:
        _stream.variable.value = _stream.pointer
