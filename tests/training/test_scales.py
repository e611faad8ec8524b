"""Method "scales": an int4 model's codes stay, its scales and norms learn."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import noisy_storyteller, tiny_checkpoint

import gemma_multi
from gemma_multi import (
    Checkpoint,
    CheckpointError,
    DataError,
    OptionError,
    finetune,
    validation_loss,
)
from gemma_multi.calibration import calibrate
from gemma_multi.config import EMBEDDING
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.training.calibrated import calibrated
from gemma_multi.training.weights import CHANGE, Int4, rescaled, trained_gradients
from training.conftest import ROWS

OPTIONS = {"epochs": 4, "learning_rate": 2e-2, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return calibrate(tiny_checkpoint(vocab_size=4096))[0]


def test_codes_stay_and_what_was_validated_ships(
    base: Checkpoint, tmp_path: Path, trainer_backend: str
) -> None:
    """It is what a calibrated model gets where no method is named."""
    held = ROWS[:5]
    result = finetune(base, ROWS[5:], validation=held, output=tmp_path / "run",
                      backend=trainer_backend, **OPTIONS)  # fmt: skip
    assert result.options.method == "scales"
    before = next(r["validation_loss"] for r in result.history if "validation_loss" in r)
    assert result.loss is not None
    assert result.loss < before - 0.5
    assert validation_loss(result.model, held).loss == pytest.approx(result.loss, abs=1e-3)
    exported = result.model.export(tmp_path / "model.litertlm", context_length=64)
    phone = validation_loss(gemma_multi.load(exported.path), held)
    assert phone.loss == pytest.approx(result.loss, abs=0.05)

    trained = gemma_multi.open_checkpoint(result.path())
    assert trained.grid == "portable"
    assert "scales and norms fine-tuned on 25 rows" in (result.path() / "NOTICE").read_text()
    assert trained.tensors[EMBEDDING] == base.tensors[EMBEDDING]
    moved = 0
    for name, tensor in base.tensors.items():
        now = trained.tensors[name]
        if isinstance(tensor, QuantizedTensor) and isinstance(now, QuantizedTensor):
            np.testing.assert_array_equal(now.packed, tensor.packed)
            moved += int((now.scales != tensor.scales).sum())
    assert moved > 1000


def test_gradients_are_those_that_jax_finds() -> None:
    """Of the loss sum(G * w), with the rounding of scales left out, as straight-through does."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (6, 64)).astype(np.int8)
    scales = rng.uniform(0.01, 0.1, (6, 2)).astype(np.float32)
    gradient = rng.standard_normal((6, 64)).astype(np.float32)

    def loss(change: jax.Array) -> jax.Array:
        grown = (scales * (1 + change))[..., None] * codes.reshape(6, 2, 32)
        return jnp.sum(gradient * grown.reshape(6, 64))

    expected = jax.grad(loss)(jnp.zeros((6, 2)))
    found = trained_gradients(
        {"a": gradient}, {"a" + CHANGE: np.zeros((6, 2))}, 1.0, {"a": Int4(codes, scales)}
    )
    np.testing.assert_allclose(found["a" + CHANGE], expected, rtol=1e-5)


def test_scales_stay_on_the_grid() -> None:
    """Whatever training makes of them, even below zero."""
    weight = Int4(np.full((1, 32), 3, np.int8), np.array([[0.125]], np.float32))
    for change, scale in ((0.0, 0.125), (1.0, 0.25), (0.001, 0.125), (-3.0, 2.0**-24)):
        grown = rescaled(np, weight, np.array([[change]], np.float32))
        np.testing.assert_array_equal(grown, np.full((1, 32), 3 * scale, np.float32))


def test_both_engines_learn_alike(base: Checkpoint, tmp_path: Path) -> None:
    losses = {}
    for backend in ("keras", "mlx"):
        result = finetune(base, ROWS * 2, output=tmp_path / backend, backend=backend, epochs=2,
                          learning_rate=1e-3, batch_size=5, max_length=64, validation=0.15,
                          progress=False)  # fmt: skip
        losses[backend] = [r["loss"] for r in result.history if "loss" in r][:20]
    assert len(losses["keras"]) == 20
    np.testing.assert_allclose(losses["keras"], losses["mlx"], rtol=0, atol=1e-3)


def test_a_finished_run_can_be_trained_on(base: Checkpoint, tmp_path: Path) -> None:
    """A specialist is an int4 model itself, and begins where it ended."""
    first = finetune(base, ROWS, output=tmp_path / "first", backend="keras", **OPTIONS)
    second = finetune(first.path(), ROWS, output=tmp_path / "second", backend="keras", **OPTIONS)
    begun = next(r["validation_loss"] for r in second.history if "validation_loss" in r)
    assert begun == pytest.approx(first.loss, abs=1e-6)


def test_an_original_is_calibrated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two specialists of one base have its codes in common, and the second begins at once."""
    monkeypatch.setenv("GEMMA_MULTI_CACHE", str(tmp_path / "cache"))
    original = noisy_storyteller()
    options = {**OPTIONS, "epochs": 1, "method": "scales", "backend": "keras", "validation": 0}
    first = finetune(original, ROWS, output=tmp_path / "first", **options)
    (kept,) = (tmp_path / "cache/calibrated").iterdir()
    made = kept.stat().st_mtime_ns
    second = finetune(original, ROWS[:9], output=tmp_path / "second", **options)
    assert kept.stat().st_mtime_ns == made
    base = gemma_multi.open_checkpoint(kept)
    assert "calibrated on text of its own" in (kept / "NOTICE").read_text()
    for name, tensor in base.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            for run in (first, second):
                trained = run.checkpoint().tensors[name]
                assert isinstance(trained, QuantizedTensor)
                np.testing.assert_array_equal(trained.packed, tensor.packed)
    with pytest.raises(DataError, match="row:2"):  # before four minutes are spent
        finetune(original, [ROWS[0], {"nothing": 1}], output=tmp_path / "third", **options)
    assert not (tmp_path / "third").exists()


def test_what_is_kept_of_one_model_is_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, and with it calibration, depends on the config too; half a directory is made anew, and
    a cache that cannot be written to is not needed."""
    monkeypatch.setenv("GEMMA_MULTI_CACHE", str(tmp_path / "cache"))
    one = tiny_checkpoint(vocab_size=4096)
    other = one.replace(config=one.config.replace(rope_local_theta=5000.0))
    made = [calibrated(model, False) for model in (one, other)]
    assert made[1].config == other.config
    assert len(list((tmp_path / "cache/calibrated").iterdir())) == 2
    named = one.replace(provenance=one.provenance.modified("named"))
    assert calibrated(named, False).provenance.modifications[-2] == "named"
    for file in (tmp_path / "cache/calibrated").glob("*/model.safetensors"):
        file.unlink()  # the other is still mapped
        file.write_bytes(b"half")
    assert calibrated(one, False) == made[0]

    def full(*_: object) -> None:
        raise CheckpointError("No space left on device")

    monkeypatch.setattr("gemma_multi.training.calibrated.save", full)
    monkeypatch.setenv("GEMMA_MULTI_CACHE", str(tmp_path / "full"))
    assert calibrated(one, False) == made[0]


def test_rows_that_can_be_read_once_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_MULTI_CACHE", str(tmp_path / "cache"))
    options = {**OPTIONS, "epochs": 1, "method": "scales", "backend": "keras", "validation": 0}
    result = finetune(
        tiny_checkpoint(vocab_size=4096), iter(ROWS), output=tmp_path / "run", **options
    )
    assert "fine-tuned on 30 rows" in (result.path() / "NOTICE").read_text()


def test_what_has_no_scales_of_ours_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    known = base.tensors[name]
    assert isinstance(known, QuantizedTensor)
    affine = base.with_tensors({name: QuantizedTensor(known.packed, known.scales, known.scales, 4)})
    for model, options, message in (
        (affine, {}, "this model is on the affine grid"),
        (base, {"qat": False}, "qat=False cannot be"),
    ):
        with pytest.raises(OptionError, match=message):
            finetune(model, ROWS, output=tmp_path / "run", method="scales", progress=False,
                     **options)  # fmt: skip
    assert not (tmp_path / "run").exists()
