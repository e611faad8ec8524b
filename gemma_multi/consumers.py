"""What other people's programs compute from an exported file: one function a program.

Each reads a file or directory as its users would and gives `f32[T, V]` logits of a text's token
ids, where it has the choice in float32. `consumer(format)` is the first that is installed;
`logits_in` asks it in a process of its own: some choose their arithmetic once a process, some
import frameworks of a gigabyte, and a native crash must not be ours. `verifying` compares after an
export; tests and benchmarks use the same functions.

gemma.cpp has no Python package, and an adapter is no model: those formats have no consumer here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.config import ModelConfig
from gemma_multi.decoder import Decoder, Weights
from gemma_multi.engines import ALL, create_engine
from gemma_multi.formats import read

# Most that a right file's logits differ by, in nats a token, by what is computed with. Real models
# and random ones stay ten times below; a matrix in the wrong place is at several nats.
FLOAT32, INT8 = 1e-3, 0.3
_TIMEOUT = 600


@dataclass(frozen=True)
class Consumer:
    """A program that reads a format."""

    name: str  # for people
    format: str
    packages: tuple[str, ...]  # what is imported
    logits: Callable[[Path, Sequence[int]], np.ndarray]
    tolerance: float
    seconds: float  # to start, on a usual computer
    seconds_per_gigabyte: float  # to read a file and a short text
    rounds_scale: bool = True  # the embedding scale to bfloat16, as Gemma was trained

    @property
    def is_installed(self) -> bool:
        return all(find_spec(package) is not None for package in self.packages)


def consumer(format: str) -> Consumer | None:
    """Who reads a format here; None where nobody does."""
    known = (one for one in CONSUMERS if one.format == format)
    return next((one for one in known if one.is_installed), None)


class ConsumerError(Exception):
    """A program that did not read the file: the last line that it said."""


def logits_in(one: Consumer, path: Path, ids: Sequence[int], python: str = "") -> np.ndarray:
    """`f32[T, V]`, computed in a process of its own, of the interpreter `python` where one is
    given. Raises ConsumerError."""
    with tempfile.TemporaryDirectory() as work:
        output = Path(work, "logits.npy")
        code = "from gemma_multi.consumers import answer; answer()"
        given = [one.name, one.format, str(path.absolute()), json.dumps(list(ids)), str(output)]
        try:
            done = subprocess.run(
                [python or sys.executable, "-c", code, *given], capture_output=True, text=True,
                errors="replace", timeout=_TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ConsumerError(f"no answer in {_TIMEOUT} s") from error
        if done.returncode or not output.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ConsumerError(lines[-1] if lines else f"ended with {done.returncode}")
        found: np.ndarray = np.load(output)
        return found


def answer() -> None:
    """The other process."""
    name, format, path, ids, output = sys.argv[1:]
    (one,) = (one for one in CONSUMERS if (one.name, one.format) == (name, format))
    np.save(output, np.asarray(one.logits(Path(path), json.loads(ids)), np.float32))


# one function a program


def in_llama_cpp(path: Path, ids: Sequence[int]) -> np.ndarray:
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=len(ids), logits_all=True, verbose=False)
    llama.eval(list(ids))
    return np.array(llama.scores[: len(ids)], np.float32)


def in_ggufs_dequantiser(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Its weights; the arithmetic between them is NumPy's."""
    import gguf

    from gemma_multi.formats.gguf.layout import stored_name

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    checkpoint = read(path)
    weights = Weights(checkpoint)
    for name, shape in checkpoint.config.tensor_shapes().items():
        theirs = stored[stored_name(name)]
        dense = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        weights.change(name, dense.reshape(shape).astype(np.float32, copy=False))
    return Decoder(checkpoint.config, weights).logits(np.array(ids))


def in_transformers(path: Path, ids: Sequence[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return logits


def in_mlx_lm(path: Path, ids: Sequence[int]) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    model.set_dtype(mx.float32)  # scales as well, which are exact in it
    return np.array(model(mx.array([list(ids)]))[0])


def in_keras_hub(path: Path, ids: Sequence[int]) -> np.ndarray:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from keras import ops
    from keras_hub.models import Gemma3Backbone

    backbone = Gemma3Backbone.from_preset(str(path), dtype="float32")
    tokens = np.array([list(ids)])
    hidden = backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    return np.asarray(ops.cast(backbone.token_embedding(hidden, reverse=True)[0], "float32"))


def in_onnxruntime(path: Path, ids: Sequence[int]) -> np.ndarray:
    import onnxruntime

    (file,) = (path / "onnx").glob("*.onnx")
    session = onnxruntime.InferenceSession(str(file))
    given: dict[str, Any] = {
        cache.name: np.zeros((1, cache.shape[1], 0, cache.shape[3]),
                             np.float16 if "float16" in cache.type else np.float32)
        for cache in session.get_inputs() if cache.name.startswith("past_")
    }  # fmt: skip
    tokens = np.array([list(ids)], np.int64)
    given |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens),
              "num_logits_to_keep": np.array(0)}  # fmt: skip
    logits: np.ndarray = session.run(["logits"], given)[0][0]
    return logits


def in_litert(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Google's runtime, which this package drives."""
    engine = create_engine(read(path), "litert")
    return np.asarray(engine.session().read(list(ids), ALL), np.float32)


def in_gemma(path: Path, ids: Sequence[int]) -> np.ndarray:
    """google-deepmind/gemma, on JAX, in float32."""
    import jax
    import jax.numpy as jnp
    from gemma import gm

    config = ModelConfig.from_file(path / "config.json")
    local, whole = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
    pattern = tuple(local if config.is_sliding(i) else whole
                    for i in range(config.num_hidden_layers))  # fmt: skip
    model = gm.nn.Transformer(
        dtype=jnp.float32,
        config=gm.nn.config.TransformerConfig(
            num_embed=config.vocab_size, embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size, num_heads=config.num_attention_heads,
            head_dim=config.head_dim, num_kv_heads=config.num_key_value_heads,
            final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True,
            use_qk_norm=True, transpose_gating_einsum=True,
            attention_types=pattern,
            sliding_window_size=config.sliding_window,
            local_base_frequency=config.rope_local_theta,
            global_base_frequency=config.rope_theta,
            global_scale_factor=config.rope_scaling_factor,
        ),
    )  # fmt: skip
    params = gm.ckpts.load_params(str(path.absolute()))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    found = model.apply({"params": params}, jnp.array([list(ids)]))
    return np.asarray(found.logits[0], np.float32)


# in the order of preference
CONSUMERS = (
    Consumer("llama.cpp", "gguf", ("llama_cpp",), in_llama_cpp, INT8, 1, 2,
             rounds_scale=False),
    Consumer("gguf's dequantiser", "gguf", ("gguf",), in_ggufs_dequantiser, FLOAT32, 1, 10),
    Consumer("transformers", "huggingface", ("transformers", "torch"), in_transformers, FLOAT32,
             5, 5, rounds_scale=False),
    Consumer("mlx-lm", "mlx", ("mlx_lm",), in_mlx_lm, FLOAT32, 4, 10),
    Consumer("keras-hub", "keras", ("keras_hub",), in_keras_hub, FLOAT32, 15, 10,
             rounds_scale=False),
    Consumer("onnxruntime", "onnx", ("onnxruntime",), in_onnxruntime, INT8, 1, 5),
    *(Consumer("LiteRT", format, ("ai_edge_litert",), in_litert, INT8, 1, 10)
      for format in ("tflite", "litertlm")),
    Consumer("google-deepmind/gemma", "jax", ("gemma",), in_gemma, FLOAT32, 20, 10,
             rounds_scale=False),
)  # fmt: skip
