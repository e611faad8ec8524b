"""The residual stream at a scale that float16 holds, chosen by what the model computes.

float16 ends at 65,504, and Gemma 3's residual stream does not: 104,000 in the 270M, at the first
token of any text, where a few channels are a thousand times the others. What a layer computes
inside stays small. `ModelConfig` says why the stream may be carried at another scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import EMBEDDING, READ_STREAM
from gemma_multi.decoder import Decoder, Weights
from gemma_multi.errors import CheckpointError

LARGEST = 65_504.0  # of float16
_ROOM = 8  # how far below that what was seen is to stay: other texts are larger
_TOKENS = 160
# the shape of what models are asked: prose, a list, code, figures, other scripts
_TEXT = """Once upon a time there was a lighthouse keeper who answered every letter he got.
- milk, 2 l: $3.10
- bread
def area(width, height):
    return width * height  # in m²
Les enfants jouent dans le jardin. Der Zug fährt um 7:45 Uhr ab. 東京は日本の首都です。
Москва, 1991. السلام عليكم! 1 + 1 = 2; 3.14159 26535 89793 23846
"""


@dataclass(frozen=True)
class Range:
    """The largest absolute values."""

    stream: float  # of the residual stream, at the scale 1
    inside: float  # of what layers compute before a norm makes it small again

    @property
    def residual_scale(self) -> float:
        """The power of two nearest to 1, and not above it, at which the stream stays eight times
        below float16's largest number."""
        most = LARGEST / _ROOM / max(self.stream, 1e-30)
        return min(1.0, 2.0 ** math.floor(math.log2(most)))


def rescaled(checkpoint: Checkpoint) -> Checkpoint:
    """The same model, and what it says in float32 to the last bit, with the residual stream at a
    scale that float16 holds. Raises CheckpointError for one that computes no numbers."""
    return _at(checkpoint, measure_range(checkpoint))


def fit_float16(checkpoint: Checkpoint) -> Checkpoint:
    """A model whose activations float16 holds: as it is, if its config has a residual scale, else
    `rescaled`. Raises CheckpointError where that is not enough."""
    if checkpoint.config.residual_scale != 1:
        return checkpoint
    found = measure_range(checkpoint)
    if found.inside > LARGEST / _ROOM:
        raise CheckpointError(
            f"its activations reach {found.inside:,.0f} inside a layer, too near to float16's "
            f"largest number, {LARGEST:,.0f}; use precision 'bfloat16' or 'float32'"
        )
    return _at(checkpoint, found)


def measure_range(checkpoint: Checkpoint) -> Range:
    """Reads a short text: a second or two for Gemma 3 270M. Raises CheckpointError."""
    tokenizer, config = checkpoint.tokenizer, checkpoint.config
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(_TEXT)][:_TOKENS])
    ids = ids[ids < config.vocab_size]  # some tokenizers have more pieces than there are rows
    seen = _Watched(config, Weights(checkpoint))
    with np.errstate(all="ignore"):  # what is not finite is refused
        x = checkpoint.rows(EMBEDDING, ids).astype(np.float32) * np.float32(config.embedding_scale)
        for layer in range(config.num_hidden_layers):
            # weights of its own, so that those of one layer are there at a time
            x = replace(seen, weights=Weights(checkpoint)).layer(layer, x)
        seen.last_norm(x)
    found = Range(float(np.max(seen.stream)), float(np.max(seen.inside)))  # a NaN stays one
    if not (math.isfinite(found.stream) and math.isfinite(found.inside)):
        raise CheckpointError("its activations are not finite; its weights are damaged")
    return found


@dataclass(frozen=True)
class _Watched(Decoder):
    """Notes the largest of all that matrices and norms are given and give."""

    stream: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)

    def linear(self, layer: int, module: str, x: np.ndarray) -> np.ndarray:
        self.inside.append(_largest(x))
        y = super().linear(layer, module, x)
        self.inside.append(_largest(y))
        return y

    def norm(self, layer: int, module: str, x: np.ndarray) -> np.ndarray:
        if module in READ_STREAM:
            self.stream.append(_largest(x))
        return super().norm(layer, module, x)

    def last_norm(self, x: np.ndarray) -> np.ndarray:
        self.stream.append(_largest(x))
        y = super().last_norm(x)
        self.inside.append(_largest(y))
        return y


def _at(checkpoint: Checkpoint, found: Range) -> Checkpoint:
    return checkpoint.replace(config=checkpoint.config.replace(residual_scale=found.residual_scale))


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())
