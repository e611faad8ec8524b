"""Many steps on Keras in one program: layers, head and choice, from one token to the next.

A step of Gemma 3 270M takes a GPU less time than it takes the host to start it, to wait for its
262,144 logits and to choose. JAX only: TensorFlow's steps are the engine's plain ones.

Design choices:
- There is one number of steps, `STEPS`. Where fewer tokens are asked for, the others are dropped: a
  number that is known when the program is compiled spares a GPU from asking the host, after each
  step, whether there is another.
- What was written beyond is like what was taken back: rings have room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_multi.engines.caches import SPARE
from gemma_multi.engines.keras_caches import seat_together
from gemma_multi.engines.keras_decoder import Cache, run_layers
from gemma_multi.engines.wants import Chosen
from gemma_multi.sampling.on_device import Arrays, Namespace, Ways, choose_rows, option_arrays

if TYPE_CHECKING:
    from gemma_multi.engines.keras import KerasEngine, KerasSession

STEPS = SPARE


class Ahead:
    """Chooses tokens for the sessions of an engine."""

    def __init__(self, engine: KerasEngine) -> None:
        self._engine = engine
        jax = engine.runtime.jax
        self._scan = jax.lax.scan
        self._namespace = Namespace(jax.numpy, lambda x, k: jax.lax.top_k(x, k)[1])
        self.program = engine.runtime.compile(
            self._steps, engine.backbone.variables, ("ways",), donated=(1,)
        )

    def read(
        self, sessions: Sequence[KerasSession], tokens: np.ndarray, wants: Sequence[Chosen]
    ) -> list[np.ndarray]:
        """The next tokens of each, of which one, in `tokens`, was not read yet. Each has room for
        `STEPS` more."""
        if len(sessions) > 1:
            with self._engine.reading_together:
                return self._read(sessions, tokens, wants)
        return self._read(sessions, tokens, wants)

    def _read(
        self, sessions: Sequence[KerasSession], tokens: np.ndarray, wants: Sequence[Chosen]
    ) -> list[np.ndarray]:
        if len(sessions) == 1:
            table = sessions[0].alone(sessions[0].length + STEPS)
            seated = {0: sessions[0]}
        else:
            table = seat_together(self._engine, sessions)
            seated = table.sessions()
        rows = [session.row for session in sessions]
        start, given, reads = (np.zeros(table.rows, np.int32) for _ in range(3))
        for row, session in seated.items():
            start[row] = session.length
        given[rows], reads[rows] = tokens, 1
        # a row that reads nothing gets padding where its next token will be
        written = start + np.where(reads, STEPS, 1)
        table.reserve(int(written.max()))
        by_row = dict(zip(rows, wants, strict=True))
        asked = [by_row.get(row) for row in range(table.rows)]
        size = self._engine.config.vocab_size
        arrays, ways = option_arrays(
            [want.options if want else None for want in asked],
            [want.vocabulary if want and want.vocabulary else size for want in asked],
        )
        with table.giving_away():
            chosen, table.layers = self.program(
                given, table.layers, start, reads, arrays, ways=ways
            )
        for row, session in seated.items():
            session.written = max(session.written, int(written[row]))
        found = np.asarray(chosen)
        return [
            session.settle(int(token), found[:, session.row], want.count)
            for session, token, want in zip(sessions, tokens, wants, strict=True)
        ]

    def _steps(
        self, token: Any, caches: list[Cache], start: Any, reads: Any, arrays: Arrays, *, ways: Ways
    ) -> tuple[Any, list[Cache]]:
        """`i32[B]` tokens, of which those that `reads` says (1, else 0) are real and follow `start`
        others -> (the `STEPS` tokens that follow, `i32[STEPS, B]`; the caches). Traced by JAX."""
        engine, xp = self._engine, self._namespace.xp

        def step(carry: Any, _: Any) -> Any:
            token, at, caches = carry
            x, _, caches = run_layers(
                engine.backbone, engine.config, token[:, None], caches, at, reads, False
            )
            logits = engine.head_of(x[:, 0])
            chosen = choose_rows(self._namespace, logits, arrays, at + 1, ways)
            return (xp.maximum(chosen, 0), at + reads, caches), chosen

        (_, _, caches), chosen = self._scan(step, (token, start, caches), None, length=STEPS)
        return chosen, caches
