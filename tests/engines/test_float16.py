"""float16: nearer to float32 than bfloat16 is, with a residual stream that it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nats import divergence
from tiny import loud_checkpoint, tiny_checkpoint

import gemma_multi
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines import ALL, Engine, create_engine
from gemma_multi.engines import mlx as mlx_engine
from gemma_multi.engines.keras import KerasEngine
from gemma_multi.engines.keras_backbone import import_keras
from gemma_multi.engines.keras_runtime import KerasRuntime
from gemma_multi.engines.precision import Prepared
from gemma_multi.errors import CheckpointError
from gemma_multi.transforms import quantize_checkpoint

IDS = np.array([2, *np.random.default_rng(0).integers(3, 4000, 39)], np.int32)  # past the window
ENGINES = ("mlx", "keras")


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def logits(engine: Engine) -> np.ndarray:
    return np.asarray(engine.numpy(engine.session().read(IDS, ALL)))


def run_as_it_is(backend: str, checkpoint: Checkpoint) -> Engine:
    """In float16, whether its activations fit or not."""
    prepared = Prepared(checkpoint, "float16", "float16")
    if backend == "mlx":
        import mlx.core as mx

        return mlx_engine.MlxEngine(mx, prepared)
    return KerasEngine(KerasRuntime(import_keras()), prepared)


def test_a_stream_beyond_float16_is_carried_at_a_scale_that_fits(backend: str) -> None:
    loud = loud_checkpoint(60_000.0)
    reference = logits(create_engine(loud, "keras", "float32"))
    engine = create_engine(loud, backend, "float16")
    assert engine.compute == "float16"
    assert engine.config.residual_scale < 1
    found = divergence(reference, logits(engine))
    assert found < divergence(reference, logits(create_engine(loud, backend, "bfloat16"))) / 10
    # and it would not have fitted
    assert not divergence(reference, logits(run_as_it_is(backend, loud))) < 0.01


def test_a_scale_that_a_config_has_is_taken(backend: str) -> None:
    quiet = tiny_checkpoint()
    config = quiet.config.replace(residual_scale=2.0**-3)
    engine = create_engine(quiet.replace(config=config), backend, "float16")
    assert engine.config.residual_scale == 2.0**-3
    assert create_engine(quiet, backend, "float16").config.residual_scale == 1


def test_int4_stays_packed_and_nothing_falls_back_to_float32(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that is fast at float16. Codes times scales are exact there."""
    monkeypatch.setattr(mlx_engine, "fast_type", lambda mx: "float16")
    monkeypatch.setattr(KerasRuntime, "fast", "float16")
    quantized = quantize_checkpoint(loud_checkpoint(60_000.0))[0]
    engine = create_engine(quantized, backend)
    assert (engine.precision, engine.compute) == ("int4", "float16")
    for name in quantized.tensors:
        held = quantized.weight(name).astype(np.float32)
        if held.ndim == 2:
            np.testing.assert_allclose(engine.weight(name), held, rtol=0, atol=2.0**-25)
    if backend == "mlx":
        session: Any = engine.session()
        assert session.hidden(IDS).dtype == engine.mx.float16
        assert engine.model.layers[0].mlp.up_proj.bits == 4
    reference = logits(create_engine(quantized, "keras", "float32"))
    assert divergence(reference, logits(engine)) < 1e-4


def test_what_a_scale_of_the_stream_does_not_help_is_refused(backend: str) -> None:
    quiet = tiny_checkpoint(vocab_size=4096)
    name = "model.layers.2.mlp.down_proj.weight"
    inside = quiet.with_tensors({name: quiet.weight(name) * np.float32(1e5)})
    with pytest.raises(CheckpointError, match=r"inside a layer, too near .* 65,504; use precision"):
        create_engine(inside, backend, "float16")
    create_engine(inside, backend, "bfloat16")


@pytest.mark.parametrize(
    ("chip", "expected"),
    [("applegpu_g13g", "float16"), ("applegpu_g14s", "float16"), ("applegpu_g15p", "bfloat16")],
)
def test_mac_chips(chip: str, expected: str) -> None:
    gpu = SimpleNamespace(
        default_device=lambda: "gpu", Device=lambda kind: kind, gpu="gpu",
        device_info=lambda: {"architecture": chip},
    )  # fmt: skip
    assert mlx_engine.fast_type(gpu) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "expected"), [("7.0", "float16"), ("7.5", "float16"), ("8.0", "bfloat16")]
)
def test_nvidia_cards(capability: str, expected: str) -> None:
    runtime = KerasRuntime(import_keras())
    assert (runtime.fast, runtime.gpu) == ("float32", "")
    runtime.device = "gpu"
    card = SimpleNamespace(compute_capability=capability, device_kind="Tesla")
    runtime.jax = SimpleNamespace(devices=lambda: [card])
    assert runtime.fast == expected
    lack = ", which has no bfloat16: float16 is used" * (expected == "float16")
    assert runtime.gpu == f"Tesla{lack}"  # as `doctor` says it


def test_parity_has_a_row_for_it() -> None:
    report = gemma_multi.parity(
        loud_checkpoint(60_000.0), backends=["keras:float32", "keras:float16"], prompts=["Once"],
        max_tokens=8, progress=False,
    )  # fmt: skip
    assert report.passed, report
