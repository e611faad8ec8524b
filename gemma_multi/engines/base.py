"""The engine protocol: token ids in, logits out.

Design choices:
- An engine knows nothing of text, chat, sampling or files. The generation loop, written once,
  sits above it.
- What every session must get right (shapes, the context limit, which tokens have been read) is
  checked here, once; an engine implements `_forward`, `_rewind` and `_copy`.
- A session whose reading was interrupted is empty, never half-read.
- `truncate` always works. Where an engine cannot go back (a sliding window has moved on), the
  tokens that stay are read again, which is slower and still right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.checkpoint import Tensor
from gemma_multi.config import ModelConfig, check_context_length
from gemma_multi.errors import BackendError, ContextError, OptionError
from gemma_multi.quantization import quantize_checkpoint
from gemma_multi.quantization.tensor import quantize_tensor

Ids = Any  # anything NumPy reads as i32[T], or i32[B, T] for a batch


class Engine(ABC):
    """Weights in a framework's memory. Sessions on one engine share them."""

    name: str  # "mlx", "keras", "litert"
    precision: str  # of the weights: "float32", "bfloat16", "int4", "int8"
    compute: str  # of the activations: "float32", "bfloat16", "int8"
    device: str  # for people: "cpu", "gpu (Apple M3)"
    fixed_weights = False  # whether other weights need another engine

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.context_length = config.max_position_embeddings  # the most a session can hold

    def session(self, batch: int = 1, context_length: int | None = None) -> Session:
        """An empty conversation of `batch` rows that advance together."""
        length = self.check_context(context_length)
        if type(batch) is not int or batch < 1:
            raise OptionError(f"batch is {batch!r}, expected at least 1")
        return self._session(batch, length)

    def check_context(self, context_length: int | None) -> int:
        """The length a session may have: as asked for, or all the engine can hold."""
        return check_context_length(context_length, self.context_length)

    def trace(self, ids: Ids) -> np.ndarray:
        """The hidden states of one text, `i32[T]` -> `f32[L + 2, T, D]`: the scaled embedding,
        what each layer gives, and what the last norm makes of it. For finding the layer in which
        two engines part; see `gemma_multi.comparison`."""
        return self._trace(self.session()._checked(ids))

    @abstractmethod
    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a tensor as this engine computes with it: `f32`, in Hugging Face's layout.

        Of a norm, what activations are multiplied by: `1 + w`. Nothing here is read back from the
        checkpoint, so that two engines can be compared.
        """

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces some weights, dense or quantised, by name; dense ones go on the engine's own
        grid if it has one. Sessions begun before hold what the old weights made of their tokens.
        """
        for name, tensor in tensors.items():
            if self.precision in ("int4", "int8") and isinstance(tensor, np.ndarray):
                bits = int(self.precision.removeprefix("int"))
                tensor, _ = quantize_tensor(tensor.astype(np.float32), bits)
            self._assign(name, tensor)

    def _assign(self, name: str, tensor: Tensor) -> None:
        raise BackendError(f"backend {self.name!r} cannot change the weights it holds")

    @abstractmethod
    def _session(self, batch: int, context_length: int) -> Session: ...

    @abstractmethod
    def _trace(self, ids: np.ndarray) -> np.ndarray:
        """`i32[1, T]` -> `f32[L + 2, T, D]`."""


def choose_precision(
    checkpoint: Checkpoint, precision: str, fast: str
) -> tuple[Checkpoint, str, str]:
    """(the checkpoint to run, the precision of its weights, the type of the activations).

    `auto` keeps a quantised checkpoint as it is and gives a dense one the type the device is
    `fast` at. A dense checkpoint asked for as int4 is put on the portable grid.
    """
    if precision == "auto":
        precision = checkpoint.precision if checkpoint.is_quantized else fast
    elif precision in ("int4", "int8") and not checkpoint.is_quantized:
        bits = int(precision.removeprefix("int"))
        checkpoint, _ = quantize_checkpoint(checkpoint, bits, embedding_bits=bits)
    elif precision in ("int4", "int8") and checkpoint.precision != precision:
        raise OptionError(
            f"precision is {precision!r}, but the checkpoint is stored as {checkpoint.precision}; "
            "use 'auto', or quantise the original"
        )
    return checkpoint, precision, precision if precision in ("float32", "bfloat16") else fast


class Session(ABC):
    """What a model has read so far, and its key/value cache. Row by row `i32[batch, length]`."""

    def __init__(self, config: ModelConfig, batch: int, context_length: int) -> None:
        self.config = config
        self.batch = batch
        self.context_length = context_length
        self.ids = np.zeros((batch, 0), np.int32)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def prefill(self, ids: Ids) -> np.ndarray:
        """Reads tokens; the logits after the last one: `f32[B, V]`."""
        return self._read(self._checked(ids), every=False)[:, -1]

    def step(self, ids: Ids) -> np.ndarray:
        """Reads one token per row: `i32[B]` (or one int) -> `f32[B, V]`."""
        return self.prefill(np.asarray(ids).reshape(-1, 1))

    def score(self, ids: Ids) -> np.ndarray:
        """Reads tokens; the logits after each of them: `f32[B, T, V]`."""
        return self._read(self._checked(ids), every=True)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot truncate {self.length} tokens to {length}")
        if length == self.length:
            return
        kept = self.ids[:, :length]
        if self._rewind(length):
            self.ids = kept
        else:
            self._rewind(0)
            self.ids = self.ids[:, :0]
            if length:
                self._read(kept, every=False)

    def fork(self) -> Session:
        """A copy that goes its own way."""
        copy = self._copy()
        copy.ids = self.ids
        return copy

    def _read(self, ids: np.ndarray, every: bool) -> np.ndarray:
        return self._reading(ids, lambda: self._forward(ids, every))

    def _reading(self, ids: np.ndarray, forward: Callable[[], np.ndarray]) -> np.ndarray:
        """Runs what reads `ids`, whole or not at all."""
        try:
            result = forward()
            self.ids = np.concatenate([self.ids, ids], axis=1)
        except BaseException:  # an interrupt may leave half of it in the cache
            self._rewind(0)
            self.ids = self.ids[:, :0]
            raise
        return result

    def _checked(self, ids: Ids) -> np.ndarray:
        try:
            array = np.asarray(ids)
        except ValueError:
            raise OptionError("token ids have rows of different lengths") from None
        if array.ndim == 1 and self.batch == 1:
            array = array[None]
        if array.ndim != 2 or array.shape[0] != self.batch or not array.shape[1]:
            raise OptionError(
                f"token ids have shape {list(array.shape)}, expected [{self.batch}, T] with T "
                "at least 1"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise OptionError(f"token ids are {array.dtype}, expected whole numbers")
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            raise OptionError(
                f"token ids run from {array.min()} to {array.max()}, but the vocabulary has "
                f"{self.config.vocab_size}"
            )
        if self.length + array.shape[1] > self.context_length:
            raise ContextError(
                f"{self.length} tokens read and {array.shape[1]} more do not fit a context of "
                f"{self.context_length}; shorten the input or raise context_length"
            )
        return array.astype(np.int32)

    @abstractmethod
    def _forward(self, ids: np.ndarray, every: bool) -> np.ndarray:
        """Reads `i32[B, T]`; logits `f32[B, T, V]` if `every`, else of the last, `f32[B, 1, V]`."""

    @abstractmethod
    def _rewind(self, length: int) -> bool:
        """Goes back to `length` tokens if that can be done; going back to 0 always can."""

    @abstractmethod
    def _copy(self) -> Session:
        """A session of its own with the same cache."""
