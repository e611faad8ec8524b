"""Calibration: an int4 model that says what the original says, made by looking at what it computes.

`texts` collects text, the caller's or what the model writes itself (`writing`); `rotating` mixes
value channels, `smoothing` evens all channels out and `arranging` puts them in order; `walk` goes
through the layers and rounds (`rounding`) each matrix on the inputs that it will have; `measure`
says what was won. All of it is NumPy (`decoder`), so it needs no backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from gemma_multi.calibration.arranging import arrange
from gemma_multi.calibration.measure import Said, measure
from gemma_multi.calibration.rotating import SEED, rotate
from gemma_multi.calibration.smoothing import sample_inputs, smooth
from gemma_multi.calibration.texts import SELF, check_source, collect, is_self
from gemma_multi.calibration.walk import Walk
from gemma_multi.checkpoint import Checkpoint, Tensor
from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.decoder import Decoder, Weights
from gemma_multi.errors import OptionError
from gemma_multi.machine import available_cores, physical_memory
from gemma_multi.progress import Report, silent
from gemma_multi.quantization.int4 import GROUP_SIZE
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor, quantize_tensor
from gemma_multi.rows import Data
from gemma_multi.transforms import (
    Calibration,
    QuantizationReport,
    original,
    quantize_checkpoint,
    rescaled,
    tensor_error,
)

__all__ = ["SELF", "calibrate", "check_source", "is_self"]

# of the whole, by what is done; the bar is nearly even with them on Gemma 3 270M
_WRITING, _WALKING, _EMBEDDING = 38, 45, 10
_TOTAL = 10_000
_ACTIVATIONS = 1_500_000_000  # bytes, of some ten thousand tokens


def calibrate(
    checkpoint: Checkpoint, text: str | Data = SELF, embedding_bits: int = 4,
    progress: Report = silent,
) -> tuple[Checkpoint, QuantizationReport]:  # fmt: skip
    """(the checkpoint in int4, with a residual scale that float16 holds; what that did to it).

    text: rows as `finetune` takes them, or "self" for what the model writes.

    Raises CheckpointError for a checkpoint that is int4 already or whose activations are not
    finite, DataError for bad rows or too few, OptionError for what is no source of text.
    """
    check_source("calibrate", text)
    checkpoint = original(checkpoint)
    plain = quantize_checkpoint(checkpoint, 4, embedding_bits)[0]  # refuses odd widths and bits
    config = checkpoint.config
    _check_memory(config)
    steps = _Steps(progress)
    with ThreadPoolExecutor(available_cores()) as pool:
        decoder = Decoder(config, Weights(checkpoint))
        texts = collect(text, decoder, checkpoint.tokenizer, pool, steps.part(_WRITING))
        # a thread for each core, each with products of its own: many small ones are done sooner
        # so than one after another by all cores
        with threadpool_limits(1):
            # three changes, one upon the other, and after each the same function; in the end
            # nothing holds the weights as they were
            evened = rotate(decoder)
            decoder = Decoder(config, decoder.weights.branch(evened))
            evened |= smooth(decoder, sample_inputs(decoder, texts.fitted, pool), pool)
            decoder = Decoder(config, decoder.weights.branch(evened))
            evened |= arrange(decoder, hidden_channels=embedding_bits == 8)
            decoder = Decoder(config, decoder.weights.branch(evened))
            walk = Walk(decoder, texts.fitted, pool)
            walk.layers(steps.part(_WALKING))
            embedding = (
                walk.round_embedding()
                if embedding_bits == 4
                else quantize_tensor(decoder.weights[EMBEDDING], embedding_bits)[0]
            )
            steps.part(_EMBEDDING)(1, 1)
            rounded = {**walk.rounded, EMBEDDING: embedding}
            result = _result(checkpoint, evened, rounded, embedding_bits, texts.source)
            errors = tuple(
                tensor_error(name, rounded[name], decoder.weights[name])
                for name, shape in config.tensor_shapes().items() if len(shape) == 2
            )  # fmt: skip
            reference = Said.by(decoder, texts.held_out, pool)
            del decoder, evened, walk
            others = [
                Said.by(Decoder(config, Weights(other)), texts.held_out, pool)
                for other in (result, plain)
            ]
            perplexity, (fitted, simple) = measure(reference, others, texts.held_out, pool)
    progress(_TOTAL, _TOTAL)
    worth = Calibration(texts.source, texts.tokens, perplexity, simple, fitted)
    return rescaled(result), QuantizationReport(errors, calibration=worth)


def _result(
    checkpoint: Checkpoint, evened: Mapping[str, np.ndarray],
    rounded: Mapping[str, QuantizedTensor], embedding_bits: int, source: str,
) -> Checkpoint:  # fmt: skip
    """The checkpoint with its matrices rounded and its norms as they are by now, in bfloat16."""
    norms: dict[str, Tensor] = {}
    for name, shape in checkpoint.config.tensor_shapes().items():
        if len(shape) == 1:
            known = evened.get(name)
            weight = checkpoint.weight(name) if known is None else known - 1
            norms[name] = weight.astype(BFLOAT16)
    how = (
        f"quantised to int4 in groups of {GROUP_SIZE}, embedding int{embedding_bits}, channels "
        f"rotated, evened out and rearranged, calibrated on {source}"
    )
    result = checkpoint.with_tensors({**norms, **rounded}, how)
    return result.replace(provenance=replace(result.provenance, channels=_order_of(evened)))


def _order_of(evened: Mapping[str, np.ndarray]) -> str:
    """A name for how channels were rotated, evened out and arranged; norms show the last two."""
    norms = (weight for _, weight in sorted(evened.items()) if weight.ndim == 1)
    digest = hashlib.sha256(f"rotated {SEED}".encode())
    digest.update(b"".join(map(np.ndarray.tobytes, norms)))
    return digest.hexdigest()[:16]


class _Steps:
    """Parts of one bar, one after another."""

    def __init__(self, progress: Report) -> None:
        self._progress, self._end = progress, 0

    def part(self, size: int) -> Report:
        """A report for what takes `size` percent of the whole."""
        begin = self._end
        self._end += size * _TOTAL // 100
        return lambda done, total: self._progress(
            begin + size * _TOTAL // 100 * done // max(total, 1), _TOTAL
        )


def _check_memory(config: ModelConfig) -> None:
    """Raises OptionError where the machine has less memory than the weights alone will take."""
    matrices = config.num_parameters - config.num_embedding_parameters
    needed = 4 * (config.num_parameters + 2 * matrices) + _ACTIVATIONS
    have = physical_memory()
    if have is not None and needed > have:
        raise OptionError(
            f"calibration needs about {needed / 1e9:.0f} GB of memory, and this machine has "
            f"{have / 1e9:.0f}; give calibrate=None to round without it"
        )
