"""Who is compared: a model on a backend, an exported file, or Hugging Face transformers.

Design choices:
- A subject is named as it was asked for: `keras`, `keras:bfloat16`, `litert:gpu`, `phone.litertlm`,
  `transformers`. All of them are a `Model`, so a comparison knows nothing of frameworks.
- Subjects must be the same model: one config, one vocabulary. What differs is named before any
  engine is started. Their weights are for the comparison to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison.their_tokenizer import TheirTokenizer
from gemma_multi.config import ModelConfig
from gemma_multi.engines import backends as known_backends
from gemma_multi.engines import check_precision, choose_backend, create_engine
from gemma_multi.errors import OptionError
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.tokenizer import Tokenizer

REFERENCE = "transformers"  # as `against`; a directory is `./transformers`
GPU = "gpu"  # behind a backend's name: on a device that it takes only when told to
# the residual scale changes no answer: an int4 model may have one, and its original none
_MAY_DIFFER = (
    "dtype", "eos_token_ids", "pad_token_id", "max_position_embeddings", "residual_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One side of a comparison."""

    name: str
    model: Model

    @property
    def compute(self) -> str:
        return self.model.engine.compute

    def __str__(self) -> str:
        engine = self.model.engine
        held = engine.precision if engine.precision == engine.compute else (
            f"{engine.precision} weights, {engine.compute} activations"
        )  # fmt: skip
        return f"{self.name} ({held})"


@dataclass(frozen=True)
class Side:
    """A backend that takes part, as it was asked for."""

    name: str = field(compare=False)  # one side may be spelled in two ways
    backend: str
    precision: str
    options: dict[str, Any] = field(default_factory=dict)  # the backend's own


@dataclass(frozen=True)
class Lineup:
    """What will be compared, checked but not started."""

    checkpoint: Checkpoint
    sides: tuple[Side, ...]
    skipped: tuple[str, ...]  # backends that `auto` skipped
    against: str | Checkpoint | None  # REFERENCE, another checkpoint, or None: the first backend

    @property
    def longest(self) -> int:
        """Positions that every subject can hold."""
        sides = (self.checkpoint, self.against)
        return min(side.context_length for side in sides if isinstance(side, Checkpoint))

    def start(self, context_length: int) -> list[Subject]:
        """The subjects, the reference first."""
        subjects = [
            Subject(side.name, load(self.checkpoint, backend=side.backend,
                                    precision=side.precision, context_length=context_length,
                                    progress=False, **side.options))
            for side in self.sides
        ]  # fmt: skip
        if self.against is None:
            return subjects
        if isinstance(self.against, str):
            return [Subject(REFERENCE, _load_reference(self.checkpoint)), *subjects]
        backend, precision = self.sides[0].backend, self.sides[0].precision
        own = choose_backend("auto", self.against)
        if self.against.format in own.runs:  # an exported file is run as it is
            backend, precision = own.name, "auto"
        model = load(
            self.against, backend=backend, precision=precision, context_length=context_length,
            progress=False,
        )  # fmt: skip
        name = self.against.path.name if self.against.path else self.against.provenance.source
        return [Subject(name, model), *subjects]


class _ReferenceModel(Model):
    """A checkpoint in transformers, with transformers' own tokenizer."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return TheirTokenizer(self.base)


def _load_reference(checkpoint: Checkpoint) -> Model:
    return _ReferenceModel(checkpoint, create_engine(checkpoint, REFERENCE, "float32"))


def line_up(
    checkpoint: Checkpoint, backends: str | Sequence[str], precision: str,
    against: Source | None, local_files_only: bool = False,
) -> Lineup:  # fmt: skip
    """Decides who takes part. Raises OptionError or BackendError with what stands in the way."""
    skipped: tuple[str, ...] = ()
    ours = [one for one in known_backends().values() if not one.is_reference]
    if backends == "auto":
        here = [one for one in ours if not one.missing()]
        skipped = tuple(one.name for one in ours if one not in here)
        # who runs the file itself comes first
        names = [
            one.name for one in sorted(here, key=lambda one: checkpoint.format not in one.runs)
        ]
    elif isinstance(backends, list | tuple) and all(isinstance(name, str) for name in backends):
        names = list(backends)
    else:
        raise OptionError(f"backends is {backends!r}, expected 'auto' or a list of names")
    chosen: list[Side] = []
    for name in names:
        side = _side(name, precision, checkpoint)
        if side in chosen:
            raise OptionError(f"backend {name!r} is named twice")
        chosen.append(side)
    if len(chosen) + (against is not None) < 2:
        what = chosen[0].name if chosen else "nothing"
        raise OptionError(
            f"{what} alone has nothing to be compared with; name two backends, or something to "
            "compare against"
        )
    if isinstance(against, str) and against == REFERENCE:
        known_backends()[REFERENCE].check_installed()
        return Lineup(checkpoint, tuple(chosen), skipped, REFERENCE)
    if against is not None:
        other = open_checkpoint(against, local_files_only=local_files_only)
        check_same_model(checkpoint, other)
        return Lineup(checkpoint, tuple(chosen), skipped, other)
    return Lineup(checkpoint, tuple(chosen), skipped, None)


def _side(name: str, precision: str, checkpoint: Checkpoint) -> Side:
    """`name` with its colons taken apart, and what it asks for checked."""
    backend, *wishes = name.split(":")
    if backend == "auto":
        raise OptionError("backends is 'auto', or a list of names without it")
    record = choose_backend(backend)
    options: dict[str, Any] = {}
    for wish in wishes:
        if wish == GPU and record.takes_a_device:
            options = {"device": GPU}
        else:
            check_precision(record, wish)
            precision = wish
    held = checkpoint.precision if precision == "auto" else precision
    if options and held == "int4":
        raise OptionError(
            f"{name} holds int4 weights as int8 rows, which are others; compare the model at "
            f"another precision, such as {backend}:{GPU}:float32"
        )
    record.check_installed()
    return Side(name, backend, precision, options)


def check_same_model(one: Checkpoint, other: Checkpoint) -> None:
    """Raises OptionError naming the first thing in which two models are not of a kind."""
    names = [str(c.path or c.provenance.source) for c in (one, other)]
    for entry in fields(ModelConfig):
        mine, theirs = (getattr(c.config, entry.name) for c in (one, other))
        if mine != theirs and entry.name not in _MAY_DIFFER:
            raise OptionError(
                f"{names[0]} and {names[1]} are different models: {entry.name} is {mine} in one "
                f"and {theirs} in the other"
            )
    stops = [sorted(c.stop_ids) for c in (one, other)]
    if stops[0] != stops[1]:
        raise OptionError(
            f"{names[0]} and {names[1]} stop at different tokens: {stops[0]} and {stops[1]}; one "
            "would go on where the other ends"
        )
    mine, theirs = one.tokenizer, other.tokenizer
    if mine.model == theirs.model:
        return
    if mine.vocab_size != theirs.vocab_size:
        raise OptionError(
            f"{names[0]} and {names[1]} have different tokenizers: {mine.vocab_size} pieces and "
            f"{theirs.vocab_size}"
        )
    for token in range(mine.vocab_size):
        if mine.piece(token) != theirs.piece(token):
            raise OptionError(
                f"{names[0]} and {names[1]} have different tokenizers: token {token} is "
                f"{mine.piece(token)!r} in one and {theirs.piece(token)!r} in the other"
            )
