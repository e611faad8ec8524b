"""Value channels mixed at random before they are rounded: the model stays the same function.

A random rotation spreads what is large over all channels, so that no weight of a group stands out
and no channel of a row (QuIP: Chee et al., 2023; QuaRot: Ashkboos et al., 2024). It needs a place
where one linear map meets the next, and Gemma 3 has one in each layer: what v writes into a value
head, attention only averages over positions, and o reads it. v's rows are rotated, o's columns
back. (Elsewhere norms with gains and the gate stand between.) The rotation is a Hadamard matrix
with random signs, which mixes all channels evenly; a seed fixes it.
"""

from __future__ import annotations

import numpy as np

from gemma_multi.decoder import Decoder, weight_name

SEED = 0


def rotate(decoder: Decoder) -> dict[str, np.ndarray]:
    """The weights of v and o that are others then: `f32`."""
    rng = np.random.default_rng(SEED)
    width = decoder.config.head_dim
    rotated: dict[str, np.ndarray] = {}
    for layer in range(decoder.config.num_hidden_layers):
        mix = _hadamard(width) * rng.choice(np.array([-1, 1], np.float32), width)
        v, o = (decoder.weights.of(layer, f"self_attn.{m}_proj") for m in "vo")
        rows = mix @ v.reshape(-1, width, v.shape[1])  # of each value head
        columns = o.reshape(-1, width) @ mix.T  # of each query head
        rotated[weight_name(layer, "self_attn.v_proj")] = rows.reshape(v.shape)
        rotated[weight_name(layer, "self_attn.o_proj")] = columns.reshape(o.shape)
    return rotated


def _hadamard(width: int) -> np.ndarray:
    """An orthogonal `f32[width, width]` whose entries are all of one size; where `width` is no
    power of two, in blocks of the largest one that divides it."""
    block = width & -width
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(width // block, dtype=np.float32), matrix / np.float32(np.sqrt(block)))
