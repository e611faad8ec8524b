"""The container: GGUF's header read, every length checked before it is believed.

A file is `GGUF`, a version, the number of tensors and of metadata entries; then the entries (key,
type, value), the tensors' descriptions (name, sizes with the innermost first, type, offset), and
from the next multiple of the alignment on the tensors' bytes. Strings and arrays carry their own
lengths, so nothing can be found without walking past all that comes before it.

The `gguf` package knows the types and how each is dequantised, and is asked for both. Its reader
takes four seconds over a vocabulary of 262,144 tokens and believes what it reads, so this one is
ours. Tensors are views of the mapped file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # unless general.alignment says otherwise
_MOST_DIMENSIONS = 4
_LARGEST_SIZE = 1 << 40
_MOST_KEY_BYTES = 1 << 16
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 13, 24  # bytes of a metadata entry, of a description

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file."""

    shape: tuple[int, ...]  # the outermost first, as NumPy has it
    kind: str  # a name in GGMLQuantizationType: "F32", "Q4_0", ...
    data: np.ndarray  # u8[nbytes], a view


class GgufFile:
    """Metadata and tensors of one file. Raises CheckpointError naming what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: expected a file")
            size = path.stat().st_size
            if size < 24:
                raise CheckpointError(f"{path}: {size} bytes, too short for a GGUF file")
            self._bytes = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._view = memoryview(self._bytes)  # type: ignore[arg-type]
        self._at = 0
        tensors, entries = self._read_preamble()
        self.metadata: dict[str, Any] = self._read_metadata(entries)
        self.tensors: dict[str, StoredTensor] = self._read_tensors(tensors)

    def _read_preamble(self) -> tuple[int, int]:
        """(number of tensors, number of metadata entries)."""
        magic = self._take(4, "its magic").tobytes()
        if magic != MAGIC:
            raise CheckpointError(f"{self.path}: begins with {magic!r}, expected {MAGIC!r}")
        version = self._number("<I", "its version")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            raise CheckpointError(
                f"{self.path}: GGUF version {version >> 24 if swapped else version}"
                f"{', big-endian' if swapped else ''}; expected 2 or 3, little-endian"
            )
        tensors, entries = (self._number("<Q", "its counts") for _ in range(2))
        for count, least, what in (
            (tensors, _SMALLEST_TENSOR, "tensors"), (entries, _SMALLEST_ENTRY, "metadata entries"),
        ):  # fmt: skip
            if count * least > len(self._view) - self._at:
                raise CheckpointError(
                    f"{self.path}: claims {count} {what}, more than its {len(self._view)} bytes "
                    "can hold"
                )
        return tensors, entries

    def _read_metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string("a metadata key", _MOST_KEY_BYTES)
            if key in found:
                raise CheckpointError(f"{self.path}: metadata {key!r} is there twice")
            found[key] = self._value(key, self._number("<I", f"the type of {key!r}"))
        return found

    def _value(self, key: str, kind: int) -> Any:
        what = f"metadata {key!r}"
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            inner, count = self._number("<I", what), self._number("<Q", what)
            if inner == _STRING:
                return self._strings(what, count)
            if inner not in _SCALARS:
                raise CheckpointError(f"{self.path}: {what} is an array of type {inner}")
            return self._array(_SCALARS[inner], count, what)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {what} has type {kind}, which GGUF does not know")
        return self._array(_SCALARS[kind], 1, what)[0].item()

    def _read_tensors(self, count: int) -> dict[str, StoredTensor]:
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}, expected a power of two"
            )
        described: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        for _ in range(count):
            name = self._string("a tensor's name", _MOST_KEY_BYTES)
            if name in described:
                raise CheckpointError(f"{self.path}: tensor {name!r} is there twice")
            described[name] = self._describe(name)
        start = self._at + -self._at % alignment
        spans = sorted((at, at + size, name) for name, (_, _, size, at) in described.items())
        before, until = "the header", 0
        for begin, end, name in spans:
            fault = (
                f"is no multiple of {alignment}" if begin % alignment
                else f"overlaps {before!r}" if begin < until
                else "ends after the file, which is truncated" if start + end > len(self._view)
                else ""
            )  # fmt: skip
            if fault:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r}, said to be at bytes {begin} to {end} of the "
                    f"data, {fault}"
                )
            before, until = name, end
        return {
            name: StoredTensor(shape, kind, self._bytes[start + at : start + at + size])
            for name, (shape, kind, size, at) in described.items()
        }

    def _describe(self, name: str) -> tuple[tuple[int, ...], str, int, int]:
        """(shape, type, bytes, offset into the data)."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        what = f"tensor {name!r}"
        dimensions = self._number("<I", what)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise CheckpointError(f"{self.path}: {what} has {dimensions} dimensions")
        sizes = [self._number("<Q", what) for _ in range(dimensions)]
        number, offset = self._number("<I", what), self._number("<Q", what)
        if 0 in sizes or math.prod(sizes) > _LARGEST_SIZE:
            raise CheckpointError(f"{self.path}: {what} has the sizes {sizes}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: {what} has type {number}, which the gguf package does not know; "
                "pip install --upgrade gguf"
            ) from None
        block, nbytes = GGML_QUANT_SIZES[kind]
        if sizes[0] % block:
            raise CheckpointError(
                f"{self.path}: {what} has rows of {sizes[0]}, not a multiple of the {block} of "
                f"{kind.name}"
            )
        return tuple(sizes[::-1]), kind.name, math.prod(sizes) // block * nbytes, offset

    def _take(self, count: int, what: str) -> memoryview:
        if count > len(self._view) - self._at:
            raise CheckpointError(
                f"{self.path}: {what} needs {count} bytes at {self._at}, but the file has "
                f"{len(self._view)}; it is truncated or damaged"
            )
        self._at += count
        return self._view[self._at - count : self._at]

    def _number(self, form: str, what: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _array(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        return np.frombuffer(self._take(count * dtype.itemsize, what), dtype)

    def _string(self, what: str, most: int = _LARGEST_SIZE) -> str:
        length = self._number("<Q", what)
        if length > most:
            raise CheckpointError(f"{self.path}: {what} claims {length} bytes")
        return self._take(length, what).tobytes().decode("utf-8", "replace")

    def _strings(self, what: str, count: int) -> list[bytes]:
        """Not decoded: most are a vocabulary that nobody may ask for."""
        view, at, size = self._view, self._at, len(self._view)
        if count * 8 > size - at:
            raise CheckpointError(f"{self.path}: {what} claims {count} strings, more than fit")
        strings = []
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(view[at:begin], "little")
            if at > size:
                raise CheckpointError(f"{self.path}: {what} has a string that ends after the file")
            strings.append(bytes(view[begin:at]))
        self._at = at
        return strings
