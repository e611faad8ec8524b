"""Keras presets that were tampered with; what is in a whole one is in exporters/test_keras.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fuzzing import fuzz
from tiny import tiny_checkpoint

import gemma_multi


def test_mutated_presets_never_crash(tmp_path: Path) -> None:
    """500 mutations in four processes (see fuzz_keras.py)."""
    source = tiny_checkpoint(num_hidden_layers=2)
    path = gemma_multi.export(source, tmp_path / "x", format="keras", progress=False).path
    outcomes: Counter[str] = Counter()
    for i in range(4):
        outcomes += fuzz("fuzz_keras.py", path, tmp_path / str(i), i, 125)
    assert sum(outcomes.values()) == 500
    assert outcomes["refused"] > 200
