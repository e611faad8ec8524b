"""What gemma.cpp calls the parts of a Gemma 3: its config, its tensors, and blobs of our own.

gemma.cpp's code decides what its config has no field for: rope bases, eps, the embedding scale
(rounded to bfloat16), the tokens that begin a prompt. What a checkpoint holds besides is in a blob
of ours, which gemma.cpp passes over.

The id of the model decides one thing in gemma.cpp: whether global layers rotate by a base of
1,000,000. In its code of October 2025 they do for every Gemma 3 but the 270M, whose weights are
made for that base as well. So a file of ours has the id by which gemma.cpp computes what the
checkpoint says, the 1B's for a 270M too, of which gemma.cpp warns. All sizes are the file's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gemma_multi.config import FULL, SLIDING, ModelConfig
from gemma_multi.errors import CheckpointError, ConfigError
from gemma_multi.formats.sbs import fields
from gemma_multi.formats.sbs.fields import Record, Words
from gemma_multi.formats.sbs.file import SbsFile

CONFIG, TOKENIZER, TABLE = "config", "tokenizer", "toc"
# ours
OWN = "gemma_multi"  # JSON: an object of the three below
OWN_CONFIG, GENERATION, PROVENANCE = "config", "generation", "provenance"
NOTICE = "NOTICE"  # for people
OWN_FIELDS = ("dtype", "embedding_scale", "residual_scale", "eos_token_id", "pad_token_id",
              "rope_theta")  # fmt: skip

MODELS = {
    3: "gemma2-9b", 4: "gemma2-27b", 7: "gemma2-2b", 10: "paligemma2-3b-224",
    11: "paligemma2-3b-448", 12: "paligemma2-10b-224", 13: "paligemma2-10b-448", 14: "gemma3-4b",
    15: "gemma3-1b", 16: "gemma3-12b", 17: "gemma3-27b", 18: "gemma3-270m",
}  # fmt: skip
GEMMA3_1B, GEMMA3_270M = 15, 18
KINDS = {0: "unknown", 1: "F32", 2: "BF16", 3: "SFP", 4: "NUQ", 5: "F64", 6: "U32", 7: "U64",
         8: "I8"}  # fmt: skip
WRAPPINGS = {"it": 0, "pt": 1}  # of prompts: in turns, or not at all
BOS, ROPE_BASE, LOCAL_ROPE_BASE, EPS = 2, 1e6, 1e4, 1e-6
WIDEST_HEAD, MOST_LAYERS = 1024, 999
_BY_KEY_SIZE, _BY_HIDDEN_SIZE = 0, 1  # what queries are divided by the root of
_SCALED = 1  # of the norms behind attention and feed-forward


@dataclass(frozen=True)
class LayerShape:
    """The fields of a layer that a Gemma 3 may choose."""

    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    head_dim: int


def write_config(
    config: ModelConfig, name: str, kind: str, wrapping: str, ends: tuple[int, int]
) -> Words:
    """The blob `config` of a model that gemma.cpp computes as it is; `kind` is of its smallest
    numbers, `ends` the tokens that end an answer."""
    number, real = fields.number, fields.real
    model = GEMMA3_1B if config.rope_theta == ROPE_BASE else GEMMA3_270M
    layer = fields.record(
        *map(number, (
            config.hidden_size, 0, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, 0,
            0, 0,  # no biases
            1,  # gate and up lie as [out, in]
            _SCALED, 0, 0, 0,  # a Gemma layer, gelu, rotary positions in full
            1,  # queries and keys have norms
        )),
    )  # fmt: skip
    longest, window = config.max_position_embeddings, config.sliding_window
    windows = [window if kind == SLIDING else longest for kind in config.layer_types]
    by_key_size = config.query_pre_attn_scalar == config.head_dim
    return fields.record(
        number(1), fields.text(name), number(model), number(WRAPPINGS[wrapping]),
        number(next(i for i, known in KINDS.items() if known == kind)),
        number(config.num_hidden_layers), number(config.hidden_size), number(config.vocab_size),
        number(longest), number(0),
        real(0.0), real(0.0),  # no caps
        number(0), number(0),
        number(_BY_KEY_SIZE if by_key_size else _BY_HIDDEN_SIZE),
        fields.listed([layer] * config.num_hidden_layers),
        fields.listed(map(number, windows)),
        number(1),
        fields.record(*map(number, (0, 0, 0, 14, 224)), fields.listed([]), number(1)),  # no images
        number(1),
        *map(number, ends),
        fields.listed([]),
    )  # fmt: skip


def query_scalars(head_dim: int, hidden: int, heads: int) -> tuple[int, int]:
    """What gemma.cpp may divide queries by the root of."""
    return head_dim, hidden // heads


def read_own(file: SbsFile, part: str) -> dict[str, Any]:
    """A part of our own blob, empty where there is none. Raises CheckpointError."""
    if OWN not in file.blobs:
        return {}
    try:
        found = json.loads(file.blob(OWN).tobytes())[part]
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file.path}: blob {OWN!r} has no JSON object {part!r}; export the file again"
        )
    return found


def read_config(file: SbsFile) -> ModelConfig:
    """The config of the blob `config`. Raises CheckpointError for another architecture, ConfigError
    for a value that cannot be."""
    if CONFIG not in file.blobs:
        raise CheckpointError(
            f"{file.path}: blob {CONFIG!r} is missing: a file from before 2025, or none of "
            "gemma.cpp's; gemma.cpp's migrate_weights makes a new one"
        )
    data = Record(file.words(CONFIG), 0, f"{file.path}: blob {CONFIG!r}")
    data.skip(1)  # the family's version
    data.text()
    _expect_gemma_3(file, data.number())
    data.skip(2)  # wrapping, smallest type
    layers, hidden, rows, longest = (data.number() for _ in range(4))
    data.skip(1)
    fixed: dict[str, tuple[Any, Any]] = {
        "att_cap": (data.real(), 0), "final_cap": (data.real(), 0),
        "absolute_pe": (data.flag(), False),
    }  # fmt: skip
    data.skip(1)
    scale = data.number()
    shapes = data.listed(lambda: _read_layer(file, data.record("a layer")))
    windows = data.listed(data.number)
    data.skip(1)
    vision = data.record("vit_config")
    vision.skip(5)
    fixed["the number of vision layers"] = (vision.number(), 0)
    data.skip(1)
    ends = (data.signed(1), data.signed(1))
    for name, (found, expected) in fixed.items():
        _expect(file, name, found, expected)
    _expect(file, "the number of layers described", len(shapes), layers)
    _expect(file, "the number of attention windows", len(windows), layers)
    if not shapes or len(set(shapes)) > 1 or scale not in (_BY_KEY_SIZE, _BY_HIDDEN_SIZE):
        raise CheckpointError(
            f"{file.path}: has layers of different shapes, none, or a query scale of kind {scale}; "
            "expected a Gemma 3 text model"
        )
    shape = shapes[0]
    _expect(file, "model_dim of the layers", shape.hidden, hidden)
    windows_of_sliding = {window for window in windows if window != longest}
    if len(windows_of_sliding) > 1:
        raise CheckpointError(
            f"{file.path}: has attention windows of {sorted(windows_of_sliding)}, expected one size"
        )
    own = read_own(file, OWN_CONFIG)
    scalars = query_scalars(shape.head_dim, hidden, max(shape.heads, 1))
    try:
        return ModelConfig.from_dict({
            "model_type": "gemma3_text",
            "vocab_size": rows,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.inner,
            "sliding_window": windows_of_sliding.pop() if windows_of_sliding else longest,
            "layer_types": [FULL if window == longest else SLIDING for window in windows],
            "max_position_embeddings": longest,
            "rope_theta": ROPE_BASE,
            "rope_local_base_freq": LOCAL_ROPE_BASE,
            "query_pre_attn_scalar": scalars[scale],
            "rms_norm_eps": EPS,
            "bos_token_id": BOS,
            "eos_token_id": sorted(set(ends)),
            **{name: own[name] for name in OWN_FIELDS if name in own},
        })  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error


def _expect_gemma_3(file: SbsFile, model: int) -> None:
    if model not in (GEMMA3_1B, GEMMA3_270M):
        raise CheckpointError(
            f"{file.path}: is a {MODELS.get(model, f'model {model}')!r}, expected "
            f"{MODELS[GEMMA3_270M]!r} or {MODELS[GEMMA3_1B]!r} (a Gemma 3 text model)"
        )


def _read_layer(file: SbsFile, data: Record) -> LayerShape:
    hidden, _, inner, heads, key_value_heads, head_dim, _ = (data.number() for _ in range(7))
    fixed: dict[str, tuple[Any, Any]] = {"ff_biases": (data.flag(), False)}
    data.skip(2)
    fixed |= {
        "post_norm": (data.number(), _SCALED), "a layer's type": (data.number(), 0),
        "activation": (data.number(), 0), "post_qk": (data.number(), 0),
        "use_qk_norm": (data.flag(), True),
    }  # fmt: skip
    for name, (found, expected) in fixed.items():
        _expect(file, name, found, expected)
    return LayerShape(hidden, inner, heads, key_value_heads, head_dim)


def _expect(file: SbsFile, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise CheckpointError(
            f"{file.path}: {what} is {found}, but a Gemma 3 text model has {expected}"
        )
