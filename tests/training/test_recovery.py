"""`quantize(..., recover=data)`: int4 trained back from the original's own probabilities."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import noisy_storyteller, tiny_checkpoint, tokenizer

import gemma_multi
from gemma_multi import Checkpoint, CheckpointError, DataError, OptionError, TrainingError
from gemma_multi.chat_template import encode_answered
from gemma_multi.cli import main
from gemma_multi.engines import ALL
from gemma_multi.exporters import save
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.training.recovery import Recoverer, as_row
from training.conftest import ROWS, wait_for_step


def divergence(a: Checkpoint, b: Checkpoint, text: str) -> float:
    ids = np.array([a.tokenizer.bos_id, *a.tokenizer.encode(text)])
    engines = [gemma_multi.load(c, backend="keras", precision="float32").engine for c in (a, b)]
    logits = [engine.session().read(ids, ALL) for engine in engines]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_recovery_brings_int4_closer_to_the_original(tmp_path: Path) -> None:
    """On what the model writes itself, to be seen on a story that it did not write."""
    original = noisy_storyteller()
    plain = gemma_multi.quantize(original, tmp_path / "plain", embedding_bits=8, calibrate=None)
    assert plain.recovery is None
    report = gemma_multi.quantize(
        original, tmp_path / "recovered", recover="self", texts=40, embedding_bits=8,
        calibrate=None, backend="keras", progress=False,
    )  # fmt: skip
    assert report.recovery is not None
    assert report.recovery.after < 0.9 * report.recovery.before
    assert "recovered to" in str(report)
    recovered, start = map(
        gemma_multi.open_checkpoint, (tmp_path / "recovered", tmp_path / "plain")
    )
    assert recovered.grid == "portable"
    assert "recovered from its own probabilities" in (tmp_path / "recovered/NOTICE").read_text()
    for name, tensor in start.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            np.testing.assert_array_equal(recovered.tensors[name].packed, tensor.packed)
    story = gemma_multi.load("storyteller", backend="keras").generate("Tell me a story.", seed=3)
    one, other = (divergence(original, model, story.text) for model in (recovered, start))
    assert one < 0.95 * other


def test_what_a_model_wrote_becomes_rows() -> None:
    """Conversations come back as their turns, to where the model last spoke."""
    words = tokenizer()
    turns = [("user", "Hello"), ("model", "Good day"), ("user", "How are you?"), ("model", "Fi")]
    ids, _ = encode_answered(words, turns)
    spoken = [{"role": role, "content": text} for role, text in turns]
    cut = ids[:-1]  # in the middle of the last turn
    assert as_row(words, np.array(cut)) == {"messages": spoken}
    before_it = ids[: len(encode_answered(words, turns[:3])[0])]
    assert as_row(words, np.array(before_it)) == {"messages": spoken[:2]}
    made_up = [*turns[:2], ("narrator", "He said"), ("model", "so")]
    for odd in (made_up, turns[1:]):  # turns that it opened of its own accord
        ids = [words.bos_id]
        for role, text in odd:
            ids += [words.start_of_turn_id, *words.encode(f"{role}\n{text}"), words.end_of_turn_id]
        assert list(as_row(words, np.array(ids))) == ["text"]
    plain = [words.bos_id, *words.encode("The fox sat in the sun.")]
    assert as_row(words, np.array(plain)) == {"text": "The fox sat in the sun."}


def test_recovery_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tiny_checkpoint(vocab_size=4096), tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(base), "-o", str(tmp_path / "out"), "--recover",
              str(tmp_path / "rows.jsonl"), "--backend", "keras", "--json"])  # fmt: skip
    assert ended.value.code == 0
    won = json.loads(capsys.readouterr().out)["recovery"]
    assert won["after"] <= won["before"]


SCRIPT = """
import json, sys
import gemma_multi
gemma_multi.quantize(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""


def test_a_killed_recovery_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    base = save(tiny_checkpoint(vocab_size=4096), tmp_path / "base")
    options = {"recover": ROWS, "calibrate": None, "backend": "keras", "epochs": 4, "save_every": 0,
               "max_length": 64, "progress": False}  # fmt: skip
    gemma_multi.quantize(base, tmp_path / "whole", **options)
    command = [sys.executable, "-c", SCRIPT, str(base), str(tmp_path / "cut"), json.dumps(options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "cut-recovery", 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut").exists()
    gemma_multi.quantize(base, tmp_path / "cut", **options)
    whole, cut = (gemma_multi.open_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert cut.digest() == whole.digest()
    assert not (tmp_path / "cut-recovery").exists()


def test_what_cannot_be_recovered(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="int4 already"):
        gemma_multi.quantize("storyteller", tmp_path / "a", recover=ROWS)
    base = tiny_checkpoint(vocab_size=4096)
    with pytest.raises(OptionError, match="recover is for int4"):
        gemma_multi.quantize(base, tmp_path / "a", bits=8, recover=ROWS)
    with pytest.raises(OptionError, match="recover is 'selv', expected 'self'"):
        gemma_multi.quantize(base, tmp_path / "a", recover="selv")
    with pytest.raises(OptionError, match="method is not an option of recover"):
        gemma_multi.quantize(base, tmp_path / "a", recover=ROWS, method="lora")
    with pytest.raises(OptionError, match="option 'epochs' is for recover"):
        gemma_multi.quantize(base, tmp_path / "a", epochs=3)
    with pytest.raises(OptionError, match="texts is for recover='self', and there are rows"):
        gemma_multi.quantize(base, tmp_path / "a", recover=ROWS, texts=100)
    with pytest.raises(OptionError, match="texts is 4, expected a whole number 8 to 4,000"):
        gemma_multi.quantize(base, tmp_path / "a", recover="self", texts=4)
    assert not (tmp_path / "a").exists()


def test_a_run_goes_on_only_with_as_many_texts(tmp_path: Path) -> None:
    """Which is said before the model writes them again."""
    base, work = tiny_checkpoint(vocab_size=4096), tmp_path / "run"
    begun = Recoverer.checked(base, "self", work, texts=40, backend="keras")
    work.mkdir()
    facts = {"backend": "keras", "options": begun.options.to_dict(), "texts": 40}
    (work / "run.json").write_text(json.dumps(facts))
    Recoverer.checked(base, "self", work, texts=40, backend="keras")
    for count in (50, None):
        with pytest.raises(TrainingError, match="the number of texts has changed"):
            Recoverer.checked(base, "self", work, texts=count, backend="keras")


def test_what_cannot_be_trained_on_is_said_before_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_multi.quantizing.round_by_use", None)
    base = tiny_checkpoint(vocab_size=4096)
    with pytest.raises(DataError, match="one row is too few"):
        gemma_multi.quantize(base, tmp_path / "a", recover=ROWS[:1])
    other = tmp_path / "a-recovery"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    with pytest.raises(OptionError, match="a-recovery: exists already"):
        gemma_multi.quantize(base, tmp_path / "a", recover=ROWS)
    assert (other / "mine.txt").read_text() == "kept"
