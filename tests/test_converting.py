"""convert: any format to any other that holds the same numbers, and back, without a bit lost."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import OptionError
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.exporters import export_checkpoint
from gemma_multi.transforms import quantize_checkpoint, to_precision

# those that hold the int4 grid and are read back; options that keep a tiny model's export small
GRID = {"mlx": "", "gguf": ".gguf", "tflite": ".tflite", "litertlm": ".litertlm"}
DENSE = ("huggingface", "mlx", "gguf", "keras", "jax")


def written(source: Path | Checkpoint, format: str, directory: Path) -> gemma_multi.Conversion:
    output = directory / f"{len(list(directory.iterdir()))}{GRID.get(format, '')}"
    return gemma_multi.convert(source, output, format=format, progress=False)


@pytest.fixture(scope="module")
def int4() -> Checkpoint:
    return to_precision(tiny_checkpoint(vocab_size=4096), "int4")


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(GRID, 2)])
def test_there_and_back_gives_the_same_codes_and_scales(
    one: str, other: str, int4: Checkpoint, tmp_path: Path
) -> None:
    there = written(int4, one, tmp_path)
    between = written(there.export.path, other, tmp_path)
    back = written(between.export.path, one, tmp_path)
    digests = {gemma_multi.open_checkpoint(c.export.path).digest() for c in (there, between, back)}
    assert digests == {int4.digest()}
    assert (there.changed, between.changed, back.changed) == ((), (), ())
    assert between.compared == len(int4.tensors)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 8])
def test_a_walk_through_formats_loses_nothing(seed: int, bits: int, tmp_path: Path) -> None:
    """With an int8 embedding or without: what each holds stays what it was, licence and list of
    changes too."""
    rng = np.random.default_rng(seed)
    start = quantize_checkpoint(tiny_checkpoint(vocab_size=4096), 4, bits)[0]
    at: Path | Checkpoint = start
    for format in rng.choice(list(GRID), 5):
        step = written(at, format, tmp_path)
        assert step.changed == ()
        at = step.export.path
    end = gemma_multi.open_checkpoint(at)
    assert end.digest() == start.digest()
    assert end.provenance.license == start.provenance.license
    told = end.provenance.modifications
    assert [m for m in told if m in start.provenance.modifications] == list(
        start.provenance.modifications
    )


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(DENSE, 2)])
def test_dense_weights_come_back_as_they_were(one: str, other: str, tmp_path: Path) -> None:
    start = to_precision(tiny_checkpoint(vocab_size=4096), "bfloat16")
    there = written(written(start, one, tmp_path).export.path, other, tmp_path)
    assert there.changed == ()
    assert gemma_multi.open_checkpoint(there.export.path).digest() == start.digest()


def test_what_changed_is_told_by_tensor(tmp_path: Path) -> None:
    start = tiny_checkpoint(vocab_size=4096)
    found = gemma_multi.convert(start, tmp_path / "a.gguf", precision="float16", progress=False)
    matrices = [name for name, shape in start.config.tensor_shapes().items() if len(shape) == 2]
    assert [tensor.name for tensor in found.changed] == matrices
    for tensor in found.changed:
        weight = start.weight(tensor.name)
        rounded = weight.astype(np.float16).astype(np.float32)
        expected = np.sqrt(np.square(rounded - weight).sum() / np.square(weight).sum())
        assert tensor.error == pytest.approx(expected, rel=1e-3)
    assert "differs most, by 0.0" in str(found)
    onnx = written(start, "onnx", tmp_path)
    assert onnx.compared == 0
    assert "not read back" in str(onnx)


def test_an_output_that_exists_is_left_alone(int4: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(int4, tmp_path / "a.gguf")
    before = (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(OptionError, match="exists already"):
        gemma_multi.convert(int4, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == before


def test_on_the_command_line(tmp_path: Path) -> None:
    def run(*given: str) -> str:
        command = [sys.executable, "-m", "gemma_multi", "convert", *given]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    said = run("storyteller", str(tmp_path / "s.gguf"))
    assert "tensors hold the same numbers" in said
    told = json.loads(run(str(tmp_path / "s.gguf"), str(tmp_path / "s"), "--format", "huggingface",
                          "--precision", "bfloat16", "--json"))  # fmt: skip
    assert told["format"] == "huggingface"
    assert told["compared"] > len(told["changed"]) > 0
    assert 0 < max(told["changed"].values()) < 0.01
