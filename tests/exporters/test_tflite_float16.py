"""What a file for GPUs computes, in float16: no GPU here has it, so NumPy runs the file's graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graph_in_numpy import Graph
from nats import divergence
from tiny import loud_checkpoint

import gemma_multi
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines import ALL
from gemma_multi.errors import OptionError

LARGEST = 65_504.0  # of float16
TEXT = "Once upon a time there was a lighthouse keeper who answered every letter. "


def tokens(count: int) -> np.ndarray:
    tokenizer = gemma_multi.open_checkpoint("storyteller").tokenizer
    return np.array([tokenizer.bos_id, *tokenizer.encode(TEXT * 20)])[:count]


def export(
    source: str | Checkpoint, path: Path, target: str, precision: str = "float32",
    context_length: int = 512,
) -> Path:  # fmt: skip
    gemma_multi.export(
        source, path, target=target, precision=precision, context_length=context_length
    )
    return path


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_numpy_computes_what_litert_does(tmp_path: Path, target: str) -> None:
    file = export("storyteller", tmp_path / "x.tflite", target)
    ids = tokens(144)  # more than the window
    ours = Graph(file).read(ids)
    theirs = gemma_multi.load(file, backend="litert").engine.session().read(ids, ALL)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_float16_holds_what_a_file_for_gpus_computes(tmp_path: Path, precision: str) -> None:
    file, ids = export("storyteller", tmp_path / "x.tflite", "gpu", precision), tokens(144)
    rounded = Graph(file, float16=True)
    assert divergence(Graph(file).read(ids), rounded.read(ids)) < 1e-4
    assert rounded.largest < LARGEST


def test_positions_beyond_float16s_whole_numbers(tmp_path: Path) -> None:
    """Where a file for CPUs turns queries by angles that are a radian off."""
    far, found = 1800, {}
    for target in ("cpu", "gpu"):
        file = export("storyteller", tmp_path / f"{target}.tflite", target, context_length=2048)
        reference = Graph(file).read(tokens(64), far)
        found[target] = divergence(reference, Graph(file, float16=True).read(tokens(64), far))
    assert found["gpu"] < 1e-4 < 1e-3 < found["cpu"]


def test_a_stream_beyond_float16(tmp_path: Path) -> None:
    """At a scale that float16 holds its squares would not be; a file for CPUs shows that the test
    would see it."""
    loud, ids, found = loud_checkpoint(), tokens(64), {}
    expected = gemma_multi.load(loud, backend="keras", precision="float32", context_length=64)
    reference = expected.engine.session().read(ids, ALL)
    for target in ("cpu", "gpu"):
        graph = Graph(
            export(loud, tmp_path / f"{target}.tflite", target, context_length=64), float16=True
        )
        found[target] = divergence(reference, graph.read(ids)), graph.largest
    assert found["gpu"][0] < 1e-3
    assert found["gpu"][1] < LARGEST
    assert not found["cpu"][0] < 1e-3
    assert not found["cpu"][1] < LARGEST


def test_a_prefill_that_float16_cannot_count(tmp_path: Path) -> None:
    file = tmp_path / "x.tflite"
    big = loud_checkpoint()
    big = big.replace(config=big.config.replace(max_position_embeddings=8192))
    with pytest.raises(OptionError, match="prefill size is 4096, but target 'gpu' takes at most"):
        gemma_multi.export(big, file, target="gpu", precision="int8", prefill=[4096])
    assert not file.exists()
