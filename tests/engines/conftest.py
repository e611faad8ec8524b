"""The engines under test. Keras on TensorFlow runs the same suite in a process of its own
(`test_keras_on_tensorflow.py`), because Keras has one framework per process."""

from __future__ import annotations

import pytest
from tiny import tiny_checkpoint

from gemma_multi.engines import create_engine
from gemma_multi.engines.base import Engine

BACKENDS = ("mlx", "keras", "litert")
ENGINES = [
    *((backend, precision) for backend in ("mlx", "keras")
      for precision in ("float32", "bfloat16", "int4")),
    *(("litert", precision) for precision in ("float32", "int4", "int8")),
]  # fmt: skip


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=ENGINES, ids="-".join)
def engine(request: pytest.FixtureRequest) -> Engine:
    return create_engine(tiny_checkpoint(), *request.param)
