"""ONNX: a directory that Transformers.js loads as it is, in Node and in browsers, and onnxruntime.

Nothing is traced, and nothing is quantised again: `decoder` writes the operators, `weights` hands
over the checkpoint's own codes and scales, `graph` writes the file tensor by tensor.

    config.json             generation_config.json   NOTICE   provenance.json
    tokenizer.json          tokenizer_config.json    with the chat template
    onnx/model_q4.onnx      named by what Transformers.js calls its `dtype`:

    precision   activations     dtype   file                    weights
    float32     float32         fp32    model.onnx              dense
    float16     float16         fp16    model_fp16.onnx         dense
    int4        int8, float32   q4      model_q4.onnx           MatMulNBits, GatherBlockQuantized
    int4        float16         q4f16   model_q4f16.onnx        the same
    int8        float32         q8      model_quantized.onnx    MatMul, rows' scales after it
    int8        int8            q8      model_quantized.onnx    MatMulNBits

Design choices:
- `config.json` names the dtype, so Transformers.js looks for the file that is there, and nobody has
  to say `dtype: "q4"`. Its defaults are fp32 in Node and q8 in browsers.
- float16 comes with the residual stream at a scale that it holds (`transforms.rescale`): no
  clipping, and in float32 the same bits.
- int4 is multiplied by activations rounded to int8 in blocks, as others' files ask for: onnxruntime
  then decodes 2.5 times as quickly as in float32, in WebAssembly too, where for float32 it unpacks
  each matrix at every call. Float32 is there for those who compare.
- int8 is for browsers. It is multiplied in float32 by plain operators, exactly, and ten times as
  quickly there as by MatMulNBits; for that onnxruntime holds it as float32. The same goes for an
  int8 embedding beside int4 layers of float32 activations. With int8 activations weights stay as
  small as in the file.
- int8 looks its embedding up by operators of every build of onnxruntime. int4 needs
  GatherBlockQuantized, which the WebAssembly build that Transformers.js takes by default has on
  WebGPU alone; on processors it wants the plain one, `ort-wasm-simd-threaded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Provenance
from gemma_multi.config import check_context_length
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.exporters.companions import (
    write_account,
    write_generation_config,
    write_tokenizer_json,
)
from gemma_multi.files import new_directory, write_json
from gemma_multi.formats.directory import CONFIG_FILE
from gemma_multi.formats.onnx import FOLDER
from gemma_multi.options import option
from gemma_multi.progress import Report, silent
from gemma_multi.transforms import GRIDS, fit_float16

# (precision, activations) -> Transformers.js' dtype and what it adds to a file's name for it; the
# first of a precision is the automatic one
_DTYPES = {
    ("float32", "float32"): ("fp32", ""),
    ("float16", "float16"): ("fp16", "_fp16"),
    ("int4", "int8"): ("q4", "_q4"),
    ("int4", "float32"): ("q4", "_q4"),
    ("int4", "float16"): ("q4f16", "_q4f16"),
    ("int8", "float32"): ("q8", "_quantized"),
    ("int8", "int8"): ("q8", "_quantized"),
}
PRECISIONS = tuple(dict.fromkeys(precision for precision, _ in _DTYPES))


@dataclass(frozen=True)
class OnnxOptions:
    precision: str = option(
        "auto", "int4, int8, float16, float32, or auto: as stored, float32 if dense."
    )
    activations: str = option(
        "auto", "What is multiplied: float32, float16 (of int4 and float16 weights), int8 (of int4 "
        "and int8: quicker on CPUs, less exact), or auto: of int4 int8, of int8 float32, else as "
        "the weights."
    )  # fmt: skip
    context_length: int | None = option(None, "Positions it can hold; all the model has.")


class _Choice(NamedTuple):
    """The options, checked, with the automatic ones decided."""

    precision: str
    activations: str
    context_length: int

    @property
    def dtype(self) -> np.dtype:
        """Of what is computed with between two products."""
        return np.dtype(np.float16 if self.activations == "float16" else np.float32)

    @property
    def names(self) -> tuple[str, str]:
        """Transformers.js' dtype, and the file's name."""
        dtype, suffix = _DTYPES[self.precision, self.activations]
        return dtype, f"model{suffix}.onnx"


def choose(checkpoint: Checkpoint, options: OnnxOptions) -> _Choice:
    """Raises OptionError."""
    length = check_context_length(options.context_length, checkpoint.config.max_position_embeddings)
    precision, activations = options.precision, options.activations
    if precision == "auto":  # float32 holds whatever is stored, mixtures too
        precision = checkpoint.precision if checkpoint.precision in GRIDS else "float32"
    if precision not in PRECISIONS:
        raise OptionError(
            f"precision is {precision!r}, expected one of auto, {', '.join(PRECISIONS)}"
        )
    possible = [other for one, other in _DTYPES if one == precision]
    if activations not in ("auto", *possible):
        raise OptionError(
            f"activations is {activations!r}, expected with precision {precision!r} one of auto, "
            f"{', '.join(possible)}"
        )
    chosen = possible[0] if activations == "auto" else activations
    return _Choice(precision, chosen, length)


def _write(
    checkpoint: Checkpoint, output: Path, options: OnnxOptions, progress: Report
) -> ExportReport:
    try:
        from gemma_multi.exporters.onnx.decoder import DecoderWriter
        from gemma_multi.exporters.onnx.graph import Graph
        from gemma_multi.exporters.onnx.weights import linear_weights, prepare
    except ImportError as error:
        raise BackendError(
            f"exporting needs onnx ({error}): pip install 'gemma-multi[onnx]'"
        ) from error
    chosen = choose(checkpoint, options)
    if chosen.dtype == np.float16:
        checkpoint = fit_float16(checkpoint)
    given = checkpoint
    checkpoint, refitted = prepare(checkpoint, chosen.precision, chosen.dtype, progress)
    config, (dtype, name) = checkpoint.config, chosen.names
    gains = {tensor: 1 + checkpoint.weight(tensor).astype(np.float32)
             for tensor, shape in config.tensor_shapes().items() if len(shape) == 1}  # fmt: skip
    linear = linear_weights(
        checkpoint, chosen.precision, chosen.dtype, chosen.activations == "int8"
    )
    graph = Graph()
    DecoderWriter(graph, config, chosen.dtype, chosen.context_length, linear, gains).write()
    provenance = checkpoint.provenance.modified(
        f"exported to ONNX as {chosen.precision} with {chosen.activations} activations, context "
        f"length {chosen.context_length}"
    )
    notes = {"NOTICE": provenance.notice()}
    writing = progress if checkpoint is given else silent  # else a bar would run twice
    with new_directory(output) as temporary:
        (temporary / FOLDER).mkdir()
        beside = graph.write(temporary / FOLDER / name, f"Gemma 3, {dtype}", notes, writing)
        _write_companions(checkpoint, provenance, chosen, beside, temporary)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return ExportReport(
        output, size, EXPORTER.format, chosen.precision, chosen.context_length, refitted
    )


def _write_companions(
    checkpoint: Checkpoint,
    provenance: Provenance,
    chosen: _Choice,
    beside: int,
    directory: Path,
) -> None:
    """What lies beside the graph, which has weights in so many files beside it."""
    config = checkpoint.config.replace(max_position_embeddings=chosen.context_length)
    theirs: dict[str, Any] = {"dtype": chosen.names[0]}
    if beside:
        theirs["use_external_data_format"] = beside
    write_json(directory / CONFIG_FILE, {**config.to_dict(), "transformers.js_config": theirs})
    write_generation_config(checkpoint, directory)
    write_tokenizer_json(checkpoint, directory, chosen.context_length)
    write_account(checkpoint, provenance, directory, "transformers.js", chosen.precision)


EXPORTER = Exporter(format="onnx", options=OnnxOptions, write=_write)
