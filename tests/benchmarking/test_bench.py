"""`bench` and `soak` in real processes: the storyteller on LiteRT, short."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import looks
from rich.console import Console
from test_cli import assert_refused, run

import gemma_multi
from gemma_multi import BackendError, BenchReport, OptionError, own_process
from gemma_multi.benchmarking import SoakReport, bench, soak
from gemma_multi.benchmarking.places import BenchPlace
from gemma_multi.benchmarking.report import Measured

# short answers, a clock that goes by turns however busy the machine is, and at will a leak in each
LEAKING = """
import os, sys, time
if "gemma_multi.benchmarking.soaking" in sys.orig_argv:
    from gemma_multi.benchmarking import workload
    from gemma_multi.chat import Chat
    workload._WRITE, send, kept, now = (3,), Chat.send, [], [0.0]
    time.perf_counter = lambda: now[0]
    def leaking(self, text, **options):
        now[0] += 0.03
        if os.environ["LEAK"] == "die" and len(self.messages) == 4:
            os.kill(os.getpid(), 9)
        kept.append(b"x" * int(os.environ["LEAK"].replace("die", "0")))
        return send(self, text, **options)
    Chat.send = leaking
"""


@pytest.fixture
def leaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int | str], None]:
    """Makes processes started later leak so many bytes a turn."""
    (tmp_path / "sitecustomize.py").write_text(LEAKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return lambda size: monkeypatch.setenv("LEAK", str(size))


def shown(report: BenchReport | SoakReport) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(report.to_table())
    return out.getvalue()


def test_the_command_measures_what_runs_and_says_why_the_rest_does_not(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run("bench", "storyteller", "--backends", "litert", "--precisions", "int4,bfloat16",
               "--device", "cpu", "--rounds", "2", "--conversations", "1", "--threads", "1",
               "-o", str(output), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads((output / "bench.json").read_text())
    ran, absent = told["measured"]
    assert absent["reason"] == ("backend 'litert' computes in float32, int4, int8, not in bfloat16")
    assert ran["name"] == "litert int4 cpu"
    assert len(ran["rounds"]) == 2
    first, second = ran["rounds"]
    assert first["written_tokens_per_second"] != second["written_tokens_per_second"]
    seconds = [one["conversations_seconds"] for one in ran["rounds"]]
    assert ran["figures"]["conversations_seconds"] == {
        "median": pytest.approx(sum(seconds) / 2), "low": min(seconds), "high": max(seconds),
    }  # fmt: skip
    # one thread computes: the clock's time is the processor's
    assert 0 < first["cpu_seconds"] < 1.5 * first["conversations_seconds"]
    assert first["bytes_moved"] > 45 * first["weight_bytes"]
    assert 50e6 < first["peak_memory_bytes"] < 1e9
    assert told["disk_bytes"] > first["weight_bytes"]
    assert (first["prompt"], first["steps"]) == (512, 64)
    assert first["joules"] is not None or first["energy"]


def test_a_page_of_a_report_fits_a_phone_and_a_terminal_80_columns(tmp_path: Path) -> None:
    report = made_up()
    page = report.save(tmp_path / "out") / "bench.html"
    for (width, _), found in looks(page).items():
        assert found["heading"] == report.headline
        assert found["scroll"] <= width
        assert len(found["plots"]) == 3
        assert found["smallest"] >= 7
        assert found["plot_ink"] == found["ink"]
    text = shown(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for said in ("litert int4 cpu", "123,457", "±10%", "12.34", "9,999", "1,234.56", "98,765",
                 "did not run: mlx gpu", "RAPL: package-0"):  # fmt: skip
        assert said in " ".join(text.split())
    assert "12%" in text  # 740 steps of 4 MB, of 25 GB a second
    with pytest.raises(OptionError, match="exists already"):
        report.save(tmp_path / "out")


def made_up() -> BenchReport:
    """With figures as wide as they come."""
    names = (
        "load_seconds", "warm_up_seconds", "prefill_tokens_per_second", "decode_tokens_per_second",
        "first_token_seconds", "conversations_seconds", "cpu_seconds", "bytes_moved", "joules",
        "written_tokens_per_second", "wait_median_seconds", "wait_p95_seconds",
        "peak_memory_bytes", "weight_bytes", "decode_step_bytes",
    )  # fmt: skip
    values = (12.34, 1, 123456.7, 740, 1.5, 9999, 9999, 1234.56e9, 98765, 740, 1, 2, 9e9, 2e6, 4e6)
    rounds = [
        {**{name: value * by for name, value in zip(names, values, strict=True)},
         "energy": "RAPL: package-0; all that runs on the machine", "prompt": 512, "steps": 64,
         "place": {"backend": backend, "weights": weights, "device": "cpu"}}
        for backend, weights in (("litert", "int4"), ("keras", "float32"))
        for by in (0.9, 1, 1.1)
    ]  # fmt: skip
    measured = [
        Measured(BenchPlace("litert", "int4", "cpu"), rounds[:3]),
        Measured(BenchPlace("keras"), rounds[3:]),
        Measured(BenchPlace("mlx", device="gpu"), [], "mlx runs on the cpu here"),
    ]
    machine = gemma_multi.machine.Machine("Linux on x86_64", 2, 10**10, 25e9)
    return BenchReport("storyteller", 2_300_000, machine, tuple(measured), 25, 3)


def test_memory_that_stays_flat_is_called_flat(leaking: Callable[[int | str], None]) -> None:
    leaking(0)
    told: list[tuple[int, int]] = []
    found = soak("storyteller", 0.06, backend="litert", progress=lambda *one: told.append(one))
    assert found.trend.verdict == "flat", found
    assert not found.leaks
    assert found.conversations * 1.5 < found.turns
    assert found.seconds >= 3.6
    assert told[-1][0] == told[-1][1] == 4
    assert "Memory is flat" in shown(found)
    assert max(map(len, shown(found).splitlines())) <= 80


def test_a_run_that_is_stopped_reports_what_it_saw(leaking: Callable[[int | str], None]) -> None:
    leaking(0)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # at the first word, when there is nothing to report
        soak("storyteller", backend="litert", progress=stop)

    def stop_later(done: int, total: int) -> None:
        if done >= 1:
            raise KeyboardInterrupt

    found = soak("storyteller", backend="litert", progress=stop_later)
    assert found.ended == "stopped"
    assert 0.5 <= found.seconds < 60
    assert "ended early: stopped" in found.scope
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["turns"] == found.turns


def test_a_process_that_is_killed_has_shown_what_it_could(
    leaking: Callable[[int | str], None],
) -> None:
    leaking("die")  # in the third turn of a conversation: the fifth is the first that has one
    found = soak("storyteller", backend="litert", progress=False)
    assert found.ended.startswith("the process was killed, as systems do where memory runs out")
    assert (found.conversations, found.turns) == (5, 8)
    assert found.failed
    assert not found.leaks
    assert "Too short to say" in shown(found)


def test_a_leak_is_seen_by_the_command(
    leaking: Callable[[int | str], None], tmp_path: Path
) -> None:
    leaking(300_000)
    output = tmp_path / "soak"
    done = run("bench", "storyteller", "-b", "litert", "--minutes", "0.06", "-o", str(output))
    assert done.returncode == 1, done.stderr
    assert "Memory grows, something leaks: 0." in done.stdout
    told = json.loads((output / "soak.json").read_text())
    assert told["verdict"] == "grows"
    assert told["mb_per_turn"] == pytest.approx(0.3, rel=0.1)
    assert told["mb_per_conversation"] == pytest.approx(
        told["mb_per_turn"] * told["turns"] / told["conversations"]
    )
    page = (output / "soak.html").read_text()
    assert page.count("<svg") == 1
    assert '<h1 class="fail">Memory grows' in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["storyteller", "-b", "onnx"], "unknown backend 'onnx', expected auto, mlx"),
        (["storyteller", "--conversations", "0"], "conversations is 0, expected a whole number"),
        (["absent/model/here"], "absent/model/here: no such directory"),
        (["storyteller", "-o", "."], "exists already"),
        (["storyteller", "--minutes", "1", "-b", "keras,litert"], "watches one process"),
        (["storyteller", "--minutes", "1", "--rounds", "2"], "--rounds is for a run without"),
    ],
)
def test_bad_input_is_a_sentence(arguments: list[str], words: str) -> None:
    assert_refused(run("bench", *arguments), words)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precisions": ["int5"]}, OptionError, "unknown precision 'int5', expected auto, float32"),
        ({"devices": ["tpu"]}, OptionError, "unknown device 'tpu', expected auto, cpu, gpu"),
        ({"rounds": True}, OptionError, "rounds is True"),
        ({"backends": "litert"}, OptionError, "backends is 'litert', expected a list"),
        ({"backends": ["keras"], "threads": 2}, OptionError, "takes an option 'threads'"),
        ({"backends": ["litert"], "devices": ["gpu"]}, BackendError, "nothing of what was asked"),
        ({"context_length": 0}, OptionError, "context_length"),
        ({"model": 5}, OptionError, "model is a int, expected a name"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bench(**{"model": "storyteller", "progress": False, **options})


@pytest.mark.parametrize("minutes", [0, -1, True, float("nan"), "60"])
def test_minutes_are_a_number(minutes: Any) -> None:
    with pytest.raises(OptionError, match=r"minutes is .*, expected more than 0"):
        soak("storyteller", minutes)


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    free = "gemma_multi.benchmarking.places.available_memory"
    monkeypatch.setattr(free, lambda: 3_000_000)
    words = r"litert float32: the weights alone take 14 MB of memory, and 3 MB are free"
    with pytest.raises(BackendError, match=words):
        bench("storyteller", backends=["litert"], precisions=["float32"], progress=False)
    with pytest.raises(BackendError, match="alone take 14 MB"):
        soak("storyteller", backend="litert", precision="float32", progress=False)


# a process of its own

ENDS = """
import os, sys
from gemma_multi import own_process
from gemma_multi.errors import CheckpointError
def work(job, tell):
    print("noise of Python")
    os.system("echo noise of others")
    tell(heard=job["how"])
    if job["how"] == "error":
        raise CheckpointError("no such thing")
    if job["how"] == "disk":
        raise OSError(28, "No space left on device")
    if job["how"] in ("9", "6"):
        os.kill(os.getpid(), int(job["how"]))
    if job["how"] == "bug":
        raise KeyError("lost")
    return {"done": True}
own_process.answer(work)
"""


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("error", BackendError, "^no such thing$"),
        ("disk", OSError, "No space left"),
        ("9", BackendError, "killed, as systems do where memory runs out, while it tried"),
        ("6", BackendError, "exit status -6 while it tried"),
        ("bug", BackendError, "exit status 1 while it tried: .*KeyError: 'lost'"),
    ],
)
def test_how_a_process_ended_is_said(
    how: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    heard: list[dict[str, Any]] = []
    assert own_process.ask("ends", {"how": "well"}, heard.append, "tried") == {"done": True}
    with pytest.raises(error, match=words):
        own_process.ask("ends", {"how": how}, heard.append, "tried")
    assert heard == [{"heard": "well"}, {"heard": how}]
