"""Exported files that are not what they should be: a clear error, and never a crash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from fuzzing import fuzz

import gemma_multi
from gemma_multi import CheckpointError
from gemma_multi.exporters.tflite.flatbuffer import ModelWriter
from gemma_multi.exporters.tflite.operators import Subgraph
from gemma_multi.formats.tflite.layout import METADATA, TRAILER_MARK

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exported")
    paths = {kind: directory / f"model.{kind}" for kind in ("tflite", "litertlm")}
    for path in paths.values():
        gemma_multi.export("storyteller", path, context_length=64)
    return paths


def test_mutated_files_are_refused_by_name_and_never_crash(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """500 mutations of each, in two processes (see fuzz_litert.py)."""
    outcomes: Counter[str] = Counter()
    for i, kind in enumerate(("tflite", "litertlm") * 2):
        found = fuzz("fuzz_litert.py", exported[kind], tmp_path / str(i), i, 250,
                     env={"GEMMA_MULTI_CACHE": str(tmp_path / "cache")})  # fmt: skip
        outcomes += Counter({f"{kind} {outcome}": count for outcome, count in found.items()})
    assert sum(outcomes.values()) == 1000
    assert outcomes["tflite refused"] == 500, outcomes
    assert outcomes["litertlm refused"] > 380, outcomes


def write_signed(path: Path, graph: bytes) -> Path:
    path.write_bytes(graph + TRAILER_MARK + hashlib.sha256(graph).digest())
    return path


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    model = ModelWriter("adds one")
    graph = Subgraph(model, "serving_default")
    graph.output("y", graph.add(graph.input("x", (1, 4)), 1.0))
    graph.finish()
    plain, path = bytes(model.pack()), tmp_path / "model.tflite"
    path.write_bytes(plain)
    with pytest.raises(CheckpointError, match="was not written by gemma_multi"):
        gemma_multi.load(path)
    with pytest.raises(CheckpointError, match=f"has no '{METADATA}' metadata"):
        gemma_multi.load(write_signed(path, plain))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not written by gemma_multi"), (b"TFL3" * 100, "not written by gemma_multi")],
)
@pytest.mark.parametrize("suffix", ["tflite", "litertlm"])
def test_a_file_of_nothing_much_is_refused(
    content: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    expected = message if content or suffix == "tflite" else "does not begin as one"
    with pytest.raises(CheckpointError, match=expected):
        gemma_multi.load(path)


def test_a_zero_scale_in_the_file_is_refused_before_the_runtime_sees_it(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    data = bytearray(exported["tflite"].read_bytes())
    model = schema.Model.GetRootAs(bytes(data), 0)
    graph = model.Subgraphs(0)
    tensors = (graph.Tensors(i) for i in range(graph.TensorsLength()))
    scales = next(t for t in tensors if t.Name().endswith(b".scales"))
    values = model.Buffers(scales.Buffer()).DataAsNumpy()
    at = bytes(data).find(values.tobytes())
    assert at > 0
    data[at : at + 2] = np.float16(0).tobytes()
    path = tmp_path / "model.tflite"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="was damaged after it was written"):
        gemma_multi.load(path)
    # even where the digest was made anew
    end = data.rfind(TRAILER_MARK)
    with pytest.raises(CheckpointError, match="scale"):
        gemma_multi.load(write_signed(path, bytes(data[:end])))


def test_a_broken_cache_of_packed_weights_is_made_again(tmp_path: Path) -> None:
    """The runtime keeps its packed weights in a file, which a full disk may have cut short."""
    script = (
        "import gemma_multi; m = gemma_multi.load('storyteller', backend='litert'); "
        "print(m.generate('Good night.', temperature=0, max_tokens=20).text)"
    )
    environment = {**os.environ, "GEMMA_MULTI_CACHE": str(tmp_path)}

    def run() -> str:
        done = subprocess.run([sys.executable, "-c", script], env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    expected = run()
    (packed,) = (tmp_path / "exports").glob("*.xnnpack")
    whole = packed.read_bytes()
    middle = len(whole) // 2
    zeros = whole[:middle] + bytes(200_000) + whole[middle + 200_000 :]
    for broken in (b"", whole[:100], whole[:middle], whole[:-1], b"x" * len(whole), zeros):
        packed.write_bytes(broken)
        assert run() == expected


def test_a_damaged_export_in_the_cache_is_made_again(tmp_path: Path) -> None:
    environment = {**os.environ, "GEMMA_MULTI_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "gemma_multi", "generate", "Good night.", "-b", "litert",
               "--temperature", "0", "--max-tokens", "20"]  # fmt: skip

    def run() -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = run()
    (kept,) = (tmp_path / "exports").glob("*.tflite")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    for broken in (bytes(data), bytes(data[:1000]), b""):
        kept.write_bytes(broken)
        assert run() == expected


def test_without_a_cache_it_runs_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("no directory")
    done = subprocess.run(
        [sys.executable, "-m", "gemma_multi", "generate", "Good night.", "-b", "litert"],
        env={**os.environ, "GEMMA_MULTI_CACHE": str(tmp_path / "file"),
             "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not list((tmp_path / "tmp").iterdir())
