"""An ONNX graph as it is put together, and its file, written tensor by tensor.

onnx's own way holds every weight twice before the first byte is on the disk. Here a weight is made
when it is its turn to be written: `onnx` serialises the nodes, and around them stand the few bytes
by which protobuf marks a field and its length. What is written parses as if onnx had written it.

A protobuf ends at 2 GiB. Weights beyond that go into files beside it, "external data" as ONNX calls
it, of less than 2 GiB each for browsers, with the names that Transformers.js looks for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import helper

from gemma_multi.progress import Report

MICROSOFT = "com.microsoft"  # onnxruntime's operators beyond the standard
OPSET, IR_VERSION = 18, 9
LARGEST = (1 << 31) - (1 << 20)  # bytes; a protobuf ends at 2 GiB
_ALIGNMENT = 4096  # of what is mapped
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

    def write(self, path: Path, name: str, notes: Mapping[str, str], progress: Report) -> int:
        """The file, forced to the disk, and how many files beside it hold weights: none, where it
        takes at most `LARGEST` bytes. `notes` go along as its metadata."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs)
        opsets = [helper.make_opsetid(*opset) for opset in _OPSETS.items()]
        model = onnx.ModelProto(
            ir_version=IR_VERSION, producer_name="gemma_multi", opset_import=opsets
        )
        helper.set_model_props(model, dict(notes))
        nodes = graph.SerializeToString()
        done, total = 0, self.nbytes

        def write_values(file: BinaryIO, one: Initializer) -> None:
            nonlocal done
            for part in one.make():
                done += file.write(_bytes(part, one.dtype))
                progress(done, total)

        beside = self._beside(path) if total > LARGEST else {}
        for file_path, places in beside.items():
            with _forced(file_path) as file:
                for one, offset in places:
                    file.write(bytes(offset - file.tell()))
                    write_values(file, one)
        outside = {one.name: _external(one, file_path.name, offset)
                   for file_path, places in beside.items() for one, offset in places}  # fmt: skip
        inside = [(one, _head(one)) for one in self._initializers.values()
                  if one.name not in outside]  # fmt: skip
        size = sum(len(_sized(head, one.nbytes)) + one.nbytes for one, head in inside)
        size += sum(len(_sized(tensor, 0)) for tensor in outside.values())
        with _forced(path) as file:
            file.write(model.SerializeToString())
            file.write(_MODEL_GRAPH + _length(len(nodes) + size) + nodes)
            file.writelines(_sized(tensor, 0) for tensor in outside.values())
            for one, head in inside:
                file.write(_sized(head, one.nbytes))
                write_values(file, one)
        assert done == total
        return len(beside)

    def _beside(self, path: Path) -> dict[Path, list[tuple[Initializer, int]]]:
        """File -> the weights in it and where."""
        found: dict[Path, list[tuple[Initializer, int]]] = {}
        end = LARGEST  # of a file that is full
        for one in self._initializers.values():
            if one.nbytes < _ALIGNMENT:
                continue  # shapes, norms: read with the nodes
            begin = end + -end % _ALIGNMENT
            if begin + one.nbytes > LARGEST:
                number = f"_{len(found)}" if found else ""
                found[path.with_name(f"{path.name}_data{number}")] = []
                begin = 0
            found[next(reversed(found))].append((one, begin))
            end = begin + one.nbytes
        return found


@contextmanager
def _forced(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
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


def _external(one: Initializer, file: str, offset: int) -> bytes:
    """A tensor's message, whose data are in another file."""
    kind = helper.np_dtype_to_tensor_dtype(one.dtype)
    tensor = onnx.TensorProto(
        dims=one.shape, data_type=kind, name=one.name, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", file), ("offset", offset), ("length", one.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return bytes(tensor.SerializeToString())


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
