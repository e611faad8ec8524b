"""The portable int4 grid: groups of 32 weights, `w = d * q` with `q` in -8..7 and `d > 0`.

Design choices:
- Symmetric, without a zero point, so that MLX (scale `d`, bias `-8 d`), GGUF Q4_0, LiteRT
  blockwise int4, ONNX MatMulNBits and Keras all hold the very same numbers.
- `d` is exact in bfloat16 and in float16, the two types those formats keep scales in.
- `d` is searched per group for the least squared error: a few shrunken ranges, then least
  squares on the codes of the best. On Gaussian weights the squared error is within 1% of an
  exhaustive search; taking the largest weight as the range alone costs 14% more.
- Every function takes the array namespace `xp` (numpy, mlx.core or jax.numpy): the grid of
  training is the grid of export by construction.
"""

from __future__ import annotations

from typing import Any

GROUP_SIZE = 32
CODE_MIN, CODE_MAX = -8, 7
SMALLEST_SCALE = 2.0**-24  # the least positive float16; also the scale of an all-zero group
LARGEST_SCALE = 2.0**15  # a power of two below float16's 65504
_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
_REFINEMENTS = 2

Array = Any


def fit_scales(xp: Any, weight: Array) -> Array:
    """The scale of every group: `f32[..., K]` -> `f32[..., K / 32]`, least squared error."""
    groups = split_groups(weight)
    reach = xp.maximum(xp.max(groups, axis=-1) / CODE_MAX, xp.min(groups, axis=-1) / CODE_MIN)
    best, least = None, None
    for shrink in _SHRINK:
        best, least = _keep_better(xp, groups, portable_scale(xp, reach * shrink), best, least)
    for _ in range(_REFINEMENTS):
        codes = _codes(xp, groups, best)
        squares = xp.sum(codes * codes, axis=-1)
        fitted = xp.sum(groups * codes, axis=-1) / xp.maximum(squares, 1.0)
        best, least = _keep_better(xp, groups, portable_scale(xp, fitted), best, least)
    return best


def quantize(xp: Any, weight: Array, scales: Array) -> Array:
    """Codes of `weight` on the grid of `scales`: `i8[..., K]`, each in -8..7."""
    return _codes(xp, split_groups(weight), scales).reshape(weight.shape).astype(xp.int8)


def dequantize(xp: Any, codes: Array, scales: Array) -> Array:
    """The weights that `codes` and `scales` stand for, exact in float32: `f32[..., K]`."""
    groups = split_groups(codes).astype(xp.float32) * scales[..., None].astype(xp.float32)
    return groups.reshape(codes.shape)


def fake_quantize(xp: Any, weight: Array) -> Array:
    """`weight` rounded to the grid it would be stored on: `f32[..., K]`."""
    scales = fit_scales(xp, weight)
    return dequantize(xp, quantize(xp, weight, scales), scales)


def portable_scale(xp: Any, value: Array) -> Array:
    """The nearest positive number that bfloat16 and float16 both hold exactly (`f32`)."""
    rounded = round_to_bfloat16(xp, value)
    # float16 has no steps finer than 2**-24, which bfloat16 reaches below 2**-17.
    coarse = xp.round(rounded * 2.0**24) * 2.0**-24
    return xp.clip(xp.where(rounded < 2.0**-17, coarse, rounded), SMALLEST_SCALE, LARGEST_SCALE)


def round_to_bfloat16(xp: Any, value: Array) -> Array:
    """The nearest bfloat16, as `f32`: by its bits, half to even, the same in every framework.
    (XLA may leave out a conversion to bfloat16 and back; it cannot leave out integers.)"""
    bits = value.astype(xp.float32).view(xp.uint32)
    bits = bits + (0x7FFF + ((bits >> 16) & 1)).astype(xp.uint32)
    return ((bits >> 16) << 16).view(xp.float32)


def split_groups(array: Array) -> Array:
    """`[..., K]` -> `[..., K / 32, 32]`."""
    return array.reshape(*array.shape[:-1], array.shape[-1] // GROUP_SIZE, GROUP_SIZE)


def _codes(xp: Any, groups: Array, scales: Array) -> Array:
    return xp.clip(xp.round(groups / scales[..., None]), CODE_MIN, CODE_MAX)


def _keep_better(xp: Any, groups: Array, scales: Array, best: Array, least: Array) -> tuple:
    residual = groups - _codes(xp, groups, scales) * scales[..., None]
    error = xp.sum(residual * residual, axis=-1)
    if best is None:
        return scales, error
    better = error < least
    return xp.where(better, scales, best), xp.where(better, error, least)
