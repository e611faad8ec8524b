"""LiteRT's GPU delegate without a GPU: Chromium brings a Vulkan in software.

A delegate that fails may end the process, so it runs in processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from needs import missing

_DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")  # Debian's
_READ = """
import sys, numpy as np, gemma_multi
from gemma_multi.engines import ALL, create_engine
file, ids, logits = sys.argv[1:]
options = {"device": "gpu", "enforce_f32": True}
engine = create_engine(gemma_multi.open_checkpoint(file), "litert", options=options)
np.save(logits, engine.session().read(np.load(ids), ALL))
"""


def environment(runtime: Path) -> dict[str, str]:
    """In which Vulkan is found. Skips where there is none, but for CI, where it fails."""
    if not _DRIVER.exists():
        missing(f"{_DRIVER} is missing: apt-get install chromium brings it")
    return {
        **os.environ,
        "VK_DRIVER_FILES": str(_DRIVER),
        "LD_LIBRARY_PATH": str(_DRIVER.parent),  # a loader, where the system has none
        "XDG_RUNTIME_DIR": str(runtime),
    }


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


def logits_on_gpu(
    environment: dict[str, str], file: Path, ids: np.ndarray, work: Path
) -> np.ndarray:
    """After each of `i32[T]`, in float32: `f32[T, V]`."""
    np.save(work / "ids.npy", ids)
    done = python(
        environment, "-c", _READ, str(file), str(work / "ids.npy"), str(work / "logits.npy")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits: np.ndarray = np.load(work / "logits.npy")
    return logits
