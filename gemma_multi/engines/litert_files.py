"""The file that the LiteRT engine runs: the one that was opened, or one exported into the cache.

A `.litertlm` is a bundle; the model inside is unpacked to the cache, where the runtime can map
it. Two processes that need the same file wait for each other. A file that is damaged is written
again; where there is no cache, or no room in it, a passing file serves one process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock

from gemma_multi.cache import EXPORTS, limit, trim, used, writable_cache
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import check_context_length
from gemma_multi.engines.backend import Request
from gemma_multi.errors import BackendError, CheckpointError, OptionError
from gemma_multi.exporters import tflite
from gemma_multi.files import write_atomically
from gemma_multi.formats.tflite import file as tflite_file
from gemma_multi.formats.tflite import layout
from gemma_multi.formats.tflite.file import TfliteFile

DEFAULT_CONTEXT = 4096  # a graph's attention costs its whole context, so not all the model has
_SMALLEST = 1024  # context of an export in the cache; the others are powers of two
_log = logging.getLogger("gemma_multi")


def ready_file(checkpoint: Checkpoint, request: Request) -> TfliteFile:
    """The file to run. Raises OptionError where a file cannot be run as asked for."""
    context_length = request.context_length
    longest = checkpoint.config.max_position_embeddings
    if context_length is not None:
        check_context_length(context_length, longest)
    origin = checkpoint.tensors.origin
    if origin is not None and isinstance(origin.file, TfliteFile):
        file, info = origin.file, origin.file.info
        if request.precision not in ("auto", info.precision):
            raise OptionError(
                f"precision is {request.precision!r}, but {file.path} was exported as "
                f"{info.precision}; use 'auto', or export again"
            )
        if context_length is not None and context_length > info.context_length:
            raise OptionError(
                f"context_length is {context_length}, but {file.path} was exported with "
                f"{info.context_length}; export it with more"
            )
        if request.options.prefill_precision not in ("same", info.prefill_precision):
            raise OptionError(
                f"prefill_precision is {request.options.prefill_precision!r}, but {file.path} was "
                "exported without; export it again"
            )
        if request.options.decode_batch > file.info.decode_batch:
            raise OptionError(
                f"decode_batch is {request.options.decode_batch}, but {file.path} was exported "
                f"with {file.info.decode_batch}; export it again"
            )
        if file.is_whole:
            return file
        return _cached(file.digest, lambda target: write_atomically(target, file.model_bytes))

    length = min(DEFAULT_CONTEXT, longest) if context_length is None else context_length
    # a few sizes, so that a cache full of exports that differ by little is not built up
    length = min(1 << (max(length, _SMALLEST) - 1).bit_length(), longest)
    options = tflite.TfliteOptions(
        context_length=length, precision=request.precision, target=request.options.device,
        prefill_precision=request.options.prefill_precision,
        decode_batch=request.options.decode_batch,
    )  # fmt: skip

    def write(target: Path) -> None:
        _log.warning("exporting for LiteRT, once, to %s", target)
        tflite.build(checkpoint, options, progress=request.progress).write(target)

    return _cached(_export_name(checkpoint, options), write)


def _export_name(checkpoint: Checkpoint, options: tflite.TfliteOptions) -> str:
    """Says all that an export depends on."""
    facts = (
        _exporter_revision(), checkpoint.identity, json.dumps(checkpoint.config.to_dict()),
        checkpoint.provenance, options,
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


@cache
def _exporter_revision() -> str:
    """Changes with the code that writes the files."""
    sources = [*sorted(Path(tflite.__file__).parent.glob("*.py")),
               Path(str(tflite_file.__file__)), Path(str(layout.__file__))]  # fmt: skip
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _cached(name: str, write: Callable[[Path], None]) -> TfliteFile:
    """A file of the cache, written if it is missing or damaged."""
    kept = writable_cache(EXPORTS)
    if kept is not None:
        limit()  # refuses one that is none, before the work
        target = kept / f"{name}.tflite"
        with contextlib.suppress(OSError), FileLock(kept / f"{name}.lock"):
            try:
                if target.exists():
                    file = TfliteFile(target)
                    used(target)
                    return file
            except CheckpointError:
                target.unlink(missing_ok=True)
            write(target)
            trim(keep=target)
            return TfliteFile(target)
    return passing_file(name, write)


def passing_file(name: str, write: Callable[[Path], None]) -> TfliteFile:
    """A file that goes when nobody holds it any more, or this process ends."""
    directory = tempfile.mkdtemp(prefix="gemma_multi.")
    target = Path(directory) / f"{name}.tflite"
    try:
        write(target)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise BackendError(
            f"backend 'litert' needs room for the model's file, but {target} cannot be written: "
            f"{error.strerror or error}; set GEMMA_MULTI_CACHE to another place"
        ) from error
    file = TfliteFile(target)
    weakref.finalize(file, shutil.rmtree, directory, ignore_errors=True)
    return file
