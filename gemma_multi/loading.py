"""`load`: a model by name, on a backend, ready to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_multi.engines import create_engine
from gemma_multi.formats.peft import read_adapter
from gemma_multi.model import Model
from gemma_multi.progress import Progress, reporting
from gemma_multi.sources import Source, open_checkpoint


def load(
    model: Source = "storyteller",
    *,
    backend: str = "auto",
    precision: str = "auto",
    context_length: int | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    prefix_cache: str | int = "256 MB",
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
    **backend_options: Any,
) -> Model:
    """Loads a Gemma 3 text model.

    model, revision, local_files_only: what to load and where from; see `open_checkpoint`.
    backend: `"mlx"`, `"keras"`, `"litert"` or `"auto"`: LiteRT for its own files; else MLX on
        Apple silicon, Keras beside an NVIDIA GPU, and on other processors LiteRT for quantised
        weights and Keras for the rest. `"transformers"` runs Hugging Face's, to compare with.
    precision: `"float32"`, `"bfloat16"`, `"float16"`, `"sfp8"`, `"int4"`, or `"auto"`: as stored
        where the device is fast at it. Asking for int4 puts a dense checkpoint on the portable int4
        grid; sfp8, on MLX and Keras, rounds it to gemma.cpp's 8-bit floats; float16, there too,
        carries the residual stream at a scale that fits.
    context_length: tokens; None for all the model has, on LiteRT for at most 4,096.
    adapter: the directory of a LoRA adapter in PEFT's layout, or several by name, of which the
        first is used; `Model.switch_adapter` switches among them.
    prefix_cache: memory for what prompts have in common (instructions, examples, earlier turns),
        which is read once; 0, or less than one conversation's caches take, keeps nothing.
    progress: True for a bar on a terminal, False for none, or a function of (done, total).
    backend_options: the backend's own. LiteRT: `threads`, the processor's cores to use; `device`,
        `"cpu"` or `"gpu"`, there with `enforce_f32`; `prefill_precision`, `"int8"` to read prompts
        with int8 rows beside int4 layers; `decode_batch`, 2, 4 or 8 conversations whose next tokens
        are read in one call, for servers.

    Raises GemmaError: HubError, CheckpointError, ConfigError, TokenizerError, BackendError or
    OptionError.
    """
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    named: Mapping[str, str | Path] = {}
    if isinstance(adapter, Mapping):
        named = adapter
    elif adapter is not None:
        named = {Path(adapter).resolve().name or "adapter": adapter}
    # what is wrong with one is said before an engine is made
    opened = {name: read_adapter(path, checkpoint.config) for name, path in named.items()}
    with reporting(progress, "loading") as report:
        engine = create_engine(
            checkpoint, backend, precision, context_length, backend_options, report
        )
    loaded = Model(checkpoint, engine, context_length, backend_options, prefix_cache)
    for name, one in opened.items():
        loaded.add_adapter(name, one)
    return loaded.switch_adapter(next(iter(opened), None))
