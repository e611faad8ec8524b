"""Weights that no NumPy array holds: `PackedTensor`, of which there are two kinds.

`QuantizedTensor` has int4 or int8 codes in the layout MLX and our int4 directory share. Codes are
unsigned and packed into 32-bit words, lowest bits first; `w = scale * u + bias` per group along the
input. On our own grid `bias = -2**(bits-1) * scale`, so that `w = scale * q`.

`Sfp8Tensor` has a code of gemma.cpp's switching float for each weight, and one scale. It is a type
of numbers, not a grid that is fitted: a weight goes there and elsewhere as it does to bfloat16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from gemma_multi.machine import available_cores
from gemma_multi.quantization import int4, int8, sfp8

GROUP_SIZE = int4.GROUP_SIZE
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SFP8 = "sfp8"
_CHUNK_ROWS = 512  # rows at a time: they stay in the cache, and threads seldom meet


class PackedTensor(ABC):
    """`f32[N, K]` held in another form. Equal to another of the same parts."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """ "int4", "int8" or "sfp8"."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def parts(self) -> tuple[np.ndarray, ...]:
        """All that it consists of, the codes first."""

    @abstractmethod
    def rows(self, rows: slice | np.ndarray) -> PackedTensor:
        """Some of the rows; a slice copies nothing."""

    @abstractmethod
    def dequantize(self) -> np.ndarray:
        """The weights: `f32[N, K]`."""

    @abstractmethod
    def packed_like(self, weight: np.ndarray) -> PackedTensor:
        """Another weight, `f32[N, K]`, in this form."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedTensor):
            return NotImplemented
        if (self.kind, self.shape) != (other.kind, other.shape):
            return False
        pairs = zip(self.parts, other.parts, strict=True)
        return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class QuantizedTensor(PackedTensor):
    """`f32[N, K]` held as `bits` bits a weight."""

    packed: np.ndarray  # u32[N, K * bits / 32]
    scales: np.ndarray  # bf16, f16 or f32 [N, K / group_size]
    biases: np.ndarray  # the same
    bits: int
    group_size: int = GROUP_SIZE

    @classmethod
    def centred(cls, packed: np.ndarray, scales: np.ndarray, bits: int) -> QuantizedTensor:
        """On our own grid: `scales` are numbers that bfloat16 holds, biases follow from them."""
        biases = scales.astype(np.float32) * -(1 << (bits - 1))
        return cls(packed, scales.astype(BFLOAT16), biases.astype(BFLOAT16), bits)

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 32 // self.bits

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        return self.packed, self.scales, self.biases

    @property
    def grid(self) -> str:
        """`portable` (ours), `signed` (ours with negative scales) or `affine` (any bias)."""
        scales = self.scales.astype(np.float32)
        centre = 1 << (self.bits - 1)
        if self.group_size != GROUP_SIZE or np.any(
            self.biases.astype(np.float32) != -centre * scales
        ):
            return "affine"
        return "portable" if np.all(scales > 0) else "signed"

    def rows(self, rows: slice | np.ndarray) -> QuantizedTensor:
        return replace(
            self, packed=self.packed[rows], scales=self.scales[rows], biases=self.biases[rows]
        )

    def codes(self) -> np.ndarray:
        """Unsigned codes: `u8[N, K]`."""
        return unpack(self.packed, self.bits)

    def dequantize(self) -> np.ndarray:
        """The weights, exact on our own grids: `f32[N, K]`."""
        rows, width = self.shape
        weight = np.empty((rows, width), np.float32)
        for start in range(0, rows, _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            codes = unpack(self.packed[part], self.bits).astype(np.float32)
            groups = codes.reshape(len(codes), -1, self.group_size)
            scales = self.scales[part, :, None].astype(np.float32)
            biases = self.biases[part, :, None].astype(np.float32)
            weight[part] = (groups * scales + biases).reshape(len(codes), width)
        return weight

    def packed_like(self, weight: np.ndarray) -> QuantizedTensor:
        return quantize_tensor(weight, self.bits)[0]


@dataclass(frozen=True, eq=False)
class Sfp8Tensor(PackedTensor):
    """`f32[N, K]` held as a byte a weight and one scale; see `sfp8`."""

    codes: np.ndarray  # u8[N, K]
    scale: float

    @property
    def kind(self) -> str:
        return SFP8

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        return self.codes, np.array([self.scale], np.float32)

    def rows(self, rows: slice | np.ndarray) -> Sfp8Tensor:
        return replace(self, codes=self.codes[rows])

    def dequantize(self) -> np.ndarray:
        weight = np.empty(self.shape, np.float32)
        for start in range(0, len(weight), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            weight[part] = sfp8.dequantize(np, self.codes[part], np.float32(self.scale))
        return weight

    def packed_like(self, weight: np.ndarray) -> Sfp8Tensor:
        return sfp8_tensor(weight)


def sfp8_tensor(weight: np.ndarray, scale: float | None = None) -> Sfp8Tensor:
    """A weight as gemma.cpp's 8-bit float, at a scale of its own unless one is given."""
    parts = [weight[start : start + _CHUNK_ROWS] for start in range(0, len(weight), _CHUNK_ROWS)]
    held = max(float(sfp8.fit_scales(np, part)) for part in parts) if scale is None else scale
    codes = [sfp8.quantize(np, part.astype(np.float32), np.float32(held)) for part in parts]
    return Sfp8Tensor(np.concatenate(codes), held)


def quantize_tensor(weight: np.ndarray, bits: int) -> tuple[QuantizedTensor, float]:
    """A weight on the int4 grid (`bits=4`) or the int8 rows (`bits=8`), and its error.

    The error is `sqrt(sum((w - w')**2) / sum(w**2))`, 0 for an all-zero weight.
    """
    rows, width = weight.shape
    packed = np.empty((rows, width * bits // 32), np.uint32)
    scales = np.empty((rows, width // GROUP_SIZE), BFLOAT16)
    grid = int4 if bits == 4 else int8

    def put(start: int) -> tuple[float, float]:
        part = slice(start, start + _CHUNK_ROWS)
        w = weight[part].astype(np.float32)
        d = grid.fit_scales(np, w)
        q = grid.quantize(np, w, d)
        difference = (w - grid.dequantize(np, q, d)).ravel()
        packed[part] = pack((q.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8), bits)
        scales[part] = d
        return float(difference @ difference), float(w.ravel() @ w.ravel())

    with ThreadPoolExecutor(available_cores()) as pool:
        lost, total = np.sum(list(pool.map(put, range(0, rows, _CHUNK_ROWS))), axis=0)
    error = float(np.sqrt(lost / total)) if total else 0.0
    return QuantizedTensor.centred(packed, scales, bits), error


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """`u8[N, K]` -> `u32[N, K * bits / 32]`, the first code in the lowest bits."""
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return np.ascontiguousarray(codes).view("<u4")


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    as_bytes = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return as_bytes
    codes = np.empty((as_bytes.shape[0], as_bytes.shape[1] * 2), np.uint8)
    codes[:, 0::2] = as_bytes & 15
    codes[:, 1::2] = as_bytes >> 4
    return codes
