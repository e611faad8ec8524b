"""SFP8, gemma.cpp's 8-bit switching float: a sign, and a magnitude of which large ones have three
bits of mantissa and small ones two.

| code & 0x7F | value | |
| --- | --- | --- |
| 64..127 | `2**(e - 15) * 1.mmm`, e = code >> 3 | 2**-7 to 1.875 |
| 1..63 | `2**(e - 23) * 1.mm`, e = code >> 2 | 1.25 * 2**-23 to 1.75 * 2**-8 |
| 0 | zero; with the sign set it is reserved | |

Design choices:
- A weight becomes the nearest of the 255 values, of two as near the one of the even code, in one
  rounding from float32. Codes grow with their values, so that is integer arithmetic on the bits of
  a float32, the same in every framework. (gemma.cpp's own encoder first cuts float32 to 6 bits of
  mantissa and makes zeros of what is below 0.9375 * 2**-23; what it has encoded, this gives back.)
- A tensor has one scale, as gemma.cpp keeps it: 1 unless a weight is beyond 1.875, else the least
  power of two that brings all within. Another power of two costs a float nothing, and keeps every
  weight exact in bfloat16.
- Every function takes the array namespace `xp` (numpy, mlx.core or jax.numpy), as in `int4`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = 1.875
RESERVED = 0x80
_SIGN, _MAGNITUDE = 0x80, 0x7F
_SWITCH = 64  # the first code with three bits of mantissa
_BIAS = 127  # of a float32's exponent, which stands above 23 bits of mantissa
# a magnitude's bits as a float32's
_LARGEST_BITS = _BIAS << 23 | 0x700000
_SWITCH_BITS = (_BIAS - 7) << 23
_HALF_OF_LEAST_BITS = (_BIAS - 24) << 23 | 0x200000  # 0.625 * 2**-23, between zero and the least

Array = Any


def _table() -> np.ndarray:
    magnitude = np.arange(256) & _MAGNITUDE
    large = 2.0 ** ((magnitude >> 3) - 15) * (1 + (magnitude & 7) / 8)
    small = 2.0 ** ((magnitude >> 2) - 23) * (1 + (magnitude & 3) / 4)
    values = np.where(magnitude >= _SWITCH, large, small) * np.where(magnitude == 0, 0, 1)
    values[_SIGN:] *= -1
    values[RESERVED] = np.nan  # no weight; readers refuse it
    return values.astype(np.float32)


VALUES = _table()  # f32[256], of each code


def fit_scales(xp: Any, weight: Array) -> Array:
    """The scale of a tensor: `f32[...]` -> `f32[]`, 1 or the least power of two above it by which
    no weight is beyond 1.875."""
    bits = _magnitude_bits(xp, xp.max(xp.abs(weight)))
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0x700000).astype(xp.int32)
    return (xp.maximum(exponent, _BIAS) << 23).view(xp.float32)


def quantize(xp: Any, weight: Array, scales: Array) -> Array:
    """Codes of `weight / scales`: `u8[...]`. What is beyond 1.875 becomes that."""
    weight = (weight / scales).astype(xp.float32)
    bits = xp.minimum(_magnitude_bits(xp, weight), _LARGEST_BITS)
    large = _rounded(bits, 20) - ((_BIAS - 15) << 3)
    small = xp.maximum(_rounded(bits, 21) - ((_BIAS - 23) << 2), 1)
    magnitude = xp.where(bits >= _SWITCH_BITS, large, small)
    magnitude = xp.where(bits > _HALF_OF_LEAST_BITS, magnitude, 0)
    sign = xp.where((weight < 0) & (magnitude > 0), _SIGN, 0)
    return (magnitude + sign).astype(xp.uint8)


def dequantize(xp: Any, codes: Array, scales: Array) -> Array:
    """The weights that `codes` and the tensor's scale stand for: `f32[...]`; NaN for the code that
    is reserved."""
    return xp.take(xp.array(VALUES) * scales, codes.astype(xp.int32))


def fake_quantize(xp: Any, weight: Array) -> Array:
    """`weight` rounded to the grid it would be stored on: `f32[...]`."""
    scales = fit_scales(xp, weight)
    return dequantize(xp, quantize(xp, weight, scales), scales)


def _magnitude_bits(xp: Any, weight: Array) -> Array:
    """A float32's bits without the sign, which order as magnitudes do: `i32[...]`."""
    return (weight.astype(xp.float32).view(xp.uint32) & 0x7FFFFFFF).astype(xp.int32)


def _rounded(bits: Array, dropped: int) -> Array:
    """`bits` without the last ones, half to even; a carry goes on into the exponent."""
    return (bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) >> dropped
