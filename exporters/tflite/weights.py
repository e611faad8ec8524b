"""A checkpoint's tensors in LiteRT's layout: the same codes and scales, another arrangement.

int4 codes are offset by 8 in our layout and two's complement in LiteRT's, which is one bit of
each code: `u ^ 8`. Scales are exact in float16 by the grid's definition. Nothing is quantised
again, except groups whose scale LiteRT cannot hold (`refit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor, dense
from gemma_multi.config import EMBEDDING
from gemma_multi.exporters.tflite.flatbuffer import Weight
from gemma_multi.formats.tflite.layout import (
    INT4_SIGN_BITS,
    INT8_SIGN_BIT,
    fused_tensors,
)
from gemma_multi.progress import Report, silent
from gemma_multi.quantization.tensor import QuantizedTensor, quantize_tensor
from gemma_multi.transforms import TensorError, to_precision


def prepare(
    checkpoint: Checkpoint, precision: str, progress: Report = silent, *, for_gpu: bool = False
) -> tuple[Checkpoint, tuple[TensorError, ...]]:
    """The checkpoint with every tensor in a form LiteRT holds, and what was refitted to get there:
    with `for_gpu` also what is int4, which becomes int8.

    Raises CheckpointError where the stored form cannot become `precision`.
    """
    if precision == "float32":  # any tensor is written so, one at a time
        return checkpoint, ()
    if not (for_gpu and checkpoint.is_int4):
        checkpoint = to_precision(checkpoint, precision, progress)
    refitted: dict[str, Tensor] = {}
    errors = []
    for name, tensor in checkpoint.tensors.items():
        if not isinstance(tensor, QuantizedTensor):
            continue
        bits = 8 if precision == "int8" else tensor.bits
        if bits != tensor.bits or not _fits(tensor):
            refitted[name], error = quantize_tensor(tensor.dequantize(), bits)
            errors.append(TensorError(name, tensor.shape, bits, error))
    if not errors:
        return checkpoint, ()
    how = f"{len(errors)} tensors refitted to scales that LiteRT holds, as {precision}"
    return checkpoint.with_tensors(refitted, how), tuple(errors)


def _fits(tensor: QuantizedTensor) -> bool:
    """Whether LiteRT holds these codes and scales as they are."""
    if tensor.grid != "portable":
        return False
    scales = tensor.scales.astype(np.float32)
    if tensor.bits == 8:  # one scale per row
        return bool(np.all(scales == scales[:, :1]))
    with np.errstate(over="ignore"):
        held = scales.astype(np.float16).astype(np.float32)
    return bool(np.all(held == scales))


def linear_weights(checkpoint: Checkpoint, precision: str) -> dict[str, Weight]:
    """Every linear tensor of the file, by its name there."""
    weights = {}
    for fused, shape, tensors in _fused(checkpoint):
        first = tensors[0]()
        bits = first.bits if precision != "float32" and isinstance(first, QuantizedTensor) else 32
        size = shape[0] * shape[1]
        if bits == 4 and isinstance(first, QuantizedTensor):
            group = first.group_size
            weights[fused] = Weight(
                fused, shape, 4, partial(_rows, tensors, _int4_codes), size // 2,
                partial(_rows, tensors, _int4_scales), group,
            )  # fmt: skip
        elif bits == 8:
            weights[fused] = Weight(
                fused, shape, 8, partial(_rows, tensors, _int8_codes), size,
                partial(_rows, tensors, _row_scales),
            )  # fmt: skip
        else:
            weights[fused] = Weight(fused, shape, 32, partial(_rows, tensors, _float32), size * 4)
    return weights


def int8_layers(checkpoint: Checkpoint) -> dict[str, Weight]:
    """The int4 layers once more, as int8 rows with one scale each: XNNPACK's kernels for these do
    1.7 times as many products a second without AVX-512. Rows of one scale hold what blocks of 32
    hold to about an eighth of int4's own rounding."""
    layers = {}
    for fused, shape, tensors in _fused(checkpoint):
        first = tensors[0]()
        if fused != EMBEDDING and isinstance(first, QuantizedTensor) and first.bits == 4:
            layers[fused] = Weight(
                f"{fused}.int8", shape, 8, partial(_rows, tensors, _rounded_codes),
                shape[0] * shape[1], cache(partial(_rows, tensors, _rounded_scales)),
            )  # fmt: skip
    return layers


def _fused(
    checkpoint: Checkpoint,
) -> Iterator[tuple[str, tuple[int, int], list[Callable[[], Tensor]]]]:
    """(name in the file, shape, what reads each of its parts) of every linear tensor."""
    shapes = checkpoint.config.tensor_shapes()
    for fused, names in fused_tensors(checkpoint.config).items():
        shape = (sum(shapes[name][0] for name in names), shapes[names[0]][1])
        yield fused, shape, [partial(checkpoint.tensors.__getitem__, name) for name in names]


def _rounded_codes(tensor: Tensor) -> np.ndarray:
    return _int8_codes(quantize_tensor(dense(tensor), 8)[0])


def _rounded_scales(tensor: Tensor) -> np.ndarray:
    return _row_scales(quantize_tensor(dense(tensor), 8)[0])


def _rows(
    tensors: Sequence[Callable[[], Tensor]], convert: Callable[[Tensor], np.ndarray]
) -> np.ndarray:
    parts = [convert(tensor()) for tensor in tensors]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _int4_codes(tensor: Tensor) -> np.ndarray:
    assert isinstance(tensor, QuantizedTensor)
    return np.ascontiguousarray(tensor.packed).view(np.uint8) ^ np.uint8(INT4_SIGN_BITS)


def _int4_scales(tensor: Tensor) -> np.ndarray:
    assert isinstance(tensor, QuantizedTensor)
    return tensor.scales.astype(np.float32).astype(np.float16)


def _int8_codes(tensor: Tensor) -> np.ndarray:
    assert isinstance(tensor, QuantizedTensor)
    return np.ascontiguousarray(tensor.packed).view(np.uint8) ^ np.uint8(INT8_SIGN_BIT)


def _row_scales(tensor: Tensor) -> np.ndarray:
    assert isinstance(tensor, QuantizedTensor)
    return tensor.scales[:, 0].astype(np.float32)


def _float32(tensor: Tensor) -> np.ndarray:
    return dense(tensor).astype(np.float32)
