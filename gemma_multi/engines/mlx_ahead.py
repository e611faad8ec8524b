"""Many steps on MLX without waiting for one: what is chosen goes into the next as it is.

MLX computes when it is asked to. A step is handed over while the device computes the one before,
and only the tokens come to the host, all of them at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_multi.engines.mlx_batch import SideBySide
from gemma_multi.engines.mlx_model import hidden_states
from gemma_multi.engines.wants import Chosen
from gemma_multi.sampling.on_device import Namespace, choose_rows, option_arrays

if TYPE_CHECKING:
    from gemma_multi.engines.mlx import MlxEngine, MlxSession

STEPS = 8  # that keep a GPU busy; of a text that ends, the others were for nothing


def run_ahead(
    engine: MlxEngine, sessions: Sequence[MlxSession], tokens: np.ndarray, wants: Sequence[Chosen]
) -> list[np.ndarray]:
    """The next tokens of each, of which one, in `tokens`, was not read yet."""
    mx, steps = engine.mx, max(want.count for want in wants)
    arrays, ways = option_arrays(
        [want.options for want in wants],
        [want.vocabulary or engine.config.vocab_size for want in wants],
    )
    given = {name: mx.array(array) for name, array in arrays.items()}
    namespace = Namespace(mx, lambda x, k: mx.argsort(-x, axis=-1)[:, :k])
    token, chosen = mx.array(tokens), []
    for step in range(steps):
        if len(sessions) == 1:
            caches = sessions[0].caches
        else:
            of_layers = zip(*(session.caches for session in sessions), strict=True)
            caches = [SideBySide(mx, list(one), [1] * len(sessions)) for one in of_layers]
        logits = engine.head(hidden_states(engine, token[:, None], caches)[:, -1])
        positions = mx.array([session.length + step + 1 for session in sessions])
        token = choose_rows(namespace, logits, given, positions, ways)
        chosen.append(token)
        mx.async_eval(token, [session.arrays() for session in sessions])
        token = mx.maximum(token, 0)
    found = np.array(mx.stack(chosen, axis=1))
    for session, want in zip(sessions, wants, strict=True):
        for cache in session.caches:
            cache.trim(steps - want.count)
    return [
        session.settle(int(token), row, want.count)
        for session, token, row, want in zip(sessions, tokens, found, wants, strict=True)
    ]
