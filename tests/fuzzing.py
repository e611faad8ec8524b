"""Runs one of the `fuzz_*.py` scripts in a process of its own, and counts what it reports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path


def fuzz(
    script: str, source: Path, work: Path, seed: int, count: int, *, timeout: float = 600,
    env: Mapping[str, str] | None = None,
) -> Counter[str]:  # fmt: skip
    """How often each outcome came. Fails where the process did."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(source), str(work), str(seed),
         str(count)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return Counter(line.split("\t")[1] for line in done.stdout.splitlines())
