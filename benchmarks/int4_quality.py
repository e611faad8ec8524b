"""What int4 costs the real Gemma 3 270M: ways to round it, on text that none of them saw.

    python benchmarks/int4_quality.py [--documents 20] [--json results/int4-quality.json]

The texts are every 25th document of the Brown corpus, the first 1,024 tokens of each, and the 69
prompts that parity asks (23 languages, code, numbers). All weights are run by the same code in
float32 (`gemma_multi.calibration.decoder`, which the tests hold against Keras), so that what
differs is the rounding; `int8` beside a row means inputs rounded to int8 as phones do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from other_peoples_files import brown_documents, gemma_270m, gemma_tokenizer
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import gemma_multi
from gemma_multi.calibration.decoder import Decoder, Weights
from gemma_multi.calibration.measure import measure
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison.prompts import shipped_prompts
from gemma_multi.config import EMBEDDING
from gemma_multi.exporters import save
from gemma_multi.transforms import Closeness, original, quantize_checkpoint

EVERY, TOKENS = 25, 1024
_CALIBRATION_DOCUMENTS = 24
_MLX_GROUPS = (64, 32)


@dataclass(frozen=True)
class Row:
    """A way to round, and what it cost."""

    name: str
    mb: float  # of weights
    seconds: float  # that it took
    brown: Closeness
    prompts: Closeness
    int8: Closeness | None  # on the Brown texts, inputs in int8; to the same weights in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20, help="of 20 to measure on")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--only", help="ways whose name holds this")
    options = parser.parse_args()

    base = original(gemma_multi.open_checkpoint(gemma_270m()))
    documents = brown_documents()
    brown = [_ids(base, text)[:TOKENS] for text in documents[::EVERY][: options.documents]]
    prompts = [ids for ids in map(_prompt_ids(base), shipped_prompts()) if len(ids) > 8]
    reference = Decoder(base.config, Weights(base))
    rows: list[Row] = []
    perplexities: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as pool:
        for name, make in ways(base, documents, Path(work)):
            if options.only and options.only not in name:
                continue
            Console(stderr=True).print(name)
            begin = time.perf_counter()
            checkpoint = make()
            seconds = time.perf_counter() - begin
            model = Decoder(base.config, Weights(checkpoint))
            with threadpool_limits(1):
                perplexities["brown"], on_brown = measure(reference, model, brown, pool)
                perplexities["prompts"], on_prompts = measure(reference, model, prompts, pool)
                on_int8 = None
                if "calibrated" in name or "nearest" in name:
                    rounded = Decoder(base.config, model.weights, int8_activations=True)
                    on_int8 = measure(model, rounded, brown[:4], pool)[1]
            rows.append(Row(name, checkpoint.nbytes / 1e6, seconds, on_brown, on_prompts, on_int8))
    _show(rows, perplexities)
    if options.json:
        data = {"unquantised": perplexities, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(data, indent=2) + "\n")


def ways(
    base: Checkpoint, documents: list[str], work: Path
) -> Iterator[tuple[str, Callable[[], Checkpoint]]]:
    """(name, a function that rounds). Documents that are measured calibrate nothing."""
    others = [text for i, text in enumerate(documents) if i % EVERY]
    step = len(others) // _CALIBRATION_DOCUMENTS
    rows = [{"text": base.tokenizer.decode(_ids(base, text)[:512])} for text in others[::step]]

    def ours(bits: int, calibrate: object) -> Checkpoint:
        target = work / f"ours-{bits}-{calibrate if isinstance(calibrate, str) else 'rows'}"
        gemma_multi.quantize(base, target, embedding_bits=bits, calibrate=calibrate)
        return gemma_multi.open_checkpoint(target)

    for bits in (8, 4):
        yield f"nearest, embedding int{bits}", partial(_nearest, base, bits)
        yield f"calibrated on itself, embedding int{bits}", partial(ours, bits, "self")
        yield f"calibrated on other Brown texts, embedding int{bits}", partial(ours, bits, rows)
    yield "llama.cpp's Q4_0, embedding Q8_0", partial(_as_llama_cpp, base)
    for group in _MLX_GROUPS:
        yield f"mlx-lm's 4 bits, groups of {group}", partial(_as_mlx_lm, base, work, group)


def _nearest(base: Checkpoint, embedding_bits: int) -> Checkpoint:
    return quantize_checkpoint(base, 4, embedding_bits)[0]


def _as_llama_cpp(base: Checkpoint) -> Checkpoint:
    """By the gguf package, whose Q4_0 and Q8_0 are llama.cpp's to the bit."""
    kinds = gguf.GGMLQuantizationType
    changes = {}
    for name, shape in base.config.tensor_shapes().items():
        if len(shape) == 2:
            kind = kinds.Q8_0 if name == EMBEDDING else kinds.Q4_0
            packed = gguf.quants.quantize(base.weight(name).astype(np.float32), kind)
            changes[name] = gguf.quants.dequantize(packed, kind)
    return base.with_tensors(changes)


def _as_mlx_lm(base: Checkpoint, work: Path, group: int) -> Checkpoint:
    from mlx_lm import convert

    dense, target = work / "dense", work / f"mlx-{group}"
    if not dense.exists():
        save(base, dense)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (dense / name).write_bytes((gemma_tokenizer() / name).read_bytes())
    convert(str(dense), str(target), quantize=True, q_group_size=group, q_bits=4)
    return gemma_multi.open_checkpoint(target)


def _ids(base: Checkpoint, text: str) -> np.ndarray:
    return np.array([base.tokenizer.bos_id, *base.tokenizer.encode(text)], np.int32)


def _prompt_ids(base: Checkpoint) -> Callable[[object], np.ndarray]:
    def ids(prompt: object) -> np.ndarray:
        content = prompt.content  # type: ignore[attr-defined]
        text = content if isinstance(content, str) else "\n".join(m["content"] for m in content)
        return _ids(base, text)[:TOKENS]

    return ids


def _show(rows: list[Row], perplexities: dict[str, float]) -> None:
    table = Table(title=f"perplexity unquantised: {perplexities['brown']:.2f} on Brown")
    for heading in (
        "",
        "MB",
        "s",
        "ratio",
        "KL",
        "top-1",
        "KL, 69 prompts",
        "int8 inputs: KL",
        "top-1",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(
            row.name, f"{row.mb:.0f}", f"{row.seconds:.0f}",
            f"{row.brown.perplexity / perplexities['brown']:.3f}", f"{row.brown.divergence:.4f}",
            f"{row.brown.agreement:.1%}", f"{row.prompts.divergence:.4f}",
            f"{row.int8.divergence:.4f}" if row.int8 else "",
            f"{row.int8.agreement:.1%}" if row.int8 else "",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
