"""One server for all tests that leave it as it was, and the model that it serves, here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served.servers import Running, serving

import gemma_multi


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with serving("storyteller", "--max-tokens", "2000", "--body-seconds", "1") as running:
        yield running


@pytest.fixture(scope="session")
def model() -> gemma_multi.Model:
    return gemma_multi.load("storyteller", backend="litert")
