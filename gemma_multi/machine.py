"""What this machine offers."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

_READ_BYTES = 1 << 28  # more than any cache holds
_INT4_BYTES = 268_098_176 * (4 + 16 / 32) / 8  # of Gemma 3 270M: a code each, a scale for 32


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    system: str
    cores: int
    memory_bytes: int | None  # None where the system does not say
    bytes_per_second: float  # that all cores together read from memory

    @property
    def most_tokens_per_second(self) -> float:
        """That Gemma 3 270M in int4 can say on the processor."""
        return self.bytes_per_second / _INT4_BYTES


def look_at_the_machine() -> Machine:
    system = f"{platform.system()} on {platform.machine()}"
    return Machine(system, available_cores(), physical_memory(), memory_speed())


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


def available_memory() -> int | None:
    """Bytes that a new process can have without others being swapped out; None where the system
    does not say, as on macOS and Windows."""
    return _kilobytes("/proc/meminfo", "MemAvailable") if sys.platform == "linux" else None


def memory_in_use() -> int | None:
    """Bytes that this process holds in memory now; None where the system does not say.

    Pages of mapped files are not counted where they can be told apart (Linux, macOS): the system
    takes them back when it needs them, and a model's embedding comes in row by row, as tokens are
    met for the first time.
    """
    if sys.platform == "linux":
        return _kilobytes("/proc/self/status", "RssAnon", "RssShmem")
    if sys.platform == "darwin":
        return _macos_footprint()
    return _windows_working_set()[0] if sys.platform == "win32" else None


def peak_memory() -> int | None:
    """Bytes that this process held at most; None where the system does not say."""
    if sys.platform == "win32":
        return _windows_working_set()[1]
    if sys.platform == "linux":  # getrusage counts the parent's memory before exec as well
        return _kilobytes("/proc/self/status", "VmHWM")
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_speed() -> float:
    """Bytes that all cores together read from memory in a second; the best of five."""
    parts = np.array_split(np.ones(_READ_BYTES // 8), available_cores())
    with ThreadPoolExecutor(len(parts)) as threads:
        return _READ_BYTES / min(_seconds_to_read(threads, parts) for _ in range(5))


def _kilobytes(file: str, *names: str) -> int:
    """Lines of a file of /proc, added up, as bytes."""
    with open(file) as lines:
        held = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return sum(int(held[name][0]) for name in names) * 1024


def _macos_footprint() -> int | None:
    """What Activity Monitor shows, in which a GPU's buffers count."""
    usage = (ctypes.c_uint64 * 12)()  # rusage_info_v0: a UUID, and ten numbers
    if ctypes.CDLL("libproc.dylib").proc_pid_rusage(os.getpid(), 0, usage):
        return None
    return usage[9]  # ri_phys_footprint


def _windows_working_set() -> tuple[int | None, int | None]:
    """(now, at most), of PROCESS_MEMORY_COUNTERS."""
    names = ("peak", "now", "_2", "_3", "_4", "_5", "_6", "_7")
    fields = [("size", ctypes.c_uint32), ("faults", ctypes.c_uint32)]
    counters = type("Counters", (ctypes.Structure,), {
        "_fields_": fields + [(name, ctypes.c_size_t) for name in names],
    })()  # fmt: skip
    counters.size = ctypes.sizeof(counters)
    itself = ctypes.c_void_p(-1)
    windows: Any = ctypes
    found = windows.windll.kernel32.K32GetProcessMemoryInfo(
        itself, ctypes.byref(counters), counters.size
    )
    return (counters.now, counters.peak) if found else (None, None)


def _seconds_to_read(threads: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    started = time.perf_counter()
    list(threads.map(np.max, parts))
    return time.perf_counter() - started
