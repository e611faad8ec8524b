"""`doctor --verify` must be able to say no: real faults, one at a time, in a whole engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gemma_multi import self_test as module
from gemma_multi.engines import Engine
from gemma_multi.engines.mlx import MlxEngine, MlxSession
from gemma_multi.generation import decoding
from gemma_multi.self_test import self_test

Patch = pytest.MonkeyPatch


def window_off_by_one(engine: MlxEngine, patch: Patch) -> None:
    engine.config = engine.config.replace(sliding_window=engine.config.sliding_window + 1)


def rope_bases_swapped(engine: MlxEngine, patch: Patch) -> None:
    bases = {10_000.0: 1_000_000.0, 1_000_000.0: 10_000.0}
    for layer in engine.model.model.layers:
        layer.self_attn.rope.base = bases[layer.self_attn.rope.base]


def steps_derailed(engine: MlxEngine, patch: Patch) -> None:
    forward = MlxSession._forward

    def derailed(self: MlxSession, ids: np.ndarray, want: Any) -> Any:
        result = forward(self, ids, want)
        return result if len(ids) > 1 or self.length < 70 else engine.mx.roll(result, 1)

    patch.setattr(MlxSession, "_forward", derailed)


def truncate_forgets_nothing(engine: MlxEngine, patch: Patch) -> None:
    patch.setattr(MlxSession, "_rewind", lambda self, length: True)


def fork_shares_its_caches(engine: MlxEngine, patch: Patch) -> None:
    def copy(self: MlxSession) -> MlxSession:
        other = MlxSession(self.engine, self.context_length)
        other.__dict__.update(self.__dict__)
        return other

    patch.setattr(MlxSession, "_copy", copy)


def noise_of_the_next_token(engine: MlxEngine, patch: Patch) -> None:
    choose = decoding.choose
    patch.setattr(decoding, "choose", lambda logits, seen, options, position, ids=None:
                  choose(logits, seen, options, position + 1, ids))  # fmt: skip


def codes_unpacked_backwards(engine: MlxEngine, patch: Patch) -> None:
    if engine.precision == "int4":
        layer = engine.model.model.layers[3].mlp.down_proj
        layer.weight = engine.mx.array(np.array(layer.weight).byteswap())


@pytest.mark.parametrize(
    ("fault", "first", "words"),
    [
        (None, None, "can be trusted: 7 checks"),
        (window_off_by_one, "float32", "from position 64 on: its sliding window, which is 64"),
        (rope_bases_swapped, "float32", "layer 0 (sliding) is the first to drift"),
        (steps_derailed, "steps past the window", "at position 70"),
        (truncate_forgets_nothing, "truncate", "at position 157"),
        (fork_shares_its_caches, "fork", "at position 100"),
        (noise_of_the_next_token, "seeds", ", expected "),
        (codes_unpacked_backwards, "int4", "KL"),
    ],
)
def test_a_fault_is_named(
    fault: Callable[[MlxEngine, Patch], None] | None, first: str | None, words: str,
    monkeypatch: Patch,
) -> None:  # fmt: skip
    create = module.create_engine

    def broken(*arguments: Any) -> Engine:
        engine = create(*arguments)
        assert isinstance(engine, MlxEngine)
        if fault is not None:
            fault(engine, monkeypatch)
        return engine

    monkeypatch.setattr(module, "create_engine", broken)
    (found,) = self_test(["mlx"], progress=False)
    assert words in found.sentence
    assert "\n" not in found.sentence
    assert found.trusted == (fault is None)
    wrong = [check.name for check in found.checks if not check.passed]
    assert wrong[:1] == ([] if first is None else [first])
