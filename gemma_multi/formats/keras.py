"""A Keras preset: the directory that keras-hub's `from_preset` loads and `save_to_preset` writes.

    config.json         class and arguments of the backbone     metadata.json    versions, our own
    model.weights.h5    one dataset a variable                  tokenizer.json   class of the
    assets/tokenizer/vocabulary.spm                                              tokenizer

Design choices:
- Paths in the file are those of Keras, which names a layer by its class and its place among layers
  of that class. `places` is the one table of where each tensor is and how it lies there; the Keras
  engine finds its variables by it, too.
- HDF5 is asked for names, types, shapes and places, and for no value: a dataset has to lie in the
  file in one piece, as Keras writes it, and is read from the mapped file. So nothing grows out of
  a small file, nothing is followed out of it, and opening copies nothing.
- keras-hub's class fixes what other models may vary (every sixth layer global, rope bases, query
  scale, eps), and its arguments' defaults are not Gemma's. What it would compute differently is
  refused by name.
- What its arguments cannot say (the embedding scale, how many positions, which tokens end an
  answer) is an entry of our own in metadata.json, which keras-hub does not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Origin, Provenance, TensorInfo, Tensors
from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.errors import BackendError, CheckpointError, ConfigError, TokenizerError
from gemma_multi.files import file_stamp, read_optional_json
from gemma_multi.formats.base import Format, checked_generation
from gemma_multi.formats.directory import CONFIG_FILE, GENERATION_FILE, config_entry
from gemma_multi.formats.heads import Arrange, split_in, split_out
from gemma_multi.quantization.tensor import BFLOAT16
from gemma_multi.safetensors_file import check_finite
from gemma_multi.tokenizer import Tokenizer

WEIGHTS_FILE, SHARDS_FILE = "model.weights.h5", "model.weights.json"
METADATA_FILE, VOCABULARY_FILE = "metadata.json", "assets/tokenizer/vocabulary.spm"
BACKBONE = "Gemma3Backbone"
# keras-hub's constants, whatever a config says
GEMMA_PERIOD, ROPE_BASE, LOCAL_ROPE_BASE, EPS = 6, 1e6, 1e4, 1e-6
OWN = "gemma_multi"  # in metadata.json: what keras-hub has no argument for
OWN_FIELDS = ("max_position_embeddings", "dtype", "embedding_scale", "residual_scale",
              "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
BFLOAT16_MARK = "bfloat16"  # a dataset's attribute "dtype"; HDF5 itself has no such type
# the backbone's argument -> the config's field
SIZES = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "head_dim": "head_dim",
    "sliding_window_size": "sliding_window",
}
# the backbone's argument -> what keras-hub takes where it is left out, what Gemma 3 text needs
FIXED: dict[str, tuple[Any, Any]] = {
    "query_head_dim_normalize": (True, True),  # which its decoder block does not pass on
    "use_query_key_norm": (True, True),
    "use_post_ffw_norm": (False, True),
    "use_post_attention_norm": (False, True),
    "use_sliding_window_attention": (False, True),
    "attention_logit_soft_cap": (None, None),
    "final_logit_soft_cap": (None, None),
    "local_rope_scaling_factor": (1.0, 1.0),
    "vision_encoder": (None, None),
    "use_bidirectional_attention": (False, False),
    "layer_norm_epsilon": (EPS, EPS),
    "is_embedding_model": (False, False),
}
NORMS = {  # by the names of Hugging Face, and of keras-hub
    "input_layernorm": "pre_attention_norm",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class TensorPlace:
    """Where Keras keeps a tensor, and how it lies there."""

    layer: int | None  # of the decoder; None: of the backbone itself
    variable: str  # from there: "attention.query_dense.kernel"
    shape: tuple[int, ...]
    arrange: Arrange  # from Hugging Face's layout to Keras's
    restore: Arrange  # and back

    @property
    def path(self) -> str:
        """In the weights' file."""
        if self.layer is None:
            own = {"token_embedding": "reversible_embedding", "layer_norm": "rms_normalization"}
            return f"layers/{own[self.variable.split('.')[0]]}/vars/0"
        block = "gemma3_decoder_block" + f"_{self.layer}" * bool(self.layer)
        return "/".join(["layers", block, *self.variable.split(".")[:-1], "vars/0"])


def places(config: ModelConfig) -> dict[str, TensorPlace]:
    """Every tensor's place by its Hugging Face name.

    Keras keeps linear layers as `[in, out]` and splits the heads: query `[heads, hidden, dim]`,
    output `[heads, dim, hidden]`.
    """
    h, d = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    f = config.intermediate_size

    def as_is(layer: int | None, variable: str, *shape: int) -> TensorPlace:
        return TensorPlace(layer, variable, shape, lambda w: w, lambda v: v)

    def transposed(layer: int, variable: str, *shape: int) -> TensorPlace:
        return TensorPlace(layer, f"{variable}.kernel", shape, lambda w: w.T, lambda v: v.T)

    def by_heads_in(layer: int, variable: str, n: int) -> TensorPlace:
        name = f"attention.{variable}.kernel"
        return TensorPlace(layer, name, (n, h, d), *split_in(n, h, d))

    def by_heads_out(layer: int, variable: str, n: int) -> TensorPlace:
        name = f"attention.{variable}.kernel"
        return TensorPlace(layer, name, (n, d, h), *split_out(n, h, d))

    found = {
        EMBEDDING: as_is(None, "token_embedding.embeddings", config.vocab_size, h),
        "model.norm.weight": as_is(None, "layer_norm.scale", h),
    }
    for i in range(config.num_hidden_layers):
        for name, place in {
            "self_attn.q_proj": by_heads_in(i, "query_dense", heads),
            "self_attn.k_proj": by_heads_in(i, "key_dense", kv_heads),
            "self_attn.v_proj": by_heads_in(i, "value_dense", kv_heads),
            "self_attn.o_proj": by_heads_out(i, "output_dense", heads),
            "mlp.gate_proj": transposed(i, "gating_ffw", h, f),
            "mlp.up_proj": transposed(i, "gating_ffw_2", h, f),
            "mlp.down_proj": transposed(i, "ffw_linear", f, h),
            **{name: as_is(i, f"{norm}.scale", d if name.endswith(("q_norm", "k_norm")) else h)
               for name, norm in NORMS.items()},
        }.items():  # fmt: skip
            found[f"model.layers.{i}.{name}.weight"] = place
    return found


def import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise BackendError(
            f"a Keras preset needs h5py ({error}): pip install 'gemma-multi[keras]'"
        ) from error
    return h5py


def is_preset(path: Path) -> bool:
    """Whether a directory's config.json is that of something Keras made."""
    return config_entry(path, "registered_name") is not None


def _read(path: Path) -> Checkpoint:
    config = _read_config(path)
    generation = path / GENERATION_FILE
    return Checkpoint(
        config=config,
        tensors=_read_tensors(path, config),
        provenance=Provenance.read(path),
        generation=checked_generation(read_optional_json(generation), str(generation)),
        path=path,
        make_tokenizer=cache(lambda: _read_tokenizer(path / VOCABULARY_FILE)),
    )


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer(file.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {error.strerror}") from error
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from error


def _read_config(path: Path) -> ModelConfig:
    file = path / CONFIG_FILE
    data = read_optional_json(file)
    name, told = data.get("class_name"), data.get("config")
    if name != BACKBONE or not isinstance(told, dict):
        raise CheckpointError(
            f"{file}: is of the class {name!r}, expected keras-hub's {BACKBONE!r} with its config"
        )
    for argument, (default, needed) in FIXED.items():
        if (value := told.get(argument, default)) != needed:
            raise ConfigError(
                f"{file}: {argument} is {value!r}, but a Gemma 3 text model has {needed!r}"
            )
    for argument in SIZES:
        if argument not in told and argument != "sliding_window_size":
            raise ConfigError(f"{file}: {argument} is missing")
    own = read_optional_json(path / METADATA_FILE).get(OWN, {})
    if not isinstance(own, dict):
        raise CheckpointError(f"{path / METADATA_FILE}: {OWN} is {own!r}, expected a JSON object")
    fields = {field: told.get(argument) for argument, field in SIZES.items()}
    fields["sliding_window"] = told.get("sliding_window_size", 1024)
    factor = told.get("global_rope_scaling_factor", 1.0)
    try:
        return ModelConfig.from_dict({
            "model_type": "gemma3_text",
            **fields,
            "sliding_window_pattern": GEMMA_PERIOD,
            "rope_theta": ROPE_BASE,
            "rope_local_base_freq": LOCAL_ROPE_BASE,
            **({"rope_scaling": {"rope_type": "linear", "factor": factor}} if factor != 1 else {}),
            "query_pre_attn_scalar": fields["head_dim"],
            "rms_norm_eps": EPS,
            "dtype": _computed_in(told.get("dtype")),
            **{name: own[name] for name in OWN_FIELDS if name in own},
        })  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _computed_in(policy: Any) -> str:
    """The type that a serialised policy names: it rounds the embedding scale."""
    settings = policy.get("config") if isinstance(policy, dict) else None
    name = settings.get("name") if isinstance(settings, dict) else policy
    kind = str(name).removeprefix("mixed_")
    return kind if kind in ("float32", "bfloat16", "float16") else "bfloat16"


def _read_tensors(path: Path, config: ModelConfig) -> Tensors:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        sharded = (path / SHARDS_FILE).exists()
        why = f"in shards ({SHARDS_FILE}), which are not read" if sharded else "missing"
        raise CheckpointError(f"{file}: the weights are {why}; save the preset in one file")
    held = places(config)
    views = _views(file, {name: place.path for name, place in held.items()})
    infos = {}
    for name, shape in config.tensor_shapes().items():
        view, place = views[name], held[name]
        if view.shape != place.shape:
            raise CheckpointError(
                f"{file}: {place.path!r} has shape {list(view.shape)}, but {CONFIG_FILE} implies "
                f"{list(place.shape)}"
            )
        check_finite(file, place.path, view)
        infos[name] = TensorInfo(shape, view.dtype.name, view.nbytes)

    def read(name: str) -> np.ndarray:
        tensor = np.ascontiguousarray(held[name].restore(views[name]))
        tensor.flags.writeable = False
        return tensor

    return Tensors(infos, read, Origin(FORMAT.name, file_stamp(file)))


def _views(file: Path, paths: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Tensors by name, each a view of the mapped file. Raises CheckpointError naming a dataset."""
    h5py = import_h5py()
    try:
        mapped = np.memmap(file, np.uint8, "r").view(np.ndarray)
        with h5py.File(file, "r") as opened:
            there: set[str] = set()
            opened.visititems(
                lambda name, item: there.add(name) if isinstance(item, h5py.Dataset) else None
            )
            for path in sorted(there - set(paths.values())):
                raise CheckpointError(
                    f"{file}: {path!r} does not belong to a Gemma 3 text model of this shape"
                )
            return {name: _view(h5py, file, opened, path, mapped) for name, path in paths.items()}
    except CheckpointError:
        raise
    except Exception as error:  # h5py raises whatever damaged bytes lead to
        raise CheckpointError(f"{file}: cannot be read as HDF5: {error}") from error


def _view(h5py: Any, file: Path, opened: Any, path: str, mapped: np.ndarray) -> np.ndarray:
    where, node = f"{file}: {path!r}", opened
    for part in path.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise CheckpointError(f"{where} is missing")
        if not isinstance(link, h5py.HardLink):
            raise CheckpointError(
                f"{where} is a link to elsewhere, expected the weights themselves"
            )
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise CheckpointError(f"{where} is no dataset")
    mark = node.attrs.get("dtype")
    dtype = BFLOAT16 if node.dtype == "V2" and mark == BFLOAT16_MARK else node.dtype
    if dtype not in (BFLOAT16, np.dtype("<f4"), np.dtype("<f2")):
        raise CheckpointError(
            f"{where} has dtype {mark or node.dtype}, expected float32, bfloat16 or float16; a "
            "quantised preset is not read: save the preset before it is quantised"
        )
    if node.chunks or node.external or node.is_virtual:
        raise CheckpointError(
            f"{where} is not stored in one piece, as Keras writes it; save the preset again"
        )
    begin, nbytes = node.id.get_offset(), node.size * dtype.itemsize
    if not nbytes or begin is None or begin + nbytes > len(mapped):
        raise CheckpointError(
            f"{where} has {nbytes} bytes at {begin}, outside the {len(mapped)} of the file"
        )
    return mapped[begin : begin + nbytes].view(dtype).reshape(node.shape)


FORMAT = Format(
    name="keras", what="a Keras preset's directory", suffix="", looks_like=is_preset, read=_read
)
