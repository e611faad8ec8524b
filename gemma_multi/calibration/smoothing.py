"""Channels made even before they are rounded: the model stays the same function.

Phones, and XNNPACK on processors, round a matrix's input to 256 steps between a row's least and
greatest value, so one channel that is much larger than the rest leaves them few. A factor a
channel is therefore moved from what makes the input into the columns that read it (SmoothQuant:
Xiao et al., 2023):

| input of | made smaller in |
| --- | --- |
| q, k, v | the gain of the norm in front |
| o | v's rows; query heads that share a key/value head share its factors |
| gate, up | the gain of the norm in front |
| down | up's rows |

The factors are fitted, not a rule of thumb. The error of a product is a row's step squared times
the sum of its matrix's squared columns; the first falls and the second grows with the factor of a
large channel. Where they balance, a channel's share in being a row's greatest value is its
column's share of the matrix. Uneven columns cost int4 groups as well, so that has a part in it;
`arranging` undoes most of the rest.

The head's input stays as it is: its factors would have to be undone behind the embedding, which no
other program's Gemma does.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from gemma_multi.decoder import (
    ATTENDED,
    ATTENTION,
    FEEDFORWARD,
    GATED,
    INPUTS,
    NORMED,
    Decoder,
    weight_name,
)
from gemma_multi.errors import CheckpointError
from gemma_multi.quantization.int4 import GROUP_SIZE
from gemma_multi.quantization.tensor import BFLOAT16

_NORMS = {ATTENTION: "input_layernorm", FEEDFORWARD: "pre_feedforward_layernorm"}
_MAKERS = {ATTENDED: "self_attn.v_proj", GATED: "mlp.up_proj"}
_SAMPLES = 1024  # rows of each input that factors are fitted to
_INT4_PART = 10.0  # what the error of int4 weights counts beside that of int8 activations
_STEPS, _RATE = 30, 0.5
_MOST = 5.5  # of a factor's logarithm, either way
_TINY = np.float32(1e-20)
_LARGEST = 1e15  # of an activation; what is beyond cannot be squared and summed in float32

Inputs = dict[tuple[int, str], np.ndarray]  # (layer, input) -> f32[N, K]


def sample_inputs(decoder: Decoder, texts: Sequence[np.ndarray], pool: Executor) -> Inputs:
    """Rows of each input, evenly taken from these texts; of each text its first, which is like no
    other. Raises CheckpointError where they are not finite."""
    every = max(1, sum(map(len, texts)) // _SAMPLES)

    def of_text(ids: np.ndarray) -> Inputs:
        found: Inputs = {}
        taken = np.arange(0, len(ids), every)
        x = decoder.embed(ids)
        for layer in range(decoder.config.num_hidden_layers):

            def keep(kind: str, value: np.ndarray, layer: int = layer) -> None:
                found[layer, kind] = value[taken]

            x = decoder.layer(layer, x, keep)
        return found

    with np.errstate(all="ignore"):  # what is not finite is refused
        parts = list(pool.map(of_text, texts))
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for (layer, kind), rows in whole.items():
        if not np.abs(rows).max() < _LARGEST:  # which no number that is none is
            raise CheckpointError(
                f"tensor {weight_name(layer, INPUTS[kind][0])!r} is given activations that are not "
                "finite, or nearly so; the model cannot be calibrated, and its answers would be no "
                "better"
            )
    return whole


def smooth(decoder: Decoder, inputs: Inputs, pool: Executor) -> dict[str, np.ndarray]:
    """The weights that change when inputs are made even: `f32`, norms as `1 + w`."""
    weights = decoder.weights
    changed: dict[str, np.ndarray] = {}

    def now(name: str) -> np.ndarray:
        return changed.get(name, weights[name])

    fitted = pool.map(lambda item: _factors(decoder, *item), inputs.items())
    for (layer, kind), factor in zip(inputs, fitted, strict=True):
        if kind in _NORMS:
            name = weight_name(layer, _NORMS[kind])
            before = now(name)
            # as it is stored: the columns then take up exactly what the gain gives away
            gain = 1 + (before / factor - 1).astype(BFLOAT16).astype(np.float32)
            changed[name] = gain = np.where(gain == 0, before, gain)
            factor = np.where(gain == 0, 1, before / np.where(gain == 0, 1, gain))
        else:
            name = weight_name(layer, _MAKERS[kind])
            rows = factor if kind == GATED else _by_head(decoder, factor)[:, 0].ravel()
            changed[name] = now(name) / rows[:, None]
        for module in INPUTS[kind]:
            name = weight_name(layer, module)
            changed[name] = now(name) * factor
    return changed


def _by_head(decoder: Decoder, values: np.ndarray) -> np.ndarray:
    """`[H * d]` -> `[KV, H / KV, d]`: the query heads of each key/value head."""
    c = decoder.config
    return values.reshape(c.num_key_value_heads, -1, c.head_dim)


def _factors(decoder: Decoder, key: tuple[int, str], x: np.ndarray) -> np.ndarray:
    """What each channel of an input is to be divided by: `f32[K]`, their mean about one."""
    layer, kind = key
    readers = [decoder.weights.of(layer, module) for module in INPUTS[kind]]
    size = np.sum([np.einsum("nk,nk->k", w, w) for w in readers], axis=0) + _TINY
    matters = np.ones(len(x), np.float32)
    if kind in NORMED:  # what comes out is divided by its length
        y = x @ readers[0].T
        matters = 1 / (np.einsum("nd,nd->n", y, y) + _TINY)
    matters /= matters.sum()
    x = np.abs(x)
    power = matters @ (x * x) + _TINY
    logs = np.zeros(x.shape[1], np.float32)
    # a row's fourth-power mean stands for its greatest value, which has no slope
    for _ in range(_STEPS):
        even = x * np.exp(-logs)
        greatest = even.max(1, keepdims=True) + _TINY
        shares = np.square(np.square(even / greatest))
        total = shares.sum(1, keepdims=True) + _TINY
        steps = matters * (greatest * np.sqrt(np.sqrt(total)))[:, 0] ** 2
        being_greatest = (steps / steps.sum()) @ (shares / total)
        columns = size * np.exp(2 * logs)
        columns /= columns.sum()
        slope, bend = columns - being_greatest, columns + being_greatest
        group_columns = (size * np.exp(2 * logs)).reshape(-1, GROUP_SIZE)
        group_power = (power * np.exp(-2 * logs)).reshape(-1, GROUP_SIZE)
        up = group_columns * group_power.sum(1, keepdims=True)
        down = group_power * group_columns.sum(1, keepdims=True)
        slope += _INT4_PART * (up - down).ravel() / up.sum()
        bend += _INT4_PART * (up + down).ravel() / up.sum()
        move = _RATE * slope / (bend + _TINY)
        if kind == ATTENDED:
            heads = _by_head(decoder, move)
            move = np.broadcast_to(heads.mean(1, keepdims=True), heads.shape).ravel()
        logs = np.clip(logs - move - (logs - move).mean(), -_MOST, _MOST)
    return np.exp(logs).astype(np.float32)
