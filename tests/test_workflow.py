"""GitHub's workflow, before it ever ran there: a linter reads it, and says what pyproject says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from needs import missing
from other_peoples_files import actionlint

ROOT = Path(__file__).parents[1]
WORKFLOWS = [
    ROOT / ".github" / "workflows" / "ci.yml",
    ROOT / "examples" / "parity_in_ci" / "github-actions.yml",
]
LINT = """
const { createLinter } = require("actionlint");
const text = require("fs").readFileSync(0, "utf8");
createLinter().then((lint) => {
  console.log(JSON.stringify(lint(text, ".github/workflows/ci.yml")));
  process.exit(0);
});
"""


def lint(text: str) -> list[dict[str, Any]]:
    node = shutil.which("node")
    if node is None:
        missing("no Node.js on the PATH")
    env = {**os.environ, "NODE_PATH": str(actionlint())}
    env.pop("LD_PRELOAD", None)
    done = subprocess.run(
        [node, "-e", LINT], input=text, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_linter_has_nothing_to_say(workflow: Path) -> None:
    assert lint(workflow.read_text()) == []


def test_the_linter_would_say_it() -> None:
    broken = WORKFLOWS[0].read_text().replace("needs: build", "needs: nothing")
    assert "nothing" in lint(broken)[0]["message"]


def test_the_versions_are_those_of_pyproject() -> None:
    jobs = yaml.safe_load(WORKFLOWS[0].read_text())["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert jobs["wheel"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
    # the suite needs tensorflow, so it runs where that has a wheel
    assert jobs["suite"]["strategy"]["matrix"]["python"] == named[:-1]
    systems = jobs["wheel"]["strategy"]["matrix"]["system"]
    assert [system.partition("-")[0] for system in systems] == ["ubuntu", "macos", "windows"]
    pinned = "\n".join(project["optional-dependencies"]["keras"])
    (hub,) = re.findall(r'KERAS_HUB = "(.*)"', (ROOT / ".ci" / "wheel.py").read_text())
    assert f"{hub}; python_version < '{named[-1]}'" in pinned


def test_what_it_runs_is_there() -> None:
    text = WORKFLOWS[0].read_text()
    files = re.findall(r"(?:source/)?((?:\.ci|tests)/[\w./]+)", text)
    assert len(files) > 5
    assert [file for file in files if not (ROOT / file).exists()] == []
    targets = re.findall(r"run: make (\S+)", text)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)
