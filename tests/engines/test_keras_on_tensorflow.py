"""Keras on TensorFlow passes the same suite, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_suite_passes_on_tensorflow() -> None:
    here = Path(__file__).parent
    chosen = "keras and not fewer_layers and not suite_passes and not float16 and not sfp8"
    # what is read together is the same code on both; TensorFlow compiles a shape in seconds
    chosen += " and (not of_many or unequal_lengths)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", chosen,
         str(here / "test_conformance.py"), str(here / "test_conformance_of_many.py"),
         str(here / "test_truth.py")],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
