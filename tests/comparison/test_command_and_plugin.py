"""Parity from a terminal and from other people's tests: real processes, real exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFLICT = """
import numpy as np
from gemma_multi.engines.keras import KerasEngine
numpy = KerasEngine.numpy
KerasEngine.numpy = lambda self, logits: numpy(self, logits) + np.float32(np.arange(4096) % 2)
"""


def run(
    *arguments: str, where: Path | None = None, broken: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A process of its own; `broken` is where a startup file breaks Keras's logits first."""
    environment = {**os.environ, "COLUMNS": "80"}
    if broken is not None:
        (broken / "sitecustomize.py").write_text(CONFLICT)
        environment["PYTHONPATH"] = str(broken)
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, cwd=where, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("What is the sentiment?\nWhich team should answer?\n")
    return file


def test_the_command_prints_a_table_of_80_columns(prompts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("gemma_multi", "parity", "-b", "keras,litert", "--prompts", str(prompts),
               "--max-tokens", "8", "--trace", "--html", str(page))  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for level in ("weights", "tokens", "logits", "text", "layers"):
        assert any(line.startswith(level) and " ok " in line for line in lines), level
    assert page.read_text().startswith("<!doctype html>")


def test_the_command_fails_with_1_out_of_tolerance(prompts: Path, tmp_path: Path) -> None:
    done = run("gemma_multi", "parity", "-b", "litert,keras", "--prompts", str(prompts),
               "--max-tokens", "8", "--json", broken=tmp_path)  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    levels = report["comparisons"][0]["levels"]
    assert not report["passed"]
    assert not levels["logits"]["passed"]
    assert levels["weights"]["passed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent-model",), "no such directory"),
        (("-b", "keras"), "nothing to be compared with"),
        (("-b", "keras,cuda"), "unknown backend 'cuda'"),
        (("-b", "keras,"), "unknown backend ''"),
        (("--html", "report.pdf"), "ends in .html"),
        (("--html", "no/such/place.html"), "its directory must exist"),
        (("--prompts", "absent.txt"), "cannot be read"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = run("gemma_multi", "parity", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert words in done.stderr


def test_other_peoples_tests_have_the_fixture_and_the_assertion(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from gemma_multi.testing import assert_parity\n"
        "OPTIONS = dict(prompts=['Hello there'], max_tokens=4)\n"
        "def test_fixture(gemma_parity):\n"
        "    first = gemma_parity('storyteller', ['litert', 'keras'], **OPTIONS)\n"
        "    assert gemma_parity('storyteller', ['litert', 'keras'], **OPTIONS) is first\n"
        "def test_function():\n"
        "    assert assert_parity('storyteller', ['litert', 'keras'], **OPTIONS).passed\n"
    )
    reports = tmp_path / "reports"
    options = ("-p", "no:cacheprovider", "--gemma-report", str(reports))
    done = run("pytest", *options, where=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    page, data = sorted(reports.iterdir())
    assert re.fullmatch(r"storyteller-litert-keras-[0-9a-f]{8}\.html", page.name)
    assert data.name == page.with_suffix(".json").name

    broken = tmp_path / "broken"
    broken.mkdir()
    done = run("pytest", *options, where=tmp_path, broken=broken)
    assert done.returncode == 1
    assert "2 failed" in done.stdout
    assert "keras does not agree with litert" in done.stdout
    assert "KL divergence is" in done.stdout
    assert "comparison/run.py" not in done.stdout  # the reader sees their own line
    assert not json.loads(data.read_text())["passed"]


def test_the_example_for_continuous_integration_runs_as_it_is(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "parity_in_ci"
    options = ("-p", "no:cacheprovider", "--gemma-report", str(tmp_path / "report"))
    done = run("pytest", *options, str(example), where=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    job = (example / "github-actions.yml").read_text()
    assert "pytest examples/parity_in_ci --gemma-report parity" in job


def test_the_plugin_costs_other_test_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import sys\n"
        "def test_light():\n"
        "    heavy = {'numpy', 'keras', 'jax', 'mlx', 'matplotlib', 'rich'}\n"
        "    assert 'gemma_multi.testing' in sys.modules and not heavy & set(sys.modules)\n"
    )
    done = run("pytest", "-p", "no:cacheprovider", "-q", "test_mine.py", where=tmp_path)
    assert done.returncode == 0, done.stdout
