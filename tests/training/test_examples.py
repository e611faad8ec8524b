"""The specialists: their rows are apart, and one of them is trained as a user would."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

SPECIALISTS = Path(__file__).parents[2] / "examples" / "specialists"


@pytest.mark.parametrize("name", ["sentiment", "entities", "routing", "structure", "compliance"])
def test_rows_to_learn_and_rows_to_ask_are_apart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SPECIALISTS))
    specialist, module = importlib.import_module("specialist"), importlib.import_module(name)
    train, test = specialist.split(module.draw, 400, 60)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert (len(train), len(test)) == (400, 60)
    assert all(row["completion"] for row in train + test)


@pytest.mark.slow
def test_a_voice_is_learned_from_twenty_examples(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SPECIALISTS / "voice.py"), "--backend", "keras", "--output",
         str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"(\d+)% of 20 unseen rows right before, (\d+)% after", done.stdout)
    assert found, done.stdout
    assert int(found[1]) <= 10
    assert int(found[2]) >= 80
    assert (tmp_path / "run" / "curves.png").exists()
