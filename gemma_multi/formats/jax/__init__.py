"""A JAX checkpoint: an Orbax tree with the parameter names of google-deepmind/gemma, as its
`gm.ckpts.load_params` loads it.

`tree` reads what Orbax wrote, `layout` has the library's names. Its checkpoints are nothing but the
tree; what the tree cannot say lies beside it in files of the names that Hugging Face has for them,
which Orbax passes over. Values are decompressed, and looked at, when a tensor is asked for.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Origin, Provenance, TensorInfo, Tensors
from gemma_multi.config import ModelConfig
from gemma_multi.errors import CheckpointError
from gemma_multi.files import file_stamp, read_optional_json
from gemma_multi.formats.base import Format, checked_generation
from gemma_multi.formats.directory import CONFIG_FILE, GENERATION_FILE
from gemma_multi.formats.jax.layout import PICTURES, config_of, places
from gemma_multi.formats.jax.tree import Tree, is_tree
from gemma_multi.safetensors_file import check_finite
from gemma_multi.tokenizer import Tokenizer


def _read(path: Path) -> Checkpoint:
    tree, generation = Tree(path), path / GENERATION_FILE
    told = path / CONFIG_FILE
    config = ModelConfig.from_file(told) if told.exists() else config_of(path, tree.shapes)
    return Checkpoint(
        config=config,
        tensors=_read_tensors(tree, config),
        provenance=Provenance.read(path),
        generation=checked_generation(read_optional_json(generation), str(generation)),
        path=path,
        make_tokenizer=cache(lambda: Tokenizer.from_directory(path, config.vocab_size)),
    )


def _read_tensors(tree: Tree, config: ModelConfig) -> Tensors:
    held, infos = places(config), {}
    for name, shape in config.tensor_shapes().items():
        place = held[name]
        tree.check(place.leaf, place.whole)
        dtype = tree.dtype(place.leaf)
        infos[name] = TensorInfo(shape, dtype.name, int(np.prod(shape)) * dtype.itemsize)
    for leaf in sorted(set(tree.shapes) - {place.leaf for place in held.values()}):
        if not leaf.startswith(PICTURES):
            raise CheckpointError(
                f"{tree.directory}: {leaf!r} does not belong to a Gemma 3 text model of this shape"
            )

    def read(name: str) -> np.ndarray:
        place = held[name]
        stored = tree.read(place.leaf, place.part)
        check_finite(tree.directory, place.leaf, stored)
        tensor = np.ascontiguousarray(place.restore(stored))
        tensor.flags.writeable = False
        return tensor

    return Tensors(infos, read, Origin(FORMAT.name, file_stamp(tree.file)))


FORMAT = Format(
    name="jax", what="a JAX checkpoint's directory", suffix="", looks_like=is_tree, read=_read
)
