"""llama.cpp as a peer: its tools, built from the sdist of llama-cpp-python, and a random Q4_0 file
in the shape of Gemma 3 270M. Both are made once, in the user's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import gguf
import numpy as np
from loading import CONFIG_270M
from rich.console import Console

from gemma_multi.cache import cache_directory

SDIST = "llama-cpp-python==0.3.36"
_TOOLS = ("llama-bench", "llama-imatrix", "llama-perplexity", "llama-quantize")
_OFF = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER",
        "LLAMA_BUILD_EXAMPLES")  # fmt: skip


def tool(name: str) -> Path:
    """One of `_TOOLS`, all built for this processor at the first call. Needs cmake and a C++
    compiler; takes ten minutes."""
    home = cache_directory("benchmarks", SDIST)
    wanted = home / "build" / "bin" / name
    if wanted.exists():
        return wanted
    Console(stderr=True).print("building llama.cpp, once")
    shutil.rmtree(home / "build", ignore_errors=True)  # of a source that is gone
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "-d", work, SDIST], check=True)
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(Path(work).glob("*/vendor/llama.cpp"))
        configure = ["cmake", "-S", str(source), "-B", str(home / "build")]
        options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", *(f"{name}=OFF" for name in _OFF)]
        subprocess.run([*configure, *(f"-D{option}" for option in options)], check=True)
        build = ["cmake", "--build", str(home / "build"), f"-j{os.cpu_count()}", "--target"]
        subprocess.run([*build, *_TOOLS], check=True)
    return wanted


def random_q4_0() -> Path:
    """Gemma 3 270M's shape with every matrix in Q4_0."""
    path = cache_directory("benchmarks", "random-270m-q4_0.gguf")
    if path.exists():
        return path
    c, rng = CONFIG_270M, np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "gemma3")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_sliding_window(c.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{i}>" for i in range(c.vocab_size)])
    writer.add_token_scores([-float(i) for i in range(c.vocab_size)])
    writer.add_token_types([1] * c.vocab_size)

    def matrix(name: str, rows: int, width: int) -> None:
        blocks = np.empty((rows, width // 32, 18), np.uint8)  # a float16 scale, then 32 codes
        blocks[..., 2:] = rng.integers(0, 256, (rows, width // 32, 16), np.uint8)
        blocks[..., :2] = np.full(1, width**-0.5 / 4.6, np.float16).view(np.uint8)
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)

    def norm(name: str, width: int) -> None:
        writer.add_tensor(name, rng.normal(1, 0.1, width).astype(np.float32))

    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrix("token_embd.weight", c.vocab_size, c.hidden_size)
    norm("output_norm.weight", c.hidden_size)
    for i in range(c.num_hidden_layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            norm(f"blk.{i}.{name}.weight", c.hidden_size)
        for name in ("attn_q_norm", "attn_k_norm"):
            norm(f"blk.{i}.{name}.weight", c.head_dim)
        for name, rows, width in (
            ("attn_q", heads, c.hidden_size), ("attn_k", kv, c.hidden_size),
            ("attn_v", kv, c.hidden_size), ("attn_output", c.hidden_size, heads),
            ("ffn_gate", c.intermediate_size, c.hidden_size),
            ("ffn_up", c.intermediate_size, c.hidden_size),
            ("ffn_down", c.hidden_size, c.intermediate_size),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)
    return path


def measure(threads: int, prompt: int, generate: int, depth: int) -> float:
    """Tokens a second of llama-bench, the best of three: of reading `prompt` or generating."""
    done = subprocess.run(
        [tool("llama-bench"), "-m", random_q4_0(), "-t", str(threads), "-p", str(prompt),
         "-n", str(generate), "-d", str(depth), "-r", "3", "-o", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(max(json.loads(done.stdout)[0]["samples_ts"]))
