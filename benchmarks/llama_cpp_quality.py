"""What llama.cpp's own ways to 4 bits cost the real Gemma 3 270M, in llama.cpp itself.

`llama-quantize` makes the files, with an importance matrix of `llama-imatrix` where one is wanted;
`llama-perplexity` compares each to the unquantised model: perplexity, divergence and agreement on
the second half of every window, which is how that tool counts. Q4_K_M is left out: the weights
come from a file of that kind, so making one of them again would cost next to nothing.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llama_cpp_tools import tool

_MATRIX, _LOGITS = "imatrix.gguf", "logits"
KINDS = {  # name: llama-quantize's options
    "Q4_0": [],
    "Q4_0 with an importance matrix": ["--imatrix", _MATRIX],
    "Q4_0 throughout": ["--pure"],
}
_SAID = {
    "unquantised": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "divergence": r"Mean\s+KLD:\s*([\d.]+)",
    "agreement": r"Same top p:\s*([\d.]+)",
}
_WINDOW, _THREADS = 1024, 2


def qualities(
    kinds: list[str], model: Path, texts: list[str], others: list[str], work: Path
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(name, bytes of the file, what `_SAID` names) of each of `kinds`. `others` are the texts of
    the importance matrix."""
    run = partial(_run, work)
    (work / "texts.txt").write_text("".join(texts), "utf-8")
    (work / "others.txt").write_text("\n\n".join(others), "utf-8")
    read: list[object] = ["-f", "texts.txt", "-c", _WINDOW, "-b", _WINDOW, "-t", _THREADS]
    read += ["--kl-divergence-base", _LOGITS]
    run("llama-quantize", "--allow-requantize", model.resolve(), "dense.gguf", "F32")
    run("llama-perplexity", "-m", "dense.gguf", *read)  # writes them
    run("llama-imatrix", "-m", "dense.gguf", "-f", "others.txt", "-o", _MATRIX, "-c", 512,
        "-t", _THREADS)  # fmt: skip
    for name in kinds:
        run("llama-quantize", *KINDS[name], "dense.gguf", "int4.gguf", "Q4_0")
        output = run("llama-perplexity", "-m", "int4.gguf", *read, "--kl-divergence")
        found = {what: float(re.findall(pattern, output)[-1]) for what, pattern in _SAID.items()}
        found["agreement"] /= 100
        yield name, (work / "int4.gguf").stat().st_size, found


def _run(work: Path, name: str, *arguments: object) -> str:
    """What one of llama.cpp's tools printed, run in the directory `work`."""
    done = subprocess.run(
        [tool(name).resolve(), *map(str, arguments)], cwd=work, check=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.stdout
