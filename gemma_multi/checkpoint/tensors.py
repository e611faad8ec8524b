"""Tensors: an immutable mapping from Hugging Face names to weights, with cheap metadata.

Design choices:
- What a tensor is (shape, type, bytes) is known without reading it: a LiteRT file makes its
  tensors anew each time one is asked for, and most questions are not about values.
- Nothing can be put in, and dense arrays are read-only, so what was said of a mapping once (its
  identity, its grid, its digest) stays true. `replaced` gives another mapping.
- `origin` says which file the values come from, as long as they are exactly that file's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gemma_multi.quantization.tensor import SFP8, PackedTensor

Tensor = np.ndarray | PackedTensor


def dense(tensor: Tensor) -> np.ndarray:
    """A tensor as an array: the stored type if it is one, `f32` if it was packed."""
    return tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor


def rows_of(tensor: Tensor, rows: slice | np.ndarray) -> Tensor:
    """Some rows of a matrix, in the form that it is in; a slice copies nothing."""
    return tensor.rows(rows) if isinstance(tensor, PackedTensor) else tensor[rows]


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", "float16", "sfp8", "int8", "int4"
    nbytes: int

    @property
    def is_quantized(self) -> bool:
        """Whether it is on a grid that was fitted to it."""
        return self.dtype in ("int4", "int8")

    @property
    def is_packed(self) -> bool:
        """Whether it is held as a `PackedTensor`."""
        return self.is_quantized or self.dtype == SFP8

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        dtype = tensor.kind if isinstance(tensor, PackedTensor) else tensor.dtype.name
        return cls(tuple(tensor.shape), dtype, tensor.nbytes)


@dataclass(frozen=True)
class Origin:
    """The files that tensors come from."""

    format: str  # a name in `gemma_multi.formats`
    identity: str = ""  # changes whenever the files do; "" where it takes reading them to know
    facts: Mapping[str, Any] = field(default_factory=dict)  # what their exporter fixed, for people
    file: Any = None  # the opened file, for an engine that runs it as it is


class Tensors(Mapping[str, Tensor]):
    """Weights by name."""

    def __init__(
        self, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor],
        origin: Origin | None = None, grid: str = "",
    ) -> None:  # fmt: skip
        """`read` gives a tensor by its name; `grid`, where the reader knows it, saves looking."""
        self.infos = dict(infos)
        self.origin = origin
        self._read, self._known_grid = read, grid

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], origin: Origin | None = None) -> Tensors:
        """Tensors in memory, or views of a mapped file."""
        held = {name: _read_only(tensor) for name, tensor in tensors.items()}
        infos = {name: TensorInfo.of(tensor) for name, tensor in held.items()}
        return cls(infos, held.__getitem__, origin)

    def replaced(self, changes: Mapping[str, Tensor]) -> Tensors:
        """A mapping with some tensors changed; it comes from no file any more."""
        new = Tensors.of(changes)

        def read(name: str) -> Tensor:
            return new[name] if name in new.infos else self._read(name)

        return Tensors({**self.infos, **new.infos}, read)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    @cached_property
    def grid(self) -> str:
        """`portable`, `signed`, `affine` or `none`; the least portable of the tensors."""
        if self._known_grid:
            return self._known_grid
        quantized = (name for name, info in self.infos.items() if info.is_quantized)
        grids = {tensor.grid for tensor in map(self._read, quantized)}  # type: ignore[union-attr]
        return next((g for g in ("affine", "signed", "portable") if g in grids), "none")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, types, shapes and values of all tensors."""
        sha = hashlib.sha256()
        for name in sorted(self.infos):
            for part in _parts(self._read(name)):
                sha.update(f"{name} {part.dtype} {part.shape}\n".encode())
                sha.update(np.ascontiguousarray(part).view(np.uint8).data)
        return sha.hexdigest()

    @property
    def identity(self) -> str:
        """Another for every other set of tensors: from the files' names, sizes and times where
        they are still what was read from them, else the digest, which reads everything."""
        return (self.origin and self.origin.identity) or self.digest

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same bits."""
        if not isinstance(other, Tensors):
            return NotImplemented
        return self is other or (self.infos == other.infos and self.digest == other.digest)

    __hash__ = None  # type: ignore[assignment]


def _parts(tensor: Tensor) -> tuple[np.ndarray, ...]:
    return tensor.parts if isinstance(tensor, PackedTensor) else (tensor,)


def _read_only(tensor: Tensor) -> Tensor:
    if isinstance(tensor, PackedTensor):
        return tensor
    view = np.asarray(tensor).view()
    view.flags.writeable = False
    return view
