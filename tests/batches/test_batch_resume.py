"""A batch that is killed, stopped, or begun twice: no row lost, none repeated, the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from batches.row_files import LABELS, reviews, write

from gemma_multi import BatchError, OptionError
from gemma_multi.batch import run

OPTIONS: dict[str, Any] = {"labels": LABELS, "key": "id", "rows_per_part": 4, "progress": False}

# a process whose parent ignores SIGINT, as in a shell's background, would ignore it too
HEARD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gemma_multi.cli import main
main(sys.argv[1:])
"""


def done(output: Path, **changes: Any) -> Any:
    given = {**OPTIONS, "load": {"backend": "litert"}, **changes}
    return run("storyteller", output.with_name("rows.jsonl"), output, "classify", **given)


def interrupted(output: Path, by: signal.Signals) -> subprocess.CompletedProcess[str]:
    """`gemma-multi batch` in a process of its own, ended when it has done two parts or more."""
    line = [
        "batch", "storyteller", str(output.with_name("rows.jsonl")), str(output), "--task",
        "classify", "-l", LABELS[0], "-l", LABELS[1], "--key", "id", "--rows-per-part", "4", "-b",
        "litert",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", HEARD, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    parts = output.with_name(f"{output.name}.parts")
    while len(list(parts.glob("[0-9]*.jsonl"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(by)
    said, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(line, process.returncode, said, errors)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run gives that nobody stops."""
    output = tmp_path_factory.mktemp("unbroken") / "found.jsonl"
    write(output.with_name("rows.jsonl"), reviews(60))
    report = done(output)
    assert (report.rows, report.resumed, report.failed) == (60, 0, 0)
    return output


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_what_is_resumed_has_the_bytes_of_an_unbroken_run(
    unbroken: Path, tmp_path: Path, by: signal.Signals
) -> None:
    write(tmp_path / "rows.jsonl", reviews(60))
    output = tmp_path / "found.jsonl"
    ended = interrupted(output, by)
    assert not output.exists()
    if by == signal.SIGINT:
        assert ended.returncode == 130
        assert "of 60 rows are done and kept, and --resume goes on" in ended.stderr
        assert "Traceback" not in ended.stderr
    with pytest.raises(BatchError, match=r"an unfinished run is there; go on with it \(--resume"):
        done(output)
    seen: list[tuple[int, int]] = []
    report = done(output, resume=True, progress=lambda *said: seen.append(said))
    assert 8 <= report.resumed < 60
    assert report.resumed % 4 == 0
    assert (report.resumed, 60) in seen
    assert seen[-1] == (60, 60)
    assert output.read_bytes() == unbroken.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.jsonl", "rows.jsonl"]


def test_one_that_is_stopped_at_once_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", reviews(12))

    def stop(done: int, total: int) -> None:
        if total:
            raise KeyboardInterrupt

    with pytest.raises(BatchError, match=r"stopped before the first 4 rows were done; nothing"):
        done(tmp_path / "found.jsonl", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.fixture
def unfinished(unbroken: Path, tmp_path: Path) -> Path:
    """Where a run was stopped, in this process."""
    write(tmp_path / "rows.jsonl", reviews(12))
    output = tmp_path / "found.jsonl"

    def stop(done: int, total: int) -> None:
        if done > 4 and total:
            raise KeyboardInterrupt

    with pytest.raises(BatchError, match=r"stopped; 4 of 12 rows are done"):
        done(output, progress=stop)
    return output


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"labels": [*LABELS, "neutral"]}, "begun with options"),
     ({"rows_per_part": 8}, "begun with rows_per_part 4, and not 8"),
     ({"load": {"backend": "keras"}}, 'begun with backend "litert", and not "keras"'),
     ({"column": "note"}, 'begun with column "text", and not "note"')],
)  # fmt: skip
def test_another_job_does_not_go_on_with_it(
    unfinished: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BatchError, match=words):
        done(unfinished, resume=True, **changes)


def test_other_rows_do_not_go_on_with_it_but_may_begin_again(unfinished: Path) -> None:
    write(unfinished.with_name("rows.jsonl"), reviews(13)[1:])
    with pytest.raises(BatchError, match="other rows: its input has changed since"):
        done(unfinished, resume=True)
    report = done(unfinished, overwrite=True)
    assert (report.resumed, report.rows) == (0, 12)


def test_a_seed_that_was_drawn_is_drawn_once(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": "Once upon"}] * 6)
    given: dict[str, Any] = {"raw": True, "temperature": 1.0, "max_tokens": 8, "rows_per_part": 2,
                             "load": {"backend": "litert"}}  # fmt: skip
    place = ("storyteller", tmp_path / "rows.jsonl", tmp_path / "a.jsonl")

    def stop(done: int, total: int) -> None:
        if done > 2 and total:
            raise KeyboardInterrupt

    with pytest.raises(BatchError):
        run(*place, progress=stop, **given)
    report = run(*place, progress=False, resume=True, **given)
    again = run(*place[:2], tmp_path / "b.jsonl", progress=False, seed=report.seed, **given)
    assert again.seed == report.seed
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_one_that_was_killed_when_all_was_written_is_tidied_up(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("gemma_multi.batch.parts.Parts.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            done(unfinished, resume=True)
    written = unfinished.read_bytes()
    assert done(unfinished, resume=True).resumed == 12
    assert unfinished.read_bytes() == written
    assert not unfinished.with_name("found.jsonl.parts").exists()


def test_two_at_once_do_not_write_one_output(unfinished: Path) -> None:
    refused: list[str] = []

    def another(seen: int, total: int) -> None:
        if total and not refused:
            with pytest.raises(BatchError, match="another process is writing it") as error:
                done(unfinished, resume=True)
            refused.append(str(error.value))

    done(unfinished, resume=True, progress=another)
    assert len(refused) == 1


def test_a_folder_of_that_name_that_is_no_runs_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", reviews(2))
    mine = tmp_path / "found.jsonl.parts" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    for changes in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(BatchError, match="is no unfinished run; move it away"):
            done(tmp_path / "found.jsonl", **changes)
    assert mine.read_text() == "mine"


def test_nothing_is_replaced_unless_asked(unbroken: Path) -> None:
    before = unbroken.read_bytes()
    for changes in ({}, {"resume": True}):
        with pytest.raises(OptionError, match=r"found.jsonl: exists already; .*--overwrite"):
            done(unbroken, **changes)
    with pytest.raises(OptionError, match="three files; two are the same"):
        run("storyteller", unbroken, unbroken, "classify", overwrite=True, **OPTIONS)
    beside = unbroken.with_name("other.errors.jsonl")
    beside.write_text(json.dumps({"mine": 1}))
    with pytest.raises(OptionError, match=r"other.errors.jsonl: exists already"):
        done(unbroken.with_name("other.jsonl"))
    assert unbroken.read_bytes() == before
    assert sorted(path.name for path in unbroken.parent.iterdir()) == [
        "found.jsonl", "other.errors.jsonl", "rows.jsonl"
    ]  # fmt: skip
    beside.unlink()
