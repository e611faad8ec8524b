"""Rows that the storyteller was made for: what it is asked, and the one right answer."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "storyteller"))

import tasks

Row = dict[str, str]


def sentiment(count: int) -> list[Row]:
    return _drawn(tasks.sentiment, count)


def entities(count: int) -> list[Row]:
    return _drawn(tasks.entities, count)


def _drawn(task, count: int) -> list[Row]:
    rng = random.Random(7)
    drawn = [task(rng) for _ in range(count)]
    return [{"prompt": one.prompt, "completion": one.answer} for one in drawn]
