"""Reading a model directory: which files, which tensors, and are they the ones the config implies.

Hugging Face directories (one file or shards), mlx-lm's quantised directories and our int4
directory differ only in that a quantised weight comes as `X.weight` (packed), `X.scales` and
`X.biases`. Vision models keep the text part under a prefix; the rest of them is passed over.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint.safetensors_file import check_finite, read_safetensors
from gemma_multi.config import ModelConfig
from gemma_multi.errors import CheckpointError
from gemma_multi.quantization.tensor import QuantizedTensor

INDEX_FILE = "model.safetensors.index.json"
_TEXT_PREFIXES = ("language_model.", "model.language_model.")
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
             "model.multi_modal_projector.")  # fmt: skip
_HEAD = "lm_head"


class StoredTensors(dict[str, "np.ndarray | QuantizedTensor"]):
    """Tensors as their files hold them, and what tells those files from others: None once a
    tensor was put in by hand."""

    identity: str | None = None

    def __setitem__(self, name: str, tensor: np.ndarray | QuantizedTensor) -> None:
        self.identity = None
        super().__setitem__(name, tensor)


def read_tensors(path: Path, config: ModelConfig) -> StoredTensors:
    """Every tensor of the model by Hugging Face name, checked against the config."""
    files = _weight_files(path)
    flat: dict[str, tuple[Path, np.ndarray]] = {}
    for file, wanted in files.items():
        found, _ = read_safetensors(file)
        if wanted is not None and wanted != set(found):
            name = sorted(wanted ^ set(found))[0]
            raise CheckpointError(f"{file}: tensor {name!r} is not where {INDEX_FILE} says")
        for name, array in found.items():
            if name.startswith(_NOT_TEXT) or name.endswith("rotary_emb.inv_freq"):
                continue
            if _text_name(name) in flat:
                raise CheckpointError(f"{file}: tensor {name!r} is there twice")
            flat[_text_name(name)] = (file, array)
    _drop_tied_head(flat)
    quantization = read_optional_json(path / "config.json").get("quantization")
    tensors = StoredTensors()
    for name, shape in config.tensor_shapes().items():
        if name not in flat:
            raise CheckpointError(f"{path}: tensor {name!r} is missing")
        file, array = flat.pop(name)
        stem = name.removesuffix(".weight")
        if array.dtype == np.uint32 and len(shape) == 2:
            tensors[name] = _read_quantized(file, stem, array, shape, flat, quantization)
            continue
        if array.dtype == np.uint32:
            raise CheckpointError(f"{file}: tensor {name!r} has dtype U32, expected floats")
        if array.shape != shape:
            raise CheckpointError(
                f"{file}: tensor {name!r} has shape {list(array.shape)}, "
                f"but config.json implies {list(shape)}"
            )
        check_finite(file, name, array)
        tensors[name] = array
    if flat:
        name, (file, _) = next(iter(flat.items()))
        raise CheckpointError(f"{file}: tensor {name!r} does not belong to a Gemma 3 text model")
    tensors.identity = " ".join(_stamp(file) for file in sorted(files))
    return tensors


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, received {type(data).__name__}")
    return data


def read_generation_config(path: Path) -> dict[str, Any]:
    """The options a checkpoint brings along; its stop ids are checked here, the rest on use."""
    data = read_optional_json(path)
    eos = data.get("eos_token_id", [])
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [eos])):
        raise CheckpointError(
            f"{path}: eos_token_id is {eos!r}, expected a token id or a list of them"
        )
    return data


def _stamp(file: Path) -> str:
    status = file.stat()
    times = f"{status.st_mtime_ns}:{status.st_ctime_ns}"
    return f"{file.resolve()}:{status.st_ino}:{status.st_size}:{times}"


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """Weight file -> the tensors an index says it holds (None: no index, all of them)."""
    single = path / "model.safetensors"
    if single.exists():
        return {single: None}
    index = path / INDEX_FILE
    if not index.exists():
        raise CheckpointError(f"{path}: has no weights (model.safetensors or {INDEX_FILE})")
    weight_map = read_optional_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {file!r}, "
                "expected the plain name of a file beside it"
            )
        names = files.setdefault(path / file, set())
        assert names is not None
        names.add(name)
    return files


def _text_name(name: str) -> str:
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", _HEAD)) else f"model.{rest}"
    return name


def _drop_tied_head(flat: dict[str, tuple[Path, np.ndarray]]) -> None:
    """Some writers store the tied head as a copy of the embedding; any other head is refused."""
    for part in ("weight", "scales", "biases"):
        head = flat.pop(f"{_HEAD}.{part}", None)
        embedding = flat.get(f"model.embed_tokens.{part}")
        if head is None:
            continue
        if embedding is None or not _same_bits(head[1], embedding[1]):
            raise CheckpointError(
                f"{head[0]}: tensor '{_HEAD}.{part}' differs from the embedding, but Gemma 3 "
                "ties the two"
            )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)))


def _read_quantized(
    file: Path,
    stem: str,
    packed: np.ndarray,
    shape: tuple[int, ...],
    flat: dict[str, tuple[Path, np.ndarray]],
    quantization: Any,
) -> QuantizedTensor:
    where = f"{file}: tensor '{stem}.weight'"
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{where} is packed, but config.json has no quantization entry")
    own = quantization.get(stem, quantization.get(f"language_model.{stem}"))
    settings = {**quantization, **own} if isinstance(own, dict) else quantization
    bits, group = settings.get("bits"), settings.get("group_size")
    if settings.get("mode", "affine") != "affine" or type(bits) is not int or bits not in (4, 8):
        raise CheckpointError(
            f"{where} is quantised as {settings.get('mode', 'affine')} with {bits} bits, "
            "expected affine with 4 or 8"
        )
    rows, width = shape
    if type(group) is not int or group < 1 or width % group or (width * bits) % 32:
        raise CheckpointError(f"{where} has group_size {group!r}, which does not divide {width}")
    parts = []
    for part in ("scales", "biases"):
        owner, array = flat.pop(f"{stem}.{part}", (file, None))
        if array is None:
            raise CheckpointError(f"{owner.parent}: tensor '{stem}.{part}' is missing")
        if array.shape != (rows, width // group) or array.dtype == np.uint32:
            raise CheckpointError(
                f"{owner}: tensor '{stem}.{part}' has shape {list(array.shape)} and type "
                f"{array.dtype}, expected floats of {[rows, width // group]}"
            )
        check_finite(owner, f"{stem}.{part}", array)
        parts.append(array)
    if packed.shape != (rows, width * bits // 32):
        raise CheckpointError(
            f"{where} has shape {list(packed.shape)}, expected {[rows, width * bits // 32]} "
            f"words of {bits}-bit codes"
        )
    scales, biases = parts
    return QuantizedTensor(packed, scales, biases, bits, group)
