"""A small writer of TensorFlow Lite files: buffers, weights and subgraphs, packed into one.

Design choices:
- The schema's own object classes (in ai-edge-litert) are filled in directly. Tracing with
  TensorFlow gave the same operators after 20 seconds and 1 GB, folded some of them against our
  wish, and put a 500 MB dependency under every export.
- Weights are lazy: their bytes are made when the file is packed, one tensor at a time, into a
  builder of the right size. Writing 151 MB of int4 takes little more memory than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3
# bytes for all that is not data, of a file, of an operator, of a row with a scale. A little more
# than it takes: a builder that is too small takes thrice as much for a moment
_STRUCTURE, _OPERATOR, _ROW = 1 << 20, 256, 12

Produce = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Weight:
    """A constant that subgraphs share: float32, int8 with a scale per row, or int4 in groups.

    `data` makes the stored bytes: `f32[shape]`, `i8[N, K]`, or `u8[N, K / 2]` with two's
    complement codes, the first in the low nibble. `scales` makes `f32[N]` or `f16[N, K / group]`.
    """

    name: str
    shape: tuple[int, ...]
    bits: int  # 32, 8 or 4
    data: Produce
    nbytes: int
    scales: Produce | None = None
    group_size: int = 0


class _Builder(flatbuffers.Builder):
    """Copies arrays straight into its memory; the library's own way holds them twice."""

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        self.StartVector(x.itemsize, x.size, x.dtype.alignment)
        self.head -= x.nbytes
        target = np.frombuffer(self.Bytes, np.uint8, x.nbytes, self.head)
        target[:] = x.reshape(-1).view(np.uint8)
        self.vectorNumElems = x.size
        return self.EndVector()


class _LazyBuffer(schema.BufferT):
    """A buffer whose bytes exist only while they are packed."""

    def __init__(self, produce: Produce) -> None:
        super().__init__()
        self._produce = produce

    def Pack(self, builder: Any) -> Any:
        self.data: np.ndarray | None
        self.data = np.ascontiguousarray(self._produce()).reshape(-1).view(np.uint8)
        packed = super().Pack(builder)
        self.data = None
        return packed


class ModelWriter:
    """One file: subgraphs, the weights they share, and metadata."""

    def __init__(self, description: str) -> None:
        self._model = schema.ModelT()
        self._model.version = _SCHEMA_VERSION
        self._model.description = description
        self._model.operatorCodes, self._model.subgraphs = [], []
        self._model.buffers = [schema.BufferT()]  # by convention, buffer 0 is "no data"
        self._model.signatureDefs, self._model.metadata = [], []
        self._codes: dict[tuple[int, int], int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self._weights: dict[str, tuple[int, int]] = {}
        self._size = _STRUCTURE

    def add_metadata(self, name: str, data: bytes) -> None:
        entry = schema.MetadataT()
        entry.name, entry.buffer = name, self.buffer(np.frombuffer(data, np.uint8))
        self._model.metadata.append(entry)

    def pack(self) -> memoryview:
        """The whole file, as a view of the builder's memory."""
        builder = _Builder(self._size)
        builder.Finish(self._model.Pack(builder), IDENTIFIER)
        return memoryview(builder.Bytes)[builder.Head() :]

    def buffer(self, data: np.ndarray) -> int:
        made = schema.BufferT()
        made.data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._size += made.data.nbytes + 64
        self._model.buffers.append(made)
        return len(self._model.buffers) - 1

    def constant_buffer(self, array: np.ndarray) -> int:
        """A buffer with these values; equal constants share one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.buffer(array)
        return self._constants[key]

    def weight_buffers(self, weight: Weight) -> tuple[int, int]:
        """(the buffer of a weight's codes, the buffer of its group scales or 0)."""
        if weight.name not in self._weights:
            codes = self._lazy(weight.data, weight.nbytes)
            scales = 0
            if weight.bits == 4:
                assert weight.scales is not None
                count = weight.shape[0] * weight.shape[1] // weight.group_size
                scales = self._lazy(weight.scales, 2 * count)
            self._weights[weight.name] = (codes, scales)
        return self._weights[weight.name]

    def _lazy(self, produce: Produce, nbytes: int) -> int:
        self._size += nbytes + 64
        self._model.buffers.append(_LazyBuffer(produce))
        return len(self._model.buffers) - 1

    def operator_code(self, code: int, version: int) -> int:
        if (code, version) not in self._codes:
            entry = schema.OperatorCodeT()
            entry.builtinCode, entry.version = code, version
            entry.deprecatedBuiltinCode = min(code, 127)  # where old readers look
            self._codes[code, version] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(entry)
        return self._codes[code, version]

    def add_signature(self, graph: schema.SubGraphT, signature: schema.SignatureDefT) -> None:
        scales = [one.quantization.scale for one in graph.tensors if one.quantization is not None]
        rows = sum(len(one) for one in scales if one is not None)
        self._size += _OPERATOR * len(graph.operators) + _ROW * rows
        signature.subgraphIndex = len(self._model.subgraphs)
        self._model.subgraphs.append(graph)
        self._model.signatureDefs.append(signature)
