"""Our int4 ONNX directory beside the layout that `onnx-community` publishes, in the same runtimes.

    pip install 'onnxruntime-genai==0.9.2' 'transformers<5' torch   # in an environment of its own
    gemma-multi export MODEL -o dense --format huggingface --precision bfloat16
    python -m onnxruntime_genai.models.builder -i dense -o theirs -p int4 -e cpu
    python benchmarks/onnx_decode.py --theirs theirs [--json results.json]

Their layout comes from onnxruntime-genai's model builder, with its settings for processors: int4
in blocks of 32, the head likewise, the embedding in float32. Both read a prompt of 128 tokens and
then choose tokens greedily: in onnxruntime from Python, and in Transformers.js in Node; in turn,
medians. The weights are those of the real Gemma 3 270M, each in its own rounding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from other_peoples_files import gemma_270m, transformers_js
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gemma_multi
from gemma_multi.training.calibrated import calibrated
from gemma_multi.transforms import original

PROMPT, STEPS = 128, 48
_NODE = """
import {env, pipeline} from "@huggingface/transformers";
const {folder, model, prompt, few, many} = JSON.parse(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = folder;
const generate = await pipeline("text-generation", model, {dtype: "q4"});
const taken = async (count) => {
  const started = performance.now();
  await generate(prompt, {max_new_tokens: count, min_new_tokens: count, do_sample: false});
  return performance.now() - started;
};
await taken(few);
const [short, long] = [await taken(few), await taken(many)];
console.log(JSON.stringify((many - few) * 1000 / (long - short)));
"""


class Layout:
    """An ONNX file in onnxruntime, and how quickly it reads and goes on."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        self.session = onnxruntime.InferenceSession(str(file), options)
        self.inputs = {given.name: given for given in self.session.get_inputs()}
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.prefill: list[float] = []  # tokens a second
        self.decode: list[float] = []

    def run(self, ids: np.ndarray) -> None:
        past: dict[str, np.ndarray] = {
            name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
            for name, given in self.inputs.items() if name.startswith("past_")
        }  # fmt: skip
        started, seen = time.perf_counter(), 0
        for step in range(STEPS + 1):
            seen += len(ids)
            given: dict[str, Any] = {
                "input_ids": ids[None], "attention_mask": np.ones((1, seen), np.int64), **past
            }  # fmt: skip
            if "num_logits_to_keep" in self.inputs:
                given["num_logits_to_keep"] = np.array(1)
            logits, *present = self.session.run(self.outputs, given)
            past = dict(zip(past, present, strict=True))
            ids = np.array([logits[0, -1].argmax()])
            if step == 0:
                read = time.perf_counter()
        self.prefill.append(PROMPT / (read - started))
        self.decode.append(STEPS / (time.perf_counter() - read))


def published(theirs: Path, ours: Path, target: Path) -> Path:
    """The builder's files under the names that Transformers.js looks for."""
    shutil.copytree(ours, target, ignore=shutil.ignore_patterns("onnx"))
    (target / "onnx").mkdir()
    model = onnx.load(str(theirs / "model.onnx"))
    onnx.save(model, str(target / "onnx" / "model_q4.onnx"), save_as_external_data=True,
              location="model_q4.onnx_data")  # fmt: skip
    config = json.loads((target / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": {"model_q4.onnx": 1}}
    (target / "config.json").write_text(json.dumps(config))
    return target


def in_transformers_js(folder: Path, model: str, prompt: str) -> float:
    """Tokens a second, of what follows the prompt."""
    given = json.dumps({"folder": str(folder), "model": model, "prompt": prompt,
                        "few": 8, "many": 8 + 2 * STEPS})  # fmt: skip
    script = folder / "time.mjs"
    script.write_text(_NODE)
    modules = folder / "node_modules"
    if not modules.exists():
        modules.symlink_to(transformers_js())
    done = subprocess.run(["node", str(script), given], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{model} in Transformers.js: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", type=Path, required=True, help="what the builder wrote")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        base = original(gemma_multi.open_checkpoint(gemma_270m()))
        source = calibrated(base, progress=True)
        more: dict[str, dict[str, Any]] = {"ours": {}, "exact": {"activations": "float32"}}
        for name, given in more.items():
            gemma_multi.export(source, folder / name, format="onnx", verify=False, **given)
        published(options.theirs, folder / "ours", folder / "theirs")
        names = {"ours": "ours", "exact": "ours, activations float32",
                 "theirs": "onnx-community's layout"}  # fmt: skip
        layouts = {key: Layout(what, folder / key / "onnx" / "model_q4.onnx")
                   for key, what in names.items()}  # fmt: skip
        ids = np.random.default_rng(0).integers(1000, 50_000, PROMPT)
        ids[0] = 2
        for i in track(range(options.runs + 1), "onnxruntime", transient=True):
            for layout in layouts.values():
                layout.run(ids)
                if i == 0:
                    layout.prefill.clear()
                    layout.decode.clear()
        prompt = source.tokenizer.decode(list(map(int, ids[1:])))
        node: dict[str, list[float]] = {key: [] for key in layouts}
        for _ in track(range(options.runs), "Transformers.js", transient=True):
            for key in layouts:
                node[key].append(in_transformers_js(folder, key, prompt))
        found = [
            {"layout": layout.name,
             "mb": sum(f.stat().st_size for f in (folder / key / "onnx").iterdir()) / 1e6,
             "prefill": statistics.median(layout.prefill),
             "decode": statistics.median(layout.decode),
             "transformers_js": statistics.median(node[key])}
            for key, layout in layouts.items()
        ]  # fmt: skip
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def show(found: list[dict[str, Any]]) -> None:
    peer = found[-1]
    table = Table("layout", "MB", "prefill", "decode", "Transformers.js, decode",
                  title="tokens a second, and as a ratio to their layout's")  # fmt: skip
    for one in found:
        figures = (f"{one[key] / peer[key]:.2f} ({one[key]:.1f})"
                   for key in ("prefill", "decode", "transformers_js"))  # fmt: skip
        table.add_row(one["layout"], f"{one['mb']:.0f}", *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
