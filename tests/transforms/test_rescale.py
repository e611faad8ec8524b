"""The scale of the residual stream that float16 needs, chosen from what the model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import loud_checkpoint, tiny_checkpoint

import gemma_multi
from gemma_multi.comparison.subjects import check_same_model
from gemma_multi.engines import create_engine
from gemma_multi.errors import CheckpointError
from gemma_multi.transforms.rescale import LARGEST, Range, measure_range, rescaled


def test_the_largest_of_the_stream_is_what_an_engine_carries() -> None:
    checkpoint = loud_checkpoint()
    found = measure_range(checkpoint)
    ids = [checkpoint.tokenizer.bos_id, *checkpoint.tokenizer.encode("Once upon a time")]
    carried = create_engine(checkpoint, "keras", "float32").trace(np.array(ids, np.int32))[:-1]
    assert 20_000 < np.abs(carried).max() <= found.stream * 1.2
    assert found.stream > 20_000 > found.inside


@pytest.mark.parametrize(
    ("stream", "scale"), [(3.0, 1.0), (8188.0, 1.0), (8189.0, 0.5), (104_060.9, 2.0**-4)]
)
def test_the_power_of_two_nearest_to_one(stream: float, scale: float) -> None:
    assert Range(stream, 1.0).residual_scale == scale


def test_the_stream_then_fits() -> None:
    checkpoint = rescaled(loud_checkpoint())
    scale = checkpoint.config.residual_scale
    assert scale < 1
    stream = measure_range(loud_checkpoint()).stream * scale
    assert LARGEST / 16 < stream <= LARGEST / 8
    assert rescaled(checkpoint).config.residual_scale == scale


def test_quantize_writes_it_and_changes_nothing_else(tmp_path: Path) -> None:
    checkpoint = loud_checkpoint()
    gemma_multi.quantize(checkpoint, tmp_path / "int4", calibrate=None)
    written = gemma_multi.open_checkpoint(tmp_path / "int4")
    assert written.config.residual_scale == rescaled(checkpoint).config.residual_scale
    plain = gemma_multi.transforms.quantize_checkpoint(checkpoint, 4, 4)[0]
    assert written.digest() == plain.digest()


def test_parity_takes_it_for_the_same_model() -> None:
    loud = loud_checkpoint()
    check_same_model(rescaled(loud), loud)


def test_what_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    broken = loud_checkpoint(float("inf"))
    with pytest.raises(CheckpointError, match="not finite"):
        gemma_multi.quantize(broken, tmp_path / "int4", calibrate=None)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_may_have_more_pieces_than_there_are_rows() -> None:
    assert 0 < measure_range(tiny_checkpoint(vocab_size=320)).stream < 1000
