"""Gemma 3's decoder in NumPy, a layer at a time: the model to look inside of.

Engines hide what goes into each matrix, and calibration is about nothing else: it asks for the
input of one matrix, changes the matrix, and goes on with what it then gives. NumPy is there on
every machine, its products run on all cores, and one text is small enough to stay in the cache.

The four inputs of a layer, in the order in which they come, have names of their own (`INPUTS`);
`Decoder` goes from one to the next. Activations are `f32[T, D]` of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import EMBEDDING, ModelConfig

ATTENTION, ATTENDED, FEEDFORWARD, GATED = "attention", "attended", "feedforward", "gated"
# what goes into which matrices
INPUTS = {
    ATTENTION: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ATTENDED: ("self_attn.o_proj",),
    FEEDFORWARD: ("mlp.gate_proj", "mlp.up_proj"),
    GATED: ("mlp.down_proj",),
}
# inputs of matrices whose output goes through a norm: which
NORMED = {ATTENDED: "post_attention_layernorm", GATED: "post_feedforward_layernorm"}
LAST_NORM = "model.norm.weight"
See = Callable[[str, np.ndarray], None]  # (a name in INPUTS, its value)
_HEAD_ROWS = 64  # positions whose logits are there at once
_INT8_STEPS = 255


def weight_name(layer: int, module: str) -> str:
    """The tensor of a layer's module: `weight_name(0, "mlp.up_proj")`."""
    return f"model.layers.{layer}.{module}.weight"


class Weights:
    """A checkpoint's weights as they are multiplied with: `f32`, norms as `1 + w`.

    Each is made once and kept, but for `rows`; `change` puts another in its place.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._held: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._held:
            weight = self._checkpoint.weight(name).astype(np.float32, copy=False)
            self._held[name] = 1 + weight if weight.ndim == 1 else weight
        return self._held[name]

    def of(self, layer: int, module: str) -> np.ndarray:
        return self[weight_name(layer, module)]

    def rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows of a matrix; of one that is packed, only those are made, and not kept."""
        if name not in self._held and self._checkpoint.tensors.infos[name].is_packed:
            return self._checkpoint.rows(name, rows)
        return self[name][rows]

    def change(self, name: str, weight: np.ndarray) -> None:
        self._held[name] = weight

    def branch(self, changes: Mapping[str, np.ndarray] | None = None) -> Weights:
        """Weights that are the same but for `changes`; what is changed later, only there."""
        copy = Weights(self._checkpoint)
        copy._held = {**self._held, **(changes or {})}
        return copy

    def alone(self, name: str) -> Weights:
        """Of all that is held, this one."""
        copy = Weights(self._checkpoint)
        copy._held = {key: held for key, held in self._held.items() if key == name}
        return copy


@dataclass(frozen=True)
class Decoder:
    """The functions between one input and the next, for one model's weights."""

    config: ModelConfig
    weights: Weights
    int8_activations: bool = False  # round each matrix's input, as XNNPACK and phones do

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.weights.rows(EMBEDDING, ids) * np.float32(self.config.embedding_scale)

    def linear(self, layer: int, module: str, x: np.ndarray) -> np.ndarray:
        return self.rounded(x) @ self.weights.of(layer, module).T

    def norm(self, layer: int, module: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.weights.of(layer, module), self.config.rms_norm_eps)

    def attention_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        return self.norm(layer, "input_layernorm", x)

    def attended(self, layer: int, n: np.ndarray) -> np.ndarray:
        """What the heads gather: the input of the output projection, `f32[T, H * d]`."""
        c, length = self.config, len(n)
        q, k, v = (
            self.linear(layer, module, n).reshape(length, -1, c.head_dim)
            for module in INPUTS[ATTENTION]
        )
        sliding = c.is_sliding(layer)
        q = rotate(self.norm(layer, "self_attn.q_norm", q), c, sliding)
        k = rotate(self.norm(layer, "self_attn.k_norm", k), c, sliding)
        past = np.arange(length)[:, None] - np.arange(length)
        hidden = (past < 0) | (sliding & (past >= c.sliding_window))
        share = c.num_attention_heads // c.num_key_value_heads
        out = np.empty_like(q)
        for head in range(c.num_attention_heads):
            scores = (q[:, head] * np.float32(c.query_scale)) @ k[:, head // share].T
            scores[hidden] = -np.inf
            out[:, head] = softmax(scores) @ v[:, head // share]
        return out.reshape(length, -1)

    def feedforward_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        return self.norm(layer, "pre_feedforward_layernorm", x)

    def gated(self, layer: int, n: np.ndarray) -> np.ndarray:
        """The input of the down projection, `f32[T, F]`."""
        return gelu(self.linear(layer, "mlp.gate_proj", n)) * self.linear(layer, "mlp.up_proj", n)

    def output(self, layer: int, kind: str, inside: np.ndarray) -> np.ndarray:
        """What the last matrix of a block makes of its input, one of `NORMED`."""
        (module,) = INPUTS[kind]
        return self.linear(layer, module, inside)

    def add(self, layer: int, kind: str, x: np.ndarray, output: np.ndarray) -> np.ndarray:
        """The stream behind that block."""
        return x + self.norm(layer, NORMED[kind], output)

    def layer(self, layer: int, x: np.ndarray, see: See | None = None) -> np.ndarray:
        """What comes after it; `see` is shown each input on the way."""
        n = self.attention_input(layer, x)
        a = self.attended(layer, n)
        x = self.add(layer, ATTENDED, x, self.output(layer, ATTENDED, a))
        m = self.feedforward_input(layer, x)
        h = self.gated(layer, m)
        if see is not None:
            for kind, value in zip(INPUTS, (n, a, m, h), strict=True):
                see(kind, value)
        return self.add(layer, GATED, x, self.output(layer, GATED, h))

    def last_norm(self, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.weights[LAST_NORM], self.config.rms_norm_eps)

    def head(self, hidden: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """The logits of some positions at a time: (which, `f32[n, V]`)."""
        for start in range(0, len(hidden), _HEAD_ROWS):
            part = slice(start, min(start + _HEAD_ROWS, len(hidden)))
            yield part, self.rounded(hidden[part]) @ self.weights[EMBEDDING].T

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Of one text, after each of its tokens: `f32[T, V]`."""
        x = self.embed(ids)
        for layer in range(self.config.num_hidden_layers):
            x = self.layer(layer, x)
        return np.concatenate([logits for _, logits in self.head(self.last_norm(x))])

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """As a matrix is given it."""
        return round_to_int8(x) if self.int8_activations else x


def round_to_int8(x: np.ndarray) -> np.ndarray:
    """Each row on 256 steps between its least and its greatest value, zero among them."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = np.maximum((high - low) / np.float32(_INT8_STEPS), np.float32(1e-30))
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, _INT8_STEPS) - zero) * step


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """`gain` is `1 + w`."""
    square = np.einsum("...d,...d->...", x, x)[..., None] / np.float32(x.shape[-1])
    return x * (gain / np.sqrt(square + np.float32(eps)))


def rotate(x: np.ndarray, config: ModelConfig, sliding: bool, start: int = 0) -> np.ndarray:
    """`x f32[T, H, d]` turned by its positions, the first of which is `start`."""
    theta = config.rope_local_theta if sliding else config.rope_theta
    factor = 1.0 if sliding else config.rope_scaling_factor
    half = config.head_dim // 2
    speed = theta ** (-np.arange(half) / half) / factor
    angle = (np.arange(start, start + len(x))[:, None] * speed)[:, None]
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in place."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in place."""
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form."""
    inner = x * x
    inner *= np.float32(0.044715)
    inner += 1
    inner *= x
    inner *= np.float32(0.7978845608028654)
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= np.float32(0.5)
    return inner
