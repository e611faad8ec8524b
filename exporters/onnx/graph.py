"""An ONNX graph as it is put together, and its file, written tensor by tensor.

onnx's own way holds every weight twice before the first byte is on the disk. Here a weight is made
when it is its turn to be written: `onnx` serialises the nodes, and around them stand the few bytes
by which protobuf marks a field and its length. What is written parses as if onnx had written it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from gemma_multi.progress import Report

MICROSOFT = "com.microsoft"  # onnxruntime's operators beyond the standard
OPSET, IR_VERSION = 18, 9
_OPSETS = {"": OPSET, MICROSOFT: 1}
# fields of onnx.proto: number << 3 | 2 for what has a length
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = b"\x3a", b"\x2a", b"\x4a"


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph. `make` is called when it is written, and gives its values in one
    part or more."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Graph:
    """Nodes and constants; a value is its name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, Initializer] = {}

    @property
    def nbytes(self) -> int:
        """Of all constants."""
        return sum(one.nbytes for one in self._initializers.values())

    def input(self, name: str, dtype: Any, shape: Iterable[int | str]) -> str:
        self._inputs.append(_described(name, dtype, shape))
        return name

    def output(self, value: str, dtype: Any, shape: Iterable[int | str]) -> None:
        self._outputs.append(_described(value, dtype, shape))

    def initializer(self, one: Initializer) -> str:
        """A constant; of two with one name the second is the first."""
        self._initializers.setdefault(one.name, one)
        return one.name

    def constant(self, value: Any, dtype: Any = np.int64, name: str = "") -> str:
        """A constant from what NumPy makes an array of; unnamed ones of one value are one."""
        array = np.asarray(value, dtype)
        if not name:
            words = [array.dtype.name, *map(str, array.shape), *map(str, array.ravel().tolist())]
            name = "_".join(words)
        return self.initializer(Initializer(name, array.shape, array.dtype, lambda: [array]))

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """One node of ONNX's with one output, which `name` names."""
        return self.node(kind, inputs, [name or f"{kind}_{len(self._nodes)}"], **attributes)[0]

    def node(
        self, kind: str, inputs: Iterable[str], outputs: list[str], *, domain: str = "",
        **attributes: Any,
    ) -> list[str]:  # fmt: skip
        """Any node. An input that is left out is ""."""
        made = helper.make_node(kind, list(inputs), outputs, outputs[0], domain=domain)
        for key, value in attributes.items():
            made.attribute.append(helper.make_attribute(key, value))
        self._nodes.append(made)
        return outputs

    def write(self, path: Path, name: str, notes: Mapping[str, str], progress: Report) -> None:
        """The file, forced to the disk. `notes` go along as its metadata."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs)
        opsets = [helper.make_opsetid(*opset) for opset in _OPSETS.items()]
        model = onnx.ModelProto(
            ir_version=IR_VERSION, producer_name="gemma_multi", opset_import=opsets
        )
        helper.set_model_props(model, dict(notes))
        nodes = graph.SerializeToString()
        heads = [(one, _head(one)) for one in self._initializers.values()]
        tensors = sum(len(_sized(head, one.nbytes)) + one.nbytes for one, head in heads)
        with path.open("wb") as file:
            file.write(model.SerializeToString())
            file.write(_MODEL_GRAPH + _length(len(nodes) + tensors) + nodes)
            done, total = 0, self.nbytes
            for one, head in heads:
                file.write(_sized(head, one.nbytes))
                for part in one.make():
                    done += file.write(_bytes(part, one.dtype))
                    progress(done, total)
            assert done == total
            file.flush()
            os.fsync(file.fileno())


def _described(name: str, dtype: Any, shape: Iterable[int | str]) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, list(shape))


def _head(one: Initializer) -> bytes:
    """A tensor's message up to its data."""
    kind = helper.np_dtype_to_tensor_dtype(one.dtype)
    tensor = onnx.TensorProto(dims=one.shape, data_type=kind, name=one.name)
    return bytes(tensor.SerializeToString()) + _TENSOR_RAW_DATA + _length(one.nbytes)


def _sized(head: bytes, nbytes: int) -> bytes:
    """The same as a field of a graph; `nbytes` of data are to follow."""
    return _GRAPH_INITIALIZER + _length(len(head) + nbytes) + head


def _bytes(array: np.ndarray, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _length(value: int) -> bytes:
    """A whole number as protobuf writes it: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
