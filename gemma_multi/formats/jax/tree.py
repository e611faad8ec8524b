"""A tree of arrays that Orbax wrote: its names, its arrays' shapes and types, and their values.

    _METADATA          the tree's names, as JSON         _CHECKPOINT_METADATA, commit_success.txt
    manifest.ocdbt, d/, ocdbt.process_*/    a key-value store of zarr arrays, compressed; or, from
    <name>/.zarray, <name>/0.0              older writers, the same as a directory an array

Design choices:
- Read with TensorStore, the library under Orbax: one array when it is asked for, where Orbax (which
  imports JAX) restores a tree at once. What is handed out was checked first: the type, the shape
  (by who asks), and that no chunk is larger than its array, so no number of a file makes a large
  allocation.
- Three spellings of google-deepmind/gemma's names become one, with slashes: the tree of its
  `model.init()`, the flat one of released checkpoints ("transformer/layer_0/mlp/linear" with "w"),
  and a training run's, which has optimiser and step beside it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.errors import BackendError, CheckpointError
from gemma_multi.files import read_optional_json
from gemma_multi.quantization.tensor import BFLOAT16

METADATA_FILE, MANIFEST_FILE = "_METADATA", "manifest.ocdbt"
_STEP = "default"  # where a training run keeps the tree
_FLAT = "transformer/"
_RUN = {"params", "step", "opt_state", "collections"}
_TYPES = (np.dtype("<f4"), BFLOAT16, np.dtype("<f2"))
_MOST_ARRAYS, _LONGEST_NAME = 1 << 14, 1 << 10


def tree_directory(path: Path) -> Path:
    """Where in a directory the tree is."""
    return path if (path / METADATA_FILE).is_file() else path / _STEP


def is_tree(path: Path) -> bool:
    try:
        return isinstance(_tree_metadata(tree_directory(path)).get("tree_metadata"), dict)
    except CheckpointError:
        return False


def _tree_metadata(directory: Path) -> dict[str, Any]:
    return read_optional_json(directory / METADATA_FILE)


class Tree:
    """The arrays of a checkpoint by their names with slashes; nothing of them is read yet."""

    def __init__(self, path: Path) -> None:
        self.directory = tree_directory(path)
        self.file = self.directory / METADATA_FILE
        described = _tree_metadata(self.directory)
        stored = _names(self.file, described.get("tree_metadata"))
        self._arrays = _open(self.directory, stored, bool(described.get("use_zarr3")))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(array.shape) for name, array in self._arrays.items()}

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype.numpy_dtype

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError where an array is missing or another than expected."""
        where = f"{self.directory}: {name!r}"
        if (array := self._arrays.get(name)) is None:
            raise CheckpointError(f"{where} is missing")
        if tuple(array.shape) != shape:
            raise CheckpointError(
                f"{where} has shape {list(array.shape)}, but the config implies {list(shape)}"
            )
        if array.dtype.numpy_dtype not in _TYPES:
            raise CheckpointError(
                f"{where} has type {array.dtype.name}, expected float32, bfloat16 or float16"
            )
        chunk = array.chunk_layout.read_chunk.shape or ()
        if math.prod(chunk) > math.prod(shape):
            raise CheckpointError(f"{where} is stored in chunks of {list(chunk)}, more than it has")

    def read(self, name: str, part: int | None) -> np.ndarray:
        """An array, or one part of it along the first axis."""
        array = self._arrays[name]
        try:
            found = (array if part is None else array[part]).read().result()
        except Exception as error:  # TensorStore raises whatever damaged bytes lead to
            raise CheckpointError(f"{self.directory}: {name!r}: {_first_line(error)}") from error
        return np.asarray(found)


def _names(file: Path, tree: Any) -> dict[str, str]:
    """Name with slashes -> name in the store."""
    if not isinstance(tree, dict) or not 0 < len(tree) <= _MOST_ARRAYS:
        raise CheckpointError(f"{file}: has no tree_metadata of at most {_MOST_ARRAYS} arrays")
    paths = [_keys(file, entry) for entry in tree.values()]
    in_run = {keys[0] for keys in paths} == _RUN
    found: dict[str, str] = {}
    for keys in paths:
        stored, own = ".".join(keys), keys
        if in_run:
            own = keys[1:]
            if keys[0] != "params":
                continue
        name = "/".join(own).removeprefix(_FLAT)
        if "/mlp/" in name:
            name = name.removesuffix("/w")
        if name in found:
            raise CheckpointError(f"{file}: {name!r} is there twice")
        found[name] = stored
    return found


def _keys(file: Path, entry: Any) -> list[str]:
    """The names on the way to an array."""
    keys = entry.get("key_metadata") if isinstance(entry, dict) else None
    if not isinstance(keys, list) or not keys:
        raise CheckpointError(f"{file}: key_metadata is {keys!r:.80}, expected names")
    names: list[str] = []
    for key in keys:
        name = key.get("key") if isinstance(key, dict) else None
        if not isinstance(name, str) or not _is_plain(name):
            raise CheckpointError(f"{file}: {name!r:.80} is no name of an array")
        names.append(name)
    return names


def _is_plain(name: str) -> bool:
    """Whether it leads nowhere else when it becomes part of a path."""
    safe = ".." not in name and "\0" not in name and not name.startswith("/")
    return safe and 0 < len(name) <= _LONGEST_NAME


def _open(directory: Path, stored: dict[str, str], zarr3: bool) -> dict[str, Any]:
    try:
        import tensorstore
    except ImportError as error:
        raise BackendError(
            f"a JAX checkpoint needs tensorstore ({error}): pip install 'gemma-multi[jax]'"
        ) from error
    root = str(directory.absolute())
    context = tensorstore.Context()
    files = {"driver": "file", "path": root + "/"}
    if (directory / MANIFEST_FILE).exists():
        store: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{root}/"}
    else:
        store = files
    opened: dict[str, Any] = {}
    for name, key in stored.items():
        kvstore = {**store, "path": f"{store.get('path', '')}{key}/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
        opened[name] = tensorstore.open(spec, open=True, read=True, context=context)
    found = {}
    for name, future in opened.items():
        try:
            found[name] = future.result()
        except Exception as error:  # as above
            raise CheckpointError(f"{directory}: {name!r}: {_first_line(error)}") from error
    return found


def _first_line(error: Exception) -> str:
    return f"cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
