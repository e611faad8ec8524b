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

from gemma_multi.quantization import int4
from gemma_multi.quantization.int4 import CODE_MAX, CODE_MIN, GROUP_SIZE
from gemma_multi.quantization.tensor import QuantizedTensor, pack

_SHRINK = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)  # of a group's range
_REFINEMENTS = 2
_PART = 512  # rows at a time, so that a part stays in the cache
DAMPING = 1.0  # of the mean power of the inputs; less fits the text that was seen, and no other
HEAD_DAMPING = 0.3  # of the embedding, which is more than the head
_DRIFT_DAMPING = 1.0
_TOWARD = 0.5  # of the way: fitted to a few thousand tokens, all of it serves them and not others


@dataclass(frozen=True)
class Moments:
    """What rounding must know of a matrix's inputs, prepared once for all that share them."""

    order: np.ndarray  # i64[K]: in which inputs are rounded
    factor: np.ndarray  # f32[K, K], upper: the Cholesky factor of the inverse, in that order
    weight: np.ndarray  # f32[K]: what an error costs once the inputs to come made up for it

    @classmethod
    def of(cls, second: np.ndarray, damping: float = DAMPING) -> Moments:
        """`second` is `E[x x^T]`, `f32[K, K]`."""
        damped = _damped(second, damping)
        groups = np.diag(second).reshape(-1, GROUP_SIZE)
        inside = np.argsort(-groups, axis=1, kind="stable")
        whole = np.argsort(-groups.sum(1), kind="stable")
        order = (whole[:, None] * GROUP_SIZE + inside[whole]).ravel()
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
        return cls(order, factor.astype(np.float32), (1 / np.diag(factor) ** 2).astype(np.float32))


def toward(weight: np.ndarray, second: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """The weight that, given the inputs there are, is nearest to what `weight` gave for the inputs
    there were. `drift` is `E[x (x_before - x)^T]`, `f32[K, K]`."""
    correction = np.linalg.solve(_damped(second, _DRIFT_DAMPING), drift.astype(np.float64))
    return weight + np.float32(_TOWARD) * (weight @ correction.T.astype(np.float32))


def _damped(second: np.ndarray, damping: float) -> np.ndarray:
    """In float64. An input that is always zero must not leave the matrix singular."""
    damped = second.astype(np.float64)
    power = np.diag(damped)
    np.fill_diagonal(damped, power + damping * power.mean() + 1e-30)
    return damped


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
    codes = np.empty((rows, width), np.int8)
    scales = np.empty((rows, width // GROUP_SIZE), np.float32)
    for start in range(0, width, GROUP_SIZE):
        part = slice(start, start + GROUP_SIZE)
        group, own = left[part], factor[part, part]
        scale = _fit_scale(group, moments.weight[part])
        inverse = 1 / scale
        lost = np.empty_like(group)
        for i in range(GROUP_SIZE):
            code = np.clip(np.round(group[i] * inverse), CODE_MIN, CODE_MAX)
            codes[:, order[start + i]] = code
            lost[i] = (group[i] - code * scale) / own[i, i]
            group[i + 1 :] -= own[i, i + 1 :, None] * lost[i]
        left[part.stop :] -= factor[part, part.stop :].T @ lost
        scales[:, order[start] // GROUP_SIZE] = scale
    return codes, scales


def _fit_scale(group: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The scale of each row's group, `f32[32, N]` -> `f32[N]`: a few shrunken ranges, then least
    squares on the codes of the best, errors weighted by `weight`, `f32[32]`."""
    reach = np.maximum(group.max(0) / CODE_MAX, group.min(0) / CODE_MIN)
    best, least, codes = _try(group, weight, reach)
    for shrink in _SHRINK[1:]:
        best, least, codes = _better(group, weight, reach * np.float32(shrink), best, least, codes)
    for _ in range(_REFINEMENTS):
        squares, products = weight @ (codes * codes), weight @ (group * codes)
        fitted = np.where(squares > 0, products / np.maximum(squares, 1e-30), best)
        best, least, codes = _better(group, weight, fitted, best, least, codes)
    return best


def _try(group: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> tuple:
    scale = int4.portable_scale(np, scale)
    codes = np.clip(np.round(group / scale), CODE_MIN, CODE_MAX)
    residual = group - codes * scale
    return scale, weight @ (residual * residual), codes


def _better(
    group: np.ndarray, weight: np.ndarray, scale: np.ndarray, best: np.ndarray, least: np.ndarray,
    codes: np.ndarray,
) -> tuple:  # fmt: skip
    other, error, other_codes = _try(group, weight, scale)
    won = error < least
    return (
        np.where(won, other, best), np.where(won, error, least), np.where(won, other_codes, codes)
    )  # fmt: skip
