"""Training against torch: losses, gradient norms and weights of AdamW on transformers' Gemma 3,
kept in `goldens/training.npz` by `goldens/make_training.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from goldens.make_training import CLIP, DECAY, FILE, RATE, batches
from tiny import gemma_270m_config, loud_checkpoint, random_checkpoint, tiny_config

from gemma_multi.training.batches import Batch
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.trainer import Job
from gemma_multi.transforms import fit_float16
from training.conftest import all_logits, make_batch, make_trainer


def golden_batches(padding: int = 1) -> list[Batch]:
    """`padding`: the segment that what comes behind a row's tokens belongs to."""
    made = []
    for ids, labels, lengths in batches():
        inside = np.arange(ids.shape[1])[None] < lengths[:, None]
        made.append(make_batch(ids, labels, np.where(inside, 1, padding).astype(np.int32)))
    return made


def train(backend: str, made: list[Batch], **options: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    trainer = make_trainer(backend, weight_decay=DECAY, clip=CLIP, **options)
    results = [(trainer.step(batch, RATE), batch.loss_tokens) for batch in made]
    losses = np.array([float(r.loss) / wanted for r, wanted in results])
    return losses, np.array([float(r.gradient_norm) for r, _ in results]), trainer


@pytest.mark.parametrize("checkpointing", [True, False])
def test_steps_equal_torch_on_transformers(trainer_backend: str, checkpointing: bool) -> None:
    expected = np.load(FILE)
    losses, norms, trainer = train(
        trainer_backend, golden_batches(), gradient_checkpointing=checkpointing
    )
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(norms, expected["norms"], rtol=2e-4)
    weight = trainer.tensors()["model.layers.5.mlp.up_proj.weight"]
    # Adam divides by the size of a gradient: where that is nothing but rounding, so is the step
    difference = np.abs(weight - expected["weight"])
    assert np.quantile(difference, 0.99) < 2e-5
    assert difference.max() < 0.1 * RATE * len(losses)


def test_short_batches_keep_what_layers_gave() -> None:
    """Unless asked otherwise: up to a gigabyte."""
    config = gemma_270m_config()
    jobs = {
        asked: Job(config, {}, {}, TrainingOptions(gradient_checkpointing=asked), "float32")
        for asked in (None, True, False)
    }
    assert not jobs[None].computes_twice(8 * 64)
    assert jobs[None].computes_twice(4 * 512)
    assert jobs[True].computes_twice(1)
    assert not jobs[False].computes_twice(1 << 20)


def test_padding_changes_nothing(trainer_backend: str) -> None:
    one, _, _ = train(trainer_backend, golden_batches(padding=1)[:2])
    other, _, _ = train(trainer_backend, golden_batches(padding=0)[:2])
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_accumulated_batches_are_one_batch(trainer_backend: str) -> None:
    whole = golden_batches()[0]
    parts = Batch(*(x.transpose(1, 0, 2) for x in (whole.ids, whole.labels, whole.segments)), ())
    a, norm_a, ours = train(trainer_backend, [whole, whole])
    b, norm_b, theirs = train(trainer_backend, [parts, parts], batch_size=1, accumulate=3)
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    np.testing.assert_allclose(norm_a, norm_b, rtol=1e-4)
    for name, value in ours.tensors().items():
        assert np.quantile(np.abs(value - theirs.tensors()[name]), 0.99) < 2e-5, name


def test_packed_examples_do_not_see_each_other(trainer_backend: str) -> None:
    """Three examples in one row give the loss and the gradients of three rows; the window of 16
    and its blocks are crossed."""
    rng = np.random.default_rng(0)
    lengths = (37, 5, 60)
    rows = [rng.integers(3, 320, n).astype(np.int32) for n in lengths]
    packed = np.concatenate(rows)[None]
    labels = np.concatenate([np.append(r[1:], -1) for r in rows])[None].astype(np.int32)
    segments = np.repeat(np.arange(1, 4), lengths)[None].astype(np.int32)
    wide = np.zeros((3, 60), np.int32)
    wide_labels, wide_segments = np.full_like(wide, -1), np.zeros_like(wide)
    for i, row in enumerate(rows):
        wide[i, : len(row)], wide_segments[i, : len(row)] = row, 1
        wide_labels[i, : len(row) - 1] = row[1:]
    one = make_trainer(trainer_backend)
    other = make_trainer(trainer_backend)
    a = one.step(make_batch(packed, labels, segments), 1e-3)
    b = other.step(make_batch(wide, wide_labels, wide_segments), 1e-3)
    assert float(a.loss) == pytest.approx(float(b.loss), abs=2e-3)
    assert float(a.gradient_norm) == pytest.approx(float(b.gradient_norm), rel=1e-4)
    apart = make_trainer(trainer_backend).step(
        make_batch(packed, labels, np.ones_like(segments)), 1e-3
    )
    assert abs(float(apart.loss) - float(a.loss)) > 0.5  # it would have shown


def test_bfloat16_is_close(trainer_backend: str) -> None:
    losses, _, _ = train(trainer_backend, golden_batches()[:2], dtype="bfloat16")
    np.testing.assert_allclose(losses, np.load(FILE)["losses"][:2], rtol=0.02)


def test_float16_is_closer(trainer_backend: str) -> None:
    expected = np.load(FILE)
    losses, norms, _ = train(trainer_backend, golden_batches(), dtype="float16")
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=2e-3)
    np.testing.assert_allclose(norms, expected["norms"], rtol=5e-3)


def test_float16_follows_float32_where_the_stream_alone_would_overflow(
    trainer_backend: str,
) -> None:
    """Twenty steps, that learn, of a model whose residual stream passes 65,504."""
    checkpoint = fit_float16(loud_checkpoint(60_000.0, vocab_size=320))
    assert checkpoint.config.residual_scale < 1
    made = golden_batches()
    made = [made[i % len(made)] for i in range(20)]
    found = [
        train(trainer_backend, made, checkpoint=checkpoint, dtype=dtype)[0]
        for dtype in ("float32", "float16")
    ]
    assert found[0][-1] < found[0][0] - 0.1
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-2)


def test_gradients_fit_into_float16(trainer_backend: str) -> None:
    """The smallest are kept, and where the largest overflow the batch is computed again."""
    batch, before = golden_batches()[0], random_checkpoint(tiny_config()).tensors
    scaled: Any = make_trainer(trainer_backend, dtype="float16")
    start, optimizer = scaled.tensors(), scaled.optimizer_state()
    first = scaled.step(batch, RATE)
    exact = make_trainer(trainer_backend)
    exact.step(batch, RATE)
    moved = [
        np.mean(np.sign(one - before[name]) == np.sign(exact.tensors()[name] - before[name]))
        for name, one in scaled.tensors().items()
    ]
    assert min(moved) > 0.9  # Adam's first step is a sign

    scaled.restore(start, {**optimizer, "loss_scale": np.array([2.0**40, 0.0])})
    again = scaled.step(batch, RATE)
    value, clean = scaled.optimizer_state()["loss_scale"]
    assert (1 < value < 2.0**40, clean) == (True, 1)  # halved until they did not
    np.testing.assert_allclose(float(again.loss), float(first.loss), rtol=1e-5)
    norms = float(again.gradient_norm), float(first.gradient_norm)
    np.testing.assert_allclose(*norms, rtol=1e-3)


def test_the_loss_in_chunks_is_the_loss_at_once(
    trainer_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma_multi.training import keras_trainer, mlx_trainer

    whole, norms, _ = train(trainer_backend, golden_batches()[:2])
    small = 4 * 320 * 16  # bytes: sixteen positions at a time
    monkeypatch.setattr(mlx_trainer, "_HEAD_BYTES", small)
    monkeypatch.setattr(keras_trainer, "_HEAD_BYTES", {"cpu": small})
    chunks, chunk_norms, trainer = train(trainer_backend, golden_batches()[:2])
    assert trainer._chunk_size(320) == 16
    np.testing.assert_allclose(chunks, whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(chunk_norms, norms, rtol=1e-5)


def test_a_teacher_is_followed(trainer_backend: str) -> None:
    """The divergence from a model to itself is nothing; from another it is what NumPy says."""
    from tiny import tiny_checkpoint

    from gemma_multi.engines import create_engine

    batch = golden_batches()[0]
    same = make_trainer(trainer_backend, teacher=tiny_checkpoint())
    assert abs(same.evaluate(batch)) < 1e-2
    other = make_trainer(trainer_backend, teacher=tiny_checkpoint(seed=1))
    logits = [
        all_logits(create_engine(tiny_checkpoint(seed=seed), "keras", "float32"), batch.ids[0])
        for seed in (1, 0)
    ]
    theirs, ours = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    wanted = batch.labels[0] >= 0
    expected = (np.exp(theirs) * (theirs - ours)).sum(-1)[wanted].sum()
    assert other.evaluate(batch) == pytest.approx(float(expected), rel=1e-4)
    first = float(other.step(batch, 1e-3).loss)
    for _ in range(5):
        last = float(other.step(batch, 1e-3).loss)
    assert last < 0.8 * first
