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
from pathlib import Path

from llama_cpp import tool

KINDS = {  # name: llama-quantize's options
    "Q4_0": [],
    "Q4_0 with an importance matrix": ["--imatrix"],
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
    dense, said = work / "dense.gguf", work / "logits"
    _quantize(model, dense, ["--allow-requantize"], "F32")
    (work / "texts.txt").write_text("".join(texts), "utf-8")
    (work / "others.txt").write_text("\n\n".join(others), "utf-8")
    read = ["-c", str(_WINDOW), "-b", str(_WINDOW), "-t", str(_THREADS)]
    run("llama-perplexity", "-m", dense, "-f", work / "texts.txt", *read,
        "--kl-divergence-base", said)  # fmt: skip
    run("llama-imatrix", "-m", dense, "-f", work / "others.txt", "-o", work / "imatrix.gguf",
        "-c", "512", "-t", str(_THREADS))  # fmt: skip
    for name in kinds:
        file = work / "quantised.gguf"
        given = [word for option in KINDS[name] for word in (
            [option, str(work / "imatrix.gguf")] if option == "--imatrix" else [option]
        )]  # fmt: skip
        _quantize(dense, file, given, "Q4_0")
        output = run("llama-perplexity", "-m", file, "-f", work / "texts.txt", *read,
                     "--kl-divergence-base", said, "--kl-divergence")  # fmt: skip
        found = {what: float(re.findall(pattern, output)[-1]) for what, pattern in _SAID.items()}
        found["agreement"] /= 100
        yield name, file.stat().st_size, found


def _quantize(source: Path, target: Path, options: list[str], kind: str) -> None:
    run("llama-quantize", *options, source, target, kind)


def run(name: str, *arguments: object) -> str:
    """What one of llama.cpp's tools printed."""
    command = [str(tool(name)), *map(str, arguments)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout
