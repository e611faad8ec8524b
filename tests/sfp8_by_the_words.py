"""SFP8 by the words of its description, in exact fractions: slow, and with nothing of ours."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from functools import cache


def value_of(code: int) -> Fraction:
    """By the words of the format: bit 7 is the sign; with bit 6 set there are three bits of
    mantissa and values 2^(e-15) * 1.mmm, e the bits above; without, two and 2^(e-23) * 1.mm; 0 is
    zero."""
    field = code & 0b0111_1111
    if field == 0:
        return Fraction(0)
    if code & 0b0100_0000:
        size = Fraction(2) ** ((field >> 3) - 15) * (1 + Fraction(field & 0b111, 8))
    else:
        size = Fraction(2) ** ((field >> 2) - 23) * (1 + Fraction(field & 0b11, 4))
    return -size if code & 0b1000_0000 else size


TABLE = {code: value_of(code) for code in range(256) if code != 0x80}


SIZES = [TABLE[code] for code in range(128)]  # in ascending order


@cache
def nearest(weight: float) -> int:
    """The code whose value is nearest; of two that are as near, the even one."""
    exact = Fraction(float(weight))
    size = min(abs(exact), SIZES[-1])
    above = min(bisect_left(SIZES, size), 127)
    pair = (above, max(above - 1, 0))
    best = min(pair, key=lambda code: (abs(SIZES[code] - size), code % 2))
    return best | 0x80 if exact < 0 and best else best
