"""One subgraph of a TensorFlow Lite file, built operator by operator.

A method per operator, named as in NumPy, with shapes worked out at once, so that a model reads like
the mathematics and a mistake is an exception here, not a crash in the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gemma_multi.exporters.tflite.flatbuffer import ModelWriter, Weight

_OPERATOR, _TYPE = schema.BuiltinOperator, schema.TensorType
_TYPES = {
    np.dtype(np.float32): _TYPE.FLOAT32,
    np.dtype(np.float16): _TYPE.FLOAT16,
    np.dtype(np.int32): _TYPE.INT32,
    np.dtype(np.int8): _TYPE.INT8,
}


@dataclass(frozen=True)
class Value:
    """A tensor inside one subgraph."""

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Subgraph:
    """One signature, operator by operator."""

    def __init__(self, model: ModelWriter, name: str) -> None:
        self._model = model
        self._graph = schema.SubGraphT()
        self._graph.name = name
        self._graph.tensors, self._graph.operators = [], []
        self._graph.inputs, self._graph.outputs = [], []
        self._signature = schema.SignatureDefT()
        self._signature.signatureKey = name
        self._signature.inputs, self._signature.outputs = [], []
        self._known: dict[Any, Value] = {}  # constants and weights met before

    # what goes in and out

    def input(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> Value:
        value = self._tensor(name, tuple(shape), np.dtype(dtype), scale=np.dtype(dtype) == np.int8)
        self._graph.inputs.append(value.index)
        self._signature.inputs.append(self._entry(name, value))
        return value

    def output(self, name: str, value: Value) -> None:
        self._graph.outputs.append(value.index)
        self._signature.outputs.append(self._entry(name, value))

    def finish(self) -> None:
        """Adds it to the file as a signature."""
        self._model.add_signature(self._graph, self._signature)

    def constant(self, array: Any, dtype: Any = np.float32, name: str = "constant") -> Value:
        array = np.asarray(array, dtype)
        buffer = self._model.constant_buffer(array)
        if (name, buffer) not in self._known:
            made = self._tensor(name, array.shape, array.dtype, buffer)
            self._known[name, buffer] = made
        return self._known[name, buffer]

    def weight(self, weight: Weight) -> Value:
        if weight.name not in self._known:
            codes, scales = self._model.weight_buffers(weight)
            value = self._tensor(weight.name, weight.shape, np.dtype(np.float32), codes)
            tensor = self._graph.tensors[value.index]
            if weight.bits == 4:
                tensor.type = _TYPE.INT4
                groups = (weight.shape[0], weight.shape[1] // weight.group_size)
                held = self._tensor(f"{weight.name}.scales", groups, np.dtype(np.float16), scales)
                tensor.quantization = _blockwise(held.index, weight.group_size)
            elif weight.bits == 8:
                assert weight.scales is not None
                tensor.type = _TYPE.INT8
                tensor.quantization = _per_row(weight.scales())
            self._known[weight.name] = value
        return self._known[weight.name]

    # arithmetic, with NumPy's broadcasting

    def add(self, a: Value, b: Any) -> Value:
        return self._binary("ADD", a, b, schema.AddOptionsT())

    def subtract(self, a: Any, b: Any) -> Value:
        return self._binary("SUB", a, b, schema.SubOptionsT())

    def multiply(self, a: Value, b: Any) -> Value:
        return self._binary("MUL", a, b, schema.MulOptionsT())

    def divide(self, a: Any, b: Value) -> Value:
        return self._binary("DIV", a, b, schema.DivOptionsT())

    def minimum(self, a: Value, b: Any) -> Value:
        return self._binary("MINIMUM", a, b, schema.MaximumMinimumOptionsT())

    def maximum(self, a: Value, b: Any) -> Value:
        return self._binary("MAXIMUM", a, b, schema.MaximumMinimumOptionsT())

    def floor_mod(self, a: Value, b: Any) -> Value:
        return self._binary("FLOOR_MOD", a, b, schema.FloorModOptionsT())

    def absolute(self, a: Value) -> Value:
        return self._unary("ABS", a, schema.AbsOptionsT())

    def negative(self, a: Value) -> Value:
        return self._unary("NEG", a, schema.NegOptionsT())

    def rsqrt(self, a: Value) -> Value:
        return self._unary("RSQRT", a)

    def sin(self, a: Value) -> Value:
        return self._unary("SIN", a)

    def cos(self, a: Value) -> Value:
        return self._unary("COS", a, schema.CosOptionsT())

    def gelu_tanh(self, a: Value) -> Value:
        options = schema.GeluOptionsT()
        options.approximate = True
        return self._unary("GELU", a, options)

    def softmax(self, a: Value) -> Value:
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        return self._unary("SOFTMAX", a, options)

    def mean_last(self, a: Value) -> Value:
        return self._reduce("MEAN", a, len(a.shape) - 1)

    def max_last(self, a: Value) -> Value:
        return self._reduce("REDUCE_MAX", a, len(a.shape) - 1)

    # types

    def cast(self, a: Value, dtype: Any) -> Value:
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = _TYPES[a.dtype], _TYPES[np.dtype(dtype)]
        return self._operator("CAST", [a], a.shape, dtype, options)

    def to_int8(self, a: Value) -> Value:
        """Rounds to the nearest whole number in -128..127."""
        return self._operator("QUANTIZE", [a], a.shape, np.int8, schema.QuantizeOptionsT())

    # shapes

    def reshape(self, a: Value, shape: Sequence[int]) -> Value:
        shape = tuple(shape)
        if shape == a.shape:
            return a
        assert np.prod(shape) == np.prod(a.shape), (a.shape, shape)
        options = schema.ReshapeOptionsT()
        options.newShape = list(shape)
        return self._operator("RESHAPE", [a, self._ints(shape)], shape, a.dtype, options)

    def transpose(self, a: Value, order: Sequence[int]) -> Value:
        shape = tuple(a.shape[i] for i in order)
        if [i for i in order if a.shape[i] > 1] == [i for i in range(len(order)) if a.shape[i] > 1]:
            return self.reshape(a, shape)  # only axes of size one change places
        inputs = [a, self._ints(order)]
        return self._operator("TRANSPOSE", inputs, shape, a.dtype, schema.TransposeOptionsT())

    def slice(self, a: Value, axis: int, begin: int, size: int) -> Value:
        """`a[begin : begin + size]` along one axis."""
        if size == a.shape[axis]:
            return a
        begins, sizes = [0] * len(a.shape), list(a.shape)
        begins[axis], sizes[axis] = begin, size
        inputs = [a, self._ints(begins), self._ints(sizes)]
        return self._operator("SLICE", inputs, tuple(sizes), a.dtype, schema.SliceOptionsT())

    def concatenate(self, values: Sequence[Value], axis: int) -> Value:
        axis %= len(values[0].shape)
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        options = schema.ConcatenationOptionsT()
        options.axis = axis
        return self._operator("CONCATENATION", values, tuple(shape), values[0].dtype, options)

    def update_slice(self, a: Value, update: Value, start: Value) -> Value:
        """`a` with `update` written at `start` (`i32[rank]`); in place where buffers are shared."""
        options = schema.DynamicUpdateSliceOptionsT()
        return self._operator("DYNAMIC_UPDATE_SLICE", [a, update, start], a.shape, a.dtype, options)

    # matrices

    def linear(self, x: Value, weight: Weight) -> Value:
        """`x @ weight.T`: `f32[T, K]` and `[N, K]` to `f32[T, N]`."""
        options = schema.FullyConnectedOptionsT()
        inputs = [x.index, self.weight(weight).index, -1]  # -1: no bias
        version = {32: 1, 8: 12, 4: 13}[weight.bits]
        shape = (x.shape[0], weight.shape[0])
        return self._operator("FULLY_CONNECTED", inputs, shape, np.float32, options, version)

    def embedding(self, ids: Value, weight: Weight) -> Value:
        """Rows of `weight`: `i32[T]` to `f32[T, K]`."""
        version = {32: 1, 8: 3, 4: 4}[weight.bits]
        inputs = [ids, self.weight(weight)]
        shape = (ids.shape[0], weight.shape[1])
        return self._operator("EMBEDDING_LOOKUP", inputs, shape, np.float32, version=version)

    def matmul(self, a: Value, b: Value, transpose_b: bool = False) -> Value:
        """Batched: `[..., M, K]` and `[..., K, N]` (or `[..., N, K]` transposed)."""
        options = schema.BatchMatMulOptionsT()
        options.adjY = transpose_b
        assert a.shape[-1] == b.shape[-1 if transpose_b else -2], (a.shape, b.shape)
        shape = (*a.shape[:-1], b.shape[-2 if transpose_b else -1])
        return self._operator("BATCH_MATMUL", [a, b], shape, np.float32, options)

    # the parts they share

    def _binary(self, name: str, a: Any, b: Any, options: Any) -> Value:
        kind = (a if isinstance(a, Value) else b).dtype
        a, b = (v if isinstance(v, Value) else self.constant(v, kind) for v in (a, b))
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self._operator(name, [a, b], shape, kind, options)

    def _unary(self, name: str, a: Value, options: Any = None) -> Value:
        return self._operator(name, [a], a.shape, a.dtype, options)

    def _reduce(self, name: str, a: Value, axis: int) -> Value:
        options = schema.ReducerOptionsT()
        options.keepDims = True
        shape = (*a.shape[:axis], 1, *a.shape[axis + 1 :])
        return self._operator(name, [a, self._ints([axis])], shape, a.dtype, options)

    def _ints(self, values: Sequence[int]) -> Value:
        return self.constant(values, np.int32)

    def _operator(
        self, name: str, inputs: Sequence[Any], shape: tuple[int, ...], dtype: Any,
        options: Any = None, version: int = 1,
    ) -> Value:  # fmt: skip
        made = schema.OperatorT()
        code = getattr(_OPERATOR, name)
        made.opcodeIndex = self._model.operator_code(code, version)
        made.inputs = [i.index if isinstance(i, Value) else i for i in inputs]
        result = self._tensor(name.lower(), shape, np.dtype(dtype), scale=name == "QUANTIZE")
        made.outputs = [result.index]
        if options is not None:
            made.builtinOptions = options
            made.builtinOptionsType = getattr(
                schema.BuiltinOptions, type(options).__name__.removesuffix("T")
            )
        self._graph.operators.append(made)
        return result

    def _tensor(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, buffer: int = 0,
        scale: bool = False,
    ) -> Value:  # fmt: skip
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = list(shape), _TYPES[dtype], buffer
        tensor.name = f"{name}:{len(self._graph.tensors)}" if not buffer else name
        if scale:
            tensor.quantization = _per_row(np.ones(1, np.float32), dimension=None)
        self._graph.tensors.append(tensor)
        return Value(len(self._graph.tensors) - 1, tuple(shape), dtype)

    @staticmethod
    def _entry(name: str, value: Value) -> schema.TensorMapT:
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, value.index
        return entry


def _blockwise(scales: int, group_size: int) -> schema.QuantizationParametersT:
    quantization = schema.QuantizationParametersT()
    quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
    details = schema.BlockwiseQuantizationT()
    details.scales, details.zeroPoints, details.blockSize = scales, -1, group_size
    quantization.details = details
    return quantization


def _per_row(scales: np.ndarray, dimension: int | None = 0) -> schema.QuantizationParametersT:
    quantization = schema.QuantizationParametersT()
    quantization.scale = scales.astype(np.float32)
    quantization.zeroPoint = np.zeros(len(scales), np.int64)
    quantization.quantizedDimension = dimension or 0
    return quantization
