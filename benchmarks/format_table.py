"""Every format of the real Gemma 3 270M in the program that it is for, against this package.

    python benchmarks/format_table.py [--only WORDS] [--json results.json] [--page]

Each line is exported from the calibrated int4 (or from the original, where a format is dense), in a
process of its own for time and memory, and read by somebody else's program in another
(`gemma_multi.consumers`): a text of 128 tokens, the logits after each against those of the weights
that were exported, in NumPy and float32, and the text's perplexity. A program that is not
installed leaves its line out; GEMMA_MULTI_JAX_PYTHON names an interpreter that has
google-deepmind/gemma. `--page` makes docs/formats/table.md of the results that are kept, and does
nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from other_peoples_files import brown_documents, gemma_270m
from rich.console import Console
from rich.table import Table
from side_by_side import measure

import gemma_multi
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.consumers import CONSUMERS, Consumer, logits_in
from gemma_multi.decoder import log_softmax
from gemma_multi.exporters import save
from gemma_multi.training.calibrated import calibrated
from gemma_multi.transforms import original
from gemma_multi.verifying import compared, expected

TOKENS = 128
RESULTS = Path(__file__).parent / "results" / "formats.json"
PAGE = Path(__file__).parents[1] / "docs" / "formats" / "table.md"


class Line(NamedTuple):
    format: str
    precision: str  # for people
    source: str  # "int4" or "bfloat16"
    options: dict[str, Any]
    suffix: str = ""

    @property
    def what(self) -> str:
        return f"{self.format}, {self.precision}"


LINES = (
    Line("gguf", "Q4_0", "int4", {}, ".gguf"),
    Line("gguf", "BF16", "bfloat16", {"precision": "bfloat16"}, ".gguf"),
    Line("onnx", "q4", "int4", {}),
    Line("onnx", "q4, float32 activations", "int4", {"activations": "float32"}),
    Line("onnx", "q4f16", "int4", {"activations": "float16"}),
    Line("onnx", "float32", "bfloat16", {"precision": "float32"}),
    Line("onnx", "float16", "bfloat16", {"precision": "float16"}),
    Line("litertlm", "int4", "int4", {"context_length": 1024}, ".litertlm"),
    Line("tflite", "int4", "int4", {"context_length": 1024}, ".tflite"),
    Line("mlx", "int4", "int4", {}),
    Line("huggingface", "bfloat16", "bfloat16", {"precision": "bfloat16"}),
    Line("keras", "bfloat16", "bfloat16", {"precision": "bfloat16"}),
    Line("jax", "bfloat16", "bfloat16", {"precision": "bfloat16"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="lines whose name holds this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="docs/formats/table.md, and no more")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return
    found = []
    for one in measured(options.only):
        Console(stderr=True).print(one)
        found.append(one)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def readers(line: Line) -> Iterator[tuple[Consumer, str]]:
    """Who is here to read it, and by which interpreter."""
    for one in CONSUMERS:
        python = os.environ.get("GEMMA_MULTI_JAX_PYTHON", "") if one.format == "jax" else ""
        if one.format == line.format and (python or one.is_installed):
            yield one, python


def measured(only: str = "") -> Iterator[dict[str, Any]]:
    """A line of the table after the other."""
    chosen = [line for line in LINES if only in line.what]
    with tempfile.TemporaryDirectory() as work:
        directories = made(Path(work))
        for source, directory in directories.items():
            checkpoint = gemma_multi.open_checkpoint(directory)
            ids = text(checkpoint)
            for line in (one for one in chosen if one.source == source):
                for reader, python in readers(line):
                    output = Path(work, f"export{line.suffix}")
                    with tempfile.TemporaryDirectory(dir=work) as place:
                        output = Path(place, f"model{line.suffix}")
                        given = {"format": line.format, "progress": False, "verify": False,
                                 **line.options}  # fmt: skip
                        export = measure(
                            "import gemma_multi\n"
                            f"gemma_multi.export({str(directory)!r}, {str(output)!r}, **{given!r})"
                        )
                        theirs = logits_in(reader, output, ids, python)
                        ours = expected(reader, checkpoint, ids)
                        difference, divergence = compared(ours, theirs)
                        yield {
                            "format": line.format, "precision": line.precision,
                            "runtime": reader.name, **asdict(export), "mb": _size(output) / 1e6,
                            "difference": difference, "divergence": divergence,
                            "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
                            "perplexity": perplexity(theirs, ids),
                            "perplexity_of_weights": perplexity(ours, ids),
                        }  # fmt: skip


def made(work: Path) -> dict[str, Path]:
    """The two checkpoints as directories."""
    base = original(gemma_multi.open_checkpoint(gemma_270m()))
    gemma_multi.export(
        base, work / "bfloat16", format="huggingface", precision="bfloat16", verify=False
    )
    save(calibrated(base, progress=True), work / "int4")
    return {"int4": work / "int4", "bfloat16": work / "bfloat16"}


def text(checkpoint: Checkpoint) -> list[int]:
    ids = checkpoint.tokenizer.encode(" ".join(brown_documents()[0].split()[:600]))
    return [checkpoint.tokenizer.bos_id, *ids][:TOKENS]


def perplexity(logits: np.ndarray, ids: list[int]) -> float:
    """Of all tokens but the first."""
    told = [log_softmax(row.astype(np.float64))[token]
            for row, token in zip(logits[:-1], ids[1:], strict=True)]  # fmt: skip
    return float(np.exp(-np.mean(told)))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


HEADINGS = ("format", "precision", "in", "MB", "export", "peak MB", "difference", "KL", "top-1",
            "perplexity", "of the weights")  # fmt: skip


_SHOWN = ("format", "precision", "in", "MB", "difference", "KL", "perplexity")


def cells(one: dict[str, Any]) -> list[str]:
    return [
        one["format"], one["precision"], one["runtime"], f"{one['mb']:.0f}",
        f"{one['seconds']:.1f} s", f"{one['peak_mb']:.0f}", f"{one['difference']:.1g}",
        f"{one['divergence']:.1g}", f"{one['agreement']:.1%}", f"{one['perplexity']:.2f}",
        f"{one['perplexity_of_weights']:.2f}",
    ]  # fmt: skip


def show(found: list[dict[str, Any]]) -> None:
    """What fits on a terminal; the page has the rest."""
    table = Table(box=None)
    for heading in _SHOWN:
        table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right")
    for one in found:
        told = dict(zip(HEADINGS, cells(one), strict=True))
        table.add_row(*(told[heading] for heading in _SHOWN))
    Console().print(table)


def page(found: list[dict[str, Any]]) -> str:
    """docs/formats/table.md."""
    rows = [HEADINGS, ["---"] * 3 + ["---:"] * 8, *map(cells, found)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""\
# Every format in the program that it is for

The real Gemma 3 270M (the base model), exported and read by somebody else's program: a text of
{TOKENS} tokens, the logits after each against those of the weights that were exported. *Difference*
is the largest of any logit, *KL* the mean nats a token, *top-1* how often the best token is the
same, *perplexity* the program's on the text, beside that *of the weights* in NumPy and float32. The
int4 is `gemma-multi quantize`'s, calibrated; dense lines are of the original. *Export* and *peak
MB* are of a process that exports and does nothing else, on two CPU cores.

{table}

LiteRT, llama.cpp and onnxruntime's q4 round what they multiply to eight bits, and the f16 lines
compute in float16; the others compute in float32. `.sbs` has no line: gemma.cpp has no Python
package. For gguf's own dequantiser the arithmetic between the weights is NumPy's, so it says that
the weights are theirs, no more.

`python benchmarks/format_table.py --json benchmarks/results/formats.json` measures it again,
`--page` makes this page of the results, and `make real` asserts bounds on each line. What
`gemma-multi export` and `convert` say of a file with `--verify` is the same on a shorter text.
"""


if __name__ == "__main__":
    main()
