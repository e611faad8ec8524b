"""A checkpoint to a precision: the grids, and dense types.

Design choices:
- Weights go on the int4 grid once, from the values they were trained to. What is on it already is
  never put on another: `original` refuses it, by name. int8 is within 0.5% of those values and
  stands for them; many files of other programs hold nothing better.
- Dense from quantised is exact in float32; it is how a mixture is run.
- SFP8 is a type as bfloat16 is: anything can be rounded to it, once, from what stands there. Only
  matrices are; norms stay as they are.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor, TensorInfo, Tensors
from gemma_multi.config import EMBEDDING
from gemma_multi.errors import CheckpointError, OptionError, PlainRoundingWarning
from gemma_multi.progress import Report, silent
from gemma_multi.quantization.int4 import GROUP_SIZE
from gemma_multi.quantization.tensor import (
    BFLOAT16,
    SFP8,
    QuantizedTensor,
    Sfp8Tensor,
    quantize_tensor,
    sfp8_tensor,
)
from gemma_multi.transforms.report import QuantizationReport, TensorError

GRIDS = {"int4": 4, "int8": 8}
DENSE = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
_ROWS = 8192  # of a tensor, looked at at once
_ROUNDED = (
    "int4 made on the way rounds each weight to its nearest code, which takes the perplexity of "
    "Gemma 3 270M from 29 to 47; quantize(model, directory) chooses codes by what they do, in "
    "minutes. Load that directory instead"
)


def to_precision(checkpoint: Checkpoint, precision: str, progress: Report = silent) -> Checkpoint:
    """The checkpoint with its weights as `precision`: `"auto"` as stored; a grid, `"int4"` or
    `"int8"`, for one that is not int4; or `"sfp8"` or a dense type, for any.

    Raises OptionError for an unknown precision, CheckpointError for another grid where it is on
    the int4 one.
    """
    if precision in ("auto", checkpoint.precision):
        return checkpoint
    if precision in GRIDS:
        bits = GRIDS[precision]
        if bits == 4:
            warnings.warn(_ROUNDED, PlainRoundingWarning, stacklevel=2)
        return quantize_checkpoint(checkpoint, bits, bits, progress)[0]
    if precision == SFP8:
        return _to_sfp8(checkpoint, progress)
    if precision not in DENSE:
        known = ", ".join(["auto", *GRIDS, *DENSE, SFP8])
        raise OptionError(f"unknown precision {precision!r}, expected one of {known}")
    dtype = DENSE[precision]
    tensors = {name: checkpoint.weight(name).astype(dtype) for name in checkpoint.tensors}
    return checkpoint.with_tensors(tensors, f"converted to {precision}")


def _to_sfp8(checkpoint: Checkpoint, progress: Report) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    done, total = 0, checkpoint.config.num_parameters
    for name, info in checkpoint.tensors.infos.items():
        if len(info.shape) == 2 and info.dtype != SFP8:
            tensors[name] = sfp8_tensor(checkpoint.weight(name))
        done += math.prod(info.shape)
        progress(done, total)
    return checkpoint.with_tensors(tensors, f"converted to {SFP8}")


def without_sfp8(checkpoint: Checkpoint, precision: str) -> Checkpoint:
    """The checkpoint for a format that has no SFP8 and is written as `precision`: what is stored so
    as arrays, each made when it is asked for, in bfloat16 where that is exact, else in float32.
    Raises OptionError where SFP8 is asked for."""
    if precision == SFP8:
        raise OptionError(
            f"precision is {SFP8!r}, which only an .sbs file holds; give 'bfloat16' for a model "
            "that is stored so already, which loses nothing"
        )
    dense = {}
    for name, info in checkpoint.tensors.infos.items():
        if info.dtype == SFP8:
            dtype = _exact_type(checkpoint.tensors[name])
            dense[name] = TensorInfo(info.shape, dtype.name, math.prod(info.shape) * dtype.itemsize)
    if not dense:
        return checkpoint

    def read(name: str) -> Tensor:
        if name not in dense:
            return checkpoint.tensors[name]
        return checkpoint.weight(name).astype(DENSE[dense[name].dtype], copy=False)

    return checkpoint.replace(tensors=Tensors({**checkpoint.tensors.infos, **dense}, read))


def _exact_type(tensor: Tensor) -> np.dtype:
    """Of an SFP8 tensor: each value is exact in bfloat16, and so is it times a power of two."""
    assert isinstance(tensor, Sfp8Tensor)
    return BFLOAT16 if math.frexp(tensor.scale)[0] == 0.5 else DENSE["float32"]


def original(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what is stored in int8 or SFP8 as the dense weights that stand there,
    each made when it is asked for. Raises CheckpointError where anything is on the int4 grid
    already."""
    infos = checkpoint.tensors.infos
    if checkpoint.is_int4:
        named = checkpoint.precision if checkpoint.precision in GRIDS else "int4 in part"
        raise CheckpointError(f"the checkpoint is {named} already; take the original instead")
    if not checkpoint.is_packed:
        return checkpoint
    dense = {
        name: TensorInfo(info.shape, "float32", math.prod(info.shape) * 4)
        if info.is_packed
        else info
        for name, info in infos.items()
    }
    return checkpoint.replace(tensors=Tensors(dense, checkpoint.weight))


def quantize_checkpoint(
    checkpoint: Checkpoint, bits: int = 4, embedding_bits: int = 4,
    progress: Report = silent,
) -> tuple[Checkpoint, QuantizationReport]:  # fmt: skip
    """(checkpoint on the grid, how well each tensor sits there).

    Raises OptionError for bits outside the format, CheckpointError for a checkpoint that is int4
    already or does not divide into groups.
    """
    for name, value in (("bits", bits), ("embedding_bits", embedding_bits)):
        if type(value) is not int or value not in (4, 8):
            raise OptionError(f"{name} is {value!r}, expected 4 or 8")
    checkpoint = original(checkpoint)
    errors: list[TensorError] = []
    tensors: dict[str, Tensor] = {}
    done, total = 0, checkpoint.config.num_parameters
    for name, shape in checkpoint.config.tensor_shapes().items():
        weight = checkpoint.weight(name)
        if len(shape) == 2:
            if shape[1] % GROUP_SIZE:
                raise CheckpointError(
                    f"tensor {name!r} has {shape[1]} inputs, not a multiple of {GROUP_SIZE}"
                )
            use = embedding_bits if name == EMBEDDING else bits
            tensors[name], error = quantize_tensor(weight, use)
            errors.append(TensorError(name, shape, use, error))
        else:
            tensors[name] = weight.astype(BFLOAT16)
        done += weight.size
        progress(done, total)
    how = f"quantised to int{bits} in groups of {GROUP_SIZE}, embedding int{embedding_bits}"
    return checkpoint.with_tensors(tensors, how), QuantizationReport(tuple(errors))


def tensor_error(name: str, tensor: QuantizedTensor, weight: np.ndarray) -> TensorError:
    """How far one tensor is from the weight that it stands for."""
    lost = whole = 0.0
    for start in range(0, len(weight), _ROWS):
        part = slice(start, start + _ROWS)
        w = weight[part].astype(np.float32, copy=False)
        lost += float(np.sum(np.square(tensor.rows(part).dequantize() - w), dtype=np.float64))
        whole += float(np.sum(np.square(w), dtype=np.float64))
    return TensorError(name, tensor.shape, tensor.bits, (lost / whole) ** 0.5 if whole else 0.0)
