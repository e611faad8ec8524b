"""int8 with one scale per row: `w = d * q` with `q` in -127..127, for the embedding.

The row's scale is repeated for every group of 32 where a format wants groups (MLX 8-bit, GGUF
Q8_0), which changes no value. Scales are portable in the sense of `int4.portable_scale`.
"""

from __future__ import annotations

from typing import Any

from gemma_multi.quantization.int4 import portable_scale

CODE_MAX = 127

Array = Any


def fit_scales(xp: Any, weight: Array) -> Array:
    """The scale of every row, from its largest weight: `f32[N, K]` -> `f32[N, 1]`."""
    return portable_scale(xp, xp.max(xp.abs(weight), axis=-1, keepdims=True) / CODE_MAX)


def quantize(xp: Any, weight: Array, scales: Array) -> Array:
    """Codes of `weight`: `i8[N, K]`, each in -127..127."""
    return xp.clip(xp.round(weight / scales), -CODE_MAX, CODE_MAX).astype(xp.int8)


def dequantize(xp: Any, codes: Array, scales: Array) -> Array:
    """The weights that `codes` and `scales` stand for, exact in float32: `f32[N, K]`."""
    return codes.astype(xp.float32) * scales.astype(xp.float32)


def fake_quantize(xp: Any, weight: Array) -> Array:
    """`weight` rounded to the grid it would be stored on: `f32[N, K]`."""
    scales = fit_scales(xp, weight)
    return dequantize(xp, quantize(xp, weight, scales), scales)
