"""The LiteRT engine on a CPU against LiteRT-LM, llama.cpp and transformers, in one run.

    python benchmarks/litert_cpu.py [--rounds 5] [--threads 2] [--json results.json]

Random weights in the true 270M shape, int4. Every figure comes from a process of its own; the
engines take turns, round by round, so that a machine that slows down slows all. Needs
`pip install 'gemma-multi[litert,litert-lm,reference]'`, cmake and a C++ compiler for the
peers; `--without` leaves some of them out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from loading import CONFIG_270M, random_270m
from rich.console import Console
from rich.progress import track
from rich.table import Table
from side_by_side import measure as cold_process

from gemma_multi import quantize
from gemma_multi.benchmarking.measuring import PASSES, speeds
from gemma_multi.benchmarking.workload import PROMPT, STEPS
from gemma_multi.cache import cache_directory
from gemma_multi.formats.tflite.layout import cache_positions
from gemma_multi.sources import open_checkpoint

PEERS = ("LiteRT-LM", "llama.cpp", "transformers")
DEEP = 8000  # tokens, past most chats


def int4_270m() -> Path:
    path = cache_directory("benchmarks", "random-270m-int4")
    if not path.exists():
        quantize(random_270m(), path, calibrate=None)
    return path


def bundle(context_length: int, prefill_precision: str = "same") -> Path:
    more = "" if prefill_precision == "same" else f"-{prefill_precision}"
    return cache_directory("benchmarks", f"random-270m-{context_length}{more}.litertlm")


def ours(
    context_length: int, depth: int, threads: int, prefill_precision: str = "same"
) -> dict[str, float]:
    """Tokens a second of reading `PROMPT` tokens and of `STEPS` greedy steps at `depth`."""
    from gemma_multi.engines import create_engine

    engine = create_engine(
        open_checkpoint(bundle(context_length, prefill_precision)), "litert",
        options={"threads": threads},
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(1000, 200_000, depth)
    return speeds(engine, ids, PROMPT, STEPS)


def litert_lm(context_length: int, threads: int) -> dict[str, float]:
    """The same file in LiteRT-LM, by its own account."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    cpu = litert_lm.Backend.CPU(thread_count=threads)
    with litert_lm.Engine(str(bundle(context_length)), cpu, enable_benchmark=True) as engine:
        ids = engine.tokenize("The quick brown fox jumps over the lazy dog. " * 200)[: PROMPT - 1]
        prompt, best = engine.detokenize(ids), {"prefill": 0.0, "decode": 0.0}
        greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
        for _ in range(PASSES):
            session = engine.create_session(apply_prompt_template=False, sampler_config=greedy,
                                            max_output_tokens=STEPS)  # fmt: skip
            session.run_prefill([prompt])
            session.run_decode()
            info = session.get_benchmark_info()
            best["prefill"] = max(best["prefill"], info.last_prefill_tokens_per_second)
            best["decode"] = max(best["decode"], info.last_decode_tokens_per_second)
            session.close()
    return best


def transformers(threads: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(random_270m(), dtype=torch.float32).eval()
    ids = torch.randint(1000, 200_000, (1, PROMPT))
    with torch.inference_mode():
        start = time.perf_counter()
        read = model(ids, use_cache=True, logits_to_keep=1)
        reading, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(8):
            read = model(ids[:, :1], past_key_values=read.past_key_values, use_cache=True)
    return {"prefill": PROMPT / reading, "decode": 8 / (time.perf_counter() - start)}


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory: the best of five."""
    block = np.ones(1 << 26, np.float32)  # 268 MB each
    blocks = [block, *(block.copy() for _ in range(threads - 1))]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=b.max) for b in blocks]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(b.nbytes for b in blocks) / (time.perf_counter() - start))
    return best


def cache_bytes(context_length: int) -> int:
    """The key/value cache of one conversation."""
    c, narrow = CONFIG_270M, context_length > 8192
    total = 0
    for i in range(c.num_hidden_layers):
        rows = 2 * c.num_key_value_heads * cache_positions(c, i, context_length)
        int8 = narrow and not c.is_sliding(i)
        total += rows * (c.head_dim + 4 if int8 else c.head_dim * 4)
    return total


def in_process(name: str, *arguments: Any) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", name, json.dumps(arguments)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, arguments = options.worker
        print(json.dumps(globals()[name](*json.loads(arguments))))
        return
    threads = options.threads
    exports = {str(length): export_cost(length) for length in (1024, 8192, 32768)}
    exports["1024, prompts in int8"] = export_cost(1024, "int8")
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "ours": lambda: in_process("ours", 1024, PROMPT, threads),
        "ours, prompts in int8": lambda: in_process("ours", 1024, PROMPT, threads, "int8"),
        "ours, context 8192, depth 8000": lambda: in_process("ours", 8192, DEEP, threads),
    }
    if "LiteRT-LM" not in options.without:
        runs["LiteRT-LM"] = lambda: in_process("litert_lm", 1024, threads)
    if "llama.cpp" not in options.without:
        import llama_cpp_tools

        llama_cpp_tools.tool("llama-bench"), llama_cpp_tools.random_gguf()
        runs["llama.cpp"] = lambda: {
            "prefill": llama_cpp_tools.measure(threads, PROMPT, 0, 0),
            "decode": llama_cpp_tools.measure(threads, 0, STEPS, PROMPT),
        }
    if "transformers" not in options.without:
        runs["transformers"] = lambda: in_process("transformers", threads)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in track(range(options.rounds), "rounds", transient=True):
        for name, run in runs.items():
            found[name].append(run())
    speeds = {
        name: {kind: statistics.median(r[kind] for r in results) for kind in ("prefill", "decode")}
        for name, results in found.items()
    }
    results = {
        "speeds": speeds, "rounds": found, "cold": cold_start(threads), "exports": exports,
        "bandwidth": bandwidth(threads),
        "cache_bytes": {n: cache_bytes(n) for n in (1024, 8192, 32768)},
        "weight_bytes": sum(
            int(np.prod(s)) * 9 // 16 for s in CONFIG_270M.tensor_shapes().values() if len(s) == 2
        ),
    }  # fmt: skip
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def export_cost(context_length: int, prefill_precision: str = "same") -> dict[str, float]:
    """Writes a bundle in a cold process."""
    path = bundle(context_length, prefill_precision)
    path.unlink(missing_ok=True)
    cost = cold_process(
        "import gemma_multi\n"
        f"gemma_multi.export({str(int4_270m())!r}, {str(path)!r}, "
        f"context_length={context_length}, prefill_precision={prefill_precision!r}, verify=False)"
    )
    return {"seconds": cost.seconds, "peak_mb": cost.peak_mb, "mb": path.stat().st_size / 1e6}


def cold_start(threads: int) -> dict[str, float]:
    """From a process's first line to the first token of a 32-token prompt; and the peak memory of
    one that reads 512 tokens and answers with 64, with the tokenizer and without."""
    load = f"import gemma_multi; m = gemma_multi.load({str(bundle(1024))!r}, threads={threads})\n"
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen " * 2
    first = [cold_process(f"{load}m.generate({text[:150]!r}, raw=True, max_tokens=1)")
             for _ in range(6)][1:]  # fmt: skip
    work = ("s = e.session(); s.read(list(range(1000, 1512)))\n"
            "for i in range(64): s.read([1000 + i])")  # fmt: skip
    engine, prompts_in_int8 = (
        "from gemma_multi.engines import create_engine\n"
        "from gemma_multi.sources import open_checkpoint\n"
        f"c = open_checkpoint({str(path)!r})\n"
        f"e = create_engine(c, 'litert', options={{'threads': {threads}}})\n"
        for path in (bundle(1024), bundle(1024, "int8"))
    )
    return {
        "first_token_seconds": statistics.median(run.seconds for run in first),
        "peak_mb": cold_process(f"{load}e = m.engine\n{work}").peak_mb,
        "engine_peak_mb": cold_process(engine + work).peak_mb,
        "prompts_in_int8_peak_mb": cold_process(prompts_in_int8 + work).peak_mb,
        "python_and_numpy_mb": cold_process("import numpy").peak_mb,
    }


def show(results: dict[str, Any]) -> None:
    speeds, console = results["speeds"], Console(width=100)
    table = Table(title="tokens a second, medians; ratio is ours / peer's")
    for heading in ("", "prefill 512", "ratio", "decode at 512", "ratio", "of the floor"):
        table.add_column(heading, justify="right" if heading else "left")
    mine = speeds["ours"]
    for name, speed in speeds.items():
        context = 8192 if "8192" in name else 1024
        read = results["weight_bytes"] + results["cache_bytes"][context]
        floor = results["bandwidth"] / read
        table.add_row(
            name, f"{speed['prefill']:,.0f}", f"{mine['prefill'] / speed['prefill']:.2f}",
            f"{speed['decode']:.0f}", f"{mine['decode'] / speed['decode']:.2f}",
            f"{speed['decode'] / floor:.0%}" if name.startswith("ours") else "",
        )  # fmt: skip
    console.print(table)
    cold, giga = results["cold"], results["bandwidth"] / 1e9
    console.print(
        f"floor: weights and cache read once a token, at the {giga:.0f} GB/s measured\n"
        f"first token of a cold process: {cold['first_token_seconds']:.2f} s\n"
        f"peak memory, context 1024: {cold['engine_peak_mb']:.0f} MB the engine, "
        f"{cold['prompts_in_int8_peak_mb']:.0f} MB with prompts in int8, "
        f"{cold['peak_mb']:.0f} MB with the tokenizer, of which Python and NumPy "
        f"{cold['python_and_numpy_mb']:.0f} MB"
    )
    for length, cost in results["exports"].items():
        cache = results["cache_bytes"][int(length.split(",")[0])] / 1e6
        console.print(
            f"export, context {length}: {cost['seconds']:.1f} s, peak {cost['peak_mb']:.0f} MB, "
            f"{cost['mb']:.1f} MB on disk; cache of a conversation {cache:.0f} MB"
        )


if __name__ == "__main__":
    main()
