"""What surrounds LiteRT's runtime: its packed weights on disk, and what it says."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint

from gemma_multi.engines import NOTHING, Rows, create_engine, litert_runtime, native_log
from gemma_multi.formats.tflite.layout import cache_names, cache_positions

RUN = (
    "import gemma_multi\n"
    "m = gemma_multi.load('storyteller', backend='litert')\n"
    "print(m.generate('Good night.', temperature=0, max_tokens=20).text)\n"
)


def run(cache: Path, script: str = RUN) -> str:
    environment = {**os.environ, "GEMMA_MULTI_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env=environment, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_packed_weights_are_kept_whole_and_used_again(tmp_path: Path) -> None:
    expected = run(tmp_path)
    (packed,) = (tmp_path / "exports").glob("*.xnnpack")
    before = packed.stat()
    assert packed.with_suffix(".stamp").read_text() == f"{before.st_size} {before.st_mtime_ns}"
    assert run(tmp_path) == expected
    after = packed.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list((tmp_path / "exports").glob(".*"))


def test_a_file_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    """It has no stamp yet. Taken for whole it would be believed, taken for broken be deleted."""
    expected = run(tmp_path)
    (packed,) = (tmp_path / "exports").glob("*.xnnpack")
    packed.with_suffix(".stamp").unlink()
    half = packed.read_bytes()[: packed.stat().st_size // 2]
    packed.write_bytes(half)
    with packed.open("rb") as theirs:  # as the process that writes it holds it
        assert run(tmp_path) == expected
        assert theirs.read() == half  # whoever has it open still has it as it was
    assert packed.stat().st_size > len(half)  # a whole one has taken the name
    assert run(tmp_path) == expected


def test_two_cold_starts_with_a_kill_between(tmp_path: Path) -> None:
    """kill -9 at moments around packing: what is left never spoils a later start."""
    expected = run(tmp_path / "other")
    for i in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "GEMMA_MULTI_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        wait_for_an_export(tmp_path / "cache" / "exports", process)
        time.sleep(0.03 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if i % 3 == 2:
            assert run(tmp_path / "cache") == expected
            for path in (tmp_path / "cache" / "exports").glob("*.xnnpack"):
                path.unlink()
    both = [subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "GEMMA_MULTI_CACHE": str(tmp_path / "two")})
            for _ in range(2)]  # fmt: skip
    assert [process.communicate(timeout=120)[0] for process in both] == [expected] * 2
    assert len(list((tmp_path / "two" / "exports").glob("*.xnnpack"))) == 1
    assert len(list((tmp_path / "two" / "exports").glob("*.tflite"))) == 1


def wait_for_an_export(directory: Path, process: subprocess.Popen) -> None:
    while not list(directory.glob("*.tflite")):
        assert process.poll() is None
        time.sleep(0.005)


def test_the_runtime_is_not_heard_when_engines_start_and_go() -> None:
    """Not at load, not when an engine and its sessions are dropped, not at the end."""
    script = (
        "import sys, gemma_multi, gc, logging\n"
        "logging.disable()  # of our own, which says once that it exports\n"
        "for _ in range(2):\n"
        "    m = gemma_multi.load('storyteller', backend='litert')\n"
        "    s = m.engine.session(); s.read([5, 6, 7])\n"
        "    print('one', file=sys.stderr)\n"
        "    del m; gc.collect(); del s; gc.collect()\n"
        "    print('two', file=sys.stderr)\n"
        "kept = gemma_multi.load('storyteller', backend='litert')\n"
        "print('three', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["one", "two", "one", "two", "three"]


@pytest.mark.skipif(sys.platform == "win32", reason="C has no variable for its stream there")
def test_other_threads_keep_their_standard_error_while_a_model_loads() -> None:
    """Descriptor 2 stays where it is, and what other native code prints is printed after all."""
    script = (
        "import ctypes, os, sys, threading, time\n"
        "from gemma_multi.engines import native_log\n"
        "c = ctypes.CDLL(None)\n"
        "where = os.fstat(2)\n"
        "with native_log.caught() as said:\n"
        "    say = lambda: print('from python', file=sys.stderr, flush=True)\n"
        "    thread = threading.Thread(target=say)\n"
        "    thread.start(); thread.join()\n"
        "    assert (os.fstat(2).st_ino, os.fstat(2).st_dev) == (where.st_ino, where.st_dev)\n"
        "    os.system('echo from another process >&2')\n"
        "    name = '__stderrp' if sys.platform == 'darwin' else 'stderr'\n"
        "    stream = ctypes.c_void_p.in_dll(c, name)\n"
        "    for line in (b'INFO: [x.cc:1] theirs\\n', b'from other native code\\n'):\n"
        "        c.fputs(line, stream)\n"
        "    assert said() == ['INFO: [x.cc:1] theirs', 'from other native code'], said()\n"
        "    os.write(1, b'.')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines == ["from python", "from another process", "from other native code"]


def test_catching_nests_and_ends_as_it_began() -> None:
    with native_log.caught() as outer, native_log.caught() as inner:
        assert outer() == inner() == []
    with native_log.caught() as again:
        assert again() == []


def test_the_process_keeps_its_umask_while_files_are_written(tmp_path: Path) -> None:
    """It can only be read by setting it, which in a threaded program others would see."""
    script = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "real, calls = os.umask, []\n"
        "os.umask = lambda mask: calls.append(mask) or real(mask)\n"
        "real(0o027)\n"
        "import gemma_multi\n"
        "gemma_multi.load('storyteller', backend='litert').save(Path(sys.argv[1]) / 'saved')\n"
        "gemma_multi.export('storyteller', Path(sys.argv[1]) / 'm.tflite')\n"
        "print(calls)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.stdout == "[]\n", done.stderr
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o750
    for file in (*(tmp_path / "saved").iterdir(), tmp_path / "m.tflite"):
        assert file.stat().st_mode & 0o777 == 0o640, file


# conversations


def test_ended_conversations_give_their_caches_to_new_ones() -> None:
    engine = create_engine(tiny_checkpoint(), "litert", "float32")
    session = engine.session()
    session.read(np.arange(5, 105))
    caches = session.own_caches()
    del session
    following = engine.session()
    following.read([5, 6, 7])
    assert following.own_caches() is caches
    assert engine.session().own_caches() is not caches


def test_forks_share_their_caches_until_one_reads_on() -> None:
    engine = create_engine(tiny_checkpoint(), "litert", "float32")
    session = engine.session()
    session.read(np.arange(5, 50))
    caches = session.own_caches()
    one, other = session.fork(), session.fork()
    assert one._holding.caches is other._holding.caches is caches
    one.read([7])
    assert one.own_caches() is not caches
    del session
    other.read([8])
    assert other.own_caches() is not one.own_caches()
    for fork, token in ((one, 7), (other, 8)):
        alone = engine.session()
        alone.read([*range(5, 50), token])
        np.testing.assert_allclose(fork.read([9]), alone.read([9]), rtol=0, atol=3e-5)


@pytest.mark.parametrize("reached", [True, False])
def test_a_fork_takes_over_what_was_read_and_nothing_behind_it(
    reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the runtime's own memory, and where that cannot be reached by copies of all of it."""
    memory, arrays = litert_runtime._host_memory, []

    def host_memory(*arguments: Any) -> np.ndarray | None:
        arrays.append(memory(*arguments))
        return arrays[-1] if reached else None

    monkeypatch.setattr(litert_runtime, "_host_memory", host_memory)
    engine = create_engine(tiny_checkpoint(), "litert", "float32")
    session = engine.session()
    session.read(np.arange(5, 105))
    assert arrays
    assert all(array is not None for array in arrays)
    session.truncate(90)
    fork = session.fork()
    # its caches are another's, who read more
    other = engine.session()
    other.read(np.arange(200, 310))
    del other
    config, theirs, ours = engine.config, session.own_caches(), fork.own_caches()
    assert ours is not theirs
    assert len(engine._spare) == 0
    for i in range(config.num_hidden_layers):
        count = min(90, cache_positions(config, i, engine.context_length))
        shape = (1, config.num_key_value_heads, count, config.head_dim)
        keys, values = (ours.held(90)[name] for name in cache_names(i))
        assert keys.shape == values.swapaxes(2, 3).shape == shape
    for name, array in theirs.held(90).items():
        np.testing.assert_array_equal(ours.held(90)[name], array)
    alone = engine.session()
    alone.read(np.arange(5, 95))
    np.testing.assert_allclose(fork.read([9]), alone.read([9]), rtol=0, atol=3e-5)
    np.testing.assert_allclose(session.read([9, 10]), alone.read([10]), rtol=0, atol=3e-5)


def test_caches_with_a_number_that_is_not_finite_are_not_used_again() -> None:
    """A masked infinity is still not a number once it is multiplied by zero."""
    checkpoint = tiny_checkpoint()
    name = "model.layers.0.self_attn.v_proj.weight"
    spoilt = {name: np.full_like(checkpoint.weight(name), np.float32(3e38))}
    engine = create_engine(checkpoint.with_tensors(spoilt), "litert", "float32")
    session = engine.session()
    logits = session.read(np.arange(5, 25))
    assert not np.isfinite(logits).all()
    caches = session.own_caches()
    del session
    assert engine.session().own_caches() is not caches


@pytest.mark.parametrize("how", ["unseen", "begun anew"])
def test_what_nobody_saw_to_be_finite_spoils_no_other_conversation(how: str) -> None:
    checkpoint = tiny_checkpoint()
    embedding = checkpoint.weight("model.embed_tokens.weight").copy()
    embedding[9] = 3e38  # a token whose states are not finite
    broken = checkpoint.with_tensors({"model.embed_tokens.weight": embedding})
    engine = create_engine(broken, "litert", "float32")
    expected = engine.session().read([5, 6, 7])
    session = engine.session()
    if how == "unseen":
        session.read([9, 5, 6], NOTHING)
        del session
        session = engine.session()
    else:
        session.read([9, 5, 6])
        session.truncate(0)
    np.testing.assert_array_equal(session.read([5, 6, 7]), expected)


def test_an_engine_goes_when_nobody_holds_it() -> None:
    """At once, without waiting for a collection: its weights are hundreds of megabytes."""
    engine = create_engine(tiny_checkpoint(), "litert", "float32")
    session = engine.session()
    session.read([5, 6], Rows(np.array([5, 6])))
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del session, engine
        assert gone() is None
    finally:
        gc.enable()


def test_sessions_in_threads_share_an_engine() -> None:
    engine = create_engine(tiny_checkpoint(), "litert", "float32")
    expected = engine.session().read(np.arange(5, 60))
    found: list[np.ndarray] = []

    def work() -> None:
        for _ in range(5):
            found.append(engine.session().read(np.arange(5, 60)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for logits in found:
        np.testing.assert_array_equal(logits, expected)
