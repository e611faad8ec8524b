"""A JAX checkpoint: the Orbax tree that google-deepmind/gemma's `gm.ckpts.load_params` loads.

Design choices:
- Written by Orbax itself, nested as the library's `model.init()` has it. The whole tree has to be
  in memory for that; leaves are filled as tensors are made, the embedding some rows at a time.
- Stored as it is, or in one type for all; int4 is exact in float32. The library computes in the
  type of the weights.
- The library's models take their sizes, window and rope from a config that the user writes (or one
  of its classes has); eps, query and embedding scale are its own. A model that needs others is
  refused.
- Tokenizer, config, generation options, NOTICE, provenance and card lie beside the tree, where
  Orbax passes them over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import ModelConfig
from gemma_multi.errors import BackendError, CheckpointError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.exporters.companions import write_account, write_generation_config
from gemma_multi.exporters.dense import PRECISION_HELP, dense_rows, dense_types
from gemma_multi.files import new_directory, write_json
from gemma_multi.formats.directory import CONFIG_FILE, TOKENIZER_FILE
from gemma_multi.formats.jax.layout import EPS, places
from gemma_multi.options import option
from gemma_multi.progress import Report

_CHUNK_ROWS = 1 << 13


@dataclass(frozen=True)
class JaxOptions:
    precision: str = option("auto", PRECISION_HELP)


def _write(
    checkpoint: Checkpoint, output: Path, options: JaxOptions, progress: Report
) -> ExportReport:
    _check_config(checkpoint.config)
    types, precision = dense_types(checkpoint, options.precision)
    checkpointer = _import_orbax().StandardCheckpointer()
    provenance = checkpoint.provenance.modified(
        f"exported as google-deepmind/gemma's parameters in {precision}"
    )
    with new_directory(output) as temporary, checkpointer:
        tree = _nested(_leaves(checkpoint, types, progress))
        checkpointer.save(temporary.absolute(), tree, force=True)
        checkpointer.wait_until_finished()
        write_json(temporary / CONFIG_FILE, checkpoint.config.to_dict())
        (temporary / TOKENIZER_FILE).write_bytes(checkpoint.tokenizer.model)
        write_generation_config(checkpoint, temporary)
        write_account(checkpoint, provenance, temporary, "gemma", precision)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return ExportReport(output, size, EXPORTER.format, precision, checkpoint.context_length)


def _import_orbax() -> Any:
    try:
        from orbax import checkpoint
    except ImportError as error:
        raise BackendError(
            f"a JAX checkpoint needs Orbax ({error}): pip install 'gemma-multi[jax]'"
        ) from error
    return checkpoint


def _check_config(config: ModelConfig) -> None:
    """Refuses what the library would compute otherwise, whatever its config."""
    by_heads = config.hidden_size // config.num_attention_heads
    root = f"{config.hidden_size**0.5:.6g}"
    for name, value, computed, ok in (
        ("rms_norm_eps", config.rms_norm_eps, EPS, config.rms_norm_eps == EPS),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar,
         f"{config.head_dim} or {by_heads}",
         config.query_pre_attn_scalar in (config.head_dim, by_heads)),
        ("embedding_scale", config.embedding_scale, root, config.is_scaled_by_root),
    ):  # fmt: skip
        if not ok:
            raise CheckpointError(
                f"{name} is {value!r}, but google-deepmind/gemma computes with {computed} for this "
                "shape; use another format"
            )


def _leaves(
    checkpoint: Checkpoint, types: dict[str, np.dtype], progress: Report
) -> dict[str, np.ndarray]:
    """The tree's arrays by their names with slashes."""
    held, leaves, done = places(checkpoint.config), dict[str, np.ndarray](), 0
    for name, place in held.items():
        if place.leaf not in leaves:
            sharing = [types[one] for one, other in held.items() if other.leaf == place.leaf]
            leaves[place.leaf] = np.empty(place.whole, np.result_type(*sharing))
        leaf = leaves[place.leaf]
        target, tensor = leaf if place.part is None else leaf[place.part], checkpoint.tensors[name]
        whole = target.shape == tensor.shape  # laid out as it is: rows go where they are
        for rows, part in dense_rows(tensor, leaf.dtype, _CHUNK_ROWS if whole else tensor.shape[0]):
            target[rows if whole else ...] = place.arrange(part)
            done += part.size
            progress(done, checkpoint.config.num_parameters)
    return leaves


def _nested(leaves: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


EXPORTER = Exporter(format="jax", options=JaxOptions, write=_write)
