"""Fixtures: tiny checkpoints on disk, and Gemma's real vocabulary."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from other_peoples_files import gemma_tokenizer
from software_gpu import environment
from tiny import tiny_checkpoint

from gemma_multi.exporters import save

os.environ["GEMMA_MULTI_VERIFY"] = "0"  # hundreds of exports; test_verifying.py asks for it


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid float32 model directory. Copy it before changing it."""
    return save(tiny_checkpoint(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_copy(tiny_directory: Path, tmp_path: Path) -> Path:
    """The same directory, to be changed."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def gemma_tokenizer_directory() -> Path:
    """A directory with Gemma 3's real tokenizer, fetched once."""
    return gemma_tokenizer()


@pytest.fixture(scope="session")
def software_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds a GPU, in software."""
    return environment(tmp_path_factory.mktemp("runtime"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: run two at a time, they would else be waited for at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
