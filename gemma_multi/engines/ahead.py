"""Tokens that are chosen while they are read: on an engine's device where it can, else here.

The plain loop is one read a token, whose logits come to the host. It is what an engine must agree
with, and what serves those that choose nothing on their device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_multi.engines.wants import LAST, NOTHING, Chosen
from gemma_multi.sampling.on_device import can_choose

if TYPE_CHECKING:
    from gemma_multi.engines.base import Engine, Session


def read_chosen(
    engine: Engine, sessions: Sequence[Session], ids: Sequence[np.ndarray], wants: Sequence[Chosen]
) -> list[np.ndarray]:
    """What is `Chosen` for each, `i32[at most count]`."""
    able = [
        i for i, want in enumerate(wants)
        if can_choose(want.options) and engine._may_run_ahead(sessions[i], len(ids[i]))
    ]  # fmt: skip
    found: dict[int, np.ndarray] = {}
    if able:
        longer = [i for i in able if len(ids[i]) > 1]
        before = [ids[i][:-1] for i in longer]
        engine._read(part(sessions, longer), before, [NOTHING] * len(longer))
        tokens = np.array([ids[i][-1] for i in able], np.int32)
        chosen = engine._run_ahead(part(sessions, able), tokens, part(wants, able))
        found |= dict(zip(able, chosen, strict=True))
    rest = [i for i in range(len(sessions)) if i not in found]
    chosen = _step_by_step(engine, part(sessions, rest), part(ids, rest), part(wants, rest))
    found |= dict(zip(rest, chosen, strict=True))
    return [found[i] for i in range(len(sessions))]


def _step_by_step(
    engine: Engine, sessions: list[Session], ids: list[np.ndarray], wants: list[Chosen]
) -> list[np.ndarray]:
    chosen: list[list[int]] = [[] for _ in wants]
    unread, going = list(ids), list(range(len(ids)))
    while going:
        rows = engine._read(part(sessions, going), part(unread, going), [LAST] * len(going))
        before, going = going, []
        for i, logits in zip(before, rows, strict=True):
            token = wants[i].choose(engine.numpy(logits), sessions[i].length)
            if token is None:
                sessions[i]._reread(sessions[i].ids[:-1].copy())
                continue
            chosen[i].append(token)
            if len(chosen[i]) < wants[i].count:
                unread[i] = np.array([token], np.int32)
                going.append(i)
    return [np.array(tokens, np.int32) for tokens in chosen]


def part(of: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """Those of a row that stand at `places`."""
    return [of[i] for i in places]
