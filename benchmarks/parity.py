"""How long a parity run takes, what it holds, and what it finds: python benchmarks/parity.py

On the bundled model, all three backends over the whole prompt set, in float32 and as each backend
runs it by itself; then a checkpoint of random weights in the true 270M shape on a few prompts.
Memory is compared with the sum of what the engines take alone, when each reads the same prompts
and answers. (Random weights have no favourite in a vocabulary of 262,144: their top-1 says little.)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loading import random_270m
from rich.console import Console
from rich.table import Table
from side_by_side import measure

import gemma_multi
from gemma_multi.comparison.prompts import shipped_prompts

_FEW = ("story", "sentiment", "language-ja", "log-past")  # the last is past a window of 512


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    model: str
    backends: tuple[str, ...]
    precision: str
    prompts: tuple[str, ...]
    max_tokens: int


def run(case: Case) -> dict[str, Any]:
    """Figures of one run, and of each engine alone."""
    chosen = (
        "import gemma_multi, json\n"
        "from gemma_multi.comparison.prompts import shipped_prompts\n"
        "from gemma_multi.engines import ALL\n"
        f"chosen = [p for p in shipped_prompts() if p.name in {case.prompts!r}]\n"
    )
    alone = []
    for name in case.backends:
        backend, _, precision = name.partition(":")
        load = (
            f"m = gemma_multi.load({case.model!r}, backend={backend!r}, "
            f"precision={precision or case.precision!r})\n"
        )
        work = (
            "for p in chosen:\n"
            "    ids, session = m.encode(p.content, raw=p.raw), m.engine.session()\n"
            "    for i in range(0, len(ids), 128):\n"
            "        session.read(ids[i : i + 128], ALL)\n"
            "    m.generate(p.content, raw=p.raw, max_tokens=8, temperature=0)"
        )
        alone.append(measure(chosen + load + work).peak_mb)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        body = (
            f"{chosen}r = gemma_multi.parity({case.model!r}, {list(case.backends)!r}, "
            f"prompts=chosen, precision={case.precision!r}, max_tokens={case.max_tokens})\n"
            f"open({str(found)!r}, 'w').write(json.dumps(r.to_dict()))"
        )
        took = measure(body)
        report = json.loads(found.read_text())
    return {
        "case": case.name,
        "seconds": round(took.seconds, 1),
        "peak_mb": round(took.peak_mb),
        "engines_alone_mb": dict(zip(case.backends, map(round, alone), strict=True)),
        "memory_ratio": round(took.peak_mb / sum(alone), 2),
        "prompts": report["prompts"],
        "passed": report["passed"],
        "pairs": [_pair(c) for c in report["comparisons"]],
    }


def _pair(comparison: dict[str, Any]) -> dict[str, Any]:
    levels = comparison["levels"]
    logits, text = levels["logits"], levels["text"]
    parted = sum(d["mode"] == "greedy" for d in text["divergences"])
    return {
        "pair": f"{comparison['other']['name']} against {comparison['reference']['name']}",
        "weights": levels["weights"]["summary"],
        "positions": logits["positions"],
        "largest": logits["largest"],
        "divergence": logits["divergence"],
        "top1": logits["top1"],
        "greedy_same": f"{text['texts']['greedy'] - parted} of {text['texts']['greedy']}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    everything = tuple(prompt.name for prompt in shipped_prompts())
    three, true_shape = ("mlx", "keras", "litert"), random_270m()
    int4 = true_shape.with_name("random-270m-int4")
    if not int4.exists():
        gemma_multi.quantize(true_shape, int4, calibrate=None)
    cases = [
        Case("storyteller, float32", "storyteller", three, "float32", everything, 200),
        Case("storyteller, int4", "storyteller", three, "auto", everything, 200),
        Case("random 270M, int4", str(int4), ("keras", "litert"), "auto", _FEW, 8),
        Case("random 270M, bfloat16", str(true_shape), ("keras:float32", "keras:bfloat16"), "auto",
             _FEW, 8),
    ]  # fmt: skip
    results = [run(case) for case in cases]
    table = Table(
        "what", "seconds", "memory, of the sum", "pair", "largest", "KL", "top-1", "greedy"
    )
    for result in results:
        for i, pair in enumerate(result["pairs"]):
            first = (result["case"], f"{result['seconds']}",
                     f"{result['peak_mb']:,} MB, {result['memory_ratio']:.0%}")  # fmt: skip
            table.add_row(
                *(("", "", "") if i else first), pair["pair"], f"{pair['largest']:.2g}",
                f"{pair['divergence']:.2g}", f"{pair['top1']:.2%}", pair["greedy_same"],
            )  # fmt: skip
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
