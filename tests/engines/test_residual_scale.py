"""The residual stream at another scale: the same function, and in float32 the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import ModelConfig
from gemma_multi.engines import ALL, create_engine
from gemma_multi.errors import ConfigError
from gemma_multi.exporters import save

IDS = np.array([2, *np.random.default_rng(0).integers(3, 300, 39)], np.int32)  # past the window


def at_scale(checkpoint: Checkpoint, scale: float) -> Checkpoint:
    return checkpoint.replace(config=checkpoint.config.replace(residual_scale=scale))


def read(checkpoint: Checkpoint, backend: str, precision: str) -> np.ndarray:
    engine = create_engine(checkpoint, backend, precision)
    session = engine.session()
    parts = [session.read(part, ALL) for part in (IDS[:7], IDS[7:39], IDS[39:])]
    return np.concatenate([np.asarray(engine.numpy(part), np.float32) for part in parts])


@pytest.mark.parametrize("scale", [2.0**-4, 2.0**3])
@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_logits_are_the_same_bits(backend: str, precision: str, scale: float) -> None:
    if (backend, precision) == ("transformers", "int4"):
        pytest.skip("float32 only")
    plain = tiny_checkpoint()
    found = read(at_scale(plain, scale), backend, precision)
    np.testing.assert_array_equal(found, read(plain, backend, precision))


def test_bfloat16_too(backend: str) -> None:
    """A power of two changes no bit of a bfloat16 either, only its exponent."""
    if backend not in ("mlx", "keras"):
        pytest.skip("float32 only")
    plain = tiny_checkpoint()
    found = read(at_scale(plain, 2.0**-4), backend, "bfloat16")
    np.testing.assert_array_equal(found, read(plain, backend, "bfloat16"))


def test_the_stream_is_carried_at_that_scale(backend: str) -> None:
    """Or the tests above would hold for a field that nobody reads."""
    if backend == "transformers":
        pytest.skip("carries it as it is")
    plain = tiny_checkpoint()
    engines = [create_engine(c, backend, "float32") for c in (plain, at_scale(plain, 2.0**-4))]
    before, after = (engine._trace(IDS) for engine in engines)
    np.testing.assert_array_equal(after[:-1], before[:-1] * np.float32(2.0**-4))
    np.testing.assert_array_equal(after[-1], before[-1])
    np.testing.assert_array_equal(*(engine.trace(IDS) for engine in engines))


def test_a_file_gives_the_weights_back(tmp_path: Path) -> None:
    plain = tiny_checkpoint()
    scaled = at_scale(plain, 2.0**-4)
    save(scaled, tmp_path / "dense")
    kept = gemma_multi.open_checkpoint(tmp_path / "dense")
    assert kept.config.residual_scale == 2.0**-4
    gemma_multi.export(scaled, tmp_path / "x.tflite", precision="float32", context_length=64)
    exported = gemma_multi.open_checkpoint(tmp_path / "x.tflite")
    assert exported.config.residual_scale == 2.0**-4
    model = gemma_multi.load(tmp_path / "x.tflite", backend="litert")
    for name in plain.tensors:
        np.testing.assert_array_equal(kept.weight(name), plain.weight(name))
        np.testing.assert_array_equal(exported.weight(name), plain.weight(name))
        norm = plain.weight(name).ndim == 1
        np.testing.assert_allclose(
            model.engine.weight(name), plain.weight(name) + norm, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("scale", [0.1, 3.0, 0.0, -0.5, 2.0**-30, float("nan")])
def test_only_powers_of_two(scale: float) -> None:
    config = tiny_checkpoint().config
    with pytest.raises(ConfigError, match="residual_scale is"):
        config.replace(residual_scale=scale)
    with pytest.raises(ConfigError, match="residual_scale is"):
        ModelConfig.from_dict({**config.to_dict(), "residual_scale": scale})


def test_a_config_without_it_says_nothing_of_it() -> None:
    config = tiny_checkpoint().config
    assert "residual_scale" not in config.to_dict()
    assert (
        ModelConfig.from_dict(config.replace(residual_scale=0.25).to_dict()).residual_scale == 0.25
    )
