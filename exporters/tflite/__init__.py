"""`.tflite`: Gemma 3 as one TensorFlow Lite file, for Android and for CPUs.

Nothing is traced and nothing is quantised again: `decoder` writes the operators (`batch` those of
several conversations at once), `weights` hands over the checkpoint's own codes and scales,
`flatbuffer` packs both. The file's names, signatures and metadata are in
`gemma_multi.formats.tflite.layout`. (LiteRT-LM cannot use the last positions of a context that the
smallest prefill size does not fit into.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Provenance
from gemma_multi.config import check_context_length
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.files import write_atomically
from gemma_multi.formats.tflite.file import ExportInfo, metadata_json
from gemma_multi.formats.tflite.layout import (
    BATCH_SIZES,
    CACHE_TYPES,
    METADATA,
    NORMS,
    PREFILL_PRECISIONS,
    TOKENIZER,
    TRAILER_MARK,
)
from gemma_multi.options import option
from gemma_multi.progress import Report, silent
from gemma_multi.sentencepiece_model import with_spoken_steering_pieces
from gemma_multi.transforms import TensorError, fit_float16

PRECISIONS = ("int4", "int8", "float32")
TARGETS = ("cpu", "gpu")
# tokens: the large one for speed; the small ones for short texts, as behind a known instruction
PREFILL = (16, 64, 128)
_INT8_CACHES_FROM = 8193  # positions; at 32,768 float32 caches would take 217 MB
_ALIGNMENT = 16
_FLOAT16_WHOLE = 2048  # so far float16 has every whole number
_LARGEST = (1 << 31) - (1 << 24)  # bytes; offsets in a flatbuffer have 31 bits


@dataclass(frozen=True)
class TfliteOptions:
    """What a `.tflite` and a `.litertlm` can be told."""

    context_length: int | None = option(None, "Positions it can hold; all the model has.")
    prefill: Sequence[int] | None = option(
        None, "Tokens read at a time, one graph each.  [16, 64, 128]; LiteRT-LM on GPUs: 16 to 512"
    )
    precision: str = option("auto", "int4, int8, float32, or auto: as stored, float32 if dense.")
    cache: str = option(
        "auto", "Type of the global layers' caches: float32, int8, or auto: int8 from 8,193 "
        "positions on if weights are quantised."
    )  # fmt: skip
    target: str = option(
        "cpu", "gpu: what LiteRT's GPU delegate takes, and CPUs too; int4 weights become int8 rows."
    )
    prefill_precision: str = option(
        "same", "int8: prompts are read with int8 rows, kept beside int4 layers: quicker on CPUs, "
        "for 100 MB of a 270M."
    )  # fmt: skip
    decode_batch: int = option(
        1, "Conversations whose next tokens one call reads, for servers: 2, 4 or 8."
    )


def _write(
    checkpoint: Checkpoint, output: Path, options: TfliteOptions, progress: Report
) -> ExportReport:
    built = build(
        checkpoint, options, tokenizer=with_spoken_steering_pieces(checkpoint.tokenizer.model),
        embed_tokenizer=True, progress=progress,
    )  # fmt: skip
    built.write(output)
    return built.report(output, EXPORTER.format)


@dataclass(frozen=True)
class Built:
    """A file in memory, and what went into it."""

    parts: list[memoryview | bytes]  # flatbuffer, padding, trailer, in this order
    info: ExportInfo
    provenance: Provenance
    refitted: tuple[TensorError, ...]  # tensors whose scales LiteRT cannot hold

    def write(self, path: Path) -> None:
        write_atomically(path, *self.parts)

    def report(self, path: Path, kind: str) -> ExportReport:
        size, info = path.stat().st_size, self.info
        return ExportReport(
            path, size, kind, info.precision, info.context_length, self.refitted, info.target
        )


def build(
    checkpoint: Checkpoint, options: TfliteOptions, *, tokenizer: bytes = b"",
    embed_tokenizer: bool = False, trace: bool = False, progress: Report = silent,
) -> Built:  # fmt: skip
    """The file, not yet written.

    `tokenizer` is the SentencePiece model that goes along, inside or in a section of its own.
    `trace` adds the signatures with which parity reports look for a fault.
    """
    info = choose(checkpoint, options)
    if options.target == "gpu":
        checkpoint = fit_float16(checkpoint)
    try:
        from gemma_multi.exporters.tflite.batch import add_batch_signatures
        from gemma_multi.exporters.tflite.decoder import add_signatures
        from gemma_multi.exporters.tflite.flatbuffer import ModelWriter
        from gemma_multi.exporters.tflite.positions import Shape
        from gemma_multi.exporters.tflite.weights import int8_layers, linear_weights, prepare
    except ImportError as error:
        raise BackendError(
            f"exporting needs ai-edge-litert ({error}): pip install 'gemma-multi[litert]'"
        ) from error
    checkpoint, refitted = prepare(
        checkpoint, info.precision, progress, for_gpu=options.target == "gpu"
    )
    config = checkpoint.config
    model = ModelWriter(f"Gemma 3, {info.precision}, context {info.context_length}")
    shape = Shape(
        info.context_length, info.prefill, info.cache == "int8", trace, info.target == "gpu"
    )
    weights = linear_weights(checkpoint, info.precision)
    norms = {name: checkpoint.weight(name) for name, s in config.tensor_shapes().items()
             if len(s) == 1}  # fmt: skip
    gains = {name: (1 + norm.astype(np.float32)) * np.float32(config.norm_gain(name))
             for name, norm in norms.items()}  # fmt: skip
    prompts = weights
    if info.prefill_precision == "int8":
        prompts = weights | int8_layers(checkpoint)
    add_signatures(model, config, shape, weights, prompts, gains)
    add_batch_signatures(model, config, shape, weights, gains, info.decode_batch)
    how = f"exported for LiteRT as {info.precision}, context length {info.context_length}"
    if info.prefill_precision == "int8":
        how += ", to read prompts with layers rounded to int8 rows"
    provenance = checkpoint.provenance.modified(how)
    model.add_metadata(METADATA, metadata_json(
        config, info, checkpoint.generation, provenance,
        {name: norm.dtype.name for name, norm in norms.items()}, tokenizer,
    ))  # fmt: skip
    model.add_metadata(NORMS, b"".join(np.ascontiguousarray(n).tobytes() for n in norms.values()))
    model.add_metadata("NOTICE", provenance.notice().encode())
    if embed_tokenizer:
        model.add_metadata(TOKENIZER, tokenizer)
    graph = model.pack()
    padding = bytes(-len(graph) % _ALIGNMENT)
    sha = hashlib.sha256(graph)
    sha.update(padding)
    return Built([graph, padding, TRAILER_MARK + sha.digest()], info, provenance, refitted)


def choose(checkpoint: Checkpoint, options: TfliteOptions) -> ExportInfo:
    """The options, checked, with the automatic ones decided."""
    precision, prefill, cache = options.precision, options.prefill, options.cache
    length = check_context_length(options.context_length, checkpoint.config.max_position_embeddings)
    if precision == "auto":  # float32 holds whatever is stored, mixtures too
        precision = checkpoint.precision if checkpoint.precision in PRECISIONS else "float32"
    if options.target not in TARGETS:
        raise OptionError(f"target is {options.target!r}, expected {' or '.join(TARGETS)}")
    if options.target == "gpu" and precision == "int4":
        if options.precision == "int4":
            raise OptionError(
                "precision 'int4' is not for target 'gpu': LiteRT's GPU delegate ends the process "
                "on int4 in blocks; leave it out, and the weights are written as int8 rows"
            )
        precision = "int8"
    if precision not in PRECISIONS:
        raise OptionError(
            f"precision is {precision!r}, expected one of auto, {', '.join(PRECISIONS)}"
        )
    if prefill is not None and (isinstance(prefill, str) or not isinstance(prefill, Sequence)):
        raise OptionError(f"prefill is {prefill!r}, expected a list of sizes, such as [16, 128]")
    sizes = tuple(s for s in PREFILL if s <= length) if prefill is None else tuple(prefill)
    for size in sizes:
        if type(size) is not int or not 2 <= size <= length:
            raise OptionError(f"prefill size is {size!r}, expected 2 to {length} tokens")
        if options.target == "gpu" and size > _FLOAT16_WHOLE:
            raise OptionError(
                f"prefill size is {size}, but target 'gpu' takes at most {_FLOAT16_WHOLE}: up to "
                "there float16 counts its rows"
            )
    sizes = tuple(sorted(set(sizes))) or (length,) * (length > 1)
    if not sizes:
        raise OptionError(f"context_length is {length}, expected at least 2 for an export")
    if cache == "auto":
        cache = "int8" if precision != "float32" and length >= _INT8_CACHES_FROM else "float32"
    if cache not in CACHE_TYPES:
        raise OptionError(f"cache is {cache!r}, expected auto, {' or '.join(CACHE_TYPES)}")
    check_ways_of_reading(options.prefill_precision, options.decode_batch)
    if options.prefill_precision == "int8" and precision != "int4":
        raise OptionError(
            f"prefill_precision 'int8' is for int4 layers, but these are {precision}; leave it out"
        )
    rows = options.decode_batch
    if rows > 1 and options.target == "gpu":
        raise OptionError(
            f"decode_batch is {rows}, but target 'gpu' reads one conversation at a time; leave it "
            "out"
        )
    bits = {"int4": 4.5, "int8": 8, "float32": 32}[precision]
    config = checkpoint.config
    nbytes = int(config.num_parameters * bits / 8)
    if options.prefill_precision == "int8":  # the layers once more
        nbytes += config.num_parameters - config.vocab_size * config.hidden_size
    if nbytes >= _LARGEST:
        raise OptionError(
            f"as {precision} the model takes {nbytes / 1e9:.1f} GB, but a .tflite file holds less "
            "than 2; use a smaller precision"
        )
    return ExportInfo(
        precision, length, sizes, cache, options.target, options.prefill_precision, rows
    )


def check_ways_of_reading(prefill_precision: Any, decode_batch: Any) -> None:
    """Raises OptionError for what they cannot be in any file."""
    if prefill_precision not in PREFILL_PRECISIONS:
        raise OptionError(
            f"prefill_precision is {prefill_precision!r}, expected "
            f"{' or '.join(PREFILL_PRECISIONS)}"
        )
    if type(decode_batch) is not int or decode_batch not in (1, *BATCH_SIZES):
        raise OptionError(f"decode_batch is {decode_batch!r}, expected 1, 2, 4 or 8")


EXPORTER = Exporter(format="tflite", options=TfliteOptions, write=_write)
