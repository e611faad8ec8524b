"""SFP8: every value and every boundary, against the format's description in exact fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from gemma_multi.quantization import sfp8

NAMESPACES = {"numpy": np, "mlx": mx, "jax": jnp}
CODES = np.array([code for code in range(256) if code != 0x80], np.uint8)


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


TABLE = {code: value_of(int(code)) for code in CODES.tolist()}


def nearest(weight: np.float32) -> int:
    """The code whose value is nearest; of two that are as near, the even one. The signs apart, so
    that the codes in question are neighbours."""
    exact = Fraction(float(weight))
    size = min(abs(exact), Fraction(15, 8))
    best = min(range(128), key=lambda code: (abs(TABLE[code] - size), code % 2))
    return best | 0x80 if exact < 0 and best else best


def boundaries() -> np.ndarray:
    """Half way between neighbours, and one float32 to either side; both signs."""
    sizes = [TABLE[code] for code in range(128)]
    middles = [(a + b) / 2 for a, b in pairwise(sizes)]
    exact = np.array([float(m) for m in middles], np.float32)
    assert [Fraction(float(x)) for x in exact] == middles
    around = np.concatenate([np.nextafter(exact, np.float32(to)) for to in (0, 2)])
    positive = np.concatenate([exact, around])
    return np.concatenate([positive, -positive])


def test_the_table_is_the_formats() -> None:
    found = {int(code): Fraction(float(sfp8.VALUES[code])) for code in CODES}
    assert found == TABLE
    assert np.isnan(sfp8.VALUES[0x80])
    assert len(set(TABLE.values())) == 255
    assert max(TABLE.values()) == Fraction(15, 8) == Fraction(sfp8.LARGEST)
    kept = sfp8.VALUES[CODES]
    np.testing.assert_array_equal(kept, kept.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
def test_every_value_comes_back_as_its_code(xp: Any) -> None:
    values = sfp8.dequantize(xp, xp.array(CODES), 1.0)
    np.testing.assert_array_equal(np.array(values), sfp8.VALUES[CODES])
    np.testing.assert_array_equal(np.array(sfp8.quantize(xp, values, 1.0)), CODES)


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
def test_every_boundary_rounds_to_the_nearest_and_halves_to_even(xp: Any) -> None:
    rng = np.random.default_rng(0)
    random = (rng.standard_normal(300) * 2.0 ** rng.integers(-30, 1, 300)).astype(np.float32)
    special = np.array([0.0, -0.0, 1e-45, -1e-45, 2.0**-24, 2.0**-23, 2.0**-7, 3, -1e30],
                       np.float32)  # fmt: skip
    weights = np.concatenate([boundaries(), random, special])
    expected = np.array([nearest(w) for w in weights], np.uint8)
    np.testing.assert_array_equal(np.array(sfp8.quantize(xp, xp.array(weights), 1.0)), expected)
    assert 0x80 not in expected


@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
def test_one_scale_brings_a_tensor_within_reach(xp: Any) -> None:
    for largest, scale in (
        (0.0, 1),
        (1.0, 1),
        (1.875, 1),
        (np.nextafter(np.float32(1.875), 2), 2),
        (3.75, 2),
        (3.76, 4),
        (1000.0, 1024),
        (961.0, 1024),
        (960.0, 512),
    ):
        weight = np.array([[0.1, -largest]], np.float32)
        found = sfp8.fit_scales(xp, xp.array(weight))
        assert float(found) == scale, largest
        rounded = np.array(sfp8.fake_quantize(xp, xp.array(weight)))
        np.testing.assert_array_equal(rounded, rounded.astype(ml_dtypes.bfloat16))
        np.testing.assert_allclose(rounded, weight, rtol=1 / 8)


def test_frameworks_agree_bit_for_bit() -> None:
    weight = (np.random.default_rng(1).standard_normal((64, 96)) * 0.9).astype(np.float32)
    expected = sfp8.fake_quantize(np, weight)
    compiled = jax.jit(lambda w: sfp8.fake_quantize(jnp, w))
    for found in (
        sfp8.fake_quantize(mx, mx.array(weight)), compiled(weight),
        sfp8.fake_quantize(np, expected),
    ):  # fmt: skip
        np.testing.assert_array_equal(np.array(found), expected)
