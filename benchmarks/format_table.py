"""Every format of the real Gemma 3 270M in the runtime that it is for, against this package.

    python benchmarks/format_table.py [--only WORDS] [--json results.json]

Each line is exported from the calibrated int4 (or from the original, where a format is dense), in a
process of its own for time and memory, and read by somebody else's runtime: a text of 320 tokens,
the logits after each against those of this package's Keras engine in float32 on the weights that
were exported. A runtime that is not installed leaves its line out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from other_peoples_files import brown_documents, gemma_270m
from rich.console import Console
from rich.table import Table
from side_by_side import measure

import gemma_multi
from gemma_multi.decoder import log_softmax
from gemma_multi.engines import ALL
from gemma_multi.exporters import save
from gemma_multi.training.calibrated import calibrated
from gemma_multi.transforms import original

TOKENS = 320


class Line(NamedTuple):
    what: str
    source: str  # "int4" or "bfloat16"
    output: str  # the name of the file or directory
    options: dict[str, Any]
    runtime: str  # for people
    package: str  # that must be there
    logits: Callable[[Path, list[int]], np.ndarray]  # f32[T, V]


def in_llama_cpp(path: Path, ids: list[int]) -> np.ndarray:
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=TOKENS, n_threads=2, logits_all=True, verbose=False)
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)], np.float32)


def in_onnxruntime(path: Path, ids: list[int]) -> np.ndarray:
    import onnxruntime

    (file,) = (path / "onnx").glob("*.onnx")
    session = onnxruntime.InferenceSession(str(file))
    given: dict[str, Any] = {
        cache.name: np.zeros((1, cache.shape[1], 0, cache.shape[3]),
                             np.float16 if "float16" in cache.type else np.float32)
        for cache in session.get_inputs() if cache.name.startswith("past_")
    }  # fmt: skip
    given |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64),
              "num_logits_to_keep": np.array(0)}  # fmt: skip
    logits: np.ndarray = session.run(["logits"], given)[0][0]
    return logits


def in_transformers(path: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].float().numpy()
    return logits


def on(backend: str, **given: Any) -> Callable[[Path, list[int]], np.ndarray]:
    """A runtime that this package drives: what is Google's or Apple's is the arithmetic."""

    def logits(path: Path, ids: list[int]) -> np.ndarray:
        model = gemma_multi.load(str(path), backend=backend, **given)
        return np.asarray(model.new_session().read(ids, ALL))

    return logits


def in_keras_hub(path: Path, ids: list[int]) -> np.ndarray:
    from gemma_multi.engines.keras_backbone import import_keras

    import_keras()
    from keras import ops
    from keras_hub.models import Gemma3Backbone

    backbone = Gemma3Backbone.from_preset(str(path))
    hidden = backbone({"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)))})
    return np.asarray(ops.cast(backbone.token_embedding(hidden, reverse=True)[0], "float32"))


LINES = (
    Line("gguf, Q4_0", "int4", "a.gguf", {}, "llama.cpp", "llama_cpp", in_llama_cpp),
    Line("mlx, int4", "int4", "a", {"format": "mlx"}, "MLX", "mlx",
         on("mlx", precision="int4")),
    Line("onnx, q4", "int4", "a", {"format": "onnx"}, "onnxruntime", "onnxruntime",
         in_onnxruntime),
    Line("onnx, q4f16", "int4", "a", {"format": "onnx", "activations": "float16"}, "onnxruntime",
         "onnxruntime", in_onnxruntime),
    Line("litertlm, int4", "int4", "a.litertlm", {"context_length": 1024},
         "LiteRT", "ai_edge_litert", on("litert")),
    Line("huggingface, bfloat16", "bfloat16", "a",
         {"format": "huggingface", "precision": "bfloat16"}, "transformers", "transformers",
         in_transformers),
    Line("keras, bfloat16", "bfloat16", "a", {"format": "keras", "precision": "bfloat16"},
         "keras-hub", "keras_hub", in_keras_hub),
    Line("onnx, float32", "bfloat16", "a", {"format": "onnx", "precision": "float32"},
         "onnxruntime", "onnxruntime", in_onnxruntime),
    Line("onnx, float16", "bfloat16", "a", {"format": "onnx", "precision": "float16"},
         "onnxruntime", "onnxruntime", in_onnxruntime),
    Line("gguf, BF16", "bfloat16", "a.gguf", {"precision": "bfloat16"}, "llama.cpp", "llama_cpp",
         in_llama_cpp),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="lines whose name holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        sources = made(Path(work))
        expected: dict[str, np.ndarray] = {}
        ids: list[int] = []
        for source, path in sources.items():
            model = gemma_multi.load(str(path), backend="keras", precision="float32")
            text = " ".join(brown_documents()[0].split()[:600])
            ids = model.encode(text, raw=True)[:TOKENS]
            expected[source] = np.asarray(model.new_session().read(ids, ALL))
            del model
        for line in LINES:
            if options.only not in line.what or find_spec(line.package) is None:
                continue
            output = Path(work, str(len(found)), line.output)
            output.parent.mkdir()
            given = {"progress": False, **line.options}
            export = measure(
                "import gemma_multi\n"
                f"gemma_multi.export({str(sources[line.source])!r}, {str(output)!r}, **{given!r})"
            )
            files = [output] if output.is_file() else [f for f in output.rglob("*") if f.is_file()]
            found.append({
                "what": line.what, "runtime": line.runtime, **asdict(export),
                "mb": sum(file.stat().st_size for file in files) / 1e6,
                **compared(line.logits(output, ids), expected[line.source]),
            })  # fmt: skip
            Console(stderr=True).print(found[-1])
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def made(work: Path) -> dict[str, Path]:
    """The two checkpoints as directories."""
    base = original(gemma_multi.open_checkpoint(gemma_270m()))
    gemma_multi.export(base, work / "bfloat16", format="huggingface", precision="bfloat16")
    save(calibrated(base, progress=True), work / "int4")
    return {"int4": work / "int4", "bfloat16": work / "bfloat16"}


def compared(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Over all positions: the largest difference, nats a token, and how often the best token is
    the same."""
    p, q = log_softmax(ours), log_softmax(theirs)
    return {
        "difference": float(np.abs(theirs - ours).max()),
        "divergence": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def show(found: list[dict[str, Any]]) -> None:
    table = Table()
    table.add_column("")
    for heading in ("in", "MB", "export", "peak", "difference", "KL", "top-1"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(
            one["what"], one["runtime"], f"{one['mb']:.0f}", f"{one['seconds']:.1f} s",
            f"{one['peak_mb']:.0f}", f"{one['difference']:.1g}", f"{one['divergence']:.1g}",
            f"{one['agreement']:.1%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
