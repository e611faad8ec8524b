"""LoRA adapters in the layout of Hugging Face PEFT.

A directory with `adapter_config.json` and `adapter_model.safetensors`; the latter holds, for each
adapted layer, `base_model.model.<module>.lora_A.weight` `[rank, in]` and `.lora_B.weight`
`[out, rank]`. An adapter is no model: opened as one, it says how it is meant to be used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Adapter, Checkpoint
from gemma_multi.config import ModelConfig
from gemma_multi.errors import CheckpointError
from gemma_multi.files import read_optional_json
from gemma_multi.formats.base import Format
from gemma_multi.safetensors_file import check_finite, read_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
CHANNELS = "gemma_multi_channels"  # our own entry: `Adapter.channels`, where there are any
PREFIX = "base_model.model."
# what changes the computation in a way that is not done here, and its harmless values
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "modules_to_save": ([],),
    "alpha_pattern": ({},), "trainable_token_indices": ([], {}), "lora_bias": (False,),
    "layer_replication": ([],), "exclude_modules": ([], ""), "use_qalora": (False,),
    # other beginnings (PiSSA, OLoRA, ...) change the base as well, which is not in the directory
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": ([],), "target_parameters": ([],),
}  # fmt: skip


def read_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """Reads an adapter directory for a model. Raises CheckpointError, naming the tensor where
    the adapter belongs to another model."""
    path = Path(path)
    if not _looks_like(path):
        raise CheckpointError(f"{path}: no adapter there ({CONFIG_FILE} is missing)")
    settings = _read_settings(path / CONFIG_FILE)
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    weights = path / WEIGHTS_FILE
    flat, _ = read_safetensors(weights)
    shapes = config.tensor_shapes()
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in flat.items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        target = f"{stem.removeprefix(PREFIX)}.weight"
        if part not in ("lora_A", "lora_B") or len(shapes.get(target, ())) != 2:
            raise CheckpointError(
                f"{weights}: tensor {name!r} has no place in this model of "
                f"{config.num_hidden_layers} layers; is the adapter for another model?"
            )
        check_finite(weights, name, tensor)
        found.setdefault(target, {})[part] = tensor.astype(np.float32)
    if not found:
        raise CheckpointError(f"{weights}: holds no tensors")
    tensors = {
        target: _pair(weights, target, parts, shapes[target], rank)
        for target, parts in found.items()
    }
    scaling = alpha / rank**0.5 if settings.get("use_rslora") else 0.0
    base = str(settings.get("base_model_name_or_path") or "")
    return Adapter(rank, alpha, tensors, base, scaling, str(settings.get(CHANNELS) or ""))


def _pair(
    weights: Path, target: str, parts: dict[str, np.ndarray], shape: tuple[int, ...], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of one layer."""
    out, inputs = shape
    own = len(parts["lora_A"]) if "lora_A" in parts else rank
    for part, expected in (("lora_A", (own, inputs)), ("lora_B", (out, own))):
        if part not in parts or parts[part].shape != expected:
            got = list(parts[part].shape) if part in parts else "none"
            raise CheckpointError(
                f"{weights}: {part} of {target!r} has shape {got}, but this "
                f"model needs {list(expected)}; is the adapter for another model?"
            )
    if own != rank:
        raise CheckpointError(
            f"{weights}: {target!r} has rank {own}, but {CONFIG_FILE} says "
            f"{rank}; ranks that differ by layer are not supported"
        )
    return parts["lora_A"], parts["lora_B"]


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_optional_json(path)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r is {rank!r}, expected a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}, expected a number above 0")
    for name, harmless in _UNSUPPORTED.items():
        if settings.get(name) is not None and settings[name] not in harmless:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}, which is not supported")
    return settings


def _looks_like(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def _read(path: Path) -> Checkpoint:
    raise CheckpointError(
        f"{path}: is a LoRA adapter, not a model; load its base with adapter={str(path)!r} "
        "(--adapter)"
    )


FORMAT = Format(
    name="peft",
    what="a LoRA adapter's directory",
    suffix="",
    looks_like=_looks_like,
    read=_read,
    is_model=False,
)
