"""SFP8: every value and every boundary, against the format's description in exact fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from sfp8_by_the_words import SIZES, TABLE, nearest
from tiny import tiny_checkpoint

from gemma_multi import Checkpoint, OptionError, load
from gemma_multi.checkpoint import Adapter
from gemma_multi.config import EMBEDDING
from gemma_multi.demo import STORY
from gemma_multi.exporters import export_checkpoint, save
from gemma_multi.quantization import sfp8
from gemma_multi.quantization.tensor import Sfp8Tensor, sfp8_tensor
from gemma_multi.sources import open_checkpoint
from gemma_multi.transforms import (
    cast_to_stored,
    merge,
    quantize_checkpoint,
    to_precision,
    trimmed,
)

NAMESPACES = {"numpy": np, "mlx": mx, "jax": jnp}
CODES = np.array(list(TABLE), np.uint8)


def boundaries() -> np.ndarray:
    """Half way between neighbours, and one float32 to either side; both signs."""
    middles = [(a + b) / 2 for a, b in pairwise(SIZES)]
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
    assert sorted(SIZES) == SIZES
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


# a checkpoint in SFP8

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def held() -> Checkpoint:
    return to_precision(tiny_checkpoint(), "sfp8")


def test_a_checkpoint_holds_a_byte_a_weight_and_norms_as_they_are(held: Checkpoint) -> None:
    dense = tiny_checkpoint()
    assert (held.precision, held.grid, held.is_quantized) == ("sfp8", "none", False)
    np.testing.assert_array_equal(held.weight(NORM), dense.weight(NORM))
    tensor = held.tensors[DOWN]
    assert isinstance(tensor, Sfp8Tensor)
    assert tensor.nbytes == held.tensors.infos[DOWN].nbytes == dense.weight(DOWN).size + 4
    np.testing.assert_array_equal(held.weight(DOWN), sfp8.fake_quantize(np, dense.weight(DOWN)))
    np.testing.assert_array_equal(held.rows(EMBEDDING, np.array([5, 2])),
                                  held.weight(EMBEDDING)[[5, 2]])  # fmt: skip
    assert to_precision(held, "sfp8") is held
    assert held == to_precision(tiny_checkpoint(), "sfp8")
    assert held != dense
    other = held.with_tensors({DOWN: Sfp8Tensor(tensor.codes, 2.0)})
    assert held.digest() != other.digest()


@pytest.mark.parametrize("backend", ["mlx", "keras"])
def test_engines_compute_with_the_values_that_stand_there(backend: str, held: Checkpoint) -> None:
    as_stored = load(held, backend=backend, progress=False)
    made = load(tiny_checkpoint(), backend=backend, precision="sfp8", progress=False)
    dense = load(to_precision(held, "float32"), backend=backend, precision="float32",
                 progress=False)  # fmt: skip
    ids = np.arange(3, 30)
    logits = [np.asarray(model.new_session().read(ids)) for model in (as_stored, made)]
    np.testing.assert_array_equal(*logits)
    assert as_stored.engine.precision == made.engine.precision == "sfp8"
    assert as_stored.describe()["stored_as"] == as_stored.describe()["weights"] == "sfp8"
    np.testing.assert_array_equal(made.engine.weight(DOWN), held.weight(DOWN))
    if as_stored.engine.compute == "float32":
        np.testing.assert_array_equal(logits[0], np.asarray(dense.new_session().read(ids)))
    made.engine.assign({DOWN: np.full((96, 128), 0.3, np.float32)})
    np.testing.assert_array_equal(made.engine.weight(DOWN), np.float32(0.3125))


def test_litert_says_what_it_computes_in_and_runs_what_is_stored(held: Checkpoint) -> None:
    with pytest.raises(OptionError, match="'litert' computes in float32, int4, int8, not in sfp8"):
        load(held, backend="litert", precision="sfp8", progress=False)
    engine = load(held, backend="litert", progress=False).engine
    assert engine.precision == "float32"
    np.testing.assert_array_equal(engine.weight(DOWN), held.weight(DOWN))


def test_other_formats_take_the_same_numbers(held: Checkpoint, tmp_path: Path) -> None:
    opened = open_checkpoint(save(held, tmp_path / "directory"))
    assert opened.precision == "bfloat16"  # exact, as the scales are powers of two
    export_checkpoint(held, tmp_path / "x.gguf")
    for one in (opened, open_checkpoint(tmp_path / "x.gguf")):
        for name in held.tensors:
            np.testing.assert_array_equal(one.weight(name), held.weight(name), strict=False)
    odd = held.with_tensors({DOWN: Sfp8Tensor(held.tensors[DOWN].codes, 0.3)})  # type: ignore[union-attr]
    export_checkpoint(odd, tmp_path / "mlx", format="mlx")
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "mlx").weight(DOWN), odd.weight(DOWN))
    for name, options in (("a", {"format": "huggingface"}), ("b", {"format": "mlx"}),
                          ("c.gguf", {}), ("d.tflite", {})):  # fmt: skip
        with pytest.raises(OptionError, match="precision is 'sfp8'"):
            export_checkpoint(held, tmp_path / name, precision="sfp8", **options)
        assert not (tmp_path / name).exists()


def test_int4_may_be_made_of_it_and_it_of_int4(held: Checkpoint) -> None:
    small, _ = quantize_checkpoint(held)
    assert small.precision == "int4"
    again = to_precision(small, "sfp8")
    np.testing.assert_array_equal(again.weight(DOWN), sfp8.fake_quantize(np, small.weight(DOWN)))


def test_a_trimmed_vocabulary_keeps_its_codes() -> None:
    stored = to_precision(open_checkpoint("storyteller"), "sfp8")
    small = trimmed(stored, [], keep=3000)
    assert isinstance(small.tensors[EMBEDDING], Sfp8Tensor)
    assert small.tensors[EMBEDDING].scale == stored.tensors[EMBEDDING].scale  # type: ignore[union-attr]


def test_the_storyteller_tells_its_story_in_sfp8() -> None:
    model = load("storyteller", backend="keras", precision="sfp8", progress=False)
    assert model.generate(STORY, max_tokens=12)


def test_a_merged_adapter_goes_back_to_bytes(held: Checkpoint) -> None:
    rng = np.random.default_rng(2)
    low, high = rng.standard_normal((2, 128)), rng.standard_normal((96, 2))
    adapter = Adapter(2, 2.0, {DOWN: (low.astype(np.float32), high.astype(np.float32))})
    merged = merge(held, adapter)
    assert merged.precision == "sfp8"
    expected = held.weight(DOWN) + adapter.change(DOWN)
    np.testing.assert_array_equal(merged.weight(DOWN), sfp8.fake_quantize(np, expected))
    dense = held.with_tensors({DOWN: expected})
    assert cast_to_stored(dense, held).tensors[DOWN] == merged.tensors[DOWN]


def test_rows_are_encoded_at_the_scale_that_is_given() -> None:
    weight = np.array([[0.5, -3.0]], np.float32)
    assert sfp8_tensor(weight).scale == 2
    assert sfp8_tensor(weight, 4.0).dequantize().tolist() == [[0.5, -3.0]]
