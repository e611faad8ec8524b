"""The engine protocol: token ids in, numbers out.

Design choices:
- An engine knows nothing of text, chat, sampling or files. The generation loop, written once,
  sits above it.
- A session is one conversation. Many advance together through `Engine.read`, each by as many
  tokens as it is given: in one batch on an engine that gains by it, else they take turns.
- `want` (`wants`) says what a read is for, so that nothing else is computed: over a vocabulary of
  262,144 tokens the head costs more than some layers. What comes back stays in the framework's
  memory, as its own array, until `Engine.numpy` (or `Session.read`, which is one session and NumPy)
  brings it over.
- An engine may choose tokens on its device, many steps at a time. They are those of the plain
  loop (`ahead`), which serves every engine.
- What every session must get right (shapes, the context limit, which tokens have been read) is
  checked here, once; an engine implements `_forward`, `_rewind` and `_copy` of its sessions.
- A session whose reading was interrupted is empty, never half-read.
- `truncate` always works: by `SPARE` positions at once, and where an engine cannot go back
  further (a sliding window has moved on), by reading the tokens that stay again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from functools import partial
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Tensor
from gemma_multi.config import ModelConfig, check_context_length
from gemma_multi.engines.ahead import part, read_chosen
from gemma_multi.engines.caches import MOST_TOGETHER, SPARE
from gemma_multi.engines.wants import ALL, LAST, NOTHING, Chosen, Rows, Wanted
from gemma_multi.errors import BackendError, ContextError, OptionError
from gemma_multi.quantization.tensor import BFLOAT16, SFP8, quantize_tensor, sfp8_tensor

Ids = Any  # anything NumPy reads as i32[T]
Array = Any  # of the engine's framework


# Logits of two tokens this close are a tie: the same model, its sums in another order, may choose
# either. By the type of the activations; LiteRT rounds to int8 each row of what a matrix is given.
TIES = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5, "int8": 1.0}


class Engine(ABC):
    """Weights in a framework's memory. Sessions on one engine share them."""

    name: str  # of its backend
    precision: str  # of the weights: "float32", "bfloat16", "sfp8", "int4", "int8"
    compute: str  # of the activations: one of `TIES`
    device: str  # "cpu" or "gpu"
    gpu: str = ""  # its name and what it lacks, for people
    fixed_weights = False  # whether other weights need another engine
    # whether the logits of some guessed tokens cost less than as many single steps from the first
    # time on; one that compiles for them may not win that back in a text
    guesses_pay = False
    # sessions that suit one read: past it a batch gains little, and takes more memory; 1 where they
    # cost as much as one after another
    rows_at_a_time = 1
    # tokens that are chosen on the device in about the time that a few take with logits coming to
    # the host; 1 where nothing is gained, at most SPARE
    steps_ahead = 1

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.context_length = config.max_position_embeddings  # the most a session can hold

    @property
    def tie(self) -> float:
        """Logits of two tokens this close are a tie."""
        return TIES[self.compute]

    def session(self, context_length: int | None = None) -> Session:
        """An empty conversation."""
        return self._session(self.check_context(context_length))

    def check_context(self, context_length: int | None) -> int:
        """The length a session may have: as asked for, or all the engine can hold."""
        return check_context_length(context_length, self.context_length)

    def read(
        self,
        sessions: Sequence[Session],
        ids: Sequence[Ids],
        want: Wanted | Sequence[Wanted] = LAST,
    ) -> list[Array | None]:
        """Advances each session by its own tokens, at least one; what is wanted of each.

        `want` is one for all, or one for each. Nothing is read if anything is refused: ids outside
        the vocabulary, a context that would overflow, a session that is there twice.
        """
        wants: list[Wanted] = (
            list(want) if isinstance(want, list | tuple) else [want] * len(sessions)  # type: ignore[list-item]
        )
        if not len(sessions) == len(ids) == len(wants):
            raise OptionError(
                f"{len(sessions)} sessions, {len(ids)} rows of ids and {len(wants)} wants; "
                "expected as many of each"
            )
        for session, one in zip(sessions, wants, strict=True):
            if session.engine is not self:
                raise OptionError("a session of another engine cannot be read on this one")
            if not isinstance(one, Wanted):
                raise OptionError(f"want is {one!r}, expected a Want, Rows or Chosen")
        if len({id(session) for session in sessions}) < len(sessions):
            raise OptionError("a session is there twice; it can read one row at a time")
        checked = [
            session._checked(row, one)
            for session, row, one in zip(sessions, ids, wants, strict=True)
        ]
        return self._read(sessions, checked, wants)

    def _read(
        self, sessions: Sequence[Session], ids: Sequence[np.ndarray], wants: Sequence[Wanted]
    ) -> list[Array | None]:
        """Where a batch pays, those that read one token in one, and those that read several in
        another, where each is padded to the longest; what is left one after the other. Those that
        want tokens chosen have batches of their own."""
        found: dict[int, Array | None] = {}
        chosen = [i for i, want in enumerate(wants) if isinstance(want, Chosen)]
        groups: list[tuple[Any, list[int]]] = [(partial(read_chosen, self), chosen)]
        for one in (True, False):
            alike = [
                i for i, row in enumerate(ids)
                if (len(row) == 1) is one and wants[i] is not ALL and i not in chosen
            ]  # fmt: skip
            if self.rows_at_a_time > 1 and len(alike) > 1:
                groups.append((self._read_together, alike))
        for read, alike in groups:
            for begin in range(0, len(alike), MOST_TOGETHER):
                places = alike[begin : begin + MOST_TOGETHER]
                rows = part(sessions, places)
                try:
                    results = read(rows, part(ids, places), part(wants, places))
                except BaseException:  # an interrupt may leave half of it in the caches
                    for session in rows:
                        session._forget()
                    raise
                found |= dict(zip(places, results, strict=True))
        for i, session in enumerate(sessions):
            if i not in found:
                found[i] = session._reading(ids[i], wants[i])
        return [found[i] for i in range(len(sessions))]

    def _read_together(
        self, sessions: Sequence[Any], ids: Sequence[np.ndarray], wants: Sequence[Wanted]
    ) -> list[Array | None]:
        """The same in one batch, of rows of unequal lengths, where `rows_at_a_time` is over 1.
        Nobody wants ALL or Chosen."""
        raise NotImplementedError

    def _may_run_ahead(self, session: Any, count: int) -> bool:
        """Whether `_run_ahead` can go on from a session that is to read `count` tokens before."""
        return False

    def _run_ahead(
        self, sessions: Sequence[Any], tokens: np.ndarray, wants: Sequence[Chosen]
    ) -> list[np.ndarray]:
        """Chooses on the device what is `Chosen` for each, after one token each that was not read
        yet, `i32[B]`. The sessions have noted it (`settle`)."""
        raise NotImplementedError

    def numpy(self, array: Array) -> np.ndarray:
        """What `read` gave, as NumPy: waits for it, and copies it from the device."""
        return np.asarray(array)

    def trace(self, ids: Ids) -> np.ndarray:
        """The hidden states of one text, `i32[T]` -> `f32[L + 2, T, D]`: the scaled embedding,
        what each layer gives, and what the last norm makes of it, at the model's own scale even if
        the residual stream is carried at another. For finding the layer in which two engines part;
        see `gemma_multi.comparison`."""
        *stream, normed = self._trace(self.session()._checked(ids, NOTHING))
        return np.stack([*(x / np.float32(self.config.residual_scale) for x in stream), normed])

    @abstractmethod
    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a tensor as this engine computes with it: `f32`, in Hugging Face's layout.

        Of a norm, what activations are multiplied by: `1 + w`. Nothing here is read back from the
        checkpoint, so that two engines can be compared.
        """

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces some weights, dense or quantised, by name; dense ones go on the engine's own
        grid if it has one (of which norms are bfloat16). Sessions begun before hold what the old
        weights made of their tokens.
        """
        for name, tensor in tensors.items():
            if self.precision in ("int4", "int8") and isinstance(tensor, np.ndarray):
                bits = int(self.precision.removeprefix("int"))
                tensor = (
                    quantize_tensor(tensor.astype(np.float32), bits)[0]
                    if tensor.ndim == 2
                    else tensor.astype(BFLOAT16)
                )
            elif self.precision == SFP8 and isinstance(tensor, np.ndarray) and tensor.ndim == 2:
                tensor = sfp8_tensor(tensor)
            self._assign(name, tensor)

    def _assign(self, name: str, tensor: Tensor) -> None:
        raise BackendError(f"backend {self.name!r} cannot change the weights it holds")

    @abstractmethod
    def _session(self, context_length: int) -> Session: ...

    @abstractmethod
    def _trace(self, ids: np.ndarray) -> np.ndarray:
        """`i32[T]` -> `f32[L + 2, T, D]`."""


class Session(ABC):
    """What a model has read of one conversation, and its key/value cache."""

    def __init__(self, engine: Engine, context_length: int) -> None:
        self.engine = engine
        self.config = engine.config
        self.context_length = context_length
        self._ids = np.zeros(256, np.int32)  # grows; the first `length` count
        self._length = 0

    @property
    def ids(self) -> np.ndarray:
        """What has been read: `i32[length]`."""
        return self._ids[: self._length]

    @property
    def length(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        """What the caches of a session of this context take at most."""
        config, room = self.config, self.context_length
        ring = min(config.sliding_window + SPARE, room)
        positions = sum(
            ring if config.is_sliding(i) else room for i in range(config.num_hidden_layers)
        )
        width = 2 if self.engine.compute in ("bfloat16", "float16") else 4
        return 2 * width * config.num_key_value_heads * config.head_dim * positions

    def read(self, ids: Ids, want: Wanted = LAST) -> Any:
        """Reads tokens, at least one: what is wanted of them as NumPy, None for nothing."""
        (result,) = self.engine.read([self], [ids], want)
        if result is None:
            return None
        try:
            return self.engine.numpy(result)
        except BaseException:  # what was still to be computed failed
            self._forget()
            raise

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        if type(length) is not int or not 0 <= length <= self.length:
            raise OptionError(f"cannot truncate {self.length} tokens to {length!r}")
        if length == self.length:
            return
        kept = self.ids[:length].copy()
        try:
            if self._rewind(length):
                self._length = length
                return
        except BaseException:  # an interrupt may leave some layers where they were
            self._forget()
            raise
        self._reread(kept)

    def fork(self) -> Session:
        """A copy that goes its own way."""
        copy = self._copy()
        copy._ids, copy._length = self._ids.copy(), self._length
        return copy

    def held(self) -> dict[str, np.ndarray]:
        """What `restore` needs to go on from here in another process: arrays by name."""
        return self._held() if self.length else {}

    def restore(self, ids: Ids, held: Mapping[str, np.ndarray]) -> None:
        """Makes an empty session one that has read `ids`, with what another one `held` on an engine
        of the same weights. Raises OptionError where that does not fit."""
        checked = self._checked(ids, NOTHING)
        try:
            if self._restore(len(checked), held):
                self._append(checked)
            else:
                self._reading(checked, NOTHING)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            self._forget()
            raise OptionError(f"what was held does not fit this engine: {error}") from error

    def check(self, ids: Ids, want: Wanted) -> None:
        """Raises OptionError or ContextError for what `read` would refuse."""
        self._checked(ids, want)

    def check_room(self, ids: Sized, ahead: int = 0) -> None:
        """Raises ContextError where so many more tokens, and `ahead` others, do not fit."""
        more = len(ids) + ahead
        if self.length + more > self.context_length:
            raise ContextError(
                f"{self.length} tokens read and {more} more do not fit a context of "
                f"{self.context_length}; shorten the input or raise context_length"
            )

    def _reading(self, ids: np.ndarray, want: Wanted) -> Array | None:
        """Reads checked `ids`, whole or not at all."""
        try:
            result = self._forward(ids, want)
            self._append(ids)
        except BaseException:  # an interrupt may leave half of it in the cache
            self._forget()
            raise
        return result

    def _append(self, ids: np.ndarray) -> None:
        end = self._length + len(ids)
        if end > len(self._ids):
            more = np.zeros(max(end, 2 * len(self._ids)) - len(self._ids), np.int32)
            self._ids = np.concatenate([self._ids, more])
        self._ids[self._length : end] = ids
        self._length = end

    def settle(self, token: int, chosen: np.ndarray, count: int) -> np.ndarray:
        """Notes that `token` was read, and all but the last of the `count` that a device has
        `chosen` first; -1 is none. What it chose up to there."""
        failed = np.flatnonzero(chosen < 0)
        good = chosen[: min([count, *failed])]
        self._append(np.array([token, *good], np.int32)[: len(good)])
        if len(failed):
            self._reread(self.ids.copy())
        return good

    def _reread(self, ids: np.ndarray) -> None:
        """Starts again with these alone. Where logits were not finite, nor are the caches behind
        what counts, and a mask does not help: it multiplies by zero."""
        self._forget()
        if len(ids):
            self._reading(ids, NOTHING)

    def _forget(self) -> None:
        self._rewind(0)
        self._length = 0

    def _checked(self, ids: Ids, want: Wanted) -> np.ndarray:
        try:
            array = np.asarray(ids)
        except ValueError:
            raise OptionError("token ids have rows of different lengths") from None
        if array.ndim != 1 or not len(array):
            raise OptionError(
                f"token ids have shape {list(array.shape)}, expected [T] with T at least 1"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise OptionError(f"token ids are {array.dtype}, expected whole numbers")
        self._check_range(array, "token ids")
        if isinstance(want, Rows):
            self._check_range(want.ids, "rows")
        self.check_room(array, want.count - 1 if isinstance(want, Chosen) else 0)
        return array.astype(np.int32)

    def _check_range(self, ids: np.ndarray, what: str) -> None:
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise OptionError(
                f"{what} run from {ids.min()} to {ids.max()}, but the vocabulary has "
                f"{self.config.vocab_size}"
            )

    @abstractmethod
    def _forward(self, ids: np.ndarray, want: Wanted) -> Array | None:
        """Reads `i32[T]`, which follow the `length` tokens that were read; what is wanted."""

    @abstractmethod
    def _rewind(self, length: int) -> bool:
        """Goes back to `length` tokens if that can be done; going back to 0 always can, and by
        `SPARE` positions."""

    def _held(self) -> dict[str, np.ndarray]:
        """Of an engine that keeps nothing: `_restore` has its tokens read again."""
        return {}

    def _restore(self, length: int, held: Mapping[str, np.ndarray]) -> bool:
        """Whether it could be done. Raises ValueError or KeyError for what does not fit."""
        return False

    @abstractmethod
    def _copy(self) -> Session:
        """A session of its own with the same cache."""
