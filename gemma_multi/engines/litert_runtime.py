"""The LiteRT runtime: a compiled model with its packed weights, and peace on standard error.

Design choices:
- XNNPACK packs weights for the processor at hand. They are kept in a file and mapped: a second
  start packs nothing, and processes share the memory. The file's name carries what the packing
  depends on.
- The runtime reports a page to file descriptor 2 when it starts and when it ends, and has no
  switch for that. What it says is kept for error messages; at exit, where nobody can catch it,
  descriptor 2 leads nowhere for the whole process, after Python has written what it had to say.
- What loading needed once is given back: the heap is trimmed, and the pages of the weights that
  were read to be packed are dropped from the mapping. They are 45 MB of 270M's memory.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.errors import BackendError
from gemma_multi.files import writable_cache

_descriptor = threading.RLock()  # a collection inside may end another runtime
_MADV_DONTNEED = 4
_ROOM = 3  # times the model's size: packed weights, and something to spare


class Runtime:
    """A model file, compiled. `model` is LiteRT's CompiledModel."""

    def __init__(self, path: Path, digest: str, threads: int, probe: tuple[str, str]) -> None:
        """`digest` names the packed weights ("" keeps none); `probe` is a signature and its input
        of one `i32`.

        Raises BackendError with what the runtime said.
        """
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.options import Options

        options = Options.create()
        options.cpu_options.num_threads = threads
        self._run_before: set[str] = set()
        self._packed = _place_for_packed_weights(path, digest)
        if self._packed is not None:
            options.cpu_options.xnnpack_weight_cache_path = str(self._packed)
        problem = ""
        with _captured_stderr() as said:
            try:
                self.model = CompiledModel.from_file(str(path), options=options)
                first = self.model.create_input_buffer_by_name(*probe)
                first.write(np.zeros(1, np.int32))  # starts a second environment, as loudly
            except Exception as error:
                problems = [line for line in said().splitlines() if line.startswith("ERROR")]
                problem = "; ".join(problems[-2:]) or str(error).splitlines()[0][:200]
                del error
                gc.collect()  # what was half made says goodbye on the descriptor, too
        if problem:
            raise BackendError(f"{path}: the LiteRT runtime refuses it: {problem}")
        _give_back(path)

    def run(self, signature: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Runs a signature on TensorBuffers by name."""
        self.model.run_by_name(signature, inputs, outputs)
        if signature not in self._run_before:  # the first run may have packed weights
            self._run_before.add(signature)
            if self._packed is not None and self._packed.is_file():
                with contextlib.suppress(OSError):
                    _stamp_file(self._packed).write_text(_stamp(self._packed))

    def __del__(self) -> None:
        if getattr(self, "model", None) is not None and not sys.is_finalizing():
            with contextlib.suppress(OSError), _captured_stderr():
                self.model = None


def _place_for_packed_weights(path: Path, digest: str) -> Path | None:
    """Where XNNPACK may keep what it packs: nowhere, if the disk could be too full for it, since
    it ends the process when a write fails. A file that changed since it was left goes: XNNPACK
    would believe it."""
    cache = writable_cache("litert") if digest else None
    if cache is None:
        return None
    packed = cache / f"{digest[:32]}.{_processor()}.xnnpack"
    try:
        if packed.exists():
            stamp = _stamp_file(packed)
            if stamp.exists() and stamp.read_text() == _stamp(packed):
                return packed
            packed.unlink()
        return packed if shutil.disk_usage(cache).free > _ROOM * path.stat().st_size else None
    except (OSError, ValueError):
        return None


def _stamp_file(packed: Path) -> Path:
    return packed.with_suffix(".stamp")


def _stamp(packed: Path) -> str:
    status = packed.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


@contextmanager
def _captured_stderr() -> Iterator[Any]:
    """Keeps what native code writes to file descriptor 2; yields a function that reads it."""
    with _descriptor, tempfile.TemporaryFile() as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)

        def said() -> str:
            kept.seek(0)
            return kept.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@atexit.register
def _silence_the_end() -> None:
    if "ai_edge_litert.compiled_model" in sys.modules:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _processor() -> str:
    """What packed weights depend on: the processor's abilities and the runtime's version."""
    facts = [platform.machine(), platform.processor(), metadata.version("ai-edge-litert")]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    except OSError:
        pass  # not Linux
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _give_back(path: Path) -> None:
    """Returns memory that only loading needed, where the platform offers a way (Linux)."""
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            if line.endswith(f" {path.resolve()}") and line.split()[1].startswith("r--"):
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                library.madvise(begin, end - begin, _MADV_DONTNEED)  # clean pages of a file
    except (OSError, AttributeError, ValueError):
        pass  # another platform
