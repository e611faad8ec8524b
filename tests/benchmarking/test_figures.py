"""What figures are made of: the workload's numbers, bytes by counting them, joules from counters, a
trend from samples."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi.benchmarking import energy, workload
from gemma_multi.benchmarking.traffic import Traffic, weight_bytes
from gemma_multi.benchmarking.trend import FLAT, GROWS, SHORT, UNCLEAR, trend
from gemma_multi.benchmarking.workload import conversations, drawn_ids
from gemma_multi.machine import available_memory, memory_in_use, peak_memory, physical_memory


def test_the_25_conversations_are_what_their_page_says() -> None:
    work = conversations()
    turns = [turn for conversation in work for turn in conversation]
    told = " ".join((workload.__doc__ or "").split())
    total = sum(turn.read for turn in turns), sum(turn.write for turn in turns)
    longest = max(sum(turn.read + turn.write for turn in one) for one in work)
    assert (len(work), len(turns), *total, longest) == (25, 50, 3500, 10750, 1365)
    for said in ("50 in all", "3,500 in all", "10,750 in all", "has 1,365 tokens"):
        assert said in told
    assert set(Counter(turns).values()) == {2}
    assert len(set(turns)) == 25
    assert conversations(60)[:25] == work
    assert conversations(60)[25:50] == work


def test_ids_are_the_same_every_time_and_never_steer() -> None:
    ids = drawn_ids(3, 500, 262_144)
    assert ids == drawn_ids(3, 500, 262_144) != drawn_ids(4, 500, 262_144)
    assert min(ids) >= 131_072
    assert max(ids) < 262_144


def test_bytes_of_a_read_are_those_of_the_arrays_it_touches() -> None:
    checkpoint = tiny_checkpoint()
    config = checkpoint.config
    model = gemma_multi.load(checkpoint, backend="litert", precision="float32")
    traffic = Traffic.of(model)
    assert traffic.weights == checkpoint.nbytes  # float32, as they are stored
    row = 2 * 4 * config.num_key_value_heads * config.head_dim
    for position, tokens in ((0, 1), (0, 40), (10, 1), (15, 1), (16, 1), (200, 1), (50, 7)):
        touched = 0
        for layer in range(config.num_hidden_layers):
            seen = set()
            for at in range(position, position + tokens):
                window = config.sliding_window if config.is_sliding(layer) else at + 1
                seen |= set(range(max(0, at - window + 1), at + 1))
            touched += len(seen) + tokens  # read, and written
        assert traffic.read(position, tokens) - traffic.weights == touched * row
    turn = traffic.read(5, 10) + sum(traffic.read(15 + i, 1) for i in range(3))
    assert traffic.turn(5, 10, 4) == turn


def test_weights_are_as_large_as_the_file_that_holds_them(tmp_path: Path) -> None:
    story = gemma_multi.open_checkpoint("storyteller")
    file = gemma_multi.export(story, tmp_path / "story.gguf", verify=False).path
    held = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    assert weight_bytes(story.config, "int4") == pytest.approx(
        held, rel=0.02
    )  # its norms are float32
    assert weight_bytes(story.config, "float32") == 4 * story.config.num_parameters


def test_memory_is_the_systems_own_figure() -> None:
    held, peak, free, there = memory_in_use(), peak_memory(), available_memory(), physical_memory()
    assert held is not None
    assert peak is not None
    assert free is not None
    assert there is not None
    assert 10e6 < held <= peak < there
    assert free < there
    resident, mapped = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    assert held == pytest.approx((resident - mapped) * os.sysconf("SC_PAGE_SIZE"), rel=0.1)
    more = np.ones(8_000_000)
    grown = memory_in_use()
    assert grown is not None
    assert grown - held == pytest.approx(more.nbytes, rel=0.1)


def test_pages_of_a_mapped_file_are_not_the_processs_own(tmp_path: Path) -> None:
    """The system takes them back when it likes, and brings them as they are looked at."""
    np.ones(8_000_000).tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.float64, "r")
    held = memory_in_use()
    assert mapped.sum() == 8_000_000
    grown = memory_in_use()
    assert held is not None
    assert grown is not None
    assert grown - held < 6_000_000


# joules


@pytest.fixture
def powercap() -> Iterator[Path]:
    """Counters as Linux has them, in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as work:
        os.chmod(work, 0o755)
        root = Path(work)
        for zone, name in (
            ("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0"),
        ):  # fmt: skip
            (root / zone).mkdir()
            (root / zone / "name").write_text(f"{name}\n")
            (root / zone / "max_energy_range_uj").write_text("1000000000\n")
            (root / zone / "energy_uj").write_text("999000000\n")
        yield root


def test_joules_are_of_packages_and_memory_and_go_on_where_a_counter_comes_round(
    powercap: Path,
) -> None:
    meter = energy.meter(powercap=powercap)
    assert isinstance(meter, energy.Meter)
    assert "RAPL: package-0, dram" in meter.of
    assert meter.joules() == 0
    for zone in powercap.iterdir():
        (zone / "energy_uj").write_text("999500000\n")
    assert meter.joules() == 1.0
    for zone in powercap.iterdir():
        (zone / "energy_uj").write_text("1499999\n")
    assert meter.joules() == pytest.approx(2 * 2.5)
    meter.close()


def test_why_there_are_no_joules_is_said(powercap: Path) -> None:
    assert "no RAPL counter" in str(energy.meter(powercap=powercap / "absent"))
    files = list(powercap.glob("*/energy_uj"))
    for file in files:
        file.chmod(0o400)
    code = (
        "import os, sys, pathlib; os.getuid() or os.setuid(65534)\n"
        "sys.path[:0] = eval(sys.argv[2])\n"
        "print(meter(powercap=pathlib.Path(sys.argv[1])))"
    )
    if os.getuid():
        for file in files:
            file.chmod(0)
    said = subprocess.run(
        [sys.executable, "-c", f"from gemma_multi.benchmarking.energy import meter\n{code}",
         str(powercap), repr(sys.path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "energy_uj may not be read: run as root, or allow it" in said


SAMPLE = """
*** Sampled system activity (Sat Nov 28 00:00:00 2026 +0000) ({ms}ms elapsed) ***

**** Processor usage ****
CPU Power: 900 mW
GPU Power: 100 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): {mw} mW
"""


def test_joules_of_powermetrics_are_power_by_time_where_sudo_lets_it_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sudo = tmp_path / "sudo"
    samples = SAMPLE.format(ms="500.00", mw="4000") + SAMPLE.format(ms="1500.00", mw="2000")
    sudo.write_text(
        f"#!/bin/sh\n[ \"$1\" = -n ] || exit 3\ncat <<'END'{samples}END\n"
        'case "$*" in *"-n 1"*) exit 0;; esac\nexec sleep 60\n'
    )
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    meter = energy.Powermetrics.start()
    assert isinstance(meter, energy.Meter), meter
    for _ in range(1000):  # until what was said is read
        if meter.joules() >= 5:
            break
        time.sleep(0.01)
    meter.close()
    assert meter.joules() == pytest.approx(0.5 * 4 + 1.5 * 2)
    sudo.write_text("#!/bin/sh\necho 'sudo: a password is required' >&2; exit 1\n")
    assert "a password is required" in str(energy.Powermetrics.start())


# whether memory grows

MB = 1e6


def moving(count: int, seed: int) -> np.ndarray:
    """Memory that does not grow: 500 MB that fill up, with noise, peaks and a garbage collector."""
    rng = np.random.default_rng(seed)
    steps = np.arange(count)
    held = 500 * MB - 80 * MB * np.exp(-steps / (count / 30)) + rng.normal(0, 0.3 * MB, count)
    held += (steps % 37) * 0.03 * MB
    return held + 30 * MB * (rng.random(count) < 0.02)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [60, 400, 5000])
def test_what_moves_and_fills_up_is_flat(count: int, seed: int) -> None:
    assert trend(range(count), moving(count, seed).tolist()).verdict == FLAT


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("count", "leak"), [(60, 110), (60, 0.5), (400, 0.05), (5000, 0.005)])
def test_a_leak_is_seen_and_its_size(count: int, leak: float, seed: int) -> None:
    held = moving(count, seed) + leak * MB * np.arange(count)
    found = trend(range(count), held.tolist())
    assert found.verdict == GROWS
    assert found.slope / MB == pytest.approx(leak, rel=0.15)
    assert found.low < found.slope < found.high


def test_a_step_is_no_leak_and_few_samples_say_nothing() -> None:
    held = np.where(np.arange(400) < 250, 500 * MB, 520 * MB)
    assert trend(range(400), held.tolist()).verdict == UNCLEAR
    assert trend(range(10), [500 * MB] * 10).verdict == SHORT
