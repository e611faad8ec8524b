"""The engines under test. Keras on TensorFlow runs the same suite in a process of its own
(`test_keras_on_tensorflow.py`), because Keras has one framework per process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import pytest
from tiny import tiny_checkpoint

from gemma_multi.engines import Engine, create_engine

# the GPU delegate passes it in a process of its own, too (`test_litert_gpu.py`)
ON_GPU = bool(os.environ.get("GEMMA_MULTI_TEST_GPU"))
IS_SLOW = ON_GPU or os.environ.get("KERAS_BACKEND") == "tensorflow"
# transformers, the reference, passes the suite in `make reference`, where torch is
BACKENDS = (
    ("transformers",) if os.environ.get("GEMMA_MULTI_REFERENCE") else ("mlx", "keras", "litert")
)
ENGINES = [
    *((backend, precision) for backend in ("mlx", "keras")
      for precision in ("float32", "bfloat16", "float16", "sfp8", "int4")),
    *(("litert", precision) for precision in ("float32", "int4", "int8")),
    ("transformers", "float32"),
]  # fmt: skip
if ON_GPU:
    BACKENDS, ENGINES = ("litert",), [("litert", "float32"), ("litert", "int8")]


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def engine_of() -> Callable[[str, str], Engine]:
    """(backend, precision) -> its engine, made once."""

    @cache
    def make(backend: str, precision: str) -> Engine:
        options = {"device": "gpu", "enforce_f32": True} if ON_GPU else {}
        return create_engine(tiny_checkpoint(), backend, precision, options=options)

    return make


@pytest.fixture(scope="session", params=[e for e in ENGINES if e[0] in BACKENDS], ids="-".join)
def engine(request: pytest.FixtureRequest, engine_of: Callable[[str, str], Engine]) -> Engine:
    """Every backend at every precision."""
    return engine_of(*request.param)


@pytest.fixture(scope="session", params=BACKENDS, ids="{}-float32".format)
def exact_engine(request: pytest.FixtureRequest, engine_of: Callable[[str, str], Engine]) -> Engine:
    """Each backend, where nothing is rounded."""
    return engine_of(request.param, "float32")


@pytest.fixture(params=(1,) if IS_SLOW else (0, 1))
def seed(request: pytest.FixtureRequest) -> int:
    """Of a random walk: one is enough where every read is slow."""
    return request.param
