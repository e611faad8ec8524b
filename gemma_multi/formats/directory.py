"""What the directories of Hugging Face and of mlx-lm have in common: files, names, checks.

Both keep `config.json`, a tokenizer, `generation_config.json` and safetensors, in one file or in
shards with an index. Vision models keep the text part under a prefix; the rest of them is passed
over. Every tensor that the config implies must be there with its shape, nothing else may be, and
all values must be finite, so engines and exporters need not ask again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Origin, Provenance, Tensor, Tensors
from gemma_multi.config import ModelConfig
from gemma_multi.errors import CheckpointError
from gemma_multi.files import file_stamp, read_optional_json
from gemma_multi.formats.base import checked_generation
from gemma_multi.safetensors_file import check_finite, read_safetensors
from gemma_multi.tokenizer import Tokenizer

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = (
    "config.json", "model.safetensors", "model.safetensors.index.json",
)  # fmt: skip
GENERATION_FILE, TOKENIZER_FILE = "generation_config.json", "tokenizer.model"
TOKENIZER_JSON, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
CARD_FILE = "README.md"
_TEXT_PREFIXES = ("language_model.", "model.language_model.")
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
             "model.multi_modal_projector.")  # fmt: skip
_HEAD = "lm_head"

Flat = dict[str, tuple[Path, np.ndarray]]  # tensor -> (its file, as stored)
ReadPacked = Callable[[Path, str, np.ndarray, tuple[int, ...], Flat], Tensor]


def config_entry(path: Path, name: str) -> Any:
    """One entry of a directory's config.json; None where there is none, or no such file."""
    try:
        return read_optional_json(path / CONFIG_FILE).get(name)
    except CheckpointError:
        return None


def read_directory(path: Path, format_name: str, read_packed: ReadPacked) -> Checkpoint:
    """`read_packed` makes a tensor of one that is stored as 32-bit words."""
    config = ModelConfig.from_file(path / CONFIG_FILE)
    return Checkpoint(
        config=config,
        tensors=_read_tensors(path, config, format_name, read_packed),
        provenance=Provenance.read(path),
        generation=checked_generation(
            read_optional_json(path / GENERATION_FILE), str(path / GENERATION_FILE)
        ),
        path=path,
        make_tokenizer=cache(lambda: Tokenizer.from_directory(path, config.vocab_size)),
    )


def _read_tensors(
    path: Path, config: ModelConfig, format_name: str, read_packed: ReadPacked
) -> Tensors:
    files = _weight_files(path)
    flat: Flat = {}
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
    if not _drop_tied_head(flat) and config_entry(path, "tie_word_embeddings") is False:
        raise CheckpointError(
            f"{path}: {CONFIG_FILE} has tie_word_embeddings False, but there is no "
            f"'{_HEAD}.weight' to compare with the embedding; Gemma 3 ties the two"
        )
    tensors: dict[str, Tensor] = {}
    for name, shape in config.tensor_shapes().items():
        if name not in flat:
            raise CheckpointError(f"{path}: tensor {name!r} is missing")
        file, array = flat.pop(name)
        if array.dtype == np.uint32 and len(shape) == 2:
            tensors[name] = read_packed(file, name.removesuffix(".weight"), array, shape, flat)
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
    identity = " ".join(file_stamp(file) for file in sorted(files))
    return Tensors.of(tensors, Origin(format_name, identity))


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """Weight file -> the tensors an index says it holds (None: no index, all of them)."""
    single = path / WEIGHTS_FILE
    if single.exists():
        return {single: None}
    index = path / INDEX_FILE
    if not index.exists():
        raise CheckpointError(f"{path}: has no weights ({WEIGHTS_FILE} or {INDEX_FILE})")
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


def _drop_tied_head(flat: Flat) -> bool:
    """Some writers store the tied head as a copy of the embedding, and some say that it is none;
    a head that differs is refused. False where there is none."""
    found = f"{_HEAD}.weight" in flat
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
    return found


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)))
