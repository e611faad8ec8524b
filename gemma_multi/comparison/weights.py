"""Level 1, weights: does every engine hold the same numbers?

Each tensor is read back from the engines, in float32 and in Hugging Face's layout, rows at a
time. Where one side computes in fewer bits, both are rounded to them first. Equal tensors are
counted and hashed, others are named with the largest difference.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from gemma_multi.comparison.subjects import Subject
from gemma_multi.comparison.tolerances import Tolerance
from gemma_multi.quantization.tensor import BFLOAT16

_CHUNK = 1 << 22  # numbers at a time, 17 MB
# types with fewer bits, the fewest first, and the step between neighbours, as a share
_NARROW = {"bfloat16": (BFLOAT16, 2.0**-7), "float16": (np.dtype(np.float16), 2.0**-10)}


@dataclass(frozen=True)
class TensorDifference:
    name: str
    largest: float  # difference of one weight
    share: float  # of the tensor's largest value
    passed: bool


@dataclass(frozen=True)
class WeightsResult:
    tensors: int
    different: tuple[TensorDifference, ...]  # the largest share first
    sha256: tuple[str, str]  # over all tensors as the reference and the other hold them
    compared_as: str  # "float32", "bfloat16" or "float16"

    @property
    def passed(self) -> bool:
        return all(tensor.passed for tensor in self.different)

    @property
    def summary(self) -> str:
        same = self.tensors - len(self.different)
        if not self.different:
            return f"all {self.tensors} tensors hold the same {self.compared_as} values"
        worst = self.different[0]
        return (
            f"{same} of {self.tensors} tensors hold the same values; {worst.name} differs by up "
            f"to {worst.largest:.1e} ({worst.share:.1e} of its largest)"
        )


def compare_weights(reference: Subject, other: Subject, allowed: Tolerance) -> WeightsResult:
    kind = next((k for k in _NARROW if k in (reference.compute, other.compute)), "float32")
    dtype, step = _NARROW.get(kind, (np.dtype(np.float32), 0.0))
    hashes = (hashlib.sha256(), hashlib.sha256())
    shapes = reference.model.config.tensor_shapes()
    different = []
    for name, shape in shapes.items():
        rows = max(1, _CHUNK // shape[-1]) if len(shape) == 2 else shape[0]
        largest, top, close = 0.0, 0.0, True
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows) if len(shape) == 2 else slice(None)
            held = [subject.model.engine.weight(name, part) for subject in (reference, other)]
            held = [v.astype(dtype, copy=False).astype(np.float32, copy=False) for v in held]
            mine, theirs = (values + np.float32(0) for values in held)  # -0 is 0
            for sha, values in zip(hashes, (mine, theirs), strict=True):
                sha.update(np.ascontiguousarray(values).data)
            if not np.array_equal(mine, theirs):  # np.maximum keeps a NaN
                difference = np.abs(mine - theirs)
                largest = float(np.maximum(largest, difference.max()))
                close &= bool(np.all(difference <= step * np.abs(mine)))
            top = max(top, float(np.abs(mine).max()))
        if largest:
            share = largest / top if top else math.inf
            # a norm's 1 + w, where w was float32, is rounded once or twice
            passed = close if step and len(shape) == 1 else share <= allowed.weight
            different.append(TensorDifference(name, largest, share, passed))
    different.sort(key=lambda tensor: -tensor.share)
    digests = (hashes[0].hexdigest(), hashes[1].hexdigest())
    return WeightsResult(len(shapes), tuple(different), digests, kind)
