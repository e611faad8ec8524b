"""Calibration: its decoder against an engine, rounding against the textbook, all by its worth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import noisy_storyteller, tiny_checkpoint

import gemma_multi
from gemma_multi import CheckpointError, DataError, OptionError
from gemma_multi.calibration import calibrate, rounding, writing
from gemma_multi.calibration.arranging import arrange
from gemma_multi.calibration.measure import Said, hidden_states, measure
from gemma_multi.calibration.rotating import rotate
from gemma_multi.calibration.rounding import Moments, round_matrix, toward
from gemma_multi.calibration.smoothing import sample_inputs, smooth
from gemma_multi.calibration.texts import collect
from gemma_multi.calibration.writing import _Batch, write_texts
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import EMBEDDING
from gemma_multi.decoder import Decoder, Weights, weight_name
from gemma_multi.engines import ALL, create_engine
from gemma_multi.machine import available_cores
from gemma_multi.quantization import int4
from gemma_multi.quantization.tensor import quantize_tensor
from gemma_multi.transforms import quantize_checkpoint

RNG = np.random.default_rng(0)
ROWS = [
    {"text": f"The fox number {i} went over the hill and found {i + 2} apples."} for i in range(60)
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture(scope="module")
def stories() -> Checkpoint:
    return noisy_storyteller()


def decoder_of(checkpoint: Checkpoint, **options: Any) -> Decoder:
    return Decoder(checkpoint.config, Weights(checkpoint), **options)


def logits_of(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    return np.concatenate([block for _, block in decoder.head(hidden_states(decoder, ids))])


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 32), (2, 48)])
def test_rotated_value_channels_compute_the_same(kv_heads: int, head_dim: int) -> None:
    checkpoint = tiny_checkpoint(num_key_value_heads=kv_heads, head_dim=head_dim)
    decoder = decoder_of(checkpoint)
    changes = rotate(decoder)
    rotated = Decoder(checkpoint.config, decoder.weights.branch(changes))
    ids = RNG.integers(4, 320, 40)
    np.testing.assert_allclose(logits_of(rotated, ids), logits_of(decoder, ids), atol=1e-5)
    name = weight_name(0, "self_attn.v_proj")
    assert np.abs(changes[name] - decoder.weights[name]).max() > 0.01
    outlier = decoder.weights.branch()
    outlier.change(name, np.eye(*decoder.weights[name].shape, dtype=np.float32))
    spread = rotate(Decoder(checkpoint.config, outlier))[name]
    assert np.abs(spread).max() <= 16**-0.5 + 1e-6  # of what was 1 in one channel of 16 or more


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_decoder_computes_what_an_engine_computes(kv_heads: int, pool: Executor) -> None:
    """Over more positions than the window; the text at once, and a token at a time."""
    checkpoint = tiny_checkpoint(num_key_value_heads=kv_heads, rope_scaling_factor=8.0)
    ids = RNG.integers(3, 320, (3, 40))
    decoder, engine = decoder_of(checkpoint), create_engine(checkpoint, "keras", "float32")
    batch = _Batch(decoder, 3, 40)
    states = np.stack([batch.read(ids[:, i]) for i in range(40)], axis=1)
    steps = states @ decoder.weights[EMBEDDING].T
    for row, one_by_one in zip(ids, steps, strict=True):
        expected = engine.session().read(row, ALL)
        np.testing.assert_allclose(logits_of(decoder, row), expected, atol=2e-4)
        np.testing.assert_allclose(one_by_one, expected, atol=2e-4)


def test_measured_closeness_is_what_its_words_say(
    pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several parts of the vocabulary and of the positions, the last ones shorter."""
    measuring = import_module("gemma_multi.calibration.measure")
    monkeypatch.setattr(measuring, "_WORDS", 100)
    monkeypatch.setattr(measuring, "_POSITIONS", 50 * available_cores())
    ours, other = (decoder_of(tiny_checkpoint(seed)) for seed in (0, 1))
    texts = [RNG.integers(3, 320, n) for n in (90, 30)]
    own, again, theirs = (Said.by(decoder, texts, pool) for decoder in (ours, ours, other))
    perplexity, (same, apart) = measure(own, [again, theirs], texts, pool)
    assert (same.divergence, same.agreement) == (pytest.approx(0, abs=1e-6), 1)
    assert same.perplexity == pytest.approx(perplexity)
    p, q = (np.concatenate([logits_of(d, t[:-1]) for t in texts]).astype(np.float64)
            for d in (ours, other))  # fmt: skip
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    assert apart.divergence == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert apart.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    following = np.concatenate([t[1:] for t in texts])
    taken = np.take_along_axis(q, following[:, None], 1)
    assert apart.perplexity == pytest.approx(np.exp(-taken.mean()), rel=1e-4)


def correlated(count: int, width: int) -> np.ndarray:
    """Inputs as layers have them: few directions, some large channels."""
    mix = RNG.standard_normal((width // 4, width))
    x = RNG.standard_normal((count, width // 4)) @ mix + 0.3 * RNG.standard_normal((count, width))
    return (x * np.exp(RNG.normal(0, 1, width))).astype(np.float32)


def test_rounding_is_the_textbooks(pool: Executor) -> None:
    """Round an input, refit all that are still to come by least squares, go on."""
    x = correlated(400, 64)
    weight = RNG.standard_normal((7, 64)).astype(np.float32)
    second = x.T @ x / np.float32(len(x))
    tensor = round_matrix(weight, Moments.of(second), pool)
    assert tensor.grid == "portable"
    codes = tensor.codes().astype(np.int64) - 8
    scales = tensor.scales.astype(np.float64)
    h = second.astype(np.float64)
    h[np.diag_indices(64)] += rounding.DAMPING * np.diag(second).mean()
    order = Moments.of(second).order
    for row, (w, ours) in enumerate(zip(weight.astype(np.float64), codes, strict=True)):
        left = list(order)
        w = w.copy()
        for i in order:
            scale = scales[row, i // 32]
            code = np.clip(np.round(w[i] / scale), -8, 7)
            near_tie = abs(abs(w[i] / scale - np.floor(w[i] / scale)) - 0.5) < 1e-3
            assert code == ours[i] or near_tie
            left.remove(i)
            rest = np.array(left, int)
            if len(rest):
                w[rest] += np.linalg.solve(h[np.ix_(rest, rest)], h[rest, i]) * (
                    w[i] - ours[i] * scale
                )


def test_rounding_by_use_loses_less_of_the_output(pool: Executor) -> None:
    x = correlated(2000, 128)
    weight = RNG.standard_normal((96, 128)).astype(np.float32)
    second = x.T @ x / np.float32(len(x))
    by_use = round_matrix(weight, Moments.of(second), pool).dequantize()
    nearest = quantize_tensor(weight, 4)[0].dequantize()
    lost = [float(np.square(x @ (weight - w).T).mean()) for w in (by_use, nearest)]
    assert lost[0] < 0.5 * lost[1]
    assert np.abs(by_use - weight).mean() > np.abs(nearest - weight).mean()  # that is the price


def test_a_channel_that_is_always_zero_is_no_fault(pool: Executor) -> None:
    x = correlated(300, 64)
    x[:, 5] = 0
    tensor = round_matrix(RNG.standard_normal((4, 64)).astype(np.float32),
                          Moments.of(x.T @ x / np.float32(300)), pool)  # fmt: skip
    assert np.isfinite(tensor.dequantize()).all()


def test_the_factor_is_that_of_the_inverse() -> None:
    inputs = correlated(900, 608)  # more than what is inverted at once
    second = inputs.T @ inputs / 900
    moments = Moments.of(second, damping=0.3)
    damped = second.astype(np.float64) + 0.3 * np.diag(second).mean() * np.eye(608)
    expected = np.linalg.inv(damped[np.ix_(moments.order, moments.order)])
    found = moments.factor.T.astype(np.float64) @ moments.factor
    assert np.array_equal(moments.factor, np.triu(moments.factor))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_target_makes_up_for_what_happened_to_the_inputs(pool: Executor) -> None:
    before = correlated(2000, 64)
    after = (
        before + 0.3 * np.roll(before, 1, axis=1) + RNG.normal(0, 0.1, before.shape).astype("f4")
    )
    weight = RNG.standard_normal((8, 64)).astype(np.float32)
    second, missing = after.T @ after / 2000, weight @ (before - after).T @ after / 2000
    moved = toward(weight, Moments.of(second), missing, pool)
    lost = [np.square(before @ weight.T - after @ w.T).mean() for w in (moved, weight)]
    assert lost[0] < 0.9 * lost[1]


def outlying(checkpoint: Checkpoint) -> Checkpoint:
    """The same function with a few large channels in front of each kind of matrix."""
    changes: dict[str, np.ndarray] = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        up, down = (weight_name(layer, f"mlp.{m}_proj") for m in ("up", "down"))
        factor = np.ones(checkpoint.config.intermediate_size, np.float32)
        factor[3::40] = 24
        changes[up] = checkpoint.weight(up) * factor[:, None]
        changes[down] = checkpoint.weight(down) / factor
    return checkpoint.with_tensors(changes)


def test_evening_channels_out_changes_nothing_but_int8_activations(
    stories: Checkpoint, pool: Executor
) -> None:
    checkpoint = outlying(stories)
    decoder = decoder_of(checkpoint)
    texts = write_texts(decoder, checkpoint.tokenizer, 6, 120, pool)
    changes = smooth(decoder, sample_inputs(decoder, texts[:3], pool), pool)
    smoothed = Decoder(checkpoint.config, decoder.weights.branch(changes))
    changes |= arrange(smoothed, hidden_channels=True)
    evened = decoder.weights.branch(changes)
    config = checkpoint.config
    others = [
        Said.by(Decoder(config, weights, int8_activations=rounded), texts[3:], pool)
        for weights, rounded in ((evened, False), (decoder.weights, True), (evened, True))
    ]
    reference = Said.by(decoder, texts[3:], pool)
    _, (same, before, after) = measure(reference, others, texts[3:], pool)
    assert same.divergence < 1e-5
    assert after.divergence < 0.5 * before.divergence


def test_texts_that_are_written_in_turn_are_the_same(
    stories: Checkpoint, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds some hundred at once."""
    decoder = decoder_of(stories)
    seen: list[tuple[int, int]] = []
    at_once = write_texts(decoder, stories.tokenizer, 10, 60, pool)
    monkeypatch.setattr(writing, "_AT_ONCE", 4)
    in_turn = write_texts(decoder, stories.tokenizer, 10, 60, pool, lambda *p: seen.append(p))
    assert all(map(np.array_equal, at_once, in_turn))
    assert seen == [(i, 3 * 59) for i in range(1, 3 * 59 + 1)]


def test_a_model_writes_as_it_speaks(stories: Checkpoint, pool: Executor) -> None:
    """Seeded; conversations with their markers where it has learnt them, and plain text."""
    tokenizer, decoder = stories.tokenizer, decoder_of(stories)
    texts = write_texts(decoder, tokenizer, 6, 200, pool)
    again = write_texts(decoder, tokenizer, 6, 200, pool)
    assert all(map(np.array_equal, texts, again))
    assert {len(text) for text in texts} == {200}
    for i, text in enumerate(texts):
        assert text[0] == tokenizer.bos_id
        assert not {0, 1, 2} & set(text[1:].tolist())
        opened = text[1] == tokenizer.start_of_turn_id
        assert opened == (i % 2 == 1)
        if opened and tokenizer.end_of_turn_id in text[:-4]:
            at = int(np.flatnonzero(text == tokenizer.end_of_turn_id)[0])
            assert tokenizer.decode(text[at:]).startswith("\nmodel")
    base = tiny_checkpoint(vocab_size=4096)  # knows nothing, and no turns
    plain = write_texts(decoder_of(base), base.tokenizer, 4, 50, pool)
    assert all(text[1] != tokenizer.start_of_turn_id for text in plain)


@pytest.mark.parametrize(("text", "embedding_bits"), [("self", 4), (ROWS, 8)])
def test_calibrated_answers_are_nearer_than_rounded_ones(
    stories: Checkpoint, text: Any, embedding_bits: int
) -> None:
    seen: list[tuple[int, int]] = []
    result, report = calibrate(stories, text, embedding_bits, lambda *p: seen.append(p))
    assert (result.precision, result.grid) == ("int4", "portable")
    assert result.tensors.infos[EMBEDDING].dtype == f"int{embedding_bits}"
    worth = report.calibration
    assert worth is not None
    assert worth.calibrated.divergence < 0.9 * worth.plain.divergence
    assert worth.calibrated.perplexity < worth.plain.perplexity
    assert worth.tokens > 1000
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    matrices = [n for n, s in stories.config.tensor_shapes().items() if len(s) == 2]
    assert [t.name for t in report.tensors] == matrices
    assert all(0.02 < t.error < 0.4 for t in report.tensors if t.bits == 4)
    if text != "self":
        return
    # on an engine and other text, too: nothing of the measuring is shared with it
    ids = (
        gemma_multi.load("storyteller", backend="keras").generate("Tell me a story.", seed=1).tokens
    )
    exact, near, far = (
        create_engine(c, "keras", "float32").session().read([2, *ids], ALL).astype(np.float64)
        for c in (stories, result, quantize_checkpoint(stories, 4, embedding_bits)[0])
    )
    p, q, r = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact, near, far))
    assert (np.exp(p) * (p - q)).sum(-1).mean() < (np.exp(p) * (p - r)).sum(-1).mean()


@pytest.fixture(scope="module")
def on_rows(stories: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on ROWS."""
    path = tmp_path_factory.mktemp("calibrated") / "int4"
    gemma_multi.quantize(stories, path, progress=False, calibrate=ROWS)
    return path


def test_the_same_model_gives_the_same_codes(
    stories: Checkpoint, on_rows: Path, tmp_path: Path
) -> None:
    again = gemma_multi.quantize(stories, tmp_path / "again", progress=False, calibrate=ROWS)
    digests = {gemma_multi.open_checkpoint(path).digest() for path in (on_rows, tmp_path / "again")}
    assert len(digests) == 1
    assert "perplexity" in str(again)
    notice = (on_rows / "NOTICE").read_text()
    assert "calibrated on rows and text of its own" in notice


def test_an_adapter_fits_only_the_order_it_was_trained_in(
    stories: Checkpoint, on_rows: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "Say yes.", "completion": "yes"}] * 4
    options: dict[str, Any] = {"method": "lora", "epochs": 1, "validation": 0, "progress": False,
                               "backend": "keras"}  # fmt: skip
    for name, base in (("of-int4", on_rows), ("of-dense", stories)):
        gemma_multi.finetune(base, rows, tmp_path / name, **options)
    own, foreign = (tmp_path / name / "adapter" for name in ("of-int4", "of-dense"))
    gemma_multi.load(on_rows, backend="keras", adapter=own)
    gemma_multi.load(stories, backend="keras", adapter=foreign)
    for base, adapter in ((on_rows, foreign), (stories, own)):
        with pytest.raises(CheckpointError, match="channels are in another order"):
            gemma_multi.load(base, backend="keras", adapter=adapter)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calibrate": []}, DataError, "0 tokens in all, too few"),
        ({"calibrate": ROWS[:3]}, DataError, r"\d+ tokens in all, too few .* at least 512"),
        ({"calibrate": [{"text": ""}]}, DataError, "'text' is empty"),
        ({"calibrate": "everything"}, OptionError, "calibrate is 'everything', expected 'self'"),
        ({"calibrate": "absent.jsonl"}, DataError, "no such file"),
        ({"calibrate": "self", "bits": 8}, OptionError, "calibrate is for int4, received bits 8"),
        ({"calibrate": 7}, DataError, "data is int"),
    ],
)
def test_what_cannot_be_calibrated_on_is_named_and_nothing_written(
    stories: Checkpoint, tmp_path: Path, options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        gemma_multi.quantize(stories, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_computes_no_numbers_is_refused(stories: Checkpoint, tmp_path: Path) -> None:
    name = weight_name(3, "mlp.up_proj")
    huge = stories.with_tensors({name: stories.weight(name) * np.float32(1e30)})
    with (
        np.errstate(all="ignore"),
        pytest.raises(CheckpointError, match=r"layers.3.mlp.down_proj.weight' is given act"),
    ):
        gemma_multi.quantize(huge, tmp_path / "out", calibrate=ROWS)
    with pytest.raises(CheckpointError, match="int4 already"):
        gemma_multi.quantize("storyteller", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_before_the_work(
    stories: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(OptionError, match="needs about 2 GB of memory, and this machine has 0"):
        gemma_multi.quantize(stories, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_held_out_was_not_fitted_to(stories: Checkpoint, pool: Executor) -> None:
    """Also where rows are too few to hold one out."""
    rows = [{"text": " ".join(ROWS[i % 60]["text"] for i in range(40))}]
    texts = collect(rows, decoder_of(stories), stories.tokenizer, pool, lambda *_: None)
    fitted = {t.tobytes() for t in texts.fitted}
    assert texts.held_out
    assert not any(t.tobytes() in fitted for t in texts.held_out)


def test_long_rows_are_taken_in_parts_and_many_are_thinned(
    stories: Checkpoint, pool: Executor
) -> None:
    decoder = decoder_of(stories)
    long = [{"text": " ".join(ROWS[i % 60]["text"] for i in range(n, n + 200))} for n in range(9)]
    texts = collect(long, decoder, stories.tokenizer, pool, lambda *_: None)
    rows = [t for t in (*texts.fitted, *texts.held_out) if len(t) != 256]
    assert {len(t) for t in rows} <= {*range(2, 513)}
    assert 4000 < sum(map(len, rows)) <= 6144
    assert all(t[0] == stories.tokenizer.bos_id for t in rows)
    assert int4.GROUP_SIZE == 32
