"""What this machine offers."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_READ_BYTES = 1 << 28  # more than any cache holds


def available_cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        return os.cpu_count() or 1


def physical_memory() -> int | None:
    """Bytes; None where the system does not say, as on Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory() -> int | None:
    """Bytes that this process held at most; None where the system does not say, as on Windows."""
    try:
        import resource
    except ImportError:
        return None
    if sys.platform == "linux":  # getrusage counts the parent's memory before exec as well
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_speed() -> float:
    """Bytes that all cores together read from memory in a second; the best of five."""
    parts = np.array_split(np.ones(_READ_BYTES // 8), available_cores())
    with ThreadPoolExecutor(len(parts)) as threads:
        return _READ_BYTES / min(_seconds_to_read(threads, parts) for _ in range(5))


def _seconds_to_read(threads: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    started = time.perf_counter()
    list(threads.map(np.max, parts))
    return time.perf_counter() - started
