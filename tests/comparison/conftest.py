"""Subjects of the bundled model, and a small set of prompts that passes its window of 64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from gemma_multi import ParityReport, parity
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.comparison.prompts import Prompt, shipped_prompts
from gemma_multi.comparison.subjects import Subject, line_up
from gemma_multi.sources import BUNDLED, open_checkpoint

NAMES = ("story", "sentiment", "language-ja", "byte-fallback", "leading-space", "repeat")
Start = Callable[..., list[Subject]]


@pytest.fixture(scope="session")
def some_prompts() -> list[Prompt]:
    return [prompt for prompt in shipped_prompts() if prompt.name in NAMES]


@pytest.fixture(scope="session")
def report(some_prompts: list[Prompt]) -> ParityReport:
    """LiteRT in int4 against Keras, with the layers."""
    return parity(
        "storyteller", ["keras", "litert"], prompts=some_prompts, max_tokens=16, trace=True
    )


@pytest.fixture
def start() -> Start:
    """Subjects ready to be compared, or broken first: the bundled model unless told otherwise."""

    def start(
        names: Sequence[str], precision: str = "float32", checkpoint: Checkpoint | None = None
    ) -> list[Subject]:
        checkpoint = checkpoint or open_checkpoint(BUNDLED["storyteller"])
        # `against` only so that one name is enough; it is not started
        lineup = line_up(checkpoint, names, precision, checkpoint)
        return replace(lineup, against=None).start(1024)

    return start
