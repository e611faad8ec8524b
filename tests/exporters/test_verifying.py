"""Exports, read by the programs that they are for; and what is said where they differ.

google-deepmind/gemma wants an older JAX than the other libraries here: GEMMA_MULTI_JAX_PYTHON names
an interpreter that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import OptionError, VerificationError, verifying
from gemma_multi.consumers import CONSUMERS, logits_in
from gemma_multi.verifying import compared, expected, verify


def exported(source, path: Path, format: str | None = None, **options):
    return gemma_multi.export(source, path, format=format, progress=False, **options)


@pytest.mark.parametrize(
    ("format", "name", "who", "most"),
    [("gguf", "x.gguf", ("gguf's dequantiser", "llama.cpp"), 1e-2),
     ("onnx", "x", ("onnxruntime",), 1e-2),
     ("litertlm", "x.litertlm", ("LiteRT",), 1e-2),
     ("mlx", "x", ("mlx-lm",), 1e-6)],
)  # fmt: skip
def test_who_reads_it_computes_what_was_written(
    format: str, name: str, who: tuple[str, ...], most: float, tmp_path: Path
) -> None:
    report = exported("storyteller", tmp_path / name, format, verify=True)
    found = report.verification
    assert found.consumer in who
    assert found.tokens > 8
    assert 0 <= found.divergence < most
    assert str(found).startswith(f"verified with {found.consumer}: over {found.tokens} tokens")


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_googles_library_for_jax_computes_what_was_written(kv: int, tmp_path: Path) -> None:
    python = os.environ.get("GEMMA_MULTI_JAX_PYTHON")
    if python is None:
        pytest.skip("GEMMA_MULTI_JAX_PYTHON names no interpreter with google-deepmind/gemma")
    checkpoint = tiny_checkpoint(num_key_value_heads=kv, rope_scaling_factor=8.0, vocab_size=4096)
    report = exported(checkpoint, tmp_path / "x", "jax")
    (gemma,) = (one for one in CONSUMERS if one.format == "jax")
    ids = list(range(2, 42))  # more than the window
    logits = logits_in(gemma, report.path, ids, python)
    np.testing.assert_allclose(logits, expected(gemma, checkpoint, ids), rtol=0, atol=1e-4)


def test_another_models_weights_are_noticed_and_the_file_is_left(tmp_path: Path) -> None:
    report = exported(tiny_checkpoint(vocab_size=4096), tmp_path / "x", "onnx")
    words = "x: onnxruntime computes something else from it, .* nats.*left as it was written"
    with pytest.raises(VerificationError, match=words):
        verify(report, tiny_checkpoint(seed=1, vocab_size=4096), True)
    assert (tmp_path / "x" / "config.json").exists()


def test_a_file_that_is_not_read_is_named_with_what_the_program_said(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(vocab_size=4096)
    report = exported(checkpoint, tmp_path / "x", "onnx")
    (file,) = (tmp_path / "x" / "onnx").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(VerificationError, match=r"x: onnxruntime does not read it: .*model"):
        verify(report, checkpoint, True)


def test_it_is_left_out_where_it_takes_long_or_nobody_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(vocab_size=4096)
    assert exported(checkpoint, tmp_path / "a.gguf").verification is None  # conftest.py's wish
    monkeypatch.delenv("GEMMA_MULTI_VERIFY")
    assert exported(checkpoint, tmp_path / "b.gguf", verify=False).verification is None
    assert exported(checkpoint, tmp_path / "c.gguf").verification.consumer
    told = exported(checkpoint, tmp_path / "d", "keras").verification
    assert "keras-hub would take about 15 s; --verify asks it" in str(told)
    told = exported(checkpoint, tmp_path / "e.sbs").verification
    assert str(told) == "not verified: no program that reads it is installed"
    with pytest.raises(OptionError, match="verify is on, but no Python package is there to read"):
        exported(checkpoint, tmp_path / "f.sbs", verify=True)
    assert not (tmp_path / "f.sbs").exists()


def test_what_is_no_number_differs() -> None:
    logits = np.zeros((3, 5), np.float32)
    assert compared(logits, logits) == (0.0, 0.0)
    assert compared(logits, logits[:2]) == (float("inf"),) * 2
    assert not compared(logits, logits * np.nan)[1] <= 1
    shifted = compared(logits, np.eye(3, 5, dtype=np.float32))
    assert shifted == pytest.approx((1.0, np.log(4 / 5 + np.e / 5) - 1 / 5))


def test_on_the_command_line(tmp_path: Path) -> None:
    def run(*given: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name != "GEMMA_MULTI_VERIFY"}
        command = [sys.executable, "-m", "gemma_multi", *given]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env)

    said = run("export", "storyteller", "-o", str(tmp_path / "a.gguf"))
    assert "verified with" in said.stderr
    said = run("convert", "storyteller", str(tmp_path / "b.gguf"), "--no-verify", "--json")
    assert json.loads(said.stdout)["verification"] is None
    said = run("convert", "storyteller", str(tmp_path / "c.gguf"), "--json")
    assert json.loads(said.stdout)["verification"]["tokens"] > 8
    assert verifying.LONGEST == 10  # as --help says
