"""Checkpoint: a config, a tokenizer and named tensors, whatever they were read from.

Design choices:
- Tensors keep their Hugging Face names and their stored type. A dense tensor is a view of the
  mapped file; a quantised one is a `QuantizedTensor`. Opening 270M in bfloat16 copies nothing.
- Opening checks everything once: every tensor that the config implies is there with its shape,
  nothing else is, and all values are finite. Engines and exporters need not ask again.
- Saving goes to a temporary sibling directory first, so a killed process leaves no half of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import directory, litert_file
from gemma_multi.checkpoint.provenance import Provenance
from gemma_multi.checkpoint.safetensors_file import write_safetensors
from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.files import new_directory
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.tokenizer import Tokenizer

Tensor = np.ndarray | QuantizedTensor
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A Gemma 3 text model at rest."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    provenance: Provenance = field(default_factory=Provenance)
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json
    path: Path | None = None  # the directory or exported file it was read from

    @classmethod
    def open(cls, path: str | Path, *, source: str = "", revision: str = "") -> Checkpoint:
        """Reads a model directory (Hugging Face's layout, mlx-lm's 4-bit layout, or our own), or a
        `.tflite` or `.litertlm` file that our exporters wrote.

        Raises CheckpointError, ConfigError or TokenizerError naming the file and the tensor.
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such directory or file")
        if path.suffix in litert_file.SUFFIXES and path.is_file():
            return cls._open_exported(path)
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: is a file, expected a directory with config.json and {WEIGHTS_FILE}, or "
                "a .tflite or .litertlm"
            )
        config = ModelConfig.from_file(path / "config.json")
        return cls(
            config=config,
            tensors=directory.read_tensors(path, config),
            provenance=Provenance.read(path, source or str(path.name), revision),
            generation=directory.read_generation_config(path / "generation_config.json"),
            path=path,
        )

    @classmethod
    def _open_exported(cls, path: Path) -> Checkpoint:
        file = litert_file.LitertFile(path)
        return cls(
            config=file.config,
            tensors=litert_file.LitertTensors(file),
            provenance=file.provenance,
            generation=file.generation,
            path=path,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.path is None:
            raise CheckpointError("this checkpoint was made in memory and has no tokenizer")
        if isinstance(self.tensors, litert_file.LitertTensors):
            return Tokenizer(self.tensors.file.tokenizer_model())
        if self.path.suffix in litert_file.SUFFIXES:  # its tensors have been replaced
            return Tokenizer(litert_file.LitertFile(self.path).tokenizer_model())
        return Tokenizer.from_directory(self.path, self.config.vocab_size)

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer: 1 and 106 always, whatever an older config leaves out."""
        tokenizer, listed = self.tokenizer, self.generation.get("eos_token_id", [])
        stops = {tokenizer.eos_id, tokenizer.end_of_turn_id, *self.config.eos_token_ids}
        return frozenset(stops | set(listed if isinstance(listed, list) else [listed]))

    @property
    def precision(self) -> str:
        """What the linear layers are stored as: `int4`, a type's name, or `mixed`."""
        kinds = {
            f"int{tensor.bits}" if isinstance(tensor, QuantizedTensor) else tensor.dtype.name
            for name, tensor in self.tensors.items()
            if len(tensor.shape) == 2 and name != EMBEDDING
        }
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def is_quantized(self) -> bool:
        return any(isinstance(tensor, QuantizedTensor) for tensor in self.tensors.values())

    @property
    def grid(self) -> str:
        """`portable`, `signed`, `affine` or `none`; the least portable of its tensors."""
        grids = {t.grid for t in self.tensors.values() if isinstance(t, QuantizedTensor)}
        return next((g for g in ("affine", "signed", "portable") if g in grids), "none")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def weight(self, name: str) -> np.ndarray:
        """A tensor as a dense array: stored type if dense, float32 if it was quantised."""
        tensor = self.tensors[name]
        return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and values of all tensors."""
        sha = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            parts = (
                (tensor.packed, tensor.scales, tensor.biases)
                if isinstance(tensor, QuantizedTensor)
                else (tensor,)
            )
            for part in parts:
                sha.update(f"{name} {part.dtype} {part.shape}\n".encode())
                sha.update(np.ascontiguousarray(part).view(np.uint8).data)
        return sha.hexdigest()

    @property
    def identity(self) -> str:
        """Changes whenever a tensor does: from the weight files' names, sizes and times where the
        tensors are still what was read from them, else `digest()`, which reads everything."""
        stored = getattr(self.tensors, "identity", None)
        return stored if stored is not None else self.digest()

    def replace(self, **changes: Any) -> Checkpoint:
        return replace(self, **changes)

    def save(self, path: str | Path) -> Path:
        """Writes a directory that this package and mlx-lm load as it is, and transformers too
        where no tensor is quantised.

        Raises OptionError when `path` is in use, CheckpointError when it cannot be written;
        then nothing is left behind.
        """
        path = Path(path)
        ensure_free(path)
        try:
            with new_directory(path) as temporary:
                self._write(temporary)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be saved: {error.strerror or error}; nothing was written"
            ) from error
        return path

    def _write(self, target: Path) -> None:
        flat: dict[str, np.ndarray] = {}
        quantized: dict[str, QuantizedTensor] = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, QuantizedTensor):
                stem = name.removesuffix(".weight")
                quantized[stem] = tensor
                flat[name] = tensor.packed
                flat[f"{stem}.scales"], flat[f"{stem}.biases"] = tensor.scales, tensor.biases
            else:
                flat[name] = np.ascontiguousarray(tensor)
        write_safetensors(flat, target / WEIGHTS_FILE, {"format": "mlx"})
        config = self.config.to_dict()
        if quantized:
            config["quantization"] = _quantization_entry(quantized)
        _write_json(target / "config.json", config)
        _write_json(target / "generation_config.json", dict(self.generation))
        (target / "tokenizer.model").write_bytes(self.tokenizer.model)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if self.path is not None and (self.path / name).is_file():
                (target / name).write_bytes((self.path / name).read_bytes())
        self.provenance.save(target)


def ensure_free(path: Path) -> None:
    """Refuses a target that is a file or a directory with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OptionError(f"{path}: exists already; choose another place or remove it first")


def _quantization_entry(quantized: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
    """mlx-lm's `quantization`: the linear layers' bits, and the tensors that differ by name."""
    linear = list(quantized.values())[-1]  # the embedding comes first, where it is quantised
    entry: dict[str, Any] = {"group_size": linear.group_size, "bits": linear.bits, "mode": "affine"}
    for name, tensor in quantized.items():
        if (tensor.bits, tensor.group_size) != (linear.bits, linear.group_size):
            entry[name] = {"group_size": tensor.group_size, "bits": tensor.bits}
    return entry


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
