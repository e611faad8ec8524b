"""JAX checkpoints: the names that google-deepmind/gemma has, the same bits again, every spelling of
the tree, and damaged ones refused.

What that library computes from one is in tests/exporters/test_verifying.py, where it is installed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fuzzing import fuzz
from orbax import checkpoint as ocp
from tiny import edit_json, tiny_checkpoint

import gemma_multi
from gemma_multi import CheckpointError, ConfigError, OptionError, open_checkpoint
from gemma_multi.config import FULL, SLIDING
from gemma_multi.formats.jax.layout import config_of
from gemma_multi.transforms import to_precision

# of one layer, by `gm.nn.Transformer.init` of gemma 3.3.0, hidden 96, 4 heads of 32, 1 key head
LAYER = {
    "attn/_key_norm/scale": (32,), "attn/_query_norm/scale": (32,),
    "attn/attn_vec_einsum/w": (4, 32, 96), "attn/kv_einsum/w": (2, 1, 96, 32),
    "attn/q_einsum/w": (4, 96, 32), "mlp/gating_einsum": (2, 128, 96), "mlp/linear": (128, 96),
    "post_attention_norm/scale": (96,), "post_ffw_norm/scale": (96,),
    "pre_attention_norm/scale": (96,), "pre_ffw_norm/scale": (96,),
}  # fmt: skip
WHOLE = {"embedder/input_embedding": (320, 96), "final_norm/scale": (96,)}


def exported(checkpoint: Any, path: Path, **options: Any) -> Path:
    return gemma_multi.export(checkpoint, path, format="jax", progress=False, **options).path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Orbax restores of an export."""
    path = exported(tiny_checkpoint(), tmp_path_factory.mktemp("jax") / "x")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found = (flat(below, f"{prefix}/{key}" if prefix else key) for key, below in tree.items())
    return {name: leaf for below in found for name, leaf in below.items()}


def saved(tree: Any, like: Path, path: Path, inside: str = "", **how: Any) -> Path:
    """A tree with the companions of an export beside it."""
    target = path / inside if inside else path
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
        checkpointer.save(target, tree, force=True)
    for name in ("config.json", "tokenizer.model", "provenance.json"):
        shutil.copy(like / name, path / name)
    return path


def test_orbax_restores_the_librarys_names_and_shapes(tree: dict[str, Any]) -> None:
    layers = {f"layer_{i}/{name}": shape for i in range(8) for name, shape in LAYER.items()}
    assert {name: leaf.shape for name, leaf in flat(tree).items()} == {**WHOLE, **layers}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", [1, 2, 4])  # queries beside keys and values, or all in one
def test_it_opens_as_the_same_bits(precision: str, kv: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(num_key_value_heads=kv, vocab_size=4096, dtype="bfloat16")
    checkpoint = to_precision(checkpoint, precision)
    opened = open_checkpoint(exported(checkpoint, tmp_path / "x"))
    assert opened == checkpoint
    assert (opened.format, opened.precision) == ("jax", precision)
    assert "google-deepmind/gemma's parameters" in (tmp_path / "x" / "NOTICE").read_text()
    assert "gm.ckpts.load_params" in (tmp_path / "x" / "README.md").read_text()


def test_int4_is_exact_in_float32(tmp_path: Path) -> None:
    int4 = open_checkpoint("storyteller")
    opened = open_checkpoint(exported(int4, tmp_path / "x"))
    assert (opened.config, opened.precision) == (int4.config, "float32")
    for name in int4.tensors:
        np.testing.assert_array_equal(opened.weight(name), int4.weight(name).astype(np.float32))
    assert opened.tokenizer.model == int4.tokenizer.model


def test_every_spelling_of_the_tree_is_the_same_checkpoint(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint()
    path = exported(checkpoint, tmp_path / "nested")
    released: dict[str, Any] = {}
    for name, leaf in flat(tree).items():
        name = name + "/w" if "/mlp/" in name else name
        above, last = f"transformer/{name}".rsplit("/", 1)
        released.setdefault(above, {})[last] = leaf
    pictures = {**tree, "vision_encoder": {"w": np.zeros(3, np.float32)}}
    run = {"params": tree, "step": np.array(3), "collections": {"a": np.zeros(1)},
           "opt_state": {"mu": np.zeros(2, np.float32)}}  # fmt: skip
    for kept in (
        saved(released, path, tmp_path / "flat"),
        saved(pictures, path, tmp_path / "pictures"),
        saved(run, path, tmp_path / "run", "default"),
        saved(tree, path, tmp_path / "directories", use_ocdbt=False),
        saved(tree, path, tmp_path / "zarr3", use_zarr3=True),
    ):
        assert open_checkpoint(kept) == checkpoint, kept


def test_a_published_tree_needs_no_config() -> None:
    """Shapes of Gemma3_270M and Gemma3_4B in gemma 3.3.0."""

    def shapes(hidden: int, layers: int, heads: int, kv: int, ffn: int) -> dict[str, tuple]:
        return {
            "embedder/input_embedding": (262144, hidden),
            **{f"layer_{i}/mlp/gating_einsum": (2, ffn, hidden) for i in range(layers)},
            "layer_0/attn/q_einsum/w": (heads, hidden, 256),
            "layer_0/attn/kv_einsum/w": (2, kv, hidden, 256),
        }

    small = config_of(Path("x"), shapes(640, 18, 4, 1, 2048))
    assert (small.sliding_window, small.num_parameters) == (512, 268_098_176)
    assert [i for i in range(18) if small.layer_types[i] == FULL] == [5, 11, 17]
    assert small.embedding_scale == 25.25
    large = config_of(Path("x"), shapes(2560, 34, 8, 4, 10240))
    assert (large.sliding_window, large.rope_scaling_factor) == (1024, 8.0)
    assert large.layer_types[0] == SLIDING
    with pytest.raises(CheckpointError, match="18 layers of 512 are none of the published"):
        config_of(Path("x"), shapes(512, 18, 4, 1, 2048))
    with pytest.raises(CheckpointError, match="'embedder/input_embedding' is missing"):
        config_of(Path("x"), {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, but google-deepmind/gemma computes with 1e"),
     ({"query_pre_attn_scalar": 48.0}, "query_pre_attn_scalar is 48.0.*with 32 or 24"),
     ({"embedding_scale": 1.0}, r"embedding_scale is 1\.0")],
)  # fmt: skip
def test_what_the_library_would_compute_otherwise_is_refused(
    changes: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        exported(tiny_checkpoint(**changes), tmp_path / "x")
    with pytest.raises(OptionError, match="precision is 'int4', expected one of auto, bfloat16"):
        exported(tiny_checkpoint(), tmp_path / "x", precision="int4")
    assert not list(tmp_path.iterdir())


def test_a_killed_or_failing_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_multi.exporters.jax.write_generation_config", fail)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was written"):
        exported(tiny_checkpoint(), tmp_path / "x")
    assert not list(tmp_path.iterdir())


# what may be wrong with one


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Another leaf in the place of one; None: none."""

    def change(tree: dict[str, Any]) -> None:
        *above, last = name.split("/")
        for key in above:
            tree = tree[key]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    return change


LINEAR = np.zeros((128, 96), np.float32)
DAMAGES = {
    "an array too few": (changed("layer_2/mlp/linear", None), "'layer_2/mlp/linear' is missing"),
    "an array too many": (changed("layer_2/more", LINEAR), "'layer_2/more' does not belong"),
    "another shape": (changed("layer_2/mlp/linear", LINEAR[:9]), r"has shape \[9, 96\], but"),
    "another type": (changed("layer_2/mlp/linear", LINEAR.astype(np.int8)), "has type int8, exp"),
    "NaN": (changed("layer_2/mlp/linear", LINEAR + np.nan), "'layer_2/mlp/linear' holds NaN"),
    "half a NaN": (
        changed("layer_2/mlp/linear", (LINEAR + np.inf).astype(ml_dtypes.bfloat16)), "holds NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_other_trees_are_refused_by_name(
    name: str, tree: dict[str, Any], tiny_directory: Path, tmp_path: Path
) -> None:
    change, words = DAMAGES[name]
    copy = json.loads(json.dumps(tree, default=lambda _: None))  # the same dicts, other leaves

    def fill(target: dict, source: dict) -> None:
        for key, below in source.items():
            if isinstance(below, dict):
                fill(target[key], below)
            else:
                target[key] = below

    fill(copy, tree)
    change(copy)
    path = saved(copy, tiny_directory, tmp_path / "x")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path).digest()


def test_other_companions_are_refused_by_name(tmp_path: Path) -> None:
    path = exported(tiny_checkpoint(), tmp_path / "x")
    edit_json(path / "config.json", num_hidden_layers="8")
    with pytest.raises(ConfigError, match="num_hidden_layers is '8'"):
        open_checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="8 layers of 96 are none of the published"):
        open_checkpoint(path)


def test_mutated_checkpoints_never_crash(tmp_path: Path) -> None:
    """500 mutations in four processes (see fuzz_jax.py), of both kinds of store."""
    path = exported(tiny_checkpoint(num_hidden_layers=1), tmp_path / "x")
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(path)
    directories = saved(plain, path, tmp_path / "directories", use_ocdbt=False)
    outcomes: Counter[str] = Counter()
    for i, source in enumerate((path, directories, path, directories)):
        outcomes += fuzz("fuzz_jax.py", source, tmp_path / str(i), i, 125)
    assert sum(outcomes.values()) == 500
    assert outcomes["refused"] > 200
