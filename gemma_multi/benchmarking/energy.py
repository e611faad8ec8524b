"""Joules, where a machine counts them and lets us read.

Linux: RAPL's counters under /sys/class/powercap, of Intel's processors and AMD's: each package and
the memory beside it. They are the whole machine's, whatever else runs. Since 2020 only root may
read them unless somebody allows it. They wrap around after some 262 kJ, so a meter is to be read at
least every half hour. macOS: powermetrics, which only root may start, so it is asked of sudo,
without a password, and only where `powermetrics=True` permits it. Elsewhere, and on virtual
machines, nothing is counted, and the reason is said instead.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_INTERVAL = 500  # milliseconds between two figures of powermetrics
_ELAPSED = re.compile(r"\(([\d.]+)ms elapsed\)")
_POWER = re.compile(r"Combined Power \(CPU \+ GPU \+ ANE\): ([\d.]+) mW")
_POWERMETRICS = ["sudo", "-n", "powermetrics", "--samplers", "cpu_power"]


class Meter(ABC):
    """Counts from its making on."""

    of: str  # whose joules

    @abstractmethod
    def joules(self) -> float:
        """So far."""

    @abstractmethod
    def close(self) -> None:
        """Ends counting."""


def meter(powermetrics: bool = False, powercap: Path = POWERCAP) -> Meter | str:
    """A meter, or why there is none."""
    if sys.platform == "linux":
        return _rapl(powercap)
    if sys.platform == "darwin":
        return Powermetrics.start() if powermetrics else (
            "powermetrics needs root: permit it with --powermetrics, after `sudo -v`"
        )  # fmt: skip
    return f"{sys.platform} counts no energy that this package could read"


class Rapl(Meter):
    """Counters of microjoules."""

    def __init__(self, domains: list[Path]) -> None:
        names = [(domain / "name").read_text().strip() for domain in domains]
        self.of = f"RAPL: {', '.join(names)}; all that runs on the machine"
        self._counters = [
            (domain / "energy_uj", int((domain / "max_energy_range_uj").read_text()))
            for domain in domains
        ]
        self._last = [_count(file) for file, _ in self._counters]
        self._total = 0

    def joules(self) -> float:
        for i, (file, most) in enumerate(self._counters):
            now = _count(file)
            self._total += (now - self._last[i]) % (most + 1)
            self._last[i] = now
        return self._total / 1e6

    def close(self) -> None:
        """A file is opened for each reading."""


def _rapl(powercap: Path) -> Meter | str:
    domains = list(_domains(powercap))
    if not domains:
        return f"there is no RAPL counter under {powercap}, as on virtual machines"
    try:
        return Rapl(domains)
    except PermissionError as error:
        return f"{error.filename} may not be read: run as root, or allow it (chmod a+r)"
    except (OSError, ValueError) as error:
        return f"RAPL cannot be read: {error}"


def _domains(powercap: Path) -> Iterator[Path]:
    """The packages, and the memory beside each, by the same names on AMD. Cores and graphics are in
    a package's count, and the packages in that of `psys`."""
    for domain in sorted(powercap.glob("intel-rapl:*")):
        name = domain / "name"
        if name.is_file() and name.read_text().startswith(("package", "dram")):
            yield domain


def _count(file: Path) -> int:
    return int(file.read_text())


class Powermetrics(Meter):
    """Adds up the watts that it says."""

    of = "powermetrics: CPU, GPU and neural engine; all that runs on the machine"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._joules, self._seconds = 0.0, 0.0
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @classmethod
    def start(cls) -> Meter | str:
        try:
            tried = subprocess.run(
                [*_POWERMETRICS, "-n", "1", "-i", "1"], capture_output=True, text=True, timeout=30
            )
            if tried.returncode:
                said = " ".join(tried.stderr.split()[-20:]) or "it said nothing"
                return f"powermetrics did not start ({said}): run `sudo -v` first"
            return cls(subprocess.Popen(
                [*_POWERMETRICS, "-i", str(_INTERVAL)], stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
            ))  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"powermetrics did not start: {error}"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := _ELAPSED.search(line):
                self._seconds = float(found[1]) / 1000
            elif found := _POWER.search(line):
                self._joules += float(found[1]) / 1000 * self._seconds

    def joules(self) -> float:
        return self._joules

    def close(self) -> None:
        """It is root's; sudo passes the signal on to it."""
        self._process.terminate()
        self._process.wait()
        self._listener.join()
