"""LoRA adapters at rest, in the layout of Hugging Face PEFT, and how they join a checkpoint.

A directory with `adapter_config.json` and `adapter_model.safetensors`; the latter holds, for each
adapted layer, `base_model.model.<module>.lora_A.weight` `[rank, in]` and `.lora_B.weight`
`[out, rank]`. The adapted weight is `W + scale * B A`, and where the checkpoint is quantised it
goes back on our own grid, never through a framework's quantiser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_multi.checkpoint.directory import read_optional_json
from gemma_multi.checkpoint.safetensors_file import (
    check_finite,
    read_safetensors,
    write_safetensors,
)
from gemma_multi.config import ModelConfig
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.files import new_directory
from gemma_multi.quantization import quantize_checkpoint
from gemma_multi.quantization.tensor import QuantizedTensor, quantize_tensor

if TYPE_CHECKING:
    from gemma_multi.checkpoint.checkpoint import Checkpoint, Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."
# what changes the computation in a way that is not done here, and its harmless values
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "modules_to_save": ([],),
    "alpha_pattern": ({},), "trainable_token_indices": ([], {}), "lora_bias": (False,),
    "layer_replication": ([],), "exclude_modules": ([], ""), "use_qalora": (False,),
    # other beginnings (PiSSA, OLoRA, ...) change the base as well, which is not in the directory
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": ([],), "target_parameters": ([],),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes to the linear layers of one model."""

    rank: int
    alpha: float
    tensors: Mapping[str, tuple[np.ndarray, np.ndarray]]  # weight name -> A [r, in], B [out, r]
    base: str = ""  # the model it was trained on, for people
    scaling: float = 0.0  # 0: alpha / rank

    @property
    def scale(self) -> float:
        return self.scaling or self.alpha / self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of layers it changes."""
        found = {name.split(".")[-2] for name in self.tensors}
        return tuple(target for target in LINEAR_LAYERS if target in found)

    @classmethod
    def open(cls, path: str | Path, config: ModelConfig) -> Adapter:
        """Reads an adapter directory for a model. Raises CheckpointError, naming the tensor where
        the adapter belongs to another model."""
        path = Path(path)
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path}: no adapter there ({CONFIG_FILE} is missing)")
        settings = _read_settings(path / CONFIG_FILE)
        rank, alpha = settings["r"], float(settings["lora_alpha"])
        flat, _ = read_safetensors(path / WEIGHTS_FILE)
        shapes = config.tensor_shapes()
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in flat.items():
            stem, _, part = name.removesuffix(".weight").rpartition(".")
            target = f"{stem.removeprefix(_PREFIX)}.weight"
            if part not in ("lora_A", "lora_B") or len(shapes.get(target, ())) != 2:
                raise CheckpointError(
                    f"{path / WEIGHTS_FILE}: tensor {name!r} has no place in this model of "
                    f"{config.num_hidden_layers} layers; is the adapter for another model?"
                )
            check_finite(path / WEIGHTS_FILE, name, tensor)
            found.setdefault(target, {})[part] = tensor.astype(np.float32)
        tensors = {}
        for target, parts in found.items():
            out, inputs = shapes[target]
            own = len(parts["lora_A"]) if "lora_A" in parts else rank
            for part, shape in (("lora_A", (own, inputs)), ("lora_B", (out, own))):
                if part not in parts or parts[part].shape != shape:
                    got = list(parts[part].shape) if part in parts else "none"
                    raise CheckpointError(
                        f"{path / WEIGHTS_FILE}: {part} of {target!r} has shape {got}, but this "
                        f"model needs {list(shape)}; is the adapter for another model?"
                    )
            if own != rank:
                raise CheckpointError(
                    f"{path / WEIGHTS_FILE}: {target!r} has rank {own}, but {CONFIG_FILE} says "
                    f"{rank}; ranks that differ by layer are not supported"
                )
            tensors[target] = (parts["lora_A"], parts["lora_B"])
        if not tensors:
            raise CheckpointError(f"{path / WEIGHTS_FILE}: holds no tensors")
        scaling = alpha / rank**0.5 if settings.get("use_rslora") else 0.0
        base = str(settings.get("base_model_name_or_path") or "")
        return cls(rank, alpha, tensors, base, scaling)

    def save(self, path: str | Path) -> Path:
        """Writes a directory that PEFT loads as it is."""
        from gemma_multi.checkpoint.checkpoint import ensure_free

        path = Path(path)
        ensure_free(path)
        flat = {}
        for name, (a, b) in self.tensors.items():
            stem = _PREFIX + name.removesuffix(".weight")
            flat[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
            flat[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "target_modules": list(self.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": bool(self.scaling),
            "use_dora": False,
            "inference_mode": True,
        }
        try:
            with new_directory(path) as temporary:
                write_safetensors(flat, temporary / WEIGHTS_FILE, {"format": "pt"})
                text = json.dumps(settings, indent=2) + "\n"
                (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be saved: {error.strerror or error}") from error
        return path

    def merged(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        """Each changed tensor of `checkpoint`: on its grid where it has one, else in float32."""
        for name, (a, b) in self.tensors.items():
            tensor = checkpoint.tensors[name]
            changed = checkpoint.weight(name).astype(np.float32) + self.scale * (b @ a)
            if isinstance(tensor, QuantizedTensor):
                yield name, quantize_tensor(changed, tensor.bits)[0]
            else:
                yield name, changed

    def merge(self, checkpoint: Checkpoint, bits: int | None = None) -> Checkpoint:
        """A checkpoint with the adapter in it, in its stored precision; a dense one on the int4
        (`bits=4`) or int8 grid if asked for."""
        merged = {**checkpoint.tensors, **dict(self.merged(checkpoint))}
        how = f"LoRA adapter of rank {self.rank} merged"
        result = checkpoint.replace(tensors=merged, provenance=checkpoint.provenance.modified(how))
        if bits is not None and not checkpoint.is_quantized:
            return quantize_checkpoint(result, bits, bits)[0]
        if bits is not None and checkpoint.precision != f"int{bits}":
            raise OptionError(
                f"bits is {bits}, but the model is {checkpoint.precision} already; merge into the "
                "original instead"
            )
        for name in self.tensors:
            before, after = checkpoint.tensors[name], merged[name]
            if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
                merged[name] = after.astype(before.dtype)
        return result


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
