"""How large a model's activations get, and the scale of the residual stream that float16 needs.

float16 ends at 65,504, and Gemma 3's residual stream does not: 104,000 in the 270M, at the first
token of any text, where a few channels are a thousand times the others. What a layer computes
inside stays small. `ModelConfig` says why the stream may be carried at another scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gemma_multi.calibration.decoder import Decoder, Weights
from gemma_multi.checkpoint import Checkpoint
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
    scale = measure_range(checkpoint).residual_scale
    return checkpoint.replace(config=checkpoint.config.replace(residual_scale=scale))


def measure_range(checkpoint: Checkpoint) -> Range:
    """Reads a short text: some two seconds for Gemma 3 270M. Raises CheckpointError."""
    tokenizer, config = checkpoint.tokenizer, checkpoint.config
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(_TEXT)][:_TOKENS])
    ids = ids[ids < config.vocab_size]  # some tokenizers have more pieces than there are rows
    decoder = Decoder(config, Weights(checkpoint))
    stream, inside = [], [0.0]
    with np.errstate(all="ignore"):  # what is not finite is refused
        x = decoder.embed(ids)
        stream.append(_largest(x))
        for layer in range(config.num_hidden_layers):
            attended = decoder.attended(layer, decoder.attention_input(layer, x))
            inside.append(_largest(attended))
            inside.append(_largest(decoder.linear(layer, "self_attn.o_proj", attended)))
            x = decoder.after_attention(layer, x, attended)
            stream.append(_largest(x))
            gated = decoder.gated(layer, decoder.feedforward_input(layer, x))
            inside.append(_largest(gated))
            inside.append(_largest(decoder.linear(layer, "mlp.down_proj", gated)))
            x = decoder.after_feedforward(layer, x, gated)
            stream.append(_largest(x))
    found = Range(float(np.max(stream)), float(np.max(inside)))  # a NaN stays one
    if not (math.isfinite(found.stream) and math.isfinite(found.inside)):
        raise CheckpointError("its activations are not finite; its weights are damaged")
    return found


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())
