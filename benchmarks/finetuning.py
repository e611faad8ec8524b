"""A step of fine-tuning the true 270M shape, against TRL's SFTTrainer on torch: tokens a second and
peak memory.

    python benchmarks/finetuning.py [--steps 3] [--json results.json]

Needs `pip install 'gemma-multi[keras,train,reference]'`. Random bfloat16 weights in the true shape,
trained whole in float32: 4 rows of 512 tokens of this repository's own pages and licence, loss on
every token, AdamW. Each line is a process of its own; its first step, in which XLA compiles, is
not counted. On a GPU (`--dtype bfloat16`) the share of the chip's matrix rate is shown for the
rate given with `--peak-tflops`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from loading import CONFIG_270M, random_270m
from rich.console import Console
from rich.table import Table

from gemma_multi.tokenizer import Tokenizer

ROWS, LENGTH = 4, 512
FLOPS_A_TOKEN = 6 * CONFIG_270M.num_parameters  # forward and backward, attention aside
ROOT = Path(__file__).parents[1]

_MEASURE = """
import json, sys, time
def peak_mb():
    status = dict(l.split(":", 1) for l in open("/proc/self/status") if ":" in l)
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6
def report(seconds, losses):
    print("RESULT" + json.dumps({"seconds": seconds, "losses": losses, "peak_mb": peak_mb()}))
"""

_OURS = """
import numpy as np
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.training.batches import Batch
from gemma_multi.training.keras_trainer import KerasTrainer
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.trainer import Job
from gemma_multi.training.weights import frozen_weights, initial_tensors
ids = np.load(ids_file)[None].astype(np.int32)
labels = np.roll(ids, -1, -1); labels[..., -1] = -1
options = TrainingOptions.checked({"learning_rate": 1e-4, "dtype": dtype, **extra}, 32768)
def place():
    checkpoint = open_checkpoint(model)
    return KerasTrainer(Job(checkpoint.config, initial_tensors(checkpoint, options),
                            frozen_weights(checkpoint, options), options, dtype))
trainer = place()
batch = Batch(ids, labels, np.ones_like(ids), ())
seconds, losses = [], []
for _ in range(steps):
    start = time.perf_counter()
    losses.append(float(trainer.step(batch, 1e-4).loss) / batch.loss_tokens)
    seconds.append(time.perf_counter() - start)
report(seconds, losses)
"""

_TRL = """
import tempfile, numpy as np, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
kind = torch.float32 if dtype == "float32" else torch.bfloat16
network = AutoModelForCausalLM.from_pretrained(model, dtype=kind)
rows = Dataset.from_dict({"input_ids": np.load(ids_file).tolist() * steps})
seconds, losses = [], []
class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__): self.start = time.perf_counter()
    def on_step_end(self, *_, **__): seconds.append(time.perf_counter() - self.start)
    def on_log(self, *_, logs=None, **__):
        if "loss" in logs: losses.append(float(logs["loss"]))
config = SFTConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(np.load(ids_file)),
    max_length=512, max_steps=steps, learning_rate=1e-4, lr_scheduler_type="constant",
    warmup_steps=0, report_to=[], save_strategy="no", logging_steps=1, bf16=dtype != "float32",
    use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, optim="adamw_torch",
    **extra,
)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json", pad_token="<pad>",
                                    eos_token="<eos>", bos_token="<bos>")
class InOrder(SFTTrainer):  # the very same rows in every step
    def _get_train_sampler(self, *_): return torch.utils.data.SequentialSampler(self.train_dataset)
InOrder(model=network, args=config, train_dataset=rows, processing_class=tokenizer,
        callbacks=[Clock()]).train()
report(seconds, losses)
"""

LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("this package", _OURS, {"qat": False}),
    ("TRL, its defaults", _TRL, {}),
    ("TRL, no gradient checkpointing", _TRL, {"gradient_checkpointing": False}),
    ("this package, through the int4 grid", _OURS, {"qat": True}),
    ("this package, LoRA", _OURS, {"qat": False, "method": "lora"}),
)


def text_ids(model: Path, file: Path) -> None:
    """Four rows of real text."""
    pages = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "limits.md", ROOT / "LICENSE")
    text = "".join(page.read_text() for page in pages)
    ids = Tokenizer.from_directory(model).encode(text)[: ROWS * LENGTH]
    np.save(file, np.array(ids).reshape(ROWS, LENGTH))


def measure(body: str, values: dict[str, Any]) -> dict[str, Any]:
    code = _MEASURE + "".join(f"{name} = {value!r}\n" for name, value in values.items()) + body
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "KERAS_BACKEND": "jax"})  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not found:
        raise SystemExit(f"failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(found[0].removeprefix("RESULT")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--peak-tflops", type=float, help="the chip's matrix rate, for its share")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    model = random_270m()
    ids_file = model.parent / "finetuning-ids.npy"
    text_ids(model, ids_file)
    results = {}
    for name, body, extra in LINES:
        values = {"model": str(model), "ids_file": str(ids_file), "steps": options.steps,
                  "dtype": options.dtype, "extra": extra}  # fmt: skip
        with Console(stderr=True).status(name):
            found = measure(body, values)
        step = statistics.median(found["seconds"][1:])
        results[name] = {**found, "tokens_per_second": ROWS * LENGTH / step}
    show(results, options.peak_tflops)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def show(results: dict[str, dict[str, Any]], peak_tflops: float | None) -> None:
    peer = results["TRL, its defaults"]
    table = Table(title="4 x 512 tokens a step; ratios to TRL's defaults")
    for heading in ("", "speed", "tokens/s", "memory", "peak MB", "loss of each step"):
        table.add_column(heading, justify="left" if not heading else "right")
    if peak_tflops:
        table.add_column("of the matrix rate", justify="right")
    for name, found in results.items():
        rate = found["tokens_per_second"]
        share = peak_tflops and f"{rate * FLOPS_A_TOKEN / (peak_tflops * 1e12):.1%}"
        table.add_row(
            name, f"{rate / peer['tokens_per_second']:.2f}", f"{rate:.1f}",
            f"{found['peak_mb'] / peer['peak_mb']:.2f}", f"{found['peak_mb']:,.0f}",
            " ".join(f"{loss:.3f}" for loss in found["losses"]), *([share] if share else []),
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
