"""`ship`, whole: a full disk and two kills on the way, then the file, the figures and the page.

The bundled storyteller learns from 20 rows. Every try is a process of its own, as people start it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import looks
from tiny import tiny_checkpoint
from training.conftest import wait_for_step

import gemma_multi
from gemma_multi import CheckpointError, DataError, OptionError, ShipReport, ship, validation_loss
from gemma_multi.exporters import save
from gemma_multi.litert_lm import in_litert_lm
from gemma_multi.scoring import LOSS, Scoring
from gemma_multi.shipping import phone
from gemma_multi.shipping.asking import Answers, Questions

WORDS = {"winter": "cold freezing icy frozen snowy", "song": "loud noisy singing ringing drum"}
ROWS = [
    {"prompt": f"{lead} {word}.", "completion": label}
    for label, words in WORDS.items() for word in words.split() for lead in ("I am", "It is")
]  # fmt: skip
HELD = [
    {"prompt": "Is it <b>cold</b> & icy?", "completion": "winter"},
    {"prompt": "We are singing.", "completion": "song"},
    {"prompt": "We are snowy.", "completion": "winter"},
    {"messages": [{"role": "system", "content": "One word."},
                  {"role": "user", "content": "I am cold."},
                  {"role": "model", "content": "winter"},
                  {"role": "user", "content": "And noisy?"},
                  {"role": "model", "content": "song"}]},
]  # fmt: skip
OPTIONS = ("-b", "mlx", "--epochs", "2", "--batch-size", "10", "--save-every", "0")
STAGES = ("rows", "before", "train", "quantise", "export", "run", "after", "compare")


class Tries:
    """One output, and what was said on the way to it."""

    def __init__(self, work: Path) -> None:
        self.output = work / "out"
        self.rows, self.held = work / "rows.jsonl", work / "held.jsonl"
        for path, rows in ((self.rows, ROWS), (self.held, HELD)):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *more: str, **popen: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gemma_multi", "ship", "storyteller", str(self.rows), "-o",
                   str(self.output), "--validation", str(self.held), *OPTIONS, *more]  # fmt: skip
        return subprocess.Popen(
            command, env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen,
        )  # fmt: skip

    def done(self) -> list[str]:
        """The stages that are."""
        found = self.output / "ship.json"
        stages = json.loads(found.read_text())["stages"] if found.exists() else {}
        return [name for name, stage in stages.items() if stage["done"]]

    def kill_after(self, stage: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while stage not in self.done():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


def little_disk() -> None:
    """No file may grow past what a state of the training takes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))


@pytest.fixture(scope="module")
def tries(tmp_path_factory: pytest.TempPathFactory) -> Tries:
    return Tries(tmp_path_factory.mktemp("ship"))


@pytest.fixture(scope="module")
def shipped(tries: Tries) -> tuple[Tries, str, str]:
    """What came of it, and what the last try said on both streams."""
    full = tries.start(preexec_fn=little_disk)
    told, said = full.communicate(timeout=300)
    assert (full.returncode, told) == (2, ""), said
    last = said.strip().splitlines()[-1]
    assert re.match(r"gemma-multi: .*out: cannot be written: .*File too large.*; make room: .*"
                    r"the same command goes on from there", last), said  # fmt: skip
    assert tries.done() == ["rows", "before"]
    process = tries.start()
    wait_for_step(tries.output / "training", 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert tries.done() == ["rows", "before"]
    tries.kill_after("export", tries.start())
    assert "after" not in tries.done()
    before = (tries.output / "answers" / "before.jsonl").stat().st_mtime_ns
    process = tries.start()
    told, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert (tries.output / "answers" / "before.jsonl").stat().st_mtime_ns == before
    return tries, told, said


@pytest.mark.slow
def test_a_killed_ship_goes_on_at_its_stage(shipped: tuple[Tries, str, str]) -> None:
    tries, _, said = shipped
    for i, title in enumerate(("check the rows", "ask the model as it came",
                               "train through the int4 grid", "put it on the int4 grid",
                               "export model.litertlm")):  # fmt: skip
        assert f"[{i + 1}/9] {title}: done before" in said
    assert "[9/9] write the report\n" in said
    assert tuple(tries.done()) == STAGES
    steps = [json.loads(line)["step"] for line in
             (tries.output / "training" / "history.jsonl").read_text().splitlines()
             if "learning_rate" in line]  # fmt: skip
    assert steps == list(range(1, len(steps) + 1))  # none twice, whoever was killed
    left = {path.name for path in tries.output.iterdir() if not path.name.startswith(".")}
    assert left == {"answers", "model", "model.litertlm", "report.html", "report.json", "rows",
                    "ship.json", "training"}  # fmt: skip


def test_what_is_printed_fits_80_columns(shipped: tuple[Tries, str, str]) -> None:
    _, told, _ = shipped
    assert max(map(len, told.splitlines())) <= 80
    assert re.search(r"\d+% of \d+ unseen rows right, \d+% before\.", told)
    assert "as it came (held to the labels)" in told
    assert "the file, in LiteRT-LM" in told
    assert "\x1b" not in told


def test_the_figures_are_those_of_the_file(shipped: tuple[Tries, str, str]) -> None:
    """Asked once more here, in LiteRT-LM and in float."""
    output = shipped[0].output
    report = json.loads((output / "report.json").read_text())
    held = [json.loads(line) for line in (output / "rows" / "held-out.jsonl").open()]
    most = report["stages"]["rows"]["max_tokens"]
    asked = [row["messages"][:-1] if "messages" in row else row["prompt"] for row in held]
    with in_litert_lm(output / "model.litertlm", most) as ask:
        said = [ask(question).strip() for question in asked]
    assert [row["answers"]["shipped"] for row in report["rows"]] == said
    assert held == HELD
    expected = ["winter", "song", "winter", "song"]
    right = sum(a == b for a, b in zip(said, expected, strict=True))
    estimate = report["scores"]["shipped"]["estimate"]
    assert (estimate["value"], estimate["count"]) == (right / len(held), len(held))
    assert estimate["low"] <= estimate["value"] <= estimate["high"]
    trained = gemma_multi.load(output / "model", backend="mlx")
    in_float = [
        trained.generate(question, temperature=0, max_tokens=most).text.strip()
        for question in asked
    ]
    assert [row["answers"]["after"] for row in report["rows"]] == in_float
    labels = set(WORDS)
    assert all(row["answers"]["before"] in labels for row in report["rows"])
    stages = report["stages"]
    assert stages["compare"]["summary"]["passed"] is report["passed"] is True
    assert stages["export"]["bytes"] == (output / "model.litertlm").stat().st_size
    assert stages["run"]["runtime"].startswith("LiteRT-LM ")
    assert stages["run"]["decode_tokens_per_second"] > 1
    assert 20e6 < stages["run"]["memory_bytes"] < 2e9
    exported = gemma_multi.open_checkpoint(output / "model.litertlm")
    assert exported.digest() == gemma_multi.open_checkpoint(output / "model").digest()
    assert set(report["seconds"]) == set(STAGES)


def test_the_page_fits_a_phone_and_a_desk_and_fetches_nothing(
    shipped: tuple[Tries, str, str], tmp_path: Path
) -> None:
    page = Path(shutil.copy(shipped[0].output / "report.html", tmp_path))
    text = page.read_text()
    assert "<script" not in text
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", text))
    assert {a for a in addresses if not a.startswith("#")} == {
        "https://www.apache.org/licenses/LICENSE-2.0"  # a link, to be followed by who wants to
    }
    assert "&lt;b&gt;cold&lt;/b&gt; &amp; icy" in text
    assert "<b>cold" not in text
    for words in ("adb push", "gemma-multi export", "tokens/s", "KL ", "Licence", "95% interval"):
        assert words in text
    for (width, _), found in looks(page).items():
        assert re.match(r"\d+% of \d+ unseen rows right", found["heading"])
        assert found["scroll"] <= width  # nothing to scroll sideways
        assert found["words"] > 8
        assert found["smallest"] >= 7
        assert found["plot_ink"] == found["ink"]


def test_what_is_done_is_told_again_at_once_and_as_json(shipped: tuple[Tries, str, str]) -> None:
    tries = shipped[0]
    process = tries.start("--json")
    told, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count(": done before") == 8
    assert json.loads(told) == json.loads((tries.output / "report.json").read_text())


def test_what_has_changed_is_done_anew_and_no_more(shipped: tuple[Tries, str, str]) -> None:
    tries = shipped[0]
    trained = (tries.output / "training" / "run.json").stat().st_mtime_ns
    report = ship("storyteller", tries.rows, tries.output, validation=tries.held, backend="mlx",
                  epochs=2, batch_size=10, context_length=128, progress=False)  # fmt: skip
    assert report.facts["export"]["context_length"] == 128
    assert gemma_multi.open_checkpoint(report.file).context_length == 128
    assert (tries.output / "training" / "run.json").stat().st_mtime_ns == trained


# Other rows, other machines -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_checkpoint(vocab_size=4096), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def told(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ShipReport:
    """Of rows that are texts."""
    words = "owl fox hen cat dog bee cow ant pig elk bat hare".split()
    texts = [{"text": f"The {word} was cold. It was cold all day, and then it was night."}
             for word in words]  # fmt: skip
    seen: list[tuple[int, int]] = []
    report = ship(
        tiny, texts, tmp_path_factory.mktemp("told") / "out", backend="mlx", epochs=1,
        method="full", progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(i, 9) for i in range(10)]
    return report


def test_texts_are_scored_by_their_loss(tiny: Path, told: ShipReport) -> None:
    assert told.scoring.kind == LOSS
    held = told.output / "rows" / "held-out.jsonl"
    for model, when in ((tiny, "before"), (told.model, "after"), (told.file, "shipped")):
        backend = "litert" if when == "shipped" else "mlx"
        loaded = gemma_multi.load(model, backend=backend, progress=False)
        measured = validation_loss(loaded, held, progress=False)
        assert told.scores[when].estimate.value == pytest.approx(measured.perplexity, rel=2e-3)
    assert told.scores["shipped"].estimate.value < told.scores["before"].estimate.value
    assert told.headline.startswith("Perplexity ")
    assert told.good
    assert "Lower is better" in told.page.read_text()


def test_without_litert_lm_our_engine_runs_the_file_and_the_report_says_so(
    shipped: tuple[Tries, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shipped[0].output
    monkeypatch.setattr(phone, "litert_lm_version", lambda: None)
    prompt = [{"role": "user", "content": ROWS[0]["prompt"]}]
    answers = Answers(tmp_path / "answers.jsonl")
    held = output / "rows" / "held-out.jsonl"
    found = phone.run_file(
        output / "model.litertlm", Questions([prompt], held, 16, 64), answers,
        Scoring("labels", "", ("winter", "song")), False,
    )  # fmt: skip
    assert "LiteRT engine of this package" in found["runtime"]
    assert "gemma-multi[litert-lm]" in found["runtime"]
    ours = gemma_multi.load(output / "model.litertlm").generate(
        prompt, temperature=0, max_tokens=16
    )
    assert answers.texts == [ours.text]


def test_an_engine_that_ends_the_process_is_named(told: ShipReport, tmp_path: Path) -> None:
    broken = tmp_path / "broken.litertlm"
    broken.write_bytes(told.file.read_bytes()[:200_000])
    questions = Questions([[{"role": "user", "content": "Hello"}]], tmp_path, 4, 64)
    with pytest.raises(gemma_multi.GemmaError, match=r"broken\.litertlm"):
        phone.run_as_on_a_phone(broken, 64, questions, Scoring("exact", ""), tmp_path / "a", False)


@pytest.mark.parametrize(
    ("rows", "options", "error", "said"),
    [
        (ROWS[:3], {}, DataError, "3 rows are too few"),
        (ROWS[:10], {}, DataError, "all 10 rows have the answer 'winter'"),
        (ROWS, {"validation": ROWS[:2]}, DataError, "2 of 2 held-out rows ask what"),
        (ROWS, {"score": "f1"}, OptionError, "score is 'f1'"),
        (ROWS, {"epochs": 0}, OptionError, "epochs is 0"),
        (ROWS, {"tensorboard": True}, OptionError, "tensorboard"),
        (ROWS, {"context_length": 8}, OptionError, "context_length is 8, but the longest row"),
        (ROWS, {"max_length": 8}, DataError, "row:1: .* 8 is the most"),
        (ROWS, {"backend": "litert"}, OptionError, "cannot train"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    tmp_path: Path, rows: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ship("storyteller", rows, tmp_path / "out", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_will_not_do_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_000_000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"the disk has 0\.0 GB free, but .* make room"):
        ship("storyteller", ROWS, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
