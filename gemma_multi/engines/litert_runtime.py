"""The LiteRT runtime: a compiled model with its packed weights, and peace on the terminal.

Design choices:
- XNNPACK packs weights for the processor at hand. They are kept in a file and mapped: a second
  start packs nothing, and processes share the memory. The file is packed under a private name and
  renamed when it is whole, so that two processes that start at once, or one that is killed, leave
  nothing half-packed. Its name carries what the packing depends on, a stamp beside it its size and
  time: XNNPACK believes whatever it finds.
- What loading needed once is given back: the heap is trimmed, and the pages of the weights that
  were read to be packed are dropped from the mapping. They are 45 MB of 270M's memory.
- What the runtime says as it starts and ends is caught on its way (`native_log`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import math
import os
import platform
import re
import secrets
import shutil
from contextlib import AbstractContextManager
from ctypes import c_char_p, c_void_p, py_object
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.cache import EXPORTS, used, writable_cache
from gemma_multi.engines import native_log
from gemma_multi.errors import BackendError
from gemma_multi.files import write_atomically

_MADV_DONTNEED = 4
# what the delegate's log says of the adapter that it takes
_SELECTED = re.compile(r"Selected adapter: (.*), arch=.*, backend=(\w+), adapterType=(.*)")
_INVALID = "Validation error: "
_ROOM = 3  # times the model's size: packed weights, and something to spare


@dataclass(frozen=True)
class Place:
    """Where a model is run."""

    threads: int = 1  # of the CPU
    gpu: bool = False
    enforce_f32: bool = False  # on a GPU that has float16


class LitertRuntime:
    """A model file, compiled. `model` is LiteRT's CompiledModel."""

    def __init__(self, path: Path, digest: str, place: Place, probe: tuple[str, str]) -> None:
        """`digest` names the packed weights ("" keeps none); `probe` is a signature and its input
        of one `i32`.

        Raises BackendError with what the runtime said.
        """
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import Options

        self._on_gpu = place.gpu
        options = Options.create()
        if place.gpu:
            options.hardware_accelerators = HardwareAccelerator.GPU
            options.gpu_options.enforce_f32 = place.enforce_f32
            digest = ""  # nothing is packed for a processor
        else:
            options.cpu_options.num_threads = place.threads
        packed = _PackedWeights(path, digest)
        if packed.path is not None:
            options.cpu_options.xnnpack_weight_cache_path = str(packed.path)
        problem = no_gpu = refused = ""
        output = native_log.standard_output_caught() if place.gpu else contextlib.nullcontext()
        with packed, output, native_log.caught() as said:
            try:
                self.model = CompiledModel.from_file(
                    str(path), environment=_environment(), options=options
                )
                first = self.model.create_input_buffer_by_name(*probe)
                first.write(np.zeros(1, np.int32))  # starts a second environment, as loudly
                packed.keep()
                lines = said() if place.gpu else []
                self.gpu = _adapter(lines) if place.gpu else ""
                # of what a GPU does not take the delegate only says so, and computes zeros
                refused = _said_after(_INVALID, lines)[:200]
            except RuntimeError as error:
                lines = said()
                problems = [line for line in lines if line.startswith("ERROR")]
                problem = "; ".join(problems[-2:]) or str(error).splitlines()[0][:200]
                no_gpu = _no_gpu(lines)
                del error
                gc.collect()  # what was half made logs its end, too
        if no_gpu:
            raise BackendError(f"LiteRT finds no GPU here ({no_gpu}); use device='cpu'")
        if problem:
            raise BackendError(f"{path}: the LiteRT runtime refuses it: {problem}")
        if refused:
            raise BackendError(
                f"{path}: this GPU does not hold what the file asks for ({refused}); export the "
                "model with target='gpu', or use device='cpu'"
            )
        self.whole_on_gpu = place.gpu and bool(self.model.is_fully_accelerated())
        _give_back(path)

    def input(self, signature: str, name: str) -> Any:
        """A TensorBuffer for an input, which other signatures take as well."""
        with self._quiet():
            return self.model.create_input_buffer_by_name(signature, name)

    def memory(
        self, signature: str, name: str, shape: tuple[int, ...], kind: np.dtype
    ) -> tuple[Any, np.ndarray | None]:
        """A TensorBuffer of zeros for an input, and its memory as an array where the processor
        reaches that; it goes with the buffer."""
        buffer = self.input(signature, name)
        array = None if self._on_gpu else _host_memory(buffer, shape, kind)
        if array is None:
            buffer.write(np.zeros(shape, kind))
        else:
            array[:] = 0
        return buffer, array

    def output(self, signature: str, name: str) -> Any:
        with self._quiet():
            return self.model.create_output_buffer_by_name(signature, name)

    def _quiet(self) -> AbstractContextManager[Any]:
        """A GPU's delegate says of an int8 buffer that it does not know what it asks for."""
        return native_log.caught() if self._on_gpu else contextlib.nullcontext()

    def run(self, signature: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Runs a signature on TensorBuffers by name. Raises BackendError where a GPU does not go
        on."""
        try:
            self.model.run_by_name(signature, inputs, outputs)
        except RuntimeError as error:
            if not self._on_gpu:
                raise
            what = str(error).splitlines()[0][:200]
            raise BackendError(
                f"the GPU stopped in the middle of an answer ({what}); load the model again, or "
                "with device='cpu'"
            ) from error

    def __del__(self) -> None:
        if getattr(self, "model", None) is not None:
            with native_log.caught():
                self.model = None


def _adapter(said: list[str]) -> str:
    """The GPU's name, and what it is reached by."""
    for line in said:
        if found := _SELECTED.search(line):
            name, api, kind = found.groups()
            return f"{name}, {api}" + ", in software" * ("Software" in kind)
    return "a GPU without a name"


def _no_gpu(said: list[str]) -> str:
    """Why there is none, if that is what was said."""
    reasons = ("Couldn't load Vulkan", "No adapters found", "Failed to initialize WebGPU")
    for reason in reasons:
        if any(reason in line for line in said):
            return (reason + _said_after(reason, said)).rstrip(".")[:160]
    return ""


def _said_after(mark: str, said: list[str]) -> str:
    """What the first line that has it says after `mark`; nothing, if none has."""
    return next((line.partition(mark)[2].rstrip() for line in said if mark in line), "")


def _host_memory(buffer: Any, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray | None:
    """What a TensorBuffer holds, by LiteRT's C interface, which Python's has no word for: it can
    copy a buffer's beginning, and of an array that it is given it forgets the shape."""
    try:
        address_of = _runtime_library().LiteRtGetTensorBufferHostMemory
    except (OSError, AttributeError, StopIteration):
        return None
    capsule, api = buffer.capsule, ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = c_char_p, [py_object]
    api.PyCapsule_GetPointer.restype = c_void_p
    api.PyCapsule_GetPointer.argtypes = [py_object, c_char_p]
    pointer = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    address = c_void_p()
    if address_of(c_void_p(pointer), ctypes.byref(address)) or not address.value:
        return None
    memory = (ctypes.c_byte * (math.prod(shape) * kind.itemsize)).from_address(address.value)
    array: np.ndarray = np.ctypeslib.as_array(memory).view(kind)
    mark = np.arange(1, min(len(array), 8) + 1, dtype=kind)
    buffer.write(mark)  # is it what this version of the runtime works on?
    return array.reshape(shape) if np.array_equal(array[: len(mark)], mark) else None


@cache
def _runtime_library() -> ctypes.CDLL:
    import ai_edge_litert

    folder = Path(ai_edge_litert.__file__).parent
    return ctypes.CDLL(str(next(folder.glob("libLiteRt.*"))))


@cache
def _environment() -> Any:
    """One for the process: buffers hold on to theirs, and each says a page when it goes."""
    import ai_edge_litert
    from ai_edge_litert.environment import Environment, EnvironmentOptions

    folder = str(Path(ai_edge_litert.__file__).parent)
    return Environment.create(options=EnvironmentOptions(runtime_path=folder))


class _PackedWeights:
    """Where XNNPACK keeps what it packs: `path`, or nowhere.

    Nowhere, if the disk could be too full for it, since it ends the process when a write fails. A
    kept file that changed since it was stamped is packed anew.
    """

    def __init__(self, model: Path, digest: str) -> None:
        self.path: Path | None = None
        self._private: Path | None = None
        folder = writable_cache(EXPORTS) if digest else None
        if folder is None:
            return
        self._final = folder / f"{digest[:32]}.{_processor()}.xnnpack"
        try:
            if _stamp_file(self._final).read_text() == _stamp(self._final):
                self.path = self._final
                used(self._final)
                return
        except (OSError, ValueError):
            pass  # never packed, or not to the end
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free > _ROOM * model.stat().st_size:
                name = f".{self._final.name}.{secrets.token_hex(6)}"
                self.path = self._private = folder / name

    def __enter__(self) -> _PackedWeights:
        return self

    def keep(self) -> None:
        """Everything is packed once a model is compiled: gives the file its name. The runtime
        goes on with the mapping it has."""
        if self._private is not None and self._private.is_file():
            with contextlib.suppress(OSError):
                stamp = _stamp(self._private)
                os.replace(self._private, self._final)
                write_atomically(_stamp_file(self._final), stamp.encode())

    def __exit__(self, *_: Any) -> None:
        if self._private is not None:
            with contextlib.suppress(OSError):
                self._private.unlink(missing_ok=True)


def _stamp_file(packed: Path) -> Path:
    return packed.with_suffix(".stamp")


def _stamp(packed: Path) -> str:
    status = packed.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


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
