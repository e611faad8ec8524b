"""What float16 costs the real Gemma 3 270M, with its residual stream at a scale that fits, and
without; beside bfloat16.

    python benchmarks/float16_quality.py [--documents 20] [--json benchmarks/results/...]

The texts are those of `int4_quality`: every 25th document of the Brown corpus, 1,024 tokens of
each. Divergence is from Keras in float32, in nats a token, over positions whose logits are finite.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from int4_quality import EVERY, TOKENS
from other_peoples_files import brown_documents, gemma_270m
from rich.console import Console
from rich.progress import track
from side_by_side import columns

import gemma_multi
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.decoder import log_softmax
from gemma_multi.engines import ALL, Engine, create_engine
from gemma_multi.engines.precision import Prepared
from gemma_multi.transforms import original

_PART = 256  # tokens whose logits are there at once


@dataclass
class Row:
    """An engine in a type, and how far it was from float32."""

    backend: str
    compute: str
    residual_scale: float
    tokens: int = 0
    broken: int = 0  # tokens whose logits are not finite
    nats: float = 0.0  # of divergence, summed over the others
    same: int = 0  # tokens, of all, that are likeliest in both

    @property
    def divergence(self) -> float | None:
        """Nats a token; None where no logit was finite."""
        finite = self.tokens - self.broken
        return self.nats / finite if finite else None

    @property
    def agreement(self) -> float:
        return self.same / self.tokens

    def add(self, reference: np.ndarray, logits: np.ndarray) -> None:
        """`reference` are log-probabilities, `f32[T, V]`; `logits` are used up."""
        finite = np.isfinite(logits).all(-1)
        self.tokens += len(logits)
        self.broken += int(np.count_nonzero(~finite))
        same = (logits.argmax(-1) == reference.argmax(-1)) & finite
        self.same += int(np.count_nonzero(same))
        p, q = reference[finite], log_softmax(logits[finite])
        self.nats += float(np.einsum("tv,tv->", np.exp(p), p - q, dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=20, help="of 20 to measure on")
    parser.add_argument("--backends", nargs="+", default=["keras", "mlx"])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    base = original(gemma_multi.open_checkpoint(gemma_270m()))
    reference = create_engine(base, "keras", "float32")
    engines = [engine for backend in options.backends for engine in engines_of(backend, base)]
    rows = [Row(e.name, e.compute, e.config.residual_scale) for e in engines]
    for text in track(brown_documents()[::EVERY][: options.documents], "reading"):
        ids = np.array([base.tokenizer.bos_id, *base.tokenizer.encode(text)][:TOKENS], np.int32)
        sessions = [engine.session() for engine in (reference, *engines)]
        for start in range(0, len(ids), _PART):
            part = ids[start : start + _PART]
            expected = log_softmax(read(reference, sessions[0], part))
            for row, engine, session in zip(rows, engines, sessions[1:], strict=True):
                row.add(expected, read(engine, session, part))
    show(rows)
    if options.json:
        figures = ("backend", "compute", "residual_scale", "tokens", "broken", "divergence",
                   "agreement")  # fmt: skip
        lines = [{name: getattr(row, name) for name in figures} for row in rows]
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


def engines_of(backend: str, base: Checkpoint) -> list[Engine]:
    """In bfloat16, in float16, and in float16 without a scale, which `load` does not do."""
    unscaled = Prepared(base, "float16", "float16")
    if backend == "mlx":
        import mlx.core as mx

        from gemma_multi.engines.mlx import MlxEngine

        plain: Engine = MlxEngine(mx, unscaled)
    else:
        from gemma_multi.engines.keras import KerasEngine
        from gemma_multi.engines.keras_backbone import import_keras
        from gemma_multi.engines.keras_runtime import KerasRuntime

        plain = KerasEngine(KerasRuntime(import_keras()), unscaled)
    return [*(create_engine(base, backend, kind) for kind in ("bfloat16", "float16")), plain]


def read(engine: Engine, session: object, ids: np.ndarray) -> np.ndarray:
    return np.array(engine.numpy(session.read(ids, ALL)), np.float32)  # type: ignore[attr-defined]


def show(rows: list[Row]) -> None:
    table = columns(("engine", "activations", "residual scale"), ("KL", "same token", "not finite"))
    for row in rows:
        table.add_row(
            row.backend, row.compute, f"{row.residual_scale:g}",
            "" if row.divergence is None else f"{row.divergence:.1e}",
            f"{row.agreement:.1%}", f"{row.broken / row.tokens:.1%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
