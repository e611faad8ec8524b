"""What a level makes of numbers that engines rarely give: not finite, tied, or of odd sizes."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison.conftest import Start

from gemma_multi import CheckpointError, Model
from gemma_multi.comparison.layers import LayerTrace
from gemma_multi.comparison.logits import LogitsResult
from gemma_multi.comparison.tolerances import TOLERANCES, tolerance_of
from gemma_multi.comparison.weights import compare_weights
from gemma_multi.engines.litert import LitertEngine

PAIRS = sorted(sorted(pair) for pair in TOLERANCES)


def logits(count: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 500)).astype(np.float32)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_logit_that_is_not_finite_fails_at_every_precision(
    pair: list[str], value: float, side: int
) -> None:
    both = [logits(), logits()]
    both[side][50, 7] = value
    result = LogitsResult(64, tolerance_of(pair[0], pair[-1]))
    result.add("p", 0, *both)
    assert not result.passed
    assert "a logit is not finite" in result.summary


def test_nothing_compared_is_never_a_pass() -> None:
    result = LogitsResult(64, tolerance_of("float32", "float32"))
    assert not result.passed
    assert result.summary == "no position was compared"


def test_ties_do_not_fail_a_small_set_and_clear_losses_do() -> None:
    for gap, passes in ((0.1, True), (3.0, False)):
        mine, theirs = logits(30), logits(30)
        for row in range(3):  # a tenth of all positions
            mine[row, :2], theirs[row, :2] = (10 + gap, 10), (10, 10 + gap)
        result = LogitsResult(64, tolerance_of("float32", "int8"))
        result.add("p", 0, mine, theirs)
        assert ("top-1 agreement, ties aside" not in result.summary) == passes
        summary = result.summary_where()
        assert summary is not None
        assert summary.top1 == pytest.approx(0.9)


def test_a_drift_is_seen_behind_the_first_tokens_huge_states() -> None:
    """Gemma's states at <bos> are a thousand times larger than all others."""
    from tiny import tiny_config

    config = tiny_config()
    states = np.random.default_rng(0).standard_normal((10, 40, 96)).astype(np.float32)
    states[:, 0] *= 1e6
    drifted = states.copy()
    drifted[4:, 1:] *= 1.5
    trace = LayerTrace(config, tolerance_of("float32", "float32"))
    trace.add(states, drifted)
    result = trace.result()
    assert result.names[result.first or 0] == "layer 3 (sliding)"
    assert result.position == 1


def test_a_wrong_norm_is_seen_beside_an_outlier_in_bfloat16(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, other = start(["keras", "keras:bfloat16"])
    name = "model.layers.1.input_layernorm.weight"

    def with_outlier(model: Model, factor: float) -> None:
        held = model.engine.weight

        def weight(asked: str, rows: slice = slice(None)) -> np.ndarray:
            values = held(asked, rows)
            if asked == name:
                values = values * np.float32(factor)
                values[3] = 60
            return values

        monkeypatch.setattr(model.engine, "weight", weight)

    with_outlier(reference.model, 1.0)
    with_outlier(other.model, 1.02)
    allowed = tolerance_of(reference.compute, other.compute)
    result = compare_weights(reference, other, allowed)
    assert not result.passed
    assert [tensor.name for tensor in result.different] == [name]


def test_a_weight_that_is_not_a_number_is_named(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, other = start(["keras", "litert"])
    held = other.model.engine.weight

    def weight(name: str, rows: slice = slice(None)) -> Any:
        values = held(name, rows).copy()
        if name == "model.layers.3.mlp.down_proj.weight":
            values[5, 5] = np.nan
        return values

    monkeypatch.setattr(other.model.engine, "weight", weight)
    result = compare_weights(reference, other, tolerance_of("float32", "float32"))
    assert not result.passed
    assert result.different[0].name == "model.layers.3.mlp.down_proj.weight"


def test_tracing_leaves_no_files_behind(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (subject,) = start(["litert"])
    assert subject.model.engine.trace([2, 5, 6]).shape == (11, 3, 160)
    assert len(list(tmp_path.iterdir())) == 1
    del subject
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_named_norms_is_refused(start: Start) -> None:
    (subject,) = start(["litert"])
    engine = subject.model.engine
    assert isinstance(engine, LitertEngine)
    vars(engine.file)["_gains"] = {}  # as files had it before
    with pytest.raises(CheckpointError, match="did not name its norms; export it again"):
        engine.weight("model.norm.weight")
