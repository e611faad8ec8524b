"""The user's cache: bounded, private, and never needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

from gemma_multi import OptionError, cache
from gemma_multi.engines import create_engine


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_MULTI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(path: Path, nbytes: int, age: float) -> Path:
    """A file that was used so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(nbytes))
    os.utime(path, (time.time() - age, time.time() - 999))
    return path


def test_what_was_used_longest_ago_goes_first(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_MULTI_CACHE_LIMIT", "2.5 kB")
    old, newer, new = (keep(own_cache / "exports" / f"{i}.tflite", 1000, 100 - i) for i in range(3))
    tokenizer = keep(own_cache / "tokenizers" / "t.model", 100_000, 500)  # is not counted
    cache.used(old)  # so that it is the newest
    cache.trim()
    assert not newer.exists()
    assert old.exists()
    assert new.exists()
    assert tokenizer.exists()
    monkeypatch.setenv("GEMMA_MULTI_CACHE_LIMIT", "0")
    cache.trim(keep=new)
    assert [path.name for path in (own_cache / "exports").iterdir()] == [new.name]


def test_a_note_of_use_does_not_look_like_a_change(own_cache: Path) -> None:
    path = keep(own_cache / "exports" / "a.tflite", 10, 500)
    before = path.stat()
    cache.used(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_atime > before.st_atime + 400


def test_what_a_killed_process_left_goes_after_a_day(own_cache: Path) -> None:
    abandoned = keep(own_cache / "exports" / ".a.tflite.12ab", 10, 25 * 3600)
    at_work = keep(own_cache / "exports" / ".b.tflite.12ab", 10, 60)
    half = own_cache / "calibrated" / ".a.12ab"
    keep(half / "model.safetensors", 10, 25 * 3600)
    os.utime(half, (time.time() - 25 * 3600,) * 2)
    cache.trim()
    assert (abandoned.exists(), at_work.exists(), half.exists()) == (False, True, False)


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [
        ("", 10**10),
        ("500MB", 5 * 10**8),
        ("1.5 gb", 15 * 10**8),
        ("10G", 10**10),
        ("7", 7),
        ("0", 0),
    ],
)
def test_a_limit_is_a_size(given: str, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_MULTI_CACHE_LIMIT", given)
    assert cache.limit() == nbytes


@pytest.mark.parametrize("given", ["much", "-1", "5 XB", "GB"])
def test_a_limit_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_MULTI_CACHE_LIMIT", given)
    with pytest.raises(OptionError, match="expected a size such as 500MB or 20GB"):
        cache.limit()


def test_exports_stay_below_the_limit_and_still_run(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three models, room for about one: the oldest goes, and comes back when it is asked for."""
    checkpoints = [tiny_checkpoint(seed) for seed in range(3)]
    first = create_engine(checkpoints[0], "litert").session().read([5, 6, 7])
    one = sum(f.stat().st_size for f in (own_cache / "exports").glob("*.tflite"))
    monkeypatch.setenv("GEMMA_MULTI_CACHE_LIMIT", str(int(one * 2.2)))
    for checkpoint in checkpoints[1:]:
        create_engine(checkpoint, "litert").session().read([5, 6, 7])
    left = list((own_cache / "exports").glob("*.tflite"))
    assert 0 < len(left) < 3
    again = create_engine(checkpoints[0], "litert").session().read([5, 6, 7])
    np.testing.assert_array_equal(again, first)


def test_a_limit_that_is_none_is_refused_before_the_work(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_MULTI_CACHE_LIMIT", "plenty")
    for _ in range(2):  # and every time
        with pytest.raises(OptionError, match="GEMMA_MULTI_CACHE_LIMIT is 'plenty'"):
            create_engine(tiny_checkpoint(), "litert")
    assert not list((own_cache / "exports").glob("*.tflite"))


def test_without_a_home_it_is_this_users_alone(tmp_path: Path) -> None:
    """A directory under the temporary one that others can enter, or that is a link, is not used."""
    script = (
        "import pathlib\n"
        "def no_home(self): raise RuntimeError\n"
        "pathlib.Path.expanduser = no_home\n"
        "from gemma_multi.cache import writable_cache\n"
        "print(writable_cache('exports'))"
    )
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("GEMMA_MULTI_CACHE", "XDG_CACHE_HOME")}  # fmt: skip

    def run(name: str) -> str:
        temporary = tmp_path / name
        temporary.mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                              env={**environment, "TMPDIR": str(temporary)})  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    made = Path(run("mine"))
    assert made.parent.stat().st_mode & 0o777 == 0o700
    made.parent.chmod(0o755)
    assert run("mine") == "None"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "theirs" / made.parent.name).symlink_to(tmp_path / "elsewhere")
    assert run("theirs") == "None"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_command_shows_and_empties_it(own_cache: Path) -> None:
    keep(own_cache / "exports" / "a.tflite", 2_000_000, 1)
    keep(own_cache / "tokenizers" / "t.model", 1_000_000, 1)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gemma_multi", "cache", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    shown = json.loads(run("--json").stdout)
    assert (shown["exports_bytes"], shown["tokenizers_bytes"]) == (2_000_000, 1_000_000)
    assert shown["path"] == str(own_cache)
    assert "2.0 MB" in run().stdout
    assert (
        json.loads(run("--clear", "--kind", "exports", "--json").stdout)["freed_bytes"] == 2_000_000
    )
    assert json.loads(run("--json").stdout)["tokenizers_bytes"] == 1_000_000
    assert "expected one of" in run("--clear", "--kind", "letters").stderr
    theirs = keep(own_cache / "huggingface" / "model.safetensors", 5, 1)
    note = keep(own_cache / "thesis.txt", 5, 1)
    assert "huggingface" not in run().stdout
    run("--clear")
    assert sorted(own_cache.rglob("*")) == [theirs.parent, theirs, note]
    theirs.unlink(), theirs.parent.rmdir(), note.unlink()
    run("--clear")
    assert not own_cache.exists()
    assert run().returncode == 0
