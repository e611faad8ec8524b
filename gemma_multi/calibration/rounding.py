"""One matrix onto the int4 grid so that what it does to its inputs stays, not its numbers.

GPTQ (Frantar et al., 2022): inputs are rounded one after another, and what rounding one loses is
made up for by those still to come, by the second moments `H = E[x x^T]` of what they multiply.

Design choices:
- The scale of a group is chosen when its turn comes, for the weights as they are by then, each
  error weighted by what the inputs still to come cannot make up for.
- Groups come in the order of their inputs' power, and so do the inputs within a group: what
  matters most is rounded first, while there is most left to make up for it.
- The rounding of a layer is not to be faithful to the inputs it would have had, but to give what
  the layer gave for those: `toward` shifts the target by what earlier rounding did to the inputs
  (GPTAQ: Li et al., 2025).
- Rows do not depend on each other, so they go in parts over the cores.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from gemma_multi.machine import available_cores
from gemma_multi.quantization import int4
from gemma_multi.quantization.int4 import CODE_MAX, CODE_MIN, GROUP_SIZE
from gemma_multi.quantization.tensor import QuantizedTensor, pack

_SHRINK = (0.93, 0.86, 0.79, 0.72, 0.65)  # of a group's range, which is tried first
_REFINEMENTS = 2
_PART = 8192  # rows at a time; with fewer, threads wait for each other between NumPy's calls
_BLOCK = 256  # of a triangular matrix
DAMPING = 1.0  # of the mean power of the inputs; less fits the text that was seen, and no other
HEAD_DAMPING = 0.3  # of the embedding, which is more than the head
_TOWARD = 0.5  # of the way: fitted to a few thousand tokens, all of it serves them and not others


@dataclass(frozen=True)
class Moments:
    """What rounding must know of a matrix's inputs, prepared once for all that share them."""

    order: np.ndarray  # i64[K]: in which inputs are rounded
    factor: np.ndarray  # f32[K, K], upper: F of the inverse F^T F of the moments, in that order
    weight: np.ndarray  # f32[K]: what an error costs once the inputs to come made up for it

    @classmethod
    def of(cls, second: np.ndarray, damping: float = DAMPING) -> Moments:
        """`second` is `E[x x^T]`, `f32[K, K]`. Damped, its greatest eigenvalue is at most
        `1 + K / damping` times its least, so float32 is enough."""
        power = np.diag(second)
        groups = power.reshape(-1, GROUP_SIZE)
        inside = np.argsort(-groups, axis=1, kind="stable")
        whole = np.argsort(-groups.sum(1), kind="stable")
        order = (whole[:, None] * GROUP_SIZE + inside[whole]).ravel()
        damped = second[np.ix_(order, order)]
        # an input that is always zero must not leave it singular
        np.fill_diagonal(damped, power[order] + damping * power.mean() + np.float32(1e-30))
        # from last to first, for a lower triangle of the moments is an upper one of the inverse
        lower = _inverse_of_lower(np.linalg.cholesky(damped[::-1, ::-1]))
        factor = np.ascontiguousarray(lower[::-1, ::-1])
        return cls(order, factor, 1 / np.diag(factor) ** 2)


def _inverse_of_lower(matrix: np.ndarray) -> np.ndarray:
    """Of a lower triangular `f32[K, K]`, in halves: NumPy has only the inverse of a full one."""
    width = len(matrix)
    if width <= _BLOCK:
        return np.tril(np.linalg.inv(matrix))
    first, second = slice(0, width // 2), slice(width // 2, width)
    inverse = np.zeros_like(matrix)
    inverse[first, first] = top = _inverse_of_lower(matrix[first, first])
    inverse[second, second] = bottom = _inverse_of_lower(matrix[second, second])
    inverse[second, first] = -(bottom @ matrix[second, first] @ top)
    return inverse


def toward(weight: np.ndarray, moments: Moments, missing: np.ndarray, pool: Executor) -> np.ndarray:
    """The weight that, given the inputs there are, is nearest to what `weight` gave for the inputs
    there were. `missing` is `E[(y_before - y) x^T]`, `f32[N, K]`, where `y` is what `weight` gives
    for them."""

    def of_rows(part: np.ndarray) -> np.ndarray:
        return part[:, moments.order] @ moments.factor.T @ moments.factor

    correction = np.empty_like(weight)
    parts = pool.map(of_rows, np.array_split(missing, available_cores()))
    correction[:, moments.order] = np.concatenate(list(parts))
    return weight + np.float32(_TOWARD) * correction


def round_matrix(weight: np.ndarray, moments: Moments, pool: Executor) -> QuantizedTensor:
    """`f32[N, K]` on the portable grid."""
    parts = [weight[start : start + _PART] for start in range(0, len(weight), _PART)]
    done = list(pool.map(lambda part: _round_rows(part, moments), parts))
    codes, scales = (np.concatenate(arrays) for arrays in zip(*done, strict=True))
    return QuantizedTensor.centred(pack((codes - CODE_MIN).astype(np.uint8), 4), scales, 4)


def _round_rows(weight: np.ndarray, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """(codes `i8[N, K]`, scales `f32[N, K / 32]`)."""
    rows, width = weight.shape
    order, factor = moments.order, moments.factor
    left = np.ascontiguousarray(weight.T[order])  # f32[K, N]: an input is a row
    codes = np.empty((width, rows), np.int8)
    scales = np.empty((rows, width // GROUP_SIZE), np.float32)
    for start in range(0, width, GROUP_SIZE):
        part = slice(start, start + GROUP_SIZE)
        group, own = left[part], factor[part, part]
        scale = _fit_scale(group, moments.weight[part])
        lost = np.empty_like(group)
        for i in range(GROUP_SIZE):
            code = _codes(group[i], scale)
            codes[start + i] = code
            lost[i] = (group[i] - code * scale) / own[i, i]
            group[i + 1 :] -= own[i, i + 1 :, None] * lost[i]
        left[part.stop :] -= factor[part, part.stop :].T @ lost
        scales[:, order[start] // GROUP_SIZE] = scale
    placed = np.empty((rows, width), np.int8)
    placed[:, order] = codes.T
    return placed, scales


def _fit_scale(group: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The scale of each row's group, `f32[32, N]` -> `f32[N]`: a few shrunken ranges, then least
    squares on the codes of the best, errors weighted by `weight`, `f32[32]`."""
    codes, spare = np.empty_like(group), np.empty_like(group)

    def error(scale: np.ndarray) -> np.ndarray:
        np.multiply(_codes(group, scale, codes), scale, out=spare)
        np.subtract(group, spare, out=spare)
        return weight @ np.square(spare, out=spare)

    reach = np.maximum(group.max(0) / CODE_MAX, group.min(0) / CODE_MIN)
    best = int4.portable_scale(np, reach)
    least = error(best)
    for shrink in _SHRINK:
        other = int4.portable_scale(np, reach * np.float32(shrink))
        best, least = _better(other, error(other), best, least)
    for _ in range(_REFINEMENTS):
        _codes(group, best, codes)
        products = weight @ np.multiply(group, codes, out=spare)
        squares = weight @ np.square(codes, out=spare)
        fitted = np.where(squares > 0, products / np.maximum(squares, np.float32(1e-30)), best)
        other = int4.portable_scale(np, fitted)
        best, least = _better(other, error(other), best, least)
    return best


def _codes(weight: np.ndarray, scale: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The nearest, as `f32`."""
    codes = np.divide(weight, scale, out=out)
    np.rint(codes, out=codes)
    return np.clip(codes, CODE_MIN, CODE_MAX, out=codes)


def _better(
    scale: np.ndarray, error: np.ndarray, best: np.ndarray, least: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    won = error < least
    return np.where(won, scale, best), np.where(won, error, least)
