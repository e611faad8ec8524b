"""Ray Data as the engine: two actors give the bytes of one process, also when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from batches.row_files import LABELS, reviews, write

import gemma_multi
from gemma_multi import BatchError, BatchStopped, OptionError
from gemma_multi.batch import ray_processor, run
from gemma_multi.batch.on_ray import import_ray

OPTIONS: dict[str, Any] = {"labels": LABELS, "key": "id", "rows_per_part": 8, "progress": False}
PLACE = {"backend": "litert"}
ROWS = 160

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One for all tests here, which `run` finds and leaves running."""
    needs.package("ray", "ray")
    ray = import_ray()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def actors() -> list[int]:
    """The processes of this test's own pool, which are Ray's, which are ours."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    parents, named = {}, []
    for line in listed.splitlines()[1:]:
        pid, parent, arguments = line.split(None, 2)
        parents[int(pid)] = int(parent)
        if "MapWorker" in arguments:
            named.append(int(pid))

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    return [pid for pid in named if is_ours(pid)]


def test_two_actors_give_the_bytes_of_one_process_though_one_is_killed(
    cluster: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", [*reviews(ROWS), {"id": "none"}])
    run("storyteller", source, tmp_path / "one.jsonl", "classify", load=PLACE, **OPTIONS)
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if total and 0 < done < total and not killed:
            pool = actors()
            assert len(pool) == 2
            killed.append(pool[0])
            os.kill(pool[0], signal.SIGKILL)

    report = run("storyteller", source, tmp_path / "two.jsonl", "classify", load=PLACE,
                 engine="ray", **{**OPTIONS, "progress": kill_one})  # fmt: skip
    assert len(killed) == 1
    assert (report.rows, report.failed, report.resumed) == (ROWS + 1, 1, 0)
    for name in ("two.jsonl", "two.errors.jsonl"):
        other = tmp_path / name.replace("two", "one")
        assert (tmp_path / name).read_bytes() == other.read_bytes()


def test_a_cluster_goes_on_with_what_one_process_left(cluster: Any, tmp_path: Path) -> None:
    """The command, at the address of a cluster that runs."""
    source = write(tmp_path / "rows.jsonl", reviews(40))
    run("storyteller", source, tmp_path / "one.jsonl", "classify", load=PLACE, **OPTIONS)

    def stop(done: int, total: int) -> None:
        if total and done > 16:
            raise KeyboardInterrupt

    output = tmp_path / "two.jsonl"
    with pytest.raises(BatchStopped, match="16 of 40 rows"):
        run("storyteller", source, output, "classify", load=PLACE, **{**OPTIONS, "progress": stop})
    done = command(
        source, output, cluster.get_runtime_context().gcs_address, "--task", "classify", "-l",
        LABELS[0], "-l", LABELS[1], "--key", "id", "--rows-per-part", "8", "--resume", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] == 16
    assert "Traceback" not in done.stderr
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def command(source: Path, output: Path, address: str, *more: str) -> Any:
    """`gemma-multi batch` on Ray, in a process of its own."""
    line = ["batch", "storyteller", str(source), str(output), "-b", "litert", "--engine", "ray",
            "--actors", "1", "--address", address, *more]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "gemma_multi", *line], capture_output=True, text=True
    )


def test_a_step_of_somebodys_pipeline(cluster: Any) -> None:
    rows = reviews(20)
    ask = ray_processor("storyteller", "classify", column="text", labels=LABELS, load=PLACE,
                        actors=2, rows_at_a_time=5)  # fmt: skip
    dataset = cluster.data.from_items([*rows, {"id": "none", "text": "", "note": ""}])
    found = {row["id"]: row for row in ask(dataset).take_all()}
    model = gemma_multi.load("storyteller", progress=False, **PLACE)
    expected = model.classify([row["text"] for row in rows], LABELS, progress=False)
    for row, answer in zip(rows, expected, strict=True):
        one = found.pop(row["id"])
        assert one == {**row, "label": answer.label, "probability": answer.probability,
                       "probabilities": answer.probabilities, "error": None}  # fmt: skip
    assert found["none"]["label"] is None
    assert "''" in found["none"]["error"]


def test_what_is_wrong_is_said_in_a_sentence(cluster: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", reviews(4))
    with pytest.raises(OptionError, match=r"^labels is empty, expected at least one text$"):
        run("storyteller", source, tmp_path / "o.jsonl", "classify", labels=[], engine="ray",
            actors=1, load=PLACE, progress=False)  # fmt: skip
    model = gemma_multi.load("storyteller", progress=False, **PLACE)
    with pytest.raises(BatchError, match="a loaded Model, and each actor loads its own"):
        run(model, source, tmp_path / "o.jsonl", "classify", labels=LABELS, engine="ray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", reviews(2))
    done = command(source, tmp_path / "o.jsonl", "127.0.0.1:1", "--task", "embed")
    assert done.returncode == 2
    assert done.stderr.startswith("gemma-multi: there is no Ray cluster at 127.0.0.1:1: ")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
