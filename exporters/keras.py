"""A Keras preset, as `keras_hub.models.Gemma3CausalLM.from_preset` loads it.

Design choices:
- Written with h5py, in the layout that Keras reads, and not through keras-hub: nothing of Keras is
  imported, and no second copy of the model is held. Every tensor goes to the file as it is made.
- The preset's arguments are all spelled out: keras-hub's defaults are not Gemma's.
- Stored as it is, or in one type for all; int4 is exact in float32. (Keras's own int4 has no groups
  of 32 for the query projection.)
- keras-hub's class computes some things in one way only. A model that needs another is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor
from gemma_multi.config import EMBEDDING, ModelConfig, alternate
from gemma_multi.errors import CheckpointError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.exporters.companions import write_account, write_generation_config
from gemma_multi.exporters.dense import PRECISION_HELP, dense_rows, dense_types
from gemma_multi.files import new_directory, write_json
from gemma_multi.formats import keras as layout
from gemma_multi.formats.directory import CONFIG_FILE, TOKENIZER_JSON
from gemma_multi.options import option
from gemma_multi.progress import Report
from gemma_multi.quantization.tensor import BFLOAT16

# whose layout this is; keras-hub reads no version
_VERSIONS = {"keras_version": "3.15.1", "keras_hub_version": "0.32.0"}
_SEQUENCE_LENGTH = 1024  # keras-hub's own default, of its preprocessor
_CHUNK_ROWS = 1 << 13


@dataclass(frozen=True)
class KerasOptions:
    precision: str = option("auto", PRECISION_HELP)


def _write(
    checkpoint: Checkpoint, output: Path, options: KerasOptions, progress: Report
) -> ExportReport:
    config, h5py = checkpoint.config, layout.import_h5py()
    _check_config(config)
    dtypes, precision = dense_types(checkpoint, options.precision)
    provenance = checkpoint.provenance.modified(f"exported as a Keras preset in {precision}")
    done = 0
    with new_directory(output) as temporary:
        with h5py.File(temporary / layout.WEIGHTS_FILE, "w") as file:
            for name, place in layout.places(config).items():
                dtype = dtypes[name]
                held = np.dtype("V2") if dtype == BFLOAT16 else dtype
                dataset = file.create_dataset(place.path, place.shape, held)
                if dtype == BFLOAT16:
                    dataset.attrs["dtype"] = layout.BFLOAT16_MARK
                for rows, part in _parts(name, checkpoint.tensors[name], dtype, place):
                    dataset[rows] = part.view(held)
                    done += part.size
                    progress(done, config.num_parameters)
        for file_name, data in _companions(checkpoint, precision).items():
            write_json(temporary / file_name, data)
        vocabulary = temporary / layout.VOCABULARY_FILE
        vocabulary.parent.mkdir(parents=True)
        vocabulary.write_bytes(checkpoint.tokenizer.model)
        write_generation_config(checkpoint, temporary)
        write_account(checkpoint, provenance, temporary, "keras-hub", precision)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return ExportReport(output, size, EXPORTER.format, precision, checkpoint.context_length)


def _parts(
    name: str, tensor: Tensor, dtype: np.dtype, place: layout.TensorPlace
) -> Iterator[tuple[slice, np.ndarray]]:
    """A tensor as the file holds it, the embedding some rows at a time."""
    step = _CHUNK_ROWS if name == EMBEDDING else tensor.shape[0]
    for part, rows in dense_rows(tensor, dtype, step):
        arranged = np.ascontiguousarray(place.arrange(rows))
        yield (part if name == EMBEDDING else slice(None)), arranged


def _check_config(config: ModelConfig) -> None:
    """Refuses what keras-hub would compute otherwise, and no argument could tell it."""
    pattern = alternate(config.num_hidden_layers, layout.GEMMA_PERIOD)
    for name, value, fixed, ok in (
        ("layer_types", list(config.layer_types), "every sixth layer global and the others sliding",
         config.layer_types == pattern),
        ("rope_theta", config.rope_theta, layout.ROPE_BASE,
         config.rope_theta == layout.ROPE_BASE),
        ("rope_local_base_freq", config.rope_local_theta, layout.LOCAL_ROPE_BASE,
         config.rope_local_theta == layout.LOCAL_ROPE_BASE),
        ("rms_norm_eps", config.rms_norm_eps, layout.EPS, config.rms_norm_eps == layout.EPS),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, config.head_dim,
         config.query_pre_attn_scalar == config.head_dim),
        ("embedding_scale", config.embedding_scale, f"{config.hidden_size**0.5:.6g}",
         config.is_scaled_by_root),
    ):  # fmt: skip
        if not ok:
            raise CheckpointError(
                f"{name} is {value!r}, but keras-hub computes with {fixed} for this shape, and a "
                "preset cannot say otherwise; use another format"
            )


def _companions(checkpoint: Checkpoint, precision: str) -> dict[str, Any]:
    """The JSON files by name."""
    config = checkpoint.config
    fields = config.to_dict()
    backbone = {
        "name": "gemma3_backbone",
        "trainable": True,
        "dtype": _policy("float32" if precision == "mixed" else precision),
        "image_size": None,
        **{argument: fields[field] for argument, field in layout.SIZES.items()},
        **{argument: needed for argument, (_, needed) in layout.FIXED.items()},
        "global_rope_scaling_factor": config.rope_scaling_factor,
        "dropout": 0,
    }
    tokenizer = _serialized("tokenizer", "Gemma3Tokenizer", {
        "name": "gemma3_tokenizer", "trainable": True, "dtype": _policy("int32"),
        "config_file": TOKENIZER_JSON, "proto": None, "sequence_length": None,
        "add_bos": False, "add_eos": False, "has_vision_tokens": False,
    })  # fmt: skip
    preprocessor = _serialized("causal_lm_preprocessor", "Gemma3CausalLMPreprocessor", {
        "name": "gemma3_causal_lm_preprocessor", "trainable": True, "dtype": _policy("float32"),
        "tokenizer": tokenizer, "config_file": "preprocessor.json",
        "sequence_length": min(_SEQUENCE_LENGTH, checkpoint.context_length),
        "add_start_token": True, "add_end_token": True,
    })  # fmt: skip
    return {
        CONFIG_FILE: _serialized("backbone", layout.BACKBONE, backbone),
        TOKENIZER_JSON: tokenizer,
        "preprocessor.json": preprocessor,
        layout.METADATA_FILE: {
            **_VERSIONS,
            "parameter_count": config.num_parameters,
            "tasks": ["CausalLM"],
            layout.OWN: {name: fields[name] for name in layout.OWN_FIELDS if name in fields},
        },
    }


def _serialized(module: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "module": f"keras_hub.src.models.gemma3.gemma3_{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"keras_hub>{name}",
    }


def _policy(name: str) -> dict[str, Any]:
    return {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": name},
        "registered_name": None,
    }


EXPORTER = Exporter(format="keras", options=KerasOptions, write=_write)
