"""Trains `storyteller`, the bundled model, with `finetune`: python examples/storyteller/train.py

A small but true Gemma 3: nine layers, so that a global layer has local ones after it; a hidden
size that is no perfect square, so that a wrong embedding scale shows; a window shorter than its
stories. Two runs: one in full precision, from random weights or from `--start`, then one through
the int4 grid, because int4 is how the model ships. Both go on where they were stopped.
`evaluate.py` says how good it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import corpus
import numpy as np

import gemma_multi
from gemma_multi.checkpoint import Provenance, Tensors
from gemma_multi.checkpoint.provenance import APACHE
from gemma_multi.config import alternate
from gemma_multi.files import write_atomically
from gemma_multi.tokenizer import Tokenizer

CONFIG = gemma_multi.ModelConfig(
    vocab_size=corpus.VOCAB_SIZE,
    hidden_size=160,
    num_hidden_layers=9,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    intermediate_size=448,
    sliding_window=64,
    layer_types=alternate(9, 6),
    max_position_embeddings=2048,
    query_pre_attn_scalar=64.0,
    dtype="bfloat16",
)
GENERATION = {  # what `generate` does when not told otherwise
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 40,
    "top_p": 0.95,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}
SHAPE: dict[str, Any] = {
    "batch_size": 12,
    "max_length": 384,
    "packing": True,
    "epochs": 1,
    "schedule": "cosine",
}


def random_checkpoint(work: Path) -> gemma_multi.Checkpoint:
    """Untrained weights, and the tokenizer, which is made first."""
    tokenizer = work / "tokenizer" / "tokenizer.model"
    if not tokenizer.exists():
        write_atomically(tokenizer, corpus.train_tokenizer())
    rng = np.random.default_rng(0)
    tensors = {
        name: np.zeros(shape, np.float32)  # norms multiply by 1 + w
        if len(shape) == 1
        else (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        for name, shape in CONFIG.tensor_shapes().items()
    }
    made = Provenance(APACHE, "storyteller", modifications=("trained on generated stories",))
    return gemma_multi.Checkpoint(
        CONFIG, Tensors.of(tensors), made, GENERATION, tokenizer.parent,
        make_tokenizer=lambda: Tokenizer.from_directory(tokenizer.parent),
    )  # fmt: skip


def train(
    base: gemma_multi.Checkpoint, output: Path, rows: int, seed: int, **options: Any
) -> gemma_multi.FineTune:
    """One run over fresh rows, resumed if it was stopped."""
    return gemma_multi.finetune(
        base, corpus.rows(rows, seed), validation=list(corpus.held_out(100)), output=output,
        resume=(output / "run.json").exists(), backend="keras", **SHAPE, **options,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled storyteller.")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--qat-rows", type=int, default=12_000)
    parser.add_argument("--start", type=Path, help="a trained model; only the second run is done")
    parser.add_argument("--work", type=Path, default=Path("build/storyteller"))
    options = parser.parse_args()

    if options.start:
        dense = gemma_multi.open_checkpoint(options.start)
    else:
        first = train(random_checkpoint(options.work), options.work / "dense", options.rows, 0,
                      qat=False, learning_rate=3e-3, warmup=0.04, weight_decay=0.05)  # fmt: skip
        print(first)
        dense = first.checkpoint()
    print(train(dense, options.work / "qat", options.qat_rows, 1, qat=True, learning_rate=2e-4,
                warmup=0.1))  # fmt: skip


if __name__ == "__main__":
    main()
