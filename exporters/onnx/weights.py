"""A checkpoint's tensors in onnxruntime's layout: the same codes and scales.

MatMulNBits holds `[out, in]` as codes in blocks along the input, unsigned around 2^(bits-1), the
lower half of a byte first: our own layout, byte for byte. Only affine groups (mlx-lm's own, which
have a bias), and scales that float16 cannot hold where the activations are float16, are put on our
grid again.

Rows of int8 with float activations are no work for MatMulNBits, which then unpacks the whole matrix
at every call. Theirs are whole numbers in the file, which onnxruntime turns into floats once, as it
folds constants, and each row's scale is multiplied in after the product. What is int8 in smaller
groups (GGUF's Q8_0) takes int8 activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from onnx import TensorProto

from gemma_multi.checkpoint import Checkpoint, Tensor, dense, rows_of
from gemma_multi.exporters.onnx.graph import MICROSOFT, Graph, Initializer
from gemma_multi.progress import Report
from gemma_multi.quantization.tensor import QuantizedTensor, quantize_tensor
from gemma_multi.transforms import GRIDS, TensorError, to_precision

_ROWS = 8192  # dense ones at a time
_LARGEST_BLOCK = 128  # of int8, whose scales are one a row
_FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 0, 4  # MatMulNBits' accuracy_level


def prepare(
    checkpoint: Checkpoint, precision: str, activations: np.dtype, progress: Report
) -> tuple[Checkpoint, tuple[TensorError, ...]]:
    """The checkpoint with every tensor in a form that the file holds, and what was refitted to get
    there. Raises CheckpointError where the stored form cannot become `precision`."""
    if precision not in GRIDS:  # any tensor is written dense, one at a time
        return checkpoint, ()
    checkpoint = to_precision(checkpoint, precision, progress)
    refitted: dict[str, Tensor] = {}
    errors = []
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QuantizedTensor) and not _fits(tensor, activations):
            refitted[name], error = quantize_tensor(tensor.dequantize(), tensor.bits)
            errors.append(TensorError(name, tensor.shape, tensor.bits, error))
    if not errors:
        return checkpoint, ()
    how = f"{len(errors)} tensors refitted to scales that onnxruntime holds, as {precision}"
    return checkpoint.with_tensors(refitted, how), tuple(errors)


def _fits(tensor: QuantizedTensor, activations: np.dtype) -> bool:
    if tensor.grid == "affine":
        return False
    scales = tensor.scales.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool(np.all(scales.astype(activations).astype(np.float32) == scales))


def linear_weights(
    checkpoint: Checkpoint, precision: str, dtype: np.dtype, int8_activations: bool
) -> dict[str, Linear]:
    """Every tensor that is multiplied with."""
    found = {}
    for name, shape in checkpoint.config.tensor_shapes().items():
        if len(shape) == 2:
            bits = GRIDS.get(checkpoint.tensors.infos[name].dtype, 0) if precision in GRIDS else 0
            read = partial(checkpoint.tensors.__getitem__, name)
            rows = (shape[0], shape[1])
            found[name] = Linear(name, rows, read, dtype, bits, int8_activations)
    return found


@dataclass(frozen=True)
class Linear:
    """A tensor `[out, in]` of the file, to multiply with or to look rows up in."""

    name: str
    shape: tuple[int, int]
    read: Callable[[], Tensor]  # each time anew: some readers make a tensor when it is asked for
    dtype: np.dtype  # of the activations, and so of scales and dense weights
    bits: int  # 4, 8, or 0: dense
    int8_activations: bool  # of codes

    def multiply(self, graph: Graph, x: str) -> str:
        """`x [..., in]` to `[..., out]`."""
        out, inputs = self.shape
        if not self.bits:
            turned = Initializer(
                self.name, (inputs, out), self.dtype, lambda: [np.concatenate([*self._dense()]).T]
            )
            return graph.op("MatMul", x, graph.initializer(turned))
        if self._by_row:
            codes = self._whole_numbers(graph, turned=True)
            return graph.op("Mul", graph.op("MatMul", x, codes), self._row_scales(graph))
        return graph.op(
            "MatMulNBits", x, *self._codes_and_scales(graph), domain=MICROSOFT,
            K=inputs, N=out, bits=self.bits, block_size=self._block,
            accuracy_level=_INT8_ACTIVATIONS
            if self.int8_activations or self.bits == 8
            else _FLOAT_ACTIVATIONS,
        )  # fmt: skip

    def multiply_rows(self, graph: Graph, x: str) -> str:
        """`x [n, in]` to `[n, out]`, with the constants that `look_up` has."""
        if self._by_row:
            x = graph.op("Gemm", x, self._whole_numbers(graph), transB=1)
            return graph.op("Mul", x, self._row_scales(graph))
        if self.bits:
            return self.multiply(graph, x)
        return graph.op("Gemm", x, graph.initializer(self._rows()), transB=1)

    def look_up(self, graph: Graph, ids: str) -> str:
        """Rows `[batch, sequence, in]` of `ids [batch, sequence]`.

        int8 by operators that every build of onnxruntime has: some for browsers have no
        GatherBlockQuantized.
        """
        if not self.bits:
            return graph.op("Gather", graph.initializer(self._rows()), ids)
        last = graph.constant([-1])
        if self._by_row:
            rows = graph.op("Gather", self._whole_numbers(graph), ids)
            scales = graph.op("Gather", self._row_scales(graph), ids)
            return graph.op("Mul", rows, graph.op("Unsqueeze", scales, last))
        codes, scales = self._codes_and_scales(graph)
        if self.bits == 4:
            scales = graph.op("Unsqueeze", scales, graph.constant([2]))
            rows = graph.op(
                "GatherBlockQuantized", codes, ids, scales, domain=MICROSOFT,
                bits=4, block_size=self._block, gather_axis=0, quantize_axis=2,
            )  # fmt: skip
        else:
            taken = graph.op("Cast", graph.op("Gather", codes, ids), to=self._kind)
            taken = graph.op("Sub", taken, graph.constant(128, self.dtype))
            taken_scales = graph.op("Unsqueeze", graph.op("Gather", scales, ids), last)
            rows = graph.op("Mul", taken, taken_scales)
        return graph.op("Reshape", rows, graph.constant([0, 0, self.shape[1]]))

    def _rows(self) -> Initializer:
        return Initializer(self.name, self.shape, self.dtype, self._dense)

    def _dense(self) -> Iterator[np.ndarray]:
        tensor = self.read()
        for start in range(0, self.shape[0], _ROWS):
            rows = rows_of(tensor, slice(start, start + _ROWS))
            yield dense(rows).astype(self.dtype, copy=False)

    def _quantized(self) -> QuantizedTensor:
        tensor = self.read()
        assert isinstance(tensor, QuantizedTensor)
        return tensor

    @property
    def _kind(self) -> int:
        return TensorProto.FLOAT if self.dtype == np.float32 else TensorProto.FLOAT16

    @cached_property
    def _by_row(self) -> bool:
        """Whether it is int8 with one scale a row, for float activations."""
        if self.bits != 8 or self.int8_activations:
            return False
        scales = self._quantized().scales
        return bool(np.all(scales == scales[:, :1]))

    def _whole_numbers(self, graph: Graph, turned: bool = False) -> str:
        """Codes as floats, -127 to 127: `[out, in]`, or turned."""
        shape = self.shape[::-1] if turned else self.shape

        def codes() -> list[np.ndarray]:
            signed = self._quantized().codes() ^ np.uint8(128)  # the same in two's complement
            return [(signed.T if turned else signed).view(np.int8)]

        found = graph.initializer(Initializer(self.name, shape, np.dtype(np.int8), codes))
        return graph.op("Cast", found, to=self._kind)

    def _row_scales(self, graph: Graph) -> str:
        def scales() -> list[np.ndarray]:
            return [self._quantized().scales[:, 0].astype(np.float32)]

        name = f"{self.name.removesuffix('.weight')}.scales"
        return graph.initializer(Initializer(name, self.shape[:1], self.dtype, scales))

    @cached_property
    def _block(self) -> int:
        """Weights that share a scale: 32, and more of int8 if neighbouring scales are the same."""
        tensor = self._quantized()
        block, scales = tensor.group_size, tensor.scales
        while self.bits == 8 and block < _LARGEST_BLOCK and scales.shape[1] % 2 == 0:
            if not np.array_equal(scales[:, 0::2], scales[:, 1::2]):
                break
            block, scales = block * 2, scales[:, 0::2]
        return block

    def _codes_and_scales(self, graph: Graph) -> tuple[str, str]:
        """Codes `u8[out, blocks, bytes]` and scales `[out, blocks]`."""
        out, inputs = self.shape
        blocks = inputs // self._block

        def codes() -> list[np.ndarray]:
            return [np.ascontiguousarray(self._quantized().packed).view(np.uint8)]

        def scales() -> list[np.ndarray]:
            found = self._quantized().scales
            return [found[:, :: found.shape[1] // blocks].astype(np.float32)]

        size = self._block * self.bits // 8
        stem = self.name.removesuffix(".weight")
        return (
            graph.initializer(
                Initializer(self.name, (out, blocks, size), np.dtype(np.uint8), codes)
            ),
            graph.initializer(Initializer(f"{stem}.scales", (out, blocks), self.dtype, scales)),
        )
