"""A `.tflite` graph run in NumPy, operator by operator: in float32, or in float16, as GPUs do.

No GPU here computes in float16: the software Vulkan has none. What a delegate does with a graph is
known well enough, though: weights, constants and the result of every operator are rounded to
float16, and integers stay integers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
_TYPES = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.INT32: np.int32,
    schema.TensorType.INT8: np.int8,
}


class Graph:
    """One file. `largest` is the largest number that any operator gave."""

    def __init__(self, path: Path, float16: bool = False) -> None:
        self._model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
        self._signatures = {s.signatureKey.decode(): s for s in self._model.signatureDefs}
        self._weights: dict[int, np.ndarray] = {}  # by buffer
        self._float16 = float16
        self.largest = 0.0

    def _empty_caches(self) -> dict[str, np.ndarray]:
        entry = self._signatures["score"]
        tensors = self._model.subgraphs[entry.subgraphIndex].tensors
        given = ((e.name.decode(), tensors[e.tensorIndex]) for e in entry.inputs)
        return {name: np.zeros(tensor.shape, _TYPES[tensor.type]) for name, tensor in given
                if name.startswith("kv_cache_")}  # fmt: skip

    def read(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """The logits after each of `i32[T]`, T a multiple of 16: `f32[T, V]`."""
        caches, logits = self._empty_caches(), []
        for begin in range(0, len(ids), 16):
            positions = np.arange(start + begin, start + begin + 16, dtype=np.int32)
            tokens = ids[None, begin : begin + 16].astype(np.int32)
            caches = self.run("score", {"tokens": tokens, "input_pos": positions, **caches})
            logits.append(caches.pop("logits")[0])
        return np.concatenate(logits)

    def run(self, signature: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A signature's outputs, caches among them."""
        entry = self._signatures[signature]
        given = {e.tensorIndex: inputs[e.name.decode()] for e in entry.inputs}
        values = self._evaluate(entry.subgraphIndex, given)
        return {e.name.decode(): values[e.tensorIndex] for e in entry.outputs}

    def _evaluate(self, index: int, values: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        graph = self._model.subgraphs[index]
        for operator in graph.operators:
            code = self._model.operatorCodes[operator.opcodeIndex]
            name = _NAMES[code.builtinCode]
            inputs = [self._value(graph, i, values) for i in operator.inputs if i >= 0]
            with np.errstate(over="ignore", invalid="ignore"):  # tests look at what comes of it
                result = _OPERATORS[name](operator.builtinOptions, *inputs)
            out = graph.tensors[operator.outputs[0]]
            kind = _TYPES[out.type]
            assert list(result.shape) == list(out.shape), (name, result.shape, out.shape)
            values[operator.outputs[0]] = self._held(result.astype(kind, copy=False))
        return values

    def _held(self, x: np.ndarray) -> np.ndarray:
        x = self._rounded(x)
        if x.dtype == np.float32:
            self.largest = max(self.largest, float(np.abs(x).max()))  # a NaN is found by its logits
        return x

    def _value(self, graph: Any, index: int, values: dict[int, np.ndarray]) -> np.ndarray:
        tensor = graph.tensors[index]
        if index not in values and tensor.buffer not in self._weights:
            data = self._model.buffers[tensor.buffer].data.view(_TYPES[tensor.type])
            data = data.reshape(tensor.shape)
            if tensor.quantization is not None and tensor.quantization.scale is not None:
                data = data * np.asarray(tensor.quantization.scale, np.float32)[:, None]
            self._weights[tensor.buffer] = self._rounded(data)
        return values[index] if index in values else self._weights[tensor.buffer]

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        if not self._float16 or x.dtype != np.float32:
            return x
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)


def _update_slice(_: Any, x: np.ndarray, update: np.ndarray, start: np.ndarray) -> np.ndarray:
    result = x.copy()
    at = [min(max(int(b), 0), n - m) for b, n, m in zip(start, x.shape, update.shape, strict=True)]
    result[tuple(slice(b, b + n) for b, n in zip(at, update.shape, strict=True))] = update
    return result


def _softmax(_: Any, x: np.ndarray) -> np.ndarray:
    shares = np.exp(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def _gelu(_: Any, x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3)))


def _slice(_: Any, x: np.ndarray, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    return x[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))]


def _quantize(_: Any, x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), -128, 127)


def _matmul(options: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a @ (b.swapaxes(-1, -2) if options.adjY else b)


_OPERATORS: dict[str, Callable[..., np.ndarray]] = {
    "ADD": lambda _, a, b: a + b,
    "SUB": lambda _, a, b: a - b,
    "MUL": lambda _, a, b: a * b,
    "DIV": lambda _, a, b: a / b,
    "MINIMUM": lambda _, a, b: np.minimum(a, b),
    "MAXIMUM": lambda _, a, b: np.maximum(a, b),
    "FLOOR_MOD": lambda _, a, b: np.mod(a, b),
    "ABS": lambda _, a: np.abs(a),
    "NEG": lambda _, a: -a,
    "RSQRT": lambda _, a: 1 / np.sqrt(a),
    "SIN": lambda _, a: np.sin(a),
    "COS": lambda _, a: np.cos(a),
    "GELU": _gelu,
    "SOFTMAX": _softmax,
    "MEAN": lambda _, a, axes: a.mean(axis=tuple(axes), keepdims=True),
    "REDUCE_MAX": lambda _, a, axes: a.max(axis=tuple(axes), keepdims=True),
    "CAST": lambda _, a: a,  # the type is the result's
    "QUANTIZE": _quantize,
    "RESHAPE": lambda _, a, shape: a.reshape(shape),
    "TRANSPOSE": lambda _, a, order: a.transpose(order),
    "SLICE": _slice,
    "CONCATENATION": lambda options, *parts: np.concatenate(parts, options.axis),
    "DYNAMIC_UPDATE_SLICE": _update_slice,
    "FULLY_CONNECTED": lambda _, x, weight: x @ weight.T,
    "EMBEDDING_LOOKUP": lambda _, ids, weight: weight[ids],
    "BATCH_MATMUL": _matmul,
}
