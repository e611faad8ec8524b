"""The grids: the same numbers in NumPy, MLX and JAX, on disk, and in mlx-lm's own hands."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mlx.utils import tree_flatten
from tiny import random_tensors, tiny_checkpoint, tiny_config

from gemma_multi import PlainRoundingWarning, load, quantize
from gemma_multi.cli import main
from gemma_multi.engines import ALL
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.exporters import save
from gemma_multi.quantization import int4, int8, sfp8
from gemma_multi.quantization.tensor import QuantizedTensor, pack, quantize_tensor, unpack
from gemma_multi.sources import open_checkpoint
from gemma_multi.transforms import quantize_checkpoint

NAMESPACES = {"numpy": np, "mlx": mx, "jax": jnp}
GRIDS = {"int4": int4, "int8": int8, "sfp8": sfp8}

weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96])),
    elements=st.one_of(
        st.floats(-1e3, 1e3, width=32), st.just(0.0), st.floats(-(2.0**-20), 2.0**-20, width=32)
    ),
)


def gaussian(rows: int = 2000, width: int = 320, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 0.03).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@settings(max_examples=150, deadline=None)
@given(weight=weights)
def test_codes_and_values_agree_bit_for_bit(grid: ModuleType, weight: np.ndarray) -> None:
    scales = grid.fit_scales(np, weight)
    codes = grid.quantize(np, weight, scales)
    values = grid.dequantize(np, codes, scales)
    for xp in (mx, jnp):
        w, d = xp.array(weight), xp.array(scales)
        theirs = grid.quantize(xp, w, d)
        np.testing.assert_array_equal(np.array(theirs), codes)
        np.testing.assert_array_equal(np.array(grid.dequantize(xp, theirs, d)), values)


@settings(max_examples=150, deadline=None)
@given(weight=weights)
def test_int4_scales_are_positive_and_exact_in_both_half_types(weight: np.ndarray) -> None:
    scales = int4.fit_scales(np, weight)
    assert (scales > 0).all()
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(scales, scales.astype(ml_dtypes.bfloat16).astype(np.float32))
    codes = int4.quantize(np, weight, scales)
    assert codes.min() >= -8
    assert codes.max() <= 7
    # minus eight times the scale, MLX's bias, must be exact as well
    biases = scales * -8
    np.testing.assert_array_equal(biases, biases.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_portable_scale_rounds_alike_everywhere() -> None:
    values = np.concatenate(
        [np.float32(2.0) ** np.arange(-40, 20), np.abs(gaussian(50).ravel()), [0.0]]
    ).astype(np.float32)
    expected = int4.portable_scale(np, values)
    for xp in (mx, jnp):
        np.testing.assert_array_equal(np.array(int4.portable_scale(xp, xp.array(values))), expected)
    assert expected[-1] > 0


def test_chosen_scales_differ_at_ties_only() -> None:
    """The search sums squares, and frameworks sum in another order: two candidates that are
    equally good to rounding may win by turns. Where scales differ, the errors are equal."""
    weight = gaussian(4000)
    ours = int4.fit_scales(np, weight)

    def errors(scales: np.ndarray) -> np.ndarray:
        difference = weight - int4.dequantize(np, int4.quantize(np, weight, scales), scales)
        return (int4.split_groups(difference).astype(np.float64) ** 2).sum(-1)

    for name, xp in (("mlx", mx), ("jax", jnp)):
        theirs = np.array(int4.fit_scales(xp, xp.array(weight)))
        ties = ours != theirs
        print(f"{name}: {ties.sum()} ties in {ours.size} groups")
        assert ties.mean() < 1e-3
        np.testing.assert_allclose(errors(theirs)[ties], errors(ours)[ties], rtol=1e-4)


def test_the_search_is_near_the_best_there_is() -> None:
    weight = gaussian(300, 64)
    groups = int4.split_groups(weight)
    reach = np.maximum(groups.max(-1) / 7, groups.min(-1) / -8)
    best = np.full(reach.shape, np.inf)
    for shrink in np.linspace(0.5, 1.05, 200):  # every range worth trying
        scales = int4.portable_scale(np, reach * np.float32(shrink))
        q = np.clip(np.round(groups / scales[..., None]), -8, 7)
        best = np.minimum(best, ((groups - q * scales[..., None]) ** 2).sum(-1))
    found = int4.split_groups(weight - int4.fake_quantize(np, weight))
    assert (found**2).sum() < 1.02 * best.sum()
    plain = int4.portable_scale(np, reach)
    absmax = weight - int4.dequantize(np, int4.quantize(np, weight, plain), plain)
    assert (found**2).sum() < 0.92 * (absmax**2).sum()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES)
def test_the_grid_is_a_fixed_point_and_zero_stays_zero(grid: ModuleType, xp: Any) -> None:
    weight = gaussian(64)
    weight[3] = 0
    scales = grid.fit_scales(np, weight)
    on_grid = grid.dequantize(np, grid.quantize(np, weight, scales), scales)
    codes = grid.quantize(xp, xp.array(on_grid), xp.array(scales))
    np.testing.assert_array_equal(np.array(codes), grid.quantize(np, weight, scales))
    assert not np.array(grid.fake_quantize(xp, xp.array(weight)))[3].any()


def test_fake_quantise_compiles_in_jax() -> None:
    weight = gaussian(64)
    compiled = jax.jit(lambda w: int4.fake_quantize(jnp, w))(weight)
    eager = int4.fake_quantize(np, weight)
    assert np.mean(np.array(compiled) != eager) < 1e-3  # ties only


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_mlx_packing(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (6, 96)).astype(np.uint8)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    ones, zeros = mx.ones((6, 3)), mx.zeros((6, 3))
    theirs = mx.dequantize(mx.array(packed), ones, zeros, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(theirs), codes)


@pytest.mark.parametrize("embedding_bits", [4, 8])
def test_mlx_lm_loads_the_directory_and_holds_our_numbers(
    tmp_path: Path, embedding_bits: int
) -> None:
    from mlx_lm.utils import load_model

    quantize(tiny_checkpoint(), tmp_path / "q", embedding_bits=embedding_bits, calibrate=None)
    checkpoint = open_checkpoint(tmp_path / "q")
    model, _ = load_model(tmp_path / "q")
    parameters = dict(tree_flatten(model.parameters()))
    for name, tensor in checkpoint.tensors.items():
        if not isinstance(tensor, QuantizedTensor):
            continue
        stem = name.removesuffix(".weight")
        bits = embedding_bits if "embed" in name else 4
        assert (tensor.bits, tensor.grid) == (bits, "portable")
        theirs = mx.dequantize(
            parameters[name],
            parameters[f"{stem}.scales"].astype(mx.float32),
            parameters[f"{stem}.biases"].astype(mx.float32),
            group_size=32,
            bits=bits,
        )
        np.testing.assert_array_equal(np.array(theirs), tensor.dequantize())


def test_mlx_lms_own_4bit_directories_are_read(tmp_path: Path) -> None:
    """Group 64 and free biases: mlx-lm's default, not our grid."""
    import mlx.nn as nn
    from mlx_lm.utils import load_model, quantize_model

    config = tiny_config(hidden_size=128, intermediate_size=192)
    source = tiny_checkpoint().replace(config=config, tensors=random_tensors(config))
    path = save(source, tmp_path / "dense")
    model, raw = load_model(path)
    model, raw = quantize_model(model, raw, group_size=64, bits=4)
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(path)
    assert (checkpoint.precision, checkpoint.grid) == ("int4", "affine")
    gate = model.model.layers[2].mlp.gate_proj
    theirs = mx.dequantize(gate.weight, gate.scales, gate.biases, group_size=64, bits=4)
    np.testing.assert_allclose(
        checkpoint.weight("model.layers.2.mlp.gate_proj.weight"), np.array(theirs), atol=1e-6
    )
    ids = mx.array([[5, 6, 7, 8]])
    from gemma_multi.engines import create_engine

    engine = create_engine(checkpoint, "mlx")
    np.testing.assert_allclose(
        engine.session().read(np.array(ids)[0], ALL), np.array(model(ids))[0], atol=1e-3
    )


def test_a_signed_grid_is_told_apart() -> None:
    tensor, _ = quantize_tensor(gaussian(32), 4)
    assert tensor.grid == "portable"
    flipped = tensor.scales.copy()
    flipped[0, 0] = -flipped[0, 0]
    signed = QuantizedTensor(tensor.packed, flipped, (flipped * -8).astype(flipped.dtype), 4)
    assert signed.grid == "signed"
    assert QuantizedTensor(tensor.packed, tensor.scales, tensor.biases * 2, 4).grid == "affine"


def test_the_report_has_every_tensor_and_its_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    report = quantize(checkpoint, tmp_path / "q", calibrate=None)
    matrices = [n for n, s in checkpoint.config.tensor_shapes().items() if len(s) == 2]
    assert [t.name for t in report.tensors] == matrices
    again = open_checkpoint(tmp_path / "q")
    for entry in report.tensors:
        w, q = checkpoint.weight(entry.name), again.weight(entry.name)
        error = np.sqrt(((w - q) ** 2).sum() / (w**2).sum())
        assert entry.error == pytest.approx(error, rel=1e-3)
        assert 0.05 < entry.error < 0.12
    assert len(str(report).splitlines()) == len(matrices) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 3}, "bits is 3"), ({"embedding_bits": 16}, "embedding_bits is 16")],
)
def test_other_bits_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quantize(tiny_checkpoint(), tmp_path / "q", **options)
    assert not list(tmp_path.iterdir())


def test_quantising_twice_and_odd_widths_are_refused() -> None:
    once, _ = quantize_checkpoint(tiny_checkpoint())
    with pytest.raises(CheckpointError, match="int4 already"):
        quantize_checkpoint(once)
    with pytest.raises(CheckpointError, match="not a multiple of 32"):
        quantize_checkpoint(tiny_checkpoint(intermediate_size=100))


def test_int4_made_on_the_way_says_what_does_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Python a warning, on the command line a line; nothing where int4 is there already."""
    dense = save(tiny_checkpoint(vocab_size=4096), tmp_path / "dense")
    with pytest.warns(PlainRoundingWarning, match="quantize"):
        load(dense, backend="keras", precision="int4", progress=False)
    asked = ["generate", "-m", str(dense), "--backend", "keras", "--precision", "int4", "Hello"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit):
            main([*asked, "--max-tokens", "1"])
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("gemma-multi: int4 made on the way")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainRoundingWarning)
        load("storyteller", backend="keras", precision="int4", progress=False)
