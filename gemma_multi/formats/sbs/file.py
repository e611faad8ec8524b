"""The container: gemma.cpp's BlobStore read, every length checked before it is believed.

A file is a header (`SBS\\n`, the number of blobs, the file's size), blobs that follow each other at
multiples of 256 bytes, and a directory: all keys, of 16 bytes, then for each an offset and a
length. The directory and the real header stand at the end, so that blobs can be written before it
is known how many there will be; the header at the beginning then counts none. In older files both
are at the beginning. Blobs are views of the mapped file.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from gemma_multi.errors import CheckpointError

MAGIC = b"SBS\n"
ALIGNMENT = 256  # of blobs
END_ALIGNMENT = 1 << 16  # of the file, so that any system can map it
KEY_BYTES = 16
MOST_BLOBS = 16 * 1024
HEADER = struct.Struct("<4sIQ")
_ENTRY = 2 * KEY_BYTES  # of the directory: a key, and its offset and length


class SbsFile:
    """The blobs of one file by their keys. Raises CheckpointError naming what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: expected a file")
            self._size = path.stat().st_size
            if self._size < HEADER.size:
                raise CheckpointError(f"{path}: {self._size} bytes, too short for an .sbs file")
            self._bytes = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if self._header(0) > 0:  # an older file
            count, begin = self._header(0), HEADER.size
        else:
            count = self._header(self._size - HEADER.size)
            begin = self._size - HEADER.size - count * _ENTRY
        self.blobs: dict[str, np.ndarray] = self._read_directory(count, begin)

    def blob(self, key: str) -> np.ndarray:
        """`u8[nbytes]`, a view. Raises CheckpointError where there is none."""
        if key not in self.blobs:
            raise CheckpointError(f"{self.path}: blob {key!r} is missing")
        return self.blobs[key]

    def words(self, key: str) -> np.ndarray:
        """A blob of whole 32-bit words: `u32[count]`."""
        blob = self.blob(key)
        if blob.size % 4:
            raise CheckpointError(
                f"{self.path}: blob {key!r} has {blob.size} bytes, no whole words"
            )
        return blob.view(np.ndarray).view("<u4")

    def _header(self, at: int) -> int:
        """The number of blobs that a header counts."""
        magic, count, size = HEADER.unpack(self._bytes[at : at + HEADER.size].tobytes())
        if magic != MAGIC:
            raise CheckpointError(
                f"{self.path}: has {magic!r} at byte {at}, expected {MAGIC!r}; it is truncated or "
                "no .sbs file"
            )
        if count > MOST_BLOBS:
            raise CheckpointError(f"{self.path}: claims {count} blobs, expected 1 to {MOST_BLOBS}")
        if count and size != self._size:
            raise CheckpointError(
                f"{self.path}: claims {size} bytes, but has {self._size}; it is truncated or "
                "damaged"
            )
        return int(count)

    def _read_directory(self, count: int, begin: int) -> dict[str, np.ndarray]:
        end = begin + count * _ENTRY
        if not count or begin < HEADER.size or end > self._size:
            raise CheckpointError(
                f"{self.path}: claims {count} blobs, more than its {self._size} bytes can list, "
                "or none"
            )
        # the blobs lie before a directory at the end, and after one at the beginning
        first, last = (-end % ALIGNMENT + end, self._size)
        if begin > HEADER.size:
            first, last = ALIGNMENT, begin
        listed = self._bytes[begin:end].tobytes()
        blobs: dict[str, np.ndarray] = {}
        for i in range(count):
            raw = listed[i * KEY_BYTES : (i + 1) * KEY_BYTES].rstrip(b"\0")
            key = raw.decode("ascii", "replace")
            offset, size = struct.unpack_from("<QQ", listed, (count + i) * KEY_BYTES)
            fault = (
                "has no name" if not key or "\0" in key
                else "is there twice" if key in blobs
                else "is empty" if not size
                else f"is not where the one before it ends, at {first}" if offset != first
                else f"ends after byte {last}, where there is no room" if size > last - offset
                else ""
            )  # fmt: skip
            if fault:
                raise CheckpointError(
                    f"{self.path}: blob {key!r}, said to be {size} bytes at {offset}, {fault}"
                )
            blobs[key] = self._bytes[offset : offset + size]
            first = offset + size + -(offset + size) % ALIGNMENT
        return blobs
