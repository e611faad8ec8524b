"""llama.cpp as a peer: its tools, built from the sdist of llama-cpp-python, and random files in the
shape of Gemma 3 270M. All are made once, in the user's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from loading import random_270m
from rich.console import Console

from gemma_multi import export
from gemma_multi.cache import cache_directory

SDIST = "llama-cpp-python==0.3.36"
_TOOLS = ("llama-bench", "llama-imatrix", "llama-perplexity", "llama-quantize",
          "llama-server")  # fmt: skip
_OFF = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES")


def tool(name: str) -> Path:
    """One of `_TOOLS`, all built for this processor at the first call. Needs cmake and a C++
    compiler; takes ten minutes."""
    home = cache_directory("benchmarks", SDIST)
    wanted = home / "build" / "bin" / name
    if wanted.exists():
        return wanted
    Console(stderr=True).print("building llama.cpp, once")
    shutil.rmtree(home / "build", ignore_errors=True)  # of a source that is gone
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "-d", work, SDIST], check=True)
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(Path(work).glob("*/vendor/llama.cpp"))
        configure = ["cmake", "-S", str(source), "-B", str(home / "build")]
        options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", *(f"{name}=OFF" for name in _OFF)]
        subprocess.run([*configure, *(f"-D{option}" for option in options)], check=True)
        build = ["cmake", "--build", str(home / "build"), f"-j{os.cpu_count()}", "--target"]
        subprocess.run([*build, *_TOOLS], check=True)
    return wanted


def random_gguf(precision: str = "int4") -> Path:
    """Gemma 3 270M's shape with every matrix in Q4_0, or `int8` in Q8_0."""
    path = cache_directory("benchmarks", f"random-270m-{precision}.gguf")
    if not path.exists():
        export(random_270m(), path, precision=precision)
    return path


def measure(threads: int, prompt: int, generate: int, depth: int) -> float:
    """Tokens a second of llama-bench, the best of three: of reading `prompt` or generating."""
    done = subprocess.run(
        [tool("llama-bench"), "-m", random_gguf(), "-t", str(threads), "-p", str(prompt),
         "-n", str(generate), "-d", str(depth), "-r", "3", "-o", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(max(json.loads(done.stdout)[0]["samples_ts"]))
