"""The real Gemma 3 270M in EleutherAI's harness: this package's engines beside transformers.

    python benchmarks/harness.py [--rows 100] [--json results/harness-cpu.json]

The base model, two tasks whose rows come in packages (film reviews and spam, see `real_rows.py`),
each row on its own, without examples. lm_eval asks: its own `hf` model, which is transformers on
torch, and ours on several backends, all with the same float32 weights; and beside them our int4.
Right answers should be the same within a row, and log-probabilities as far as sums in another
order let them. Needs `gemma-multi[eval,reference]` and `accelerate`.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from other_peoples_files import gemma_270m
from real_rows import TASKS
from rich.console import Console
from side_by_side import columns

import gemma_multi
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.evaluation.harness import GemmaMultiLM
from gemma_multi.exporters import save
from gemma_multi.scoring import share
from gemma_multi.training.calibrated import calibrated
from gemma_multi.transforms import original

CHOICES = {"film reviews": ["positive", "negative"], "spam": ["yes", "no"]}
_THEIRS = "transformers"


@dataclass(frozen=True)
class Scored:
    """How many rows of a task one model got right in the harness."""

    task: str
    model: str
    right: int
    rows: int
    low: float  # of the 95% interval
    high: float
    differing: int  # rows that transformers answers otherwise
    largest: float  # difference to its log-probabilities of answers, in nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    base = original(gemma_multi.open_checkpoint(gemma_270m()))
    found: list[Scored] = []
    with tempfile.TemporaryDirectory() as work:
        names = _write_tasks(Path(work), options.rows)
        manager = TaskManager(include_path=work, include_defaults=False)
        theirs: dict[str, Any] = {}
        for model, make in _models(base, Path(work)).items():
            lm = make()
            for name, task in names.items():
                results = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0)
                samples = sorted(results["samples"][name], key=lambda one: one["doc_id"])
                theirs.setdefault(name, samples)
                found.append(_scored(task, model, samples, theirs[name]))
                Console(stderr=True).print(found[-1])
                if options.json:  # as they are found, for all of them take most of an hour
                    facts = json.dumps([asdict(one) for one in found], indent=1)
                    options.json.write_text(f"{facts}\n")
            del lm
            gc.collect()
    _show(found)


def _models(base: Checkpoint, work: Path) -> dict[str, Callable[[], Any]]:
    """What is asked, theirs first, each made when its turn comes."""

    def ours(checkpoint: Callable[[], Checkpoint], backend: str, precision: str) -> Any:
        return lambda: GemmaMultiLM(
            gemma_multi.load(checkpoint(), backend=backend, precision=precision,
                             context_length=1024)
        )  # fmt: skip

    return {
        _THEIRS: lambda: _transformers(base, work / "dense"),
        "Keras": ours(lambda: base, "keras", "float32"),
        "LiteRT": ours(lambda: base, "litert", "float32"),
        "LiteRT, int4": ours(lambda: calibrated(base, True), "litert", "int4"),
    }


def _transformers(base: Checkpoint, directory: Path) -> Any:
    """The harness's own model, with the embedding scale that the weights were trained with:
    transformers rounds it where weights are bfloat16, and these are in float32."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    save(base, directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.model.embed_tokens.embed_scale = torch.tensor(base.config.embedding_scale)
    return HFLM(
        pretrained=model, tokenizer=str(directory), backend="causal", device="cpu", batch_size=1
    )


def _write_tasks(work: Path, count: int) -> dict[str, str]:
    """Tasks as the harness reads them: its name for each, and ours."""
    names = {}
    for task, choices in CHOICES.items():
        name = f"gemma_multi_{task.replace(' ', '_')}"
        file = work / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in TASKS[task]()[:count]))
        names[name] = task
        # JSON is YAML
        (work / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}\nAnswer:", "doc_to_choice": choices,
            "doc_to_target": "completion",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }))  # fmt: skip
    return names


def _scored(task: str, model: str, samples: Any, theirs: Any) -> Scored:
    right = sum(bool(one["acc"]) for one in samples)
    differing, largest = 0, 0.0
    for one, other in zip(samples, theirs, strict=True):
        ours, reference = ([float(answer[0]) for answer in side["filtered_resps"]]
                           for side in (one, other))  # fmt: skip
        differing += ours.index(max(ours)) != reference.index(max(reference))
        largest = max(largest, *(abs(a - b) for a, b in zip(ours, reference, strict=True)))
    interval = share(right, len(samples))
    return Scored(task, model, right, len(samples), interval.low, interval.high, differing, largest)


def _show(found: list[Scored]) -> None:
    table = columns(("task", "model"), ("right", "95%", "differ", "most, nats"))
    for one in found:
        theirs = one.model == _THEIRS
        table.add_row(
            one.task, one.model, f"{one.right} of {one.rows}", f"{one.low:.0%} to {one.high:.0%}",
            "" if theirs else str(one.differing), "" if theirs else f"{one.largest:.2g}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
