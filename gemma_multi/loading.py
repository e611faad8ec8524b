"""`load`: a model by name, on a backend, ready to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.adapter import Adapter
from gemma_multi.checkpoint.litert_file import LitertTensors
from gemma_multi.checkpoint.resolve import resolve
from gemma_multi.engines import create_engine
from gemma_multi.model import Model


def load(
    model: str | Path | Checkpoint = "storyteller",
    *,
    backend: str = "auto",
    precision: str = "auto",
    context_length: int | None = None,
    threads: int | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Model:
    """Loads a Gemma 3 text model.

    model: the bundled `"storyteller"`, a directory (Hugging Face's layout, mlx-lm's 4-bit layout
        or ours), a `.tflite` or `.litertlm` that `export` wrote, a Hugging Face id such as
        `"google/gemma-3-270m-it"`, or a Checkpoint.
    backend: `"mlx"`, `"keras"`, `"litert"` or `"auto"`: LiteRT for its own files; else MLX on
        Apple silicon, Keras beside an NVIDIA GPU, and on other processors LiteRT for quantised
        weights and Keras for the rest.
    precision: `"float32"`, `"bfloat16"`, `"int4"`, or `"auto"`: as stored where the device is
        fast at it. Asking for int4 puts a dense checkpoint on the portable int4 grid.
    context_length: tokens; None for all the model has, on LiteRT for at most 4,096.
    threads: the processor's cores to use; LiteRT only, None for all there are.
    adapter: the directory of a LoRA adapter in PEFT's layout, or several by name, of which the
        first is used; `Model.adapter` switches among them.
    revision: a branch, tag or commit of a hub repository.
    local_files_only: never ask the hub, use its cache only.

    Raises GemmaError: HubError, CheckpointError, ConfigError, TokenizerError, BackendError or
    OptionError.
    """
    if not isinstance(model, Checkpoint):
        model = resolve(model, revision=revision, local_files_only=local_files_only)
    named: Mapping[str, str | Path] = {}
    if isinstance(adapter, Mapping):
        named = adapter
    elif adapter is not None:
        named = {Path(adapter).resolve().name or "adapter": adapter}
    # what is wrong with one is said before an engine is made
    opened = {name: Adapter.open(path, model.config) for name, path in named.items()}
    if backend == "auto" and isinstance(model.tensors, LitertTensors):
        backend = "litert"
    engine = create_engine(model, backend, precision, context_length, threads)
    loaded = Model(model, engine, context_length)
    for name, one in opened.items():
        loaded.add_adapter(name, one)
    return loaded.adapter(next(iter(opened), None))
