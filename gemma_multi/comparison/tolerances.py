"""How far apart two engines may be, by what they compute in: one table, with a reason each.

A pair is looked up by the types of the activations (`Engine.compute`). The figures come from the
bundled model, from random weights in the true 270M shape and, with int8 activations, from the real
270M in calibrated int4; a bug moves them by far more than the room that is left here
(`tests/comparison/test_seeded_bugs.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gemma_multi.engines import TIES
from gemma_multi.errors import OptionError


@dataclass(frozen=True)
class Tolerance:
    """What still counts as the same answer."""

    weight: float  # largest difference in a tensor, as a share of its largest value
    logit: float  # largest difference of a logit
    divergence: float  # mean Kullback-Leibler divergence of a token's distribution, in nats
    top1: float  # least share of positions whose most likely token is the same, ties aside
    tie: float  # logits of two tokens this close are a tie: either may be chosen
    hidden: float  # difference of the hidden states, as a share of their size, in any layer
    reason: str


_FLOAT32 = Tolerance(
    weight=1e-6, logit=1e-3, divergence=1e-6, top1=0.999, tie=TIES["float32"], hidden=1e-4,
    reason="float32 on both sides: the same sums in another order. A thousandth is about a hundred "
    "times what is seen, and a hundredth of what the smallest known bug does.",
)  # fmt: skip
_BFLOAT16 = Tolerance(
    weight=0.0, logit=math.inf, divergence=0.02, top1=0.97, tie=TIES["bfloat16"], hidden=0.1,
    reason="bfloat16 keeps 8 bits of a number, and every layer rounds its activations anew. "
    "Weights are compared as bfloat16 rounds them.",
)  # fmt: skip
_FLOAT16 = Tolerance(
    weight=1e-5, logit=math.inf, divergence=1e-3, top1=0.99, tie=TIES["float16"], hidden=0.02,
    reason="float16 keeps 11 bits of a number, and every layer rounds its activations anew; below "
    "6e-5 it keeps fewer, so the smallest weights move.",
)  # fmt: skip
_INT8 = Tolerance(
    weight=1e-6, logit=math.inf, divergence=0.01, top1=0.99, tie=TIES["int8"], hidden=0.1,
    reason="LiteRT rounds each row of activations to int8 in front of an int4 or int8 matrix, in "
    "every layer: the weights are the same, the sums are not. On the real 270M a logit moves by "
    "0.3 (root mean square), KL is 0.0038, and texts part where the two best tokens are up to 0.86 "
    "apart.",
)  # fmt: skip

TOLERANCES = {
    frozenset({"float32"}): _FLOAT32,
    frozenset({"bfloat16"}): _BFLOAT16,
    frozenset({"float32", "bfloat16"}): _BFLOAT16,
    frozenset({"float16"}): _FLOAT16,
    frozenset({"float32", "float16"}): _FLOAT16,
    frozenset({"bfloat16", "float16"}): replace(
        _BFLOAT16, weight=1e-5,
        reason="bfloat16's rounding; and what float16 does to the smallest weights.",
    ),
    frozenset({"int8"}): _INT8,
    frozenset({"float32", "int8"}): _INT8,
    frozenset({"float16", "int8"}): replace(
        _INT8, weight=1e-5, divergence=0.012, top1=0.985, tie=1.1,
        reason="Both roundings at once: float16 on one side, int8 activations on the other.",
    ),
    frozenset({"bfloat16", "int8"}): Tolerance(
        weight=0.0, logit=math.inf, divergence=0.03, top1=0.96, tie=1.2, hidden=0.2,
        reason="Both roundings at once: bfloat16 on one side, int8 activations on the other.",
    ),
}  # fmt: skip


def tolerance_of(one: str, other: str) -> Tolerance:
    """The tolerance between two types of activations."""
    pair = frozenset({one, other})
    if pair not in TOLERANCES:
        raise OptionError(f"there is no tolerance for {one} against {other} activations")
    return TOLERANCES[pair]
