"""The examples, run as their docstrings print it, on the bundled model."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = {
    "hello": ["3,519,392 parameters", "Luna", "stopped by: stop"],
    "stream": ["Leo", "[closed after"],
    "chat": ["\nLuna the owl.\n", "tokens were read before]"],
    "classify": ["negative", "0 negative\n1 the text is '', expected some words\n2 positive"],
    "extract": ["person='Anna' company=None place='Rome' day='Friday'", "day, "],
    "route": ["billing ", "shipping ", "technical "],
    "call_functions": ["set_timer {'minutes': ", " -> a timer of ", "the model: "],
    "finetune_20_rows": ["before ok\n  after  Arr. "],
    "fleet": ["billing    Good morning.", "shipping   Good evening.", "technical  Hello."],
    "qat_and_export": ["Word fox -> fox is a fine word", "the same weights, bit for bit: yes"],
}


def commands(name: str) -> list[str]:
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    return re.findall(r"^    (python .+)$", text or "", re.MULTILINE)


@pytest.mark.parametrize("name", SHOWN)
def test_it_runs_exactly_as_printed(name: str, tmp_path: Path) -> None:
    (command,) = commands(name)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for words in SHOWN[name]:
        assert words in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["examples"]  # nothing is left behind


def test_each_is_short() -> None:
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 60, file.name
