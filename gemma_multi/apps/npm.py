"""Other people's JavaScript: fetched from npm by name, checked by hash, kept in the cache.

Never committed and never in a wheel. With npm on the PATH its own client fetches, by the user's
settings; without it, plain HTTPS does, from npm's registry or `NPM_CONFIG_REGISTRY`.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_multi.cache import LIBRARIES, writable_cache
from gemma_multi.errors import BackendError
from gemma_multi.files import write_atomically

_REGISTRY = "https://registry.npmjs.org"
_TIMEOUT = 600  # seconds


@dataclass(frozen=True)
class Package:
    """One version of a package, and what it is as a file."""

    name: str
    version: str
    sha256: str
    license: str = ""  # for those that go along in a folder

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def fetch(self) -> bytes:
        """The package, a .tgz. Raises BackendError."""
        npm = shutil.which("npm")
        data = self._by_npm(npm) if npm else self._by_https()
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise BackendError(f"{self} from npm has sha256 {found}, expected {self.sha256}")
        return data

    def archive(self) -> tarfile.TarFile:
        """The same, open. Raises BackendError."""
        return tarfile.open(fileobj=io.BytesIO(self.fetch()))

    def _by_npm(self, npm: str) -> bytes:
        with tempfile.TemporaryDirectory() as work:
            command = [npm, "pack", "--silent", str(self)]
            try:
                subprocess.run(command, cwd=work, check=True, timeout=_TIMEOUT, capture_output=True)
            except (subprocess.SubprocessError, OSError) as error:
                said = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace")
                raise self._missing(said.strip() or str(error)) from error
            return next(Path(work).glob("*.tgz")).read_bytes()

    def _by_https(self) -> bytes:
        registry = os.environ.get("NPM_CONFIG_REGISTRY", _REGISTRY).rstrip("/")
        file = f"{self.name.rsplit('/', 1)[-1]}-{self.version}.tgz"
        try:
            with urllib.request.urlopen(f"{registry}/{self.name}/-/{file}", timeout=60) as answer:
                data: bytes = answer.read()
                return data
        except (OSError, ValueError) as error:
            raise self._missing(str(error)) from error

    def _missing(self, why: str) -> BackendError:
        return BackendError(
            f"{self} cannot be fetched from npm ({why}); it is needed once, and kept from then on"
        )

    def files(self, wanted: Mapping[str, str]) -> dict[str, bytes]:
        """Files of the package by the names that they shall have, from the cache where they are.
        `wanted` has those names by where the files lie in the package. Raises BackendError."""
        kept = writable_cache(LIBRARIES, str(self).replace("/", "_"))
        if kept is not None and all((kept / new).is_file() for new in wanted.values()):
            return {new: (kept / new).read_bytes() for new in wanted.values()}
        with self.archive() as archive:
            found = {new: member(archive, f"package/{old}") for old, new in wanted.items()}
        if kept is not None:
            for new, data in found.items():
                write_atomically(kept / new, data)
        return found


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """A file of an archive, which has it."""
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


LITERT = Package(
    "@litertjs/core", "2.5.3",
    "a97660833e9e7e1063c95e12016718881240b14f7438728a2f62785e912d30fd", "Apache-2.0",
)  # fmt: skip
LITERT_UTILS = Package(
    "@litertjs/wasm-utils", "2.5.3",
    "ce2a1f8379c067be49e59752e5a7f40db6be09f6e497f0f11e59f17b515366a7", "Apache-2.0",
)  # fmt: skip
TOKENIZERS = Package(
    "@huggingface/tokenizers", "0.2.0",
    "2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a", "Apache-2.0",
)  # fmt: skip
TRANSFORMERS = Package(
    "@huggingface/transformers", "4.3.1",
    "0325441d6bd7bc7697fccb32ee6e5febc7f89691e42402d071adc678237b8015", "Apache-2.0",
)  # fmt: skip
ONNXRUNTIME = Package(  # the version that Transformers.js names
    "onnxruntime-web", "1.31.0-dev.20260914-8d85527a0",
    "0de27582f3e3189dec4a2082513a0af1ea79ae7fd3039bbfe634a526e173cbe0", "MIT",
)  # fmt: skip
