"""Checkpoint: a config, a tokenizer and named tensors, whatever they were read from.

Design choices:
- A value: it knows no format, no engine and no transform. Readers (`gemma_multi.formats`) make
  one, engines run one, exporters write one out.
- Tensors keep their Hugging Face names and their stored type. A dense tensor is a view of the
  mapped file; any other is a `PackedTensor`. Opening 270M in bfloat16 copies nothing.
- The tokenizer is made when it is first asked for, by whatever the reader supplied.
- Two checkpoints are equal when they say the same: config, tensors bit for bit, tokenizer, and
  what ends an answer, whichever of their parts says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint.provenance import Provenance
from gemma_multi.checkpoint.tensors import Tensor, Tensors, dense, rows_of
from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.errors import CheckpointError
from gemma_multi.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A Gemma 3 text model at rest."""

    config: ModelConfig
    tensors: Tensors
    provenance: Provenance = field(default_factory=Provenance)
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json
    path: Path | None = None  # the directory or file it was read from
    make_tokenizer: Callable[[], Tokenizer] | None = None  # called once

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Tensors):
            object.__setattr__(self, "tensors", Tensors.of(self.tensors))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.make_tokenizer is None:
            raise CheckpointError("this checkpoint was made in memory and has no tokenizer")
        return self.make_tokenizer()

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer: 1 and 106 always, whatever an older config leaves out, and with
        FunctionGemma's tokenizer the beginning of a response, which is not the model's to give."""
        tokenizer, listed = self.tokenizer, self.generation.get("eos_token_id", [])
        stops = {tokenizer.eos_id, tokenizer.end_of_turn_id, *self.config.eos_token_ids}
        if tokenizer.has_function_pieces:
            stops.add(tokenizer.id("<start_function_response>"))
        return frozenset(stops | set(listed if isinstance(listed, list) else [listed]))

    @property
    def format(self) -> str:
        """The name of the format it was read from, "" once a tensor was replaced."""
        return self.tensors.origin.format if self.tensors.origin else ""

    @property
    def context_length(self) -> int:
        """The most tokens it can read: what the model was made for, or what its file holds."""
        facts = self.tensors.origin.facts if self.tensors.origin else {}
        return int(facts.get("context_length", self.config.max_position_embeddings))

    @property
    def precision(self) -> str:
        """What the linear layers are stored as: `int4`, `sfp8`, a type's name, or `mixed`."""
        kinds = {info.dtype for name, info in self.tensors.infos.items()
                 if len(info.shape) == 2 and name != EMBEDDING}  # fmt: skip
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def is_packed(self) -> bool:
        """Whether anything is in a form that no array holds."""
        return any(info.is_packed for info in self.tensors.infos.values())

    @property
    def is_quantized(self) -> bool:
        """Whether anything is on a grid that was fitted to it."""
        return any(info.is_quantized for info in self.tensors.infos.values())

    @property
    def is_int4(self) -> bool:
        """Whether anything is on the int4 grid, from which there is no way back."""
        return any(info.dtype == "int4" for info in self.tensors.infos.values())

    @property
    def grid(self) -> str:
        """`portable`, `signed`, `affine` or `none`; the least portable of its tensors."""
        return self.tensors.grid

    @property
    def nbytes(self) -> int:
        return self.tensors.nbytes

    @property
    def identity(self) -> str:
        """Changes whenever a tensor does; see `Tensors.identity`."""
        return self.tensors.identity

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and values of all tensors."""
        return self.tensors.digest

    def weight(self, name: str) -> np.ndarray:
        """A tensor as a dense array: stored type if dense, float32 if it was packed."""
        return dense(self.tensors[name])

    def rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows of a tensor, likewise."""
        return dense(rows_of(self.tensors[name], rows))

    def replace(self, **changes: Any) -> Checkpoint:
        """A copy with other fields."""
        return replace(self, **changes)

    def with_tensors(self, changes: Mapping[str, Tensor], how: str = "") -> Checkpoint:
        """A copy with some tensors changed; `how` goes into its provenance."""
        tensors = self.tensors.replaced(changes)
        provenance = self.provenance.modified(how) if how else self.provenance
        return replace(self, tensors=tensors, provenance=provenance)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        if (self.config, self._defaults()) != (other.config, other._defaults()):
            return False
        return self.tensors == other.tensors and self._spelling() == other._spelling()

    __hash__ = None  # type: ignore[assignment]

    def _defaults(self) -> dict[str, Any]:
        """How it generates unless told otherwise, with all that ends an answer."""
        if self.make_tokenizer is None:
            return dict(self.generation)
        return {**self.generation, "eos_token_id": self.stop_ids}

    def _spelling(self) -> bytes:
        return b"" if self.make_tokenizer is None else self.tokenizer.model
