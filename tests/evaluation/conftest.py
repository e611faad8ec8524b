"""One loaded model for all that is measured."""

from __future__ import annotations

import pytest

import gemma_multi


@pytest.fixture(scope="session")
def model() -> gemma_multi.Model:
    return gemma_multi.load("storyteller", backend="litert", precision="float32",
                            context_length=512)  # fmt: skip
